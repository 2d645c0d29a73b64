"""Runs that begin with weights: all of them are trained on, or adapters beside them.

A model learns Python's sources first, and then tables of characters.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from emberflow import TokenDataset
from embertrain import lora
from embertrain.checkpoint import Checkpoints
from embertrain.errors import ConfigError, ResumeError, VocabularyError, WeightsError
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.parallel import Mesh
from embertrain.train import StepRecord, TrainConfig, Trainer
from embertrain.train.step import Samples
from embertrain.weights import Source, load

from emberline.cli import main

from . import ranks, runs, texts

STEPS = 50
LORA_STEPS = 24
SAVED_EVERY = 8


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token shards of most tables."""
    files = texts.tables()
    return texts.write(tmp_path_factory.mktemp("tables") / "tokens", files[::3] + files[1::3])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Of the other tables, a little of each."""
    files = texts.tables()[2::3]
    pieces = [file[i : i + 128] for file in files for i in range(len(file) // 4, len(file) - 128, len(file) // 4)]
    url = texts.write(tmp_path_factory.mktemp("held-out") / "tokens", pieces)
    with TokenDataset(url, sequence_tokens=64) as data:
        return data.read(range(32))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on sources, which is done."""
    folder = tmp_path_factory.mktemp("base")
    tables = runs.tables(texts.shards(folder), folder, losses={"mtp_weight": 0.0, "index_weight": 0.0},
                         schedule={"steps": STEPS})  # fmt: skip
    tables["checkpoint"]["every_steps"] = STEPS
    runs.run(tables)
    return tables


