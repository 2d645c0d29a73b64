"""Checkpoints in one process: what comes back, what is refused, what is current, kept and swept.

Run: pytest tests/trainer/test_checkpoints.py
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.checkpoint import Checkpoints
from embertrain.errors import NoCheckpoint, StateError, Superseded
from fsspec.implementations.memory import MemoryFileSystem

from .states import blank, differences, state


@pytest.fixture(params=["local", "ember", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where checkpoints go: every rule holds on each kind of file system."""
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
    yield {
        "local": str(tmp_path / "run" / "checkpoints"),
        "ember": f"ember://{tmp_path}/store/!/run/checkpoints",
        "memory": "memory://run/checkpoints",
    }[request.param]


def loaded(checkpoints: Checkpoints, like: Any, step: int | None = None) -> Any:
    target = blank(like)
    checkpoints.load(target, step)
    return target


# ---- what comes back


def test_a_state_comes_back_bit_for_bit_and_type_for_type(url: str) -> None:
    with Checkpoints(url) as checkpoints:
        checkpoints.save(3, state(3))
        assert checkpoints.steps() == [3] and checkpoints.latest() == 3
    with Checkpoints(url) as again:
        target = blank(state(3))
        tensor = target["model"]["a.weight"]
        assert again.load(target) == 3
        assert target["model"]["a.weight"] is tensor, "tensors are filled where they are"
        assert not differences(target, state(3))


def test_values_that_the_state_has_not_come_in_too(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state(1))
        target = blank(state(1)) | {"trainer": {}}
        checkpoints.load(target)
        assert not differences(target, state(1))


def test_what_an_asynchronous_save_writes_is_the_state_of_that_moment(url: str) -> None:
    with Checkpoints(url, keep=None) as checkpoints:
        now = state(1)
        for step in (1, 2, 3):
            fresh = state(step)
            for part in ("model", "optimizer"):
                for mine, its in zip(_tensors(now[part]), _tensors(fresh[part]), strict=True):
                    mine.copy_(its)
            now["trainer"] = fresh["trainer"]
            now["optimizer"]["param_groups"] = fresh["optimizer"]["param_groups"]
            now["optimizer"]["mixed"][1:] = [step, {"x": (step, 2.5), "y": fresh["optimizer"]["mixed"][2]["y"]}]
            checkpoints.save_async(step, now)
            for tensor in _tensors(now):
                tensor.zero_()
            now["trainer"]["step"] = -1
        checkpoints.wait()
        for step in (1, 2, 3):
            assert not differences(loaded(checkpoints, state(step), step), state(step))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def test_modules_and_optimizers_are_taken_as_they_are(tmp_path: Path) -> None:
    def made() -> dict[str, Any]:
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    torch.manual_seed(0)
    saved, other = made(), made()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.load(other)
    for part in ("model", "optimizer"):
        assert not differences(saved[part].state_dict(), other[part].state_dict())


