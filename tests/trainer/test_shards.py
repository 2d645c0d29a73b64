"""What ranks hold, exchange and save: each piece of a parallel model against the same without ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from embertrain.errors import ConfigError
from embertrain.kernels import library
from embertrain.lora import LoraConfig, attach
from embertrain.model.batch import Batch
from embertrain.model.experts import Experts
from embertrain.model.linear import Linear
from embertrain.model.model import Model
from embertrain.model.moe import MoE
from embertrain.model.presets import preset
from embertrain.optim import Muon, OptimConfig, build, clip
from embertrain.parallel import ExchangeDispatcher, Mesh, ParallelConfig, apply, reduce_gradients
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.trainer.ranks import Run, backward, begin, each, go_on, ranks, train

# ---- checkpoints


def _write(parallel: ParallelConfig, folder: str) -> Run:
    """Two steps, a checkpoint, and what two more bring."""
    mesh = Mesh(parallel, torch.device("cpu"))
    model = begin("micro", mesh)
    optimizers = build(model, OptimConfig())
    go_on(model, optimizers, mesh, range(2))
    weights, states = get_state_dict(model, optimizers)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    return go_on(model, optimizers, mesh, range(2, 4))


def _read(parallel: ParallelConfig, folder: str) -> Run:
    """From the checkpoint on."""
    mesh = Mesh(parallel, torch.device("cpu"))
    model = begin("micro", mesh)
    optimizers = build(model, OptimConfig())
    weights, states = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return go_on(model, optimizers, mesh, range(2, 4))


def test_a_checkpoint_is_read_by_ranks_of_another_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    both = ParallelConfig(fsdp=2, ep=2)
    written, same = ranks(4, each, tmp_path / "four", [(_write, (both, folder)), (_read, (both, folder))])[0]
    assert same.losses == written.losses
    assert all(same.weights[name].equal(weight) for name, weight in written.weights.items())
    for count in (1, 2):
        run = ranks(count, _read, tmp_path / str(count), ParallelConfig(ep=count), folder)[0]
        assert run.losses == pytest.approx(written.losses, abs=1e-6)


# ---- what each rank holds


def _held(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    mesh = Mesh(parallel, torch.device("cpu"))
    model = begin("micro", mesh, dtype)
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, Experts | Linear):
            module.register_forward_pre_hook(lambda module, args: seen.update(p.dtype for p in module.parameters()))
    loss, _ = backward(model, mesh, 0)
    return {
        "shapes": {name: tuple(_local(p).shape) for name, p in model.named_parameters()},
        "gradients": {p.grad.dtype for p in model.parameters() if p.grad is not None},
        "computed": seen,
        "loss": mesh.sum(loss).item(),
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_a_rank_holds_its_part_and_computes_in_the_dtype_asked_for(tmp_path: Path) -> None:
    alone = train("micro", ParallelConfig(), OptimConfig(), steps=1)
    both, ep = ParallelConfig(fsdp=2, ep=2), ParallelConfig(dp=2, ep=2)
    works = [(_held, (both, torch.bfloat16)), (_held, (ep, torch.float32))]
    cut, spread = ranks(4, each, tmp_path, works)[0]
    whole = {name: tuple(p.shape) for name, p in Model(preset("micro")).named_parameters()}
    w13, wq_b, norm = "layers.1.ffn.experts.w13", "layers.1.attn.wq_b.weight", "layers.1.attn_norm.weight"
    assert cut["shapes"][w13] == (whole[w13][0] // 4, *whole[w13][1:])
    assert cut["shapes"][wq_b] == (whole[wq_b][0] // 2, whole[wq_b][1])
    assert cut["shapes"][norm] == whole[norm]
    assert cut["computed"] == {torch.bfloat16}
    assert cut["gradients"] == {torch.float32}
    assert cut["loss"] == pytest.approx(alone.losses[0], rel=1e-2)
    assert spread["shapes"][w13] == (whole[w13][0] // 2, *whole[w13][1:])
    assert spread["shapes"][wq_b] == whole[wq_b]
    assert spread["computed"] == {torch.float32}
    assert spread["loss"] == pytest.approx(alone.losses[0], abs=1e-6)


def _adapted(parallel: ParallelConfig) -> list[float]:
    mesh = Mesh(parallel, torch.device("cpu"))
    model = Model(preset("micro"))
    model.reset_parameters(torch.Generator().manual_seed(0))
    attach(model, LoraConfig(rank=2), torch.Generator().manual_seed(5))
    apply(model, mesh)
    return go_on(model, build(model, OptimConfig()), mesh, range(3), lr=1e-2).losses


def test_adapters_of_experts_are_spread_with_them(tmp_path: Path) -> None:
    alone = _adapted(ParallelConfig())
    assert alone[2] < alone[0] - 1e-4
    for found in ranks(2, each, tmp_path, [(_adapted, (ParallelConfig(**{name: 2}),)) for name in ("ep", "fsdp")])[0]:
        assert found == pytest.approx(alone, abs=1e-6)


# ---- the pieces


def _matrices(cut: bool) -> list[Tensor]:
    """Matrices of which some have fewer rows than there are ranks, and others do not divide; after three steps."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (2, 6), (9, 4), (12, 3), (1, 4)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if cut else None

    def draw(shape: tuple[int, int]) -> Tensor:
        whole = torch.randn(shape, generator=generator)
        return whole if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])

    weights = [nn.Parameter(draw(shape)) for shape in shapes]
    optimizer = Muon([{"params": weights[:3]}, {"params": weights[3:4], "parts": 3}, {"params": weights[4:]}], lr=0.1)
    norms = []
    for _ in range(3):
        for weight in weights:
            weight.grad = draw(tuple(weight.shape))  # type: ignore[arg-type]
        norms.append(clip(nn.ParameterList(weights), 1.0))
        optimizer.step()
    full = [w.full_tensor() if isinstance(w, DTensor) else w for w in weights]
    return [*(w.detach() for w in full), torch.stack(norms)]


