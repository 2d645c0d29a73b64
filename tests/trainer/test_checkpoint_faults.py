"""What becomes of checkpoints when a save is cut short, and when bytes on disk change.

Run: pytest tests/trainer/test_checkpoint_faults.py. EMBERLINE_CHECKPOINT_KILLS=100 kills more often.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.checkpoint import Checkpoints
from embertrain.checkpoint.catalog import DEAD_AFTER_S
from embertrain.checkpoint.place import LocalPlace, Place
from embertrain.errors import Damaged, NoCheckpoint
from embertrain.model.presets import preset
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from . import runs, save_probe
from .save_probe import numbers
from .states import blank, differences, state

KILLS = int(os.environ.get("EMBERLINE_CHECKPOINT_KILLS", "4"))


# ---- a process that dies


@pytest.mark.timeout(60 + 60 * KILLS)
@pytest.mark.parametrize("where", ["local", "ember"])
def test_a_killed_save_leaves_the_checkpoint_before_it_or_is_whole(tmp_path: Path, where: str) -> None:
    url = str(tmp_path / "run") if where == "local" else f"ember://{tmp_path}/store/!/run"
    chance = random.Random(0)
    latest = 0
    for _ in range(KILLS):
        floor = max(_kill_after(url, chance.random() * 1.5), latest)
        with Checkpoints(url, keep=2) as checkpoints:
            latest = checkpoints.latest() or 0
            assert latest in (floor, floor + 1)
            if latest:
                assert checkpoints.verify() == []
                target: dict[str, Any] = {"model": blank(numbers(0)), "step": 0}
                assert checkpoints.load(target) == target["step"] == latest
                assert not differences(target["model"], numbers(latest))
    # Of a folder that a kill left without a word of whose it is, nothing but its age tells that it is of the dead.
    with Checkpoints(url, keep=2, clock=lambda: time.time() + 2 * DEAD_AFTER_S) as checkpoints:
        checkpoints.save(10_000, {})
        assert len(checkpoints.catalog.place.folders()) <= 2, "nothing of the dead is left"


def _kill_after(url: str, delay_s: float) -> int:
    """Let a process save, kill it, and return the last step it said was saved, or 0."""
    telling, said = multiprocessing.Pipe(duplex=False)
    process = runs.start(save_probe.save_until_killed, url, said)
    said.close()  # Ours, so that what is told ends with the process.
    with telling:
        assert telling.recv() == "ready"
        time.sleep(delay_s)
        process.kill()
        process.join()
        step = 0
        with contextlib.suppress(EOFError):
            while True:
                step = telling.recv()
        return step


class Cut(BaseException):
    """The process ends here."""


class CutPlace(LocalPlace):
    """A place whose process ends at its nth call that changes something: before it, half-way through it, or after."""

    def __init__(self, root: Path, calls: int, when: str) -> None:
        super().__init__(root)
        self.left = calls
        self._when = when

    def _cut(self, call: Callable[[], None], half: Callable[[], None]) -> None:
        self.left -= 1
        if self.left > 0:
            call()
        elif self.left == 0:
            {"before": lambda: None, "half": half, "after": call}[self._when]()
            raise Cut
        else:
            raise Cut

    def make(self, folder: str) -> None:
        self._cut(lambda: super(CutPlace, self).make(folder), lambda: None)

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        whole = b"".join(pieces)
        self._cut(
            lambda: super(CutPlace, self).write(name, [memoryview(whole)]),
            lambda: super(CutPlace, self).write(name, [memoryview(whole)[: len(whole) // 2]]),
        )

    def put(self, name: str, content: bytes) -> None:
        def half() -> None:
            path = self._root / name
            path.with_name(f".{path.name}.new").write_bytes(content[: len(content) // 2])

        self._cut(lambda: super(CutPlace, self).put(name, content), half)

    def settle(self, folder: str) -> None:
        self._cut(lambda: super(CutPlace, self).settle(folder), lambda: None)

    def remove(self, name: str) -> None:
        def half() -> None:
            for file in list((self._root / name).glob("*"))[:2]:
                file.unlink()

        self._cut(lambda: super(CutPlace, self).remove(name), half)


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_save_that_ends_at_any_call_leaves_old_or_new(tmp_path: Path, when: str) -> None:
    calls = 0
    ended = False
    while not ended:
        calls += 1
        root = tmp_path / str(calls)
        with Checkpoints(root, keep=1) as checkpoints:
            checkpoints.save(1, state(1))
            place: Place = CutPlace(root, calls, when)
            checkpoints.catalog.place = place
            try:
                checkpoints.save(2, state(2))
                ended = True
            except Cut:
                pass
        with Checkpoints(root, keep=1) as again:
            latest = again.latest()
            target = blank(state(1))
            assert again.load(target) == latest
            assert latest is not None and not differences(target, state(latest))
            assert latest == 2 or not ended
            again.save(3, state(3))
            assert again.steps() == [3]
    assert calls > 8


def test_a_machine_that_loses_power_keeps_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the marker is written all else is synced: files, and the names of every folder that the save made."""
    synced: list[Path] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "runs" / "1" / "checkpoints"
    with Checkpoints(root) as checkpoints:
        checkpoints.save(1, state(1))
    (folder,) = root.iterdir()
    before = synced[: synced.index(folder / ".checkpoint.json.new")]
    above = {tmp_path, tmp_path / "runs", tmp_path / "runs" / "1", root}
    assert above <= set(before) and before[-1] == folder
    assert {*folder.glob("*.bin"), folder / "index.json"} <= set(before)
    assert synced[-1] == folder


