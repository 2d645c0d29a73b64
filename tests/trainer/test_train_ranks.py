"""The trainer as several processes over gloo: the same losses as one, whatever the ranks are for; a checkpoint of one
kind of run continued as another; and a run whose processes are killed, continued to the same bits.

EMBERLINE_KILLS asks for more kills than a test run of all takes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from embertrain.checkpoint import Checkpoints
from embertrain.checkpoint.catalog import Catalog
from embertrain.checkpoint.index import ATTEMPT
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
KILLS = int(os.environ.get("EMBERLINE_KILLS", "1"))


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
            assert record[key] == pytest.approx(other[key], rel=1e-12), (record["step"], key)
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


# ---- killed

LAST = 8


def end(folder: Path, url: str) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of the last checkpoint, whole."""
    with Trainer(TrainConfig.of(runs.tables(url, folder))) as trainer:
        assert trainer.done == LAST and trainer.checkpoints is not None
        catalog = trainer.checkpoints.catalog
        left = set(catalog.place.folders()).difference(entry.folder for entry in catalog.published())
        # A folder that a kill left without a word of whose it is (half made, half removed) goes when it is old.
        assert not any(catalog.place.exists(f"{folder}/{ATTEMPT}") for folder in left), "nothing of the dead is left"
        return {name: t.clone() for name, t in runs.weights(trainer.state()).items()}


def die_in_a_save(tables: dict[str, Any], at: int, rank: int) -> None:
    """A run one of whose ranks is killed in the save of step `at`: rank 0 when all but its last file is there, another
    with half of its bytes written."""
    if dist.get_rank() == rank:
        owner, name = (Catalog, "publish") if rank == 0 else (LocalPlace, "write")
        works = getattr(owner, name)

        def killed(self: Any, place: str, *args: Any) -> None:
            if place.startswith(f"step-{at:09d}"):
                if rank:
                    whole = b"".join(args[0])
                    works(self, place, [memoryview(whole)[: len(whole) // 2]])
                os.kill(os.getpid(), signal.SIGKILL)
            works(self, place, *args)

        setattr(owner, name, killed)
    work(tables, LAST)


def kill(processes: list[BaseProcess], rng: random.Random) -> None:
    """All of them, in any order, some time apart."""
    for process in rng.sample(processes, len(processes)):
        process.join(rng.random() * 0.2)
        process.kill()
    for process in processes:
        process.join()


def test_ranks_that_are_killed_go_on_to_the_same_bits(url: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    parallel = {"fsdp": 2}
    ranks.ranks(2, work, tmp_path / "ranks", runs.tables(url, whole, parallel=parallel), LAST)
    tables = runs.tables(url, killed, parallel=parallel)
    assert TrainConfig.of(tables).checkpoint.asynchronous and TrainConfig.of(tables).optimizer.kind == "muon"
    rng = random.Random(os.environ.get("EMBERLINE_KILL_SEED", "1"))
    for at, rank in ((4, 0), (6, 1)):
        processes = ranks.start(2, die_in_a_save, tmp_path / f"save-{at}", tables, at, rank)
        processes[rank].join(ranks.TIMEOUT_S)
        assert processes[rank].exitcode == -signal.SIGKILL
        kill(processes, rng)
        assert Checkpoints(killed / "checkpoints").latest() == at - 2
    for number in range(KILLS):
        step = rng.randint(5, LAST - 1)
        processes = ranks.start(2, work, tmp_path / f"random-{number}", tables, LAST)
        while len(runs.lines(killed)) < step and processes[0].is_alive():
            processes[0].join(0.005)
        kill(processes, rng)
    ranks.ranks(2, work, tmp_path / "last", tables, LAST)
    assert runs.lines(killed) == runs.lines(whole) and len(runs.lines(whole)) == LAST
    ours, theirs = end(killed, url), end(whole, url)
    assert ours.keys() == theirs.keys() and len(ours) > 300
    for name, t in ours.items():
        assert torch.equal(t, theirs[name]), name