# ---- what is refused


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"trainer": {"lock": object()}}, "trainer.lock holds a builtins.object"),
        ({"trainer": {"sizes": [torch.Size([1])]}}, "trainer.sizes holds a torch.Size"),
        ({"a": {"b": 1}, "a.b": 2}, "both called a.b"),
        ({"a": {1.5: 2}}, "a key of a is 1.5"),
        ({"a": (torch.ones(1), 2)}, "a is a tuple of tensors and other values"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is a torch.sparse_coo tensor"),
        ({"a": torch.ones(2, device="meta")}, "a is a meta tensor"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_cannot_be_saved_is_refused_at_once(
    tmp_path: Path, wrong: dict[str, Any], says: str, asynchronous: bool
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        with pytest.raises(StateError, match=says):
            (checkpoints.save_async if asynchronous else checkpoints.save)(2, wrong)
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert len(list(tmp_path.iterdir())) == 1, "nothing of it is left"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"b": torch.ones(3)}}, "it has no model.b"),
        ({"model": {"w": torch.ones(3, 2)}}, r"model.w is \[2, 3\] in it and \[3, 2\] in the state"),
        ({"model": {"w": torch.ones(2, 3, dtype=torch.float64)}}, "model.w is float32 in it and float64 in the state"),
        ({"model": {"w": 1}}, "model.w is a tensor in it and none in the state"),
        ({"model": {"w": torch.ones(2, 3)}, "step": torch.ones(())}, "step is no tensor in it"),
        ({"model": {"w": torch.ones(2, 3)}, "epoch": 1}, "it has no epoch"),
        ({"step": 0}, r"no place for 1 tensors of the checkpoint \(model.w\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_filled(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.zeros(2, 3)}, "step": 1})
        with pytest.raises(StateError, match=says):
            checkpoints.load(change)
        assert all(bool((tensor == 1).all()) for tensor in _tensors(change))


def test_a_part_of_a_state_is_loaded_if_that_is_said(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        target = {"model": {"a.weight": torch.zeros(300, 700)}}
        checkpoints.load(target, partial=True)
        assert not differences(target, {"model": {"a.weight": state(1)["model"]["a.weight"]}})


def test_what_is_not_there_is_said(url: str) -> None:
    with Checkpoints(url) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
        with pytest.raises(NoCheckpoint, match="there is no checkpoint at"):
            checkpoints.load({})
        checkpoints.save(1, {"a": 1})
        with pytest.raises(NoCheckpoint, match="no checkpoint of step 2"):
            checkpoints.load({}, 2)


# ---- what is current, and what is kept


def test_the_latest_is_the_one_published_last(url: str) -> None:
    with Checkpoints(url, keep=None) as checkpoints:
        for step in (10, 20, 30, 20):
            checkpoints.save(step, {"a": step, "saved": step == 20 and checkpoints.latest() == 30})
        assert checkpoints.latest() == 20 and checkpoints.steps() == [10, 20, 30]
        assert loaded(checkpoints, {"a": 0}) == {"a": 20, "saved": True}


def test_of_two_that_save_at_one_place_the_last_goes_on(url: str) -> None:
    with Checkpoints(url) as old:
        old.save(10, {"a": "old"})
        with Checkpoints(url) as new:
            new.save(5, {"a": "new"})
            with pytest.raises(Superseded, match="another process has published step 5"):
                old.save(20, {"a": "old"})
            new.save(6, {"a": "new"})
            with pytest.raises(Superseded, match="another process has published step 6"):
                old.save_async(20, {"a": "old"})
                old.wait()
            assert new.steps() == [5, 6, 10] and loaded(new, {"a": 0}) == {"a": "new"}
            assert len(new.catalog.place.folders()) == 3, "nothing is left of what was not published"


def test_who_publishes_while_another_saves_is_the_one_that_goes_on(url: str) -> None:
    with Checkpoints(url) as slow, Checkpoints(url) as quick:
        publish = slow.catalog.publish

        def overtaken(*args: Any) -> None:
            quick.save(1, {"a": "quick"})
            publish(*args)

        slow.catalog.publish = overtaken  # type: ignore[method-assign]
        with pytest.raises(Superseded, match="another process has published step 1"):
            slow.save(2, {"a": "slow"})
        quick.save(3, {"a": "quick"})
        assert quick.steps() == [1, 3]


def test_of_two_that_publish_in_one_moment_one_is_told(url: str) -> None:
    with Checkpoints(url) as one, Checkpoints(url) as other:
        put = one.catalog.place.put

        def at_once(name: str, content: bytes) -> None:
            if name.endswith("checkpoint.json"):
                other.save(1, {"a": "other"})
            put(name, content)

        with pytest.MonkeyPatch.context() as moment:
            moment.setattr(one.catalog.place, "put", at_once)
            one.save(2, {"a": "one"})
        assert one.steps() == [1, 2] and one.latest() == other.latest() == 1
        other.save(3, {"a": "other"})
        with pytest.raises(Superseded, match="another process has published step 3"):
            one.save(4, {"a": "one"})


def test_a_marker_of_ones_own_that_was_not_heard_of_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {})
        put = checkpoints.catalog.place.put

        def unheard(name: str, content: bytes) -> None:
            put(name, content)
            if name.endswith("checkpoint.json"):
                raise TimeoutError("no answer")

        def fail(*_: object) -> None:
            raise TimeoutError("no answer")

        with monkeypatch.context() as broken:
            broken.setattr(checkpoints.catalog.place, "put", unheard)
            broken.setattr(checkpoints.catalog.place, "remove", fail)
            with pytest.raises(TimeoutError):
                checkpoints.save(2, {})
        checkpoints.save(3, {})
        assert checkpoints.steps() == [1, 2, 3]


def test_retention_keeps_the_last_and_every_so_many(url: str) -> None:
    with Checkpoints(url, keep=2, keep_every=100) as checkpoints:
        kept = []
        for step in (50, 100, 150, 200, 250, 300, 350):
            checkpoints.save(step, {"a": step})
            kept.append(checkpoints.steps())
    assert kept == [[50], [50, 100], [100, 150], [100, 150, 200], [100, 200, 250], [100, 200, 250, 300],
                    [100, 200, 300, 350]]  # fmt: skip


def test_a_step_is_not_negative(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for save in (checkpoints.save, checkpoints.save_async):
            with pytest.raises(ValueError, match="a step is 0 or more: -1"):
                save(-1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": 0}, {"threads": 0}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, **options)


# ---- what failed


@pytest.mark.parametrize("call", ["make", "write"])
def test_a_background_failure_is_raised_by_the_next_call_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))

        def fail(*_: object) -> None:
            raise OSError("no space")

        with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
            broken.setattr(checkpoints.catalog.place, call, fail)
            checkpoints.save_async(2, state(2))
            with pytest.raises(OSError, match="no space"):
                checkpoints.save_async(3, state(3))
        assert "a checkpoint was not written: no space" in caplog.text
        assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 1
        checkpoints.save_async(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


@pytest.mark.parametrize("error", [OSError("no answer"), RuntimeError("a library's own")])
def test_a_save_is_good_though_old_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1))
        monkeypatch.setattr(checkpoints.catalog.place, "remove", fail)
        checkpoints.save(2, state(2))
        assert checkpoints.steps() == [1, 2]
    assert f"are left behind: {error}" in caplog.text