@pytest.fixture(scope="module")
def exported(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of that run as safetensors."""
    return export(base, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def adapted(base: dict[str, Any], domain: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of adapters on tables, without a break."""
    tables = adapting(base, domain, tmp_path_factory.mktemp("adapted"))
    runs.run(tables)
    return tables


def adapting(base: dict[str, Any], domain: str, folder: Path | None, **changes: dict[str, Any]) -> dict[str, Any]:
    """Adapters beside the weights of `base`."""
    tables = runs.tables(domain, folder, losses={"mtp_weight": 0.0}, schedule={"steps": LORA_STEPS, "lr": 1e-2},
                         lora={"rank": 4, "alpha": 8.0}, **changes)  # fmt: skip
    tables["model"] = {"weights": base["checkpoint"]["url"]}
    if folder is not None:
        tables["checkpoint"]["every_steps"] = SAVED_EVERY
    return tables


def export(tables: dict[str, Any], out: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["checkpoint", "export", tables["checkpoint"]["url"], str(out), *options])
    assert done.exit_code == 0, done.output
    return str(out)


def loss(tables: dict[str, Any], samples: Samples) -> float:
    """Where a run is."""
    with Trainer(TrainConfig.of(tables)) as trainer:
        return trainer.stepper.evaluate([samples])


def weights(path: str) -> dict[str, torch.Tensor]:
    """All weights of a folder, by our names."""
    model = Model(Source(path).config)
    load(model, path)
    return dict(model.state_dict())


def saved(tables: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    with Checkpoints(tables["checkpoint"]["url"]) as checkpoints:
        entry = checkpoints.catalog.find(step)
        index = checkpoints.catalog.index(entry, checkpoints.catalog.marker(entry))
        state: dict[str, Any] = {}
        for tensor in index.tensors.values():
            *path, last = tensor.path
            inner = state
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        checkpoints.load(state, step, partial=True)
    return runs.weights(state)


# ---- all weights


@pytest.mark.parametrize("source", ["checkpoints", "folder", "store"])
def test_a_run_begins_where_the_earlier_one_ended(
    base: dict[str, Any], exported: str, domain: str, held_out: Samples, tmp_path: Path, source: str
) -> None:
    begin = {"checkpoints": base["checkpoint"]["url"], "folder": exported, "store": f"ember://{tmp_path}/store/!/model"}
    if source == "store":
        export(base, begin[source])  # type: ignore[arg-type]
    tables = runs.tables(domain, losses={"mtp_weight": 0.0})
    tables["model"] = {"weights": begin[source]}
    before = loss(base, held_out)
    with Trainer(TrainConfig.of(tables)) as trainer:
        assert trainer.stepper.evaluate([held_out]) == before
        if source == "folder":
            trainer.run(until=2)
            moved = [n for n, t in weights(exported).items() if not torch.equal(t, trainer.model.state_dict()[n])]
            assert {"embed.weight", "head.weight"} < set(moved)


def test_a_run_that_goes_on_needs_no_other_weights(exported: str, domain: str, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(exported, tmp_path / "model")
    tables = runs.tables(domain, tmp_path, losses={"mtp_weight": 0.0})
    tables["model"] = {"weights": str(elsewhere)}
    runs.run(tables, until=1)
    shutil.rmtree(elsewhere)
    with Trainer(TrainConfig.of(tables)) as trainer:
        assert trainer.done == 1


def test_a_shape_that_is_said_has_to_fit(exported: str, base: dict[str, Any], domain: str) -> None:
    for url in (exported, base["checkpoint"]["url"]):
        tables = runs.tables(domain, model={"weights": url, "vocab_size": 300})
        with pytest.raises(WeightsError, match=r"vocabulary|embed\.weight"):
            Trainer(TrainConfig.of(tables))
    tables = runs.tables(domain, model={"weights": base["checkpoint"]["url"], "preset": "micro-v3"})
    with pytest.raises(WeightsError, match="of another model: it lacks"):
        Trainer(TrainConfig.of(tables))


def test_what_cannot_be_begun_with_is_told(exported: str, domain: str, tmp_path: Path) -> None:
    tables = runs.tables(domain)
    tables["model"] = {"weights": str(tmp_path / "nothing")}
    with pytest.raises(ConfigError, match="neither weights"):
        Trainer(TrainConfig.of(tables))
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "model.safetensors").write_bytes(Path(exported, "model.safetensors").read_bytes())
    tables["model"] = {"weights": str(tmp_path / "lacking")}
    with pytest.raises(WeightsError, match=r"has no config.json"):
        Trainer(TrainConfig.of(tables))


def test_tokens_of_a_larger_vocabulary_are_refused(exported: str, tmp_path: Path) -> None:
    from emberflow import write_tokens

    write_tokens(str(tmp_path / "tokens"), texts.documents()[:1], tokenizer="other", tokenizer_hash="other",
                 vocab_size=5000, eos_id=4999)  # fmt: skip
    tables = runs.tables(str(tmp_path / "tokens"))
    tables["model"] = {"weights": exported}
    with pytest.raises(VocabularyError, match="the model has 257: make the tokens"):
        Trainer(TrainConfig.of(tables))


# ---- adapters


def test_adapters_lower_the_loss_on_tables_they_have_not_seen(
    base: dict[str, Any], adapted: dict[str, Any], held_out: Samples
) -> None:
    assert loss(adapted, held_out) < loss(base, held_out) - 0.4


@pytest.mark.parametrize("compute", [{"dtype": "bf16"}, {"recompute": True}], ids=lambda c: next(iter(c)))
def test_however_it_is_computed(
    base: dict[str, Any], adapted: dict[str, Any], domain: str, compute: dict[str, Any]
) -> None:
    tables = adapting(base, domain, None, compute=compute)
    told: list[StepRecord] = []
    with Trainer(TrainConfig.of(tables)) as trainer:
        trainer.run(until=2, on_step=told.append)
    expected = runs.lines(Path(adapted["metrics"]["folder"]))[1]["loss"]
    assert told[1].loss == pytest.approx(expected, rel=1e-2 if "dtype" in compute else 1e-6)


def test_a_checkpoint_holds_adapters_alone(adapted: dict[str, Any]) -> None:
    names = saved(adapted, LORA_STEPS).keys()
    parts = ("lora_a", "lora_b", "a13", "b13", "a2", "b2")
    model = {name for name in names if name.startswith("/model/")}
    assert model and all(name.rpartition(".")[2] in parts for name in model)
    moments = {name for name in names if name.endswith("exp_avg")}
    assert len(moments) == len(model), "AdamW moves adapters, and nothing else"


def test_an_interrupted_run_goes_on_beside_weights_that_never_move(
    base: dict[str, Any], exported: str, adapted: dict[str, Any], domain: str, tmp_path: Path
) -> None:
    tables = adapting(base, domain, tmp_path)

    def interrupt(record: StepRecord) -> None:
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with Trainer(TrainConfig.of(tables)) as trainer:
        report = trainer.run(on_step=interrupt)
        assert report.interrupted_by == signal.SIGTERM and report.saved_step == report.step < SAVED_EVERY
    tables["model"] = {"weights": exported}  # The same weights, elsewhere.
    with Trainer(TrainConfig.of(tables)) as trainer:
        assert trainer.done == report.step
        trainer.run(until=SAVED_EVERY)
        state = trainer.model.state_dict()
        for name, tensor in weights(exported).items():
            assert torch.equal(state[name], tensor), name
    assert runs.lines(tmp_path) == runs.lines(Path(adapted["metrics"]["folder"]))[:SAVED_EVERY]
    ours, theirs = saved(tables, SAVED_EVERY), saved(adapted, SAVED_EVERY)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_an_export_is_the_adapted_model(adapted: dict[str, Any], exported: str, domain: str, tmp_path: Path) -> None:
    plain = Model(Source(export(adapted, tmp_path / "merged")).config)
    load(plain, tmp_path / "merged")
    ids = torch.from_numpy(texts.tables()[2][:300].astype("int64"))
    batch = Batch.of([(0, len(ids))])
    with Trainer(TrainConfig.of(adapted)) as trainer, torch.no_grad():
        assert lora.adapters(trainer.model)
        logits = trainer.model(ids, batch).logits
        assert float((plain(ids, batch).logits - logits).abs().max()) < 2e-5
    command = ["generate", "--model", str(tmp_path / "merged"), "--prompt", "decoding_table", "--max-new", "4"]
    assert CliRunner().invoke(main, command).exit_code == 0
    export(adapted, tmp_path / "again", "--base", exported)
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
    # Beside other weights of the same shape adapters mean nothing.
    url, other = adapted["checkpoint"]["url"], str(tmp_path / "merged")
    told = CliRunner().invoke(main, ["checkpoint", "export", url, str(tmp_path / "out"), "--base", other])
    assert told.exit_code == 1 and "not those that the adapters" in told.stderr
    with pytest.raises(ResumeError, match="not those that the adapters were trained beside"):
        Trainer(TrainConfig.of(adapted | {"model": {"weights": other}}))


def test_other_adapters_are_another_run(base: dict[str, Any], adapted: dict[str, Any], exported: str) -> None:
    for change, told in (
        ({"lora": {"rank": 2, "alpha": 8.0}}, "lora.rank was 4 and is 2"),
        ({"lora": {"rank": 4, "alpha": 9.0}}, "lora.alpha was 8.0 and is 9.0"),
    ):
        with pytest.raises(ResumeError, match=told):
            Trainer(TrainConfig.of(adapted | change))
    whole = {key: value for key, value in adapted.items() if key != "lora"} | {"model": base["model"]}
    with pytest.raises(ResumeError, match="adapters were trained, and all weights are to be"):
        Trainer(TrainConfig.of(whole))
    with pytest.raises(WeightsError, match="are of adapters, and no whole model"):
        Trainer(TrainConfig.of(adapted | {"model": base["model"] | {"weights": adapted["checkpoint"]["url"]}}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"preset": "micro"}}, "say model.weights"),
        ({"parallel": {"fsdp": 2}}, "not with fsdp or ep"),
        ({"parallel": {"ep": 2}}, "not with fsdp or ep"),
        ({"lora": {"targets": ["head"]}}, "targets are some of"),
        ({"model": {"weights": "x", "vocab_size": 3}}, "vocab_size goes with preset or config"),
        ({"model": {}}, "say preset or config, or weights"),
    ],
)
def test_what_adapters_cannot_be_is_told(change: dict[str, Any], told: str) -> None:
    tables = runs.tables("x", lora={})
    tables["model"] = {"weights": "x"}
    TrainConfig.of(tables)
    with pytest.raises(ConfigError, match=told):
        TrainConfig.of(tables | change)


def work(tables: dict[str, Any], until: int) -> None:
    config = TrainConfig.of(tables)
    with Trainer(config, mesh=Mesh(config.parallel, torch.device("cpu"))) as trainer:
        trainer.run(until=until)


def test_two_ranks_adapt_as_one(base: dict[str, Any], adapted: dict[str, Any], domain: str, tmp_path: Path) -> None:
    tables = adapting(base, domain, tmp_path / "run", parallel={"dp": 2})
    ranks.ranks(2, work, tmp_path / "ranks", tables, 2)
    expected = runs.lines(Path(adapted["metrics"]["folder"]))[:2]
    for record, other in zip(runs.lines(tmp_path / "run"), expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=2e-4)