def test_matrices_cut_into_rows_move_as_whole_ones(tmp_path: Path) -> None:
    for count in (2, 3):
        cut = ranks(count, _matrices, tmp_path / str(count), True)
        for of_rank in cut:
            for ours, theirs in zip(of_rank, _matrices(False), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
            assert all(a.equal(b) for a, b in zip(of_rank, cut[0], strict=True))


def _mixture() -> tuple[MoE, Tensor, Tensor]:
    mixture = Model(preset("micro")).layers["1"].ffn
    generator = torch.Generator().manual_seed(3)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return mixture, torch.randn(48, 64, generator=generator), torch.randn(48, 64, generator=generator)


def _exchange(skewed: bool) -> tuple[Tensor, ...]:
    """A mixture's output and gradients, of this rank's tokens or, where there is one rank, all. `skewed`: most experts
    have no row, those of one rank all."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mixture, x, grad = _mixture()
    if count > 1:
        E = mixture.gate.spec.experts
        physical = torch.arange(E).flip(0)
        mixture.dispatcher = ExchangeDispatcher(dist.group.WORLD, physical)
        for name, parameter in list(mixture.experts.named_parameters()):
            mine = parameter.detach()[physical].chunk(count)[rank].clone()
            setattr(mixture.experts, name, nn.Parameter(mine))
    part = slice(rank * 48 // count, (rank + 1) * 48 // count)
    x = x[part].clone().requires_grad_()
    batch = Batch.of([(0, len(x))])
    chosen = torch.tensor([[0, 1]]).expand(len(x), 2) if skewed else None
    y, _ = mixture(x, torch.zeros(len(x), dtype=torch.int64), batch, selection_TK=chosen)
    y.backward(grad[part])
    assert x.grad is not None
    w13, w2 = mixture.experts.w13.grad, mixture.experts.w2.grad
    assert w13 is not None and w2 is not None
    return y.detach(), x.grad, w13, w2


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_rows_find_their_experts_and_come_back(tmp_path: Path, count: int, skewed: bool) -> None:
    y, x_grad, w13, w2 = _exchange(skewed)
    parts = ranks(count, _exchange, tmp_path, skewed)
    for whole, place in ((y, 0), (x_grad, 1)):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), whole, atol=1e-6, rtol=1e-5)
    for whole, place in ((w13, 2), (w2, 3)):
        # Physical expert i is logical expert E - 1 - i.
        torch.testing.assert_close(torch.cat([part[place] for part in parts]).flip(0), whole, atol=1e-6, rtol=1e-5)


def _apart(most: int) -> list[bool]:
    """Whether the bits are those of all experts on this rank: of outputs, gradients, and weights' gradients summed over
    ranks in fp64. Every token chooses expert 0, so that other ranks have far fewer rows of each of theirs."""
    library.GROUP_ROWS = most  # Of the fullest expert; with more, other products are used.
    rank, count = dist.get_rank(), dist.get_world_size()
    mixture, x, grad = _mixture()
    some = slice(rank * 48 // count, (rank + 1) * 48 // count)
    chosen = torch.stack([torch.zeros(48, dtype=torch.int64), 1 + torch.arange(48) % 7], 1)[some]

    def run() -> tuple[Tensor, Tensor]:
        here = x[some].clone().requires_grad_()
        y, _ = mixture(here, torch.zeros(len(here), dtype=torch.int64), Batch.of([(0, len(here))]), selection_TK=chosen)
        y.backward(grad[some])
        assert here.grad is not None
        return y.detach(), here.grad

    expected = run()
    weights = dict(mixture.experts.named_parameters())
    for name, parameter in weights.items():
        setattr(mixture.experts, name, nn.Parameter(parameter.detach().chunk(count)[rank].clone()))
        getattr(mixture.experts, name).grad_dtype = torch.float64
    mixture.dispatcher = ExchangeDispatcher(dist.group.WORLD, apart=True)
    same = [torch.equal(ours, theirs) for ours, theirs in zip(run(), expected, strict=True)]
    for name, parameter in weights.items():
        assert parameter.grad is not None
        total = parameter.grad.double()
        dist.all_reduce(total)
        same.append(torch.equal(getattr(mixture.experts, name).grad, total.chunk(count)[rank]))
    return same


@pytest.mark.parametrize("most", [10, 1000])
def test_rows_that_stay_apart_have_the_bits_of_their_rank(tmp_path: Path, most: int) -> None:
    for count in (2, 4):
        assert ranks(count, _apart, tmp_path / str(count), most) == [[True] * 4] * count


def _steps_with_kept_gradients() -> list[float]:
    """The same two forward calls twice, after each other; what the gradients of the second time are, by the first."""
    mesh = Mesh(ParallelConfig(fsdp=2), torch.device("cpu"))
    model = begin("micro", mesh, exact=True)
    sizes = []
    for _ in range(2):
        backward(model, mesh, 0, 4)
        reduce_gradients(model, mesh)
        sizes.append(clip(model, 1e9).item())
        model.zero_grad(set_to_none=False)
    return sizes


def test_sums_of_a_step_end_with_it(tmp_path: Path) -> None:
    for first, second in ranks(2, _steps_with_kept_gradients, tmp_path):
        assert second == pytest.approx(first, rel=1e-9)
        assert first > 0


def _calls_with_other_weights() -> None:
    mesh = Mesh(ParallelConfig(fsdp=2), torch.device("cpu"))
    model = begin("micro", mesh, exact=True)
    ids, batch = torch.arange(32), Batch.of([(0, 32)])
    for further in (False, True):
        out = model(ids, batch)
        total = out.logits.float().sum()
        if further:
            total = total + model.predict(0, out.residual, ids, batch).logits.float().sum()
        total.backward()


def test_calls_that_use_other_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="use the same weights of a layer"):
        ranks(2, _calls_with_other_weights, tmp_path)


# ---- what is refused


def test_exact_sums_need_a_torch_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("embertrain.parallel.apply"), "HAS_FP64", False)
    mesh = Mesh(ParallelConfig(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="exact sums"):
        apply(Model(preset("micro")), mesh, exact=True)


def test_one_process_needs_no_group_and_is_a_mesh_too() -> None:
    with Mesh.start(ParallelConfig(), torch.device("cpu"), environment={}) as mesh:
        assert (mesh.rank, mesh.ranks, mesh.group) == (0, 1, None)
        total = torch.ones(3)
        assert mesh.sum(total).equal(total)
        model = Model(preset("micro"))
        apply(model, mesh)
        assert model.layers["1"].ffn.dispatcher is None
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ParallelConfig(dp=2), "dp 2 \\* fsdp 1 \\* ep 1 are 2 ranks, but 4 were started"),
        (ParallelConfig(fsdp=3), "are 3 ranks, but 4"),
        (ParallelConfig(ep=8), "torchrun --nproc-per-node 8"),
    ],
)
def test_ranks_that_do_not_fit_are_told_before_anything_waits(config: ParallelConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mesh.start(config, torch.device("cpu"), environment={"WORLD_SIZE": "4"})


def test_what_is_left_is_dp() -> None:
    assert ParallelConfig(ep=2).sizes(8) == (4, 1, 2)
    assert ParallelConfig(fsdp=2, ep=2).sizes(4) == (1, 2, 2)


@pytest.mark.parametrize("wrong", [{"dp": -1}, {"fsdp": 0}, {"ep": 0}, {"offload": True}])
def test_a_wrong_field_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ParallelConfig(**wrong)


def _undealt() -> str:
    try:
        begin("micro", Mesh(ParallelConfig(ep=3), torch.device("cpu")))
    except ConfigError as error:
        return str(error)
    return ""


def test_experts_that_cannot_be_dealt_out_are_told(tmp_path: Path) -> None:
    assert all("8 experts cannot be dealt out to ep 3" in said for said in ranks(3, _undealt, tmp_path))