def test_who_saves_in_the_background_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        gate, make = threading.Event(), checkpoints.catalog.place.make

        def slow(folder: str) -> None:
            assert gate.wait(60), "the caller waited for this"
            make(folder)

        monkeypatch.setattr(checkpoints.catalog.place, "make", slow)
        checkpoints.save_async(1, state(1))
        gate.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_dead_attempts_are_swept_and_living_ones_are_not(tmp_path: Path) -> None:
    now = [0.0]
    with Checkpoints(tmp_path, clock=lambda: now[0]) as checkpoints:
        catalog = checkpoints.catalog
        mine, elsewhere, dead, mute = (catalog.begin(step) for step in (1, 2, 3, 4))
        assert not list(tmp_path.iterdir())
        for folder in (mine, elsewhere, dead, mute):
            catalog.make(folder)
        for folder, change in ((elsewhere, {"host": "another"}), (dead, {"started": 1})):
            path = tmp_path / folder / "attempt.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        (tmp_path / mute / "attempt.json").unlink()
        (tmp_path / "notes").mkdir()
        now[0] = (tmp_path / mute).stat().st_mtime + 3600
        checkpoints.save(5, {})
        assert {path.name for path in tmp_path.iterdir()} > {mine, elsewhere, mute, "notes"}
        assert not (tmp_path / dead).exists()
        now[0] += 86_400
        checkpoints.save(6, {})
        assert checkpoints.steps() == [5, 6]
        assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / mine).exists() and (tmp_path / "notes").exists()
