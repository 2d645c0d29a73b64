"""Steps of training: the same gradients however a step is cut or computed, even experts, bf16, and what goes wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emberflow import TokenDataset
from emberflow.tokens import Samples
from embertrain.errors import ConfigError, DataError, NotFinite, VocabularyError
from embertrain.info import training_flops
from embertrain.kernels import library, products
from embertrain.model.batch import Batch
from embertrain.model.config import Mixture, ModelConfig
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.optim import build
from embertrain.parallel import Mesh, ParallelConfig, apply
from embertrain.train import TrainConfig, Trainer
from embertrain.train.objective import Objective, blocks
from embertrain.train.recompute import recompute
from embertrain.train.step import Stepped, Stepper, is_exact
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from . import runs, texts


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return texts.shards(tmp_path_factory.mktemp("tokens"), piece=150)


def stepper_of(tables: dict[str, Any], shape: ModelConfig | None = None) -> Stepper:
    """Steps of a new model."""
    config = TrainConfig.of(tables)
    model = Model(shape or config.model.shape())
    model.reset_parameters(torch.Generator().manual_seed(config.seed))
    objective = Objective(model, config.losses)
    objective.freeze_untaught()
    if config.compute.recompute:
        for block in blocks(model):
            recompute(block)
    mesh = Mesh.start(ParallelConfig())
    apply(model, mesh, exact=is_exact(config, mesh))
    return Stepper(objective, build(model, config.optimizer), config, mesh, eos_id=texts.EOS)


def samples_of(tables: dict[str, Any], step: int = 0, *, backwards: bool = False) -> Samples:
    data = tables["data"]
    with TokenDataset(data["url"], sequence_tokens=data["sequence_tokens"]) as dataset:
        (numbers,) = dataset.indices(step, data["batch_samples"])
        return dataset.read(numbers[::-1] if backwards else numbers)


def gradients(
    tables: dict[str, Any], shape: ModelConfig | None = None, samples: Samples | None = None
) -> tuple[Stepped, dict[str, Tensor]]:
    """A step without the optimizers, and what they would have got."""
    stepper = stepper_of(tables, shape)
    stepper.optimizers = ()
    stepped = stepper.step(0, samples or samples_of(tables))
    return stepped, {n: p.grad for n, p in stepper.objective.model.named_parameters() if p.grad is not None}


def noisy(shape: ModelConfig) -> ModelConfig:
    """With routers that add noise, in MTP layers too."""

    def changed(layers: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(layer, ffn=replace(layer.ffn, noise=0.5))
            if isinstance(layer.ffn, Mixture) and not layer.ffn.hashed
            else layer
            for layer in layers
        )

    return replace(shape, layers=changed(shape.layers), mtp=changed(shape.mtp))


@pytest.mark.parametrize("name", ["micro", "micro-v3", "micro-v3.2"])
def test_micro_batches_make_the_batch(url: str, name: str) -> None:
    model = {"preset": name}
    whole, expected = gradients(runs.tables(url, model=model))
    cut, summed = gradients(runs.tables(url, model=model, data={"micro_samples": 1}))
    assert cut.loads == whole.loads and cut.tokens == whole.tokens == 256
    for term in ("loss", "mtp_loss", "balance_loss", "index_loss", "gradient_norm"):
        assert getattr(cut, term) == pytest.approx(getattr(whole, term), rel=1e-5), term
    assert summed.keys() == expected.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(summed[parameter], grad, rtol=1e-3, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_order_of_micro_batches_changes_no_bit(url: str, dtype: str) -> None:
    tables = runs.tables(url, data={"micro_samples": 1}, compute={"dtype": dtype})
    forward, expected = gradients(tables)
    backward, grads = gradients(tables, samples=samples_of(tables, backwards=True))
    # Sums of the norm are in fp64.
    assert backward.loss == forward.loss and backward.gradient_norm == pytest.approx(forward.gradient_norm, rel=1e-12)
    assert grads.keys() == expected.keys() and {grad.dtype for grad in grads.values()} == {torch.float32}
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("with_noise", [False, True])
def test_recomputed_activations_are_the_same(url: str, with_noise: bool) -> None:
    shape = TrainConfig.of(runs.tables(url)).model.shape()
    shape = noisy(shape) if with_noise else shape
    kept, expected = gradients(runs.tables(url), shape)
    again, grads = gradients(runs.tables(url, compute={"recompute": True}), shape)
    assert again == kept
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.timeout(1200)  # The compiler's own time: it has taken more than 300 s on a busy machine.
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler sees to it that torch warns of what it does itself.
def test_compiled_parts_compute_the_same(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # No processes of its own.
    losses = {}
    for compiles in (False, True):
        tables = runs.tables(url, compute={"compile": compiles, "threads": 1}, data={"micro_samples": 2})
        torch._dynamo.reset()
        counters.clear()
        losses[compiles] = []
        with Trainer(TrainConfig.of(tables)) as trainer:
            trainer.run(on_step=lambda record, found=losses[compiles]: found.append(record.loss))  # type: ignore[misc]
    torch._dynamo.reset()
    assert len(losses[True]) == runs.STEPS and losses[True][-1] < losses[True][0] - 0.2
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    # One graph of norms and one of hyper-connections, for all layers and steps.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_loads_are_counted_once(url: str) -> None:
    tables = runs.tables(url, compute={"recompute": True}, data={"micro_samples": 2})
    stepper = stepper_of(tables)
    seen: list[dict[int, Tensor]] = []
    stepper.objective.register_forward_hook(lambda module, args, losses: seen.append(losses.counts))
    before = {n: b.clone() for n, b in stepper.objective.model.named_buffers() if n.endswith("bias")}
    stepper.step(0, samples_of(tables))
    assert len(seen) == 2
    for layer in seen[0]:
        counts = sum(counts[layer] for counts in seen)
        assert counts.sum() == 256 * 2  # tokens * top_k
    moved = torch.cat([b - before[n] for n, b in stepper.objective.model.named_buffers() if n in before]).abs()
    assert ((moved == 0) | ((moved - 0.01).abs() < 1e-6)).all() and moved.any(), "once"


def test_noise_is_a_function_of_the_step(url: str) -> None:
    tables, shape = runs.tables(url), noisy(TrainConfig.of(runs.tables(url)).model.shape())
    first, again = gradients(tables, shape)[0], gradients(tables, shape)[0]
    assert first == again
    other = stepper_of(tables, shape).step(1, samples_of(tables))
    assert other.loss != first.loss


def test_biases_even_the_load(url: str) -> None:
    def last_loads(rate: float) -> float:
        tables = runs.tables(
            url, model={"preset": "micro"}, losses={"bias_rate": rate, "balance_weight": 0.0, "index_weight": 0.0,
            "mtp_weight": 0.0}, optimizer={"kind": "adamw"}, schedule={"lr": 3e-3, "steps": 60},
        )  # fmt: skip
        stepper = stepper_of(tables)
        stepped = [stepper.step(step, samples_of(tables, step)) for step in range(30)]
        return max(sum(s.loads[layer] for s in stepped[-10:]) / 10 for layer in stepped[0].loads)

    even, left = last_loads(0.02), last_loads(0.0)
    print(f"max/mean load {even:.2f}, without the update {left:.2f}")
    assert even < 0.7 * left


def test_bf16_tracks_fp32(url: str) -> None:
    def trained(dtype: str) -> tuple[list[float], Stepper]:
        tables = runs.tables(url, compute={"dtype": dtype}, optimizer={"kind": "adamw"}, schedule={"steps": 12})
        stepper = stepper_of(tables)
        return [stepper.step(step, samples_of(tables, step)).loss for step in range(12)], stepper

    (exact, _), (rough, stepper) = trained("fp32"), trained("bf16")
    assert rough != exact
    assert all(abs(a - b) < 0.03 for a, b in zip(exact, rough, strict=True))
    assert rough[-1] < rough[0] - 1
    model = stepper.objective.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.head.weight is dict(model.named_parameters())["head.weight"], "nothing shadows it any more"
    states = [t for o in stepper.optimizers for state in o.state.values() for t in state.values()]
    assert {t.dtype for t in states} == {torch.float32}


def test_a_loss_that_is_not_finite_moves_nothing(url: str) -> None:
    tables = runs.tables(url)
    stepper = stepper_of(tables)
    model = stepper.objective.model
    with torch.no_grad():
        model.head.weight[7] = torch.inf
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(NotFinite, match=r"step 5: the loss is nan.*lower schedule\.lr"):
        stepper.step(4, samples_of(tables))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()), "the next step would add to what is not finite"


def test_what_no_loss_reaches_stays(url: str) -> None:
    tables = runs.tables(url, losses={"mtp_weight": 0.0, "index_weight": 0.0})
    stepper = stepper_of(tables)
    before = {name: t.clone() for name, t in stepper.objective.model.named_parameters()}
    stepped = stepper.step(0, samples_of(tables))
    assert stepped.mtp_loss == stepped.index_loss == 0
    moved = {name for name, t in stepper.objective.model.named_parameters() if not torch.equal(t, before[name])}
    assert not any(name.startswith("mtp.") or ".indexer." in name for name in moved)
    assert {"embed.weight", "head.weight", "layers.1.attn.wkv.weight", "layers.2.ffn.experts.w13"} <= moved


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"model": {"vocab_size": 256}}, VocabularyError, "vocabulary of 257, and the model has 256: set"),
        ({"data": {"batch_samples": 10**6}}, DataError, "fewer than the 1,000,000 of one step"),
        ({"data": {"sequence_tokens": 2_000_000}}, ValueError, "too few for a sample of 2,000,000"),
        ({"parallel": {"fsdp": 2}}, ConfigError, "torchrun --nproc-per-node 2"),
    ],
)
def test_what_cannot_be_trained_is_told(url: str, changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Trainer(TrainConfig.of(runs.tables(url, **changes)))


def test_what_a_run_writes(url: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tables = runs.tables(
        url, tmp_path, validation={"url": url, "every_steps": 2, "samples": 6}, data={"micro_samples": 2},
        metrics={"tensorboard": True, "trace_from_step": 2, "trace_steps": 1},
    )  # fmt: skip
    del tables["metrics"]["peak_flops"]
    runs.run(tables, until=2)
    runs.run(tables, until=3)
    records = runs.lines(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["validation_loss"] is not None for record in records] == [False, True, True]
    assert 4 < records[1]["validation_loss"] < 7
    assert records[2]["tokens"] == 3 * 256
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([r["loss"] for r in records])
    assert "expert_load/1" in board.Tags()["scalars"]
    trace = (tmp_path / "trace-2.json").read_text()
    assert "traceEvents" in trace and "aten::" in trace


def test_a_step_costs_what_its_products_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter knows neither oneDNN's products nor those of the loops.
    monkeypatch.setattr(products, "_asks_onednn", False)
    monkeypatch.setattr(library, "native", None)
    shape = replace(preset("micro-v3"), mtp=())
    model = Model(shape)
    model.reset_parameters(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, Batch.of([(0, 64)]))
    counted = 3 * counter.get_total_flops() / 64
    # Scores and sums that the mask throws away are counted: 31.5 rows a query, 4 heads, 3 layers.
    masked = 3 * 31.5 * 2 * 4 * (16 + 16 + 16) * 3
    assert training_flops(shape, 64) + masked == pytest.approx(counted, rel=0.005)
