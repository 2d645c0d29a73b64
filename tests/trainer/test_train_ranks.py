"""The trainer as several processes over gloo: the same losses as one, whatever the ranks are for; and a checkpoint of
one kind of run continued as another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from embertrain.checkpoint import Checkpoints
from embertrain.checkpoint.place import LocalPlace
from embertrain.model.model import Model
from embertrain.parallel import Mesh
from embertrain.train import TrainConfig, Trainer
from embertrain.train.base import open_base
from embertrain.weights.fingerprint import fingerprint
from fsspec.implementations.local import LocalFileSystem

from . import ranks, runs, texts

STEPS = 4
TABLES = {"optimizer": {"kind": "adamw"}, "checkpoint": {"every_steps": 100}, "data": {"micro_samples": 1}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return texts.shards(tmp_path_factory.mktemp("tokens"), piece=150)


def work(tables: dict[str, Any], until: int) -> None:
    config = TrainConfig.of(tables)
    with Trainer(config, mesh=Mesh(config.parallel, torch.device("cpu"))) as trainer:
        trainer.run(until=until)


@pytest.fixture(scope="module")
def alone(url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a run of one process: done, and half done."""
    folders = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    for folder, until in zip(folders, (STEPS, STEPS // 2), strict=True):
        work(runs.tables(url, folder, **TABLES), until)
    return folders


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"fsdp": 2}, {"ep": 2}], ids=lambda p: next(iter(p)))
def test_two_ranks_are_one(url: str, alone: tuple[Path, Path], tmp_path: Path, parallel: dict[str, int]) -> None:
    whole, half = alone
    # Half of it alone, and half by two.
    shared = shutil.copytree(half, tmp_path / "shared")
    ranks.ranks(2, work, tmp_path / "ranks", runs.tables(url, shared, parallel=parallel, **TABLES), STEPS)
    expected, records = runs.lines(whole), runs.lines(shared)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[: STEPS // 2] == expected[: STEPS // 2]
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "index_loss", "gradient_norm", "expert_load_max_over_mean"):
            assert record[key] == pytest.approx(other[key], rel=2e-4), (record["step"], key)
    with Trainer(TrainConfig.of(runs.tables(url, shared, **TABLES))) as trainer:
        assert trainer.done == STEPS
        assert any("ranks were 2 and are 1" in note for note in trainer.notes)


def go_on_blind(tables: dict[str, Any]) -> tuple[int, int]:
    """The steps done before and after one more, where the file system of rank 1 does not list the checkpoints yet."""
    if dist.get_rank() == 1:
        Checkpoints.latest = lambda self: None  # type: ignore[method-assign]
    config = TrainConfig.of(tables)
    with Trainer(config, mesh=Mesh(config.parallel, torch.device("cpu"))) as trainer:
        begun = trainer.done
        trainer.run(until=begun + 1)
        return begun, trainer.done


def test_ranks_go_on_from_what_the_first_finds(url: str, tmp_path: Path) -> None:
    work(runs.tables(url, tmp_path), 2)
    # The weights it began with are not looked for again.
    tables = runs.tables(url, tmp_path, parallel={"dp": 2}, model={"weights": str(tmp_path / "gone")})
    assert ranks.ranks(2, go_on_blind, tmp_path / "ranks", tables) == [(2, 3), (2, 3)]


def begin_blind(urls: list[str]) -> list[str]:
    """What weights each URL gives, where the file system of rank 1 lists nothing yet."""
    if dist.get_rank() == 1:
        LocalPlace.folders = lambda self: []  # type: ignore[method-assign]
        LocalFileSystem.isdir = lambda self, path: False  # type: ignore[method-assign]
    found = []
    for url in urls:
        with open_base(url) as base:
            model = Model(base.shape())
            base.fill(model)
            found.append(fingerprint(model))
    return found


def test_ranks_begin_with_what_the_first_finds(url: str, tmp_path: Path) -> None:
    work(runs.tables(url, tmp_path), 2)
    checkpoints, exported = str(tmp_path / "checkpoints"), str(tmp_path / "exported")
    with Checkpoints(checkpoints) as saved:
        saved.export(2, exported)
    ours, theirs = ranks.ranks(2, begin_blind, tmp_path / "ranks", [checkpoints, exported])
    assert ours == theirs and ours[0] == ours[1]