# ---- bytes that change


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints."""
    root = tmp_path_factory.mktemp("whole")
    with Checkpoints(root) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2))
    return root


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_is_never_loaded(whole: Path, data: st.DataObject) -> None:
    (folder,) = whole.glob("step-000000002.*")
    names = [file.name for file in folder.iterdir() if file.name != "attempt.json"]
    name = data.draw(st.sampled_from(sorted(names)))
    path = folder / name
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(before[:at] + bytes([before[at] ^ flip]) + before[at + 1 :])
    try:
        with Checkpoints(whole) as checkpoints:
            with pytest.raises(Damaged) as raised:
                checkpoints.load(blank(state(2)))
            assert raised.value.step == 2 and raised.value.file == name
            assert len(checkpoints.verify()) == 1
            target = blank(state(1))
            assert checkpoints.load(target, fallback=True) == 1
            assert not differences(target, state(1))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["rank-00000-0.bin", "index.json"])
@pytest.mark.parametrize("change", ["gone", "short", "empty"])
def test_a_file_that_is_not_whole_is_found(whole: Path, name: str, change: str) -> None:
    (folder,) = whole.glob("step-000000002.*")
    path = folder / name
    before = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(before[:-1] if change == "short" else b"")
    try:
        with Checkpoints(whole) as checkpoints:
            with pytest.raises(Damaged, match=name):
                checkpoints.load(blank(state(2)))
            assert len(checkpoints.verify()) == 1
    finally:
        path.write_bytes(before)


def test_damage_in_a_store_is_damage(tmp_path: Path) -> None:
    url = f"ember://{tmp_path}/store/!/run"
    with Checkpoints(url) as checkpoints:
        checkpoints.save(1, {"w": torch.rand(300_000)})
    for blocks in (tmp_path / "store" / "target-1").glob("blocks-*"):
        with blocks.open("r+b") as file:
            file.seek(100_000)
            byte = file.read(1)
            file.seek(100_000)
            file.write(bytes([byte[0] ^ 1]))
    with Checkpoints(url) as checkpoints, pytest.raises(Damaged, match=r"rank-00000-0.bin cannot be read"):
        checkpoints.load({"w": torch.zeros(300_000)})


@pytest.mark.parametrize("where", ["local", "ember"])
@pytest.mark.parametrize("file", ["checkpoint.json", "index.json", "rank-00000-0.bin"])
@pytest.mark.parametrize("use", ["verify", "load", "export"])
def test_what_retention_removes_meanwhile_is_not_damaged(tmp_path: Path, where: str, file: str, use: str) -> None:
    url = str(tmp_path / "run") if where == "local" else f"ember://{tmp_path}/store/!/run"
    with Checkpoints(url, keep=1) as run, Checkpoints(url) as reader:
        run.save(1, {"model": {"w": torch.rand(9)}})
        place = reader.catalog.place

        def overtaken(call: Callable[[str], Any], name: str) -> Any:
            if name.endswith(file):
                run.save(2, {"model": {"w": torch.rand(9)}})
            return call(name)

        place.read = partial(overtaken, place.read)  # type: ignore[method-assign]
        place.open = partial(overtaken, place.open)  # type: ignore[method-assign]
        uses: dict[str, Callable[[], Any]] = {
            "verify": lambda: reader.verify(1),
            "load": lambda: reader.load({"model": {"w": torch.zeros(9)}}, fallback=True),
            "export": lambda: reader.export(1, tmp_path / "out", config=preset("micro")),
        }
        with pytest.raises(NoCheckpoint, match=r"step 1 at .* was removed while it was read"):
            uses[use]()
        assert run.verify() == []


@pytest.mark.parametrize("moment", ["index", "bytes"])
def test_what_is_out_of_reach_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def fail(*_: object) -> None:
        raise TimeoutError("no answer")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2))
        monkeypatch.setattr(checkpoints.catalog.place, "read" if moment == "index" else "open", fail)
        with pytest.raises(TimeoutError, match="no answer"):
            checkpoints.load(blank(state(2)), fallback=True)


def test_what_is_out_of_reach_is_there_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not looked past by a run that goes on, and not swept."""

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "exists", AbstractFileSystem.exists)  # as object stores have it
    with Checkpoints(f"memory://{tmp_path}") as checkpoints:
        checkpoints.save(1, state(1))
        with monkeypatch.context() as broken:
            broken.setattr(MemoryFileSystem, "info", fail)
            for look in (checkpoints.latest, checkpoints.steps):
                with pytest.raises(TimeoutError, match="no answer"):
                    look()
            checkpoints.catalog.tidy()
        assert checkpoints.steps() == [1] and checkpoints.verify() == []


def test_a_newer_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {})
        (marker,) = tmp_path.glob("*/checkpoint.json")
        marker.write_text('{"format": 2, "all": "new"}')
        with pytest.raises(Damaged, match="is of format 2, and this code reads 1: update emberline"):
            checkpoints.load({})


def test_an_interpreter_that_ends_finishes_the_saves_in_the_air(tmp_path: Path) -> None:
    urls = [str(tmp_path / "local"), f"ember://{tmp_path}/store/!/run"]
    script = (
        "import sys, torch; from embertrain.checkpoint import Checkpoints\n"
        "for url in sys.argv[1:]: Checkpoints(url, threads=4).save_async(1, {'w': torch.arange(20 << 20)})"
    )
    subprocess.run([sys.executable, "-c", script, *urls], check=True, timeout=120)
    for url in urls:
        with Checkpoints(url) as checkpoints:
            assert checkpoints.latest() == 1 and checkpoints.verify() == []
