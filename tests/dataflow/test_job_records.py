"""What is kept of jobs, and what is made of it when their drivers die. Run: pytest tests/dataflow"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from emberflow.errors import CallCancelled, InvalidArgument
from emberflow.job.event import Event
from emberflow.job.history import LEASE_S, JobInfo, cancel, jobs, logs, show
from emberflow.job.record import Record, start_thread


@dataclass
class World:
    """A root, a clock that stands still, and heartbeats by hand."""

    root: str
    now_s: float = 1_000_000.0
    cancelled: list[str] = field(default_factory=list)

    def record(self, id: str = "j", **options: Any) -> Record:
        def start(beat: Callable[[], None], every_s: float) -> Callable[[], None]:
            return lambda: None

        return Record(
            self.root,
            JobInfo(id=id, name="a name", query="select 1"),
            now=lambda: self.now_s,
            start=start,
            on_cancel=lambda: self.cancelled.append(id),
            **options,
        )

    def state(self, id: str = "j") -> str:
        return show(self.root, id, now=lambda: self.now_s).info.state


@pytest.fixture
def world(root: str) -> World:
    return World(root)


def test_the_life_of_a_record(world: World) -> None:
    assert jobs(world.root) == []
    with world.record(explain="stage 0\n") as record:
        record.use("a" * 32)
        record.use("a" * 32)
        record.note(Event("stage", 0, -1, 0.1, {"label": "scan", "tasks": 3, "reused": 1}))
        record.note(Event("finished", 0, 1, 0.5, {"rows": 7}))
        record.note(Event("rows", 0, 2, 0.6, {"rows": 5}))
        world.now_s += 7
        record.beat()
        (info,) = jobs(world.root, now=lambda: world.now_s)
        assert (info.state, info.steps, info.query) == ("running", ["a" * 32], "select 1")
        assert (info.stages, info.tasks, info.tasks_done) == (1, 3, 2)
        assert info.seen_s - info.started_s == 7
        assert info.pid and info.host and info.versions
        record.note(Event("done", -1, -1, 1.0))
    found = show(world.root, "j")
    assert (found.info.state, found.info.ended_s, found.info.error) == ("done", world.now_s, "")
    assert [event.kind for event in found.events] == ["stage", "finished", "done"]
    assert found.events[0].data == {"label": "scan", "tasks": 3, "reused": 1}
    assert found.explain == "stage 0\n"


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("no\udcff"), "failed"), (CallCancelled("late"), "cancelled"), (KeyboardInterrupt(), "cancelled")],
)
def test_how_a_job_ends(world: World, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), world.record():
        raise error
    info = show(world.root, "j").info
    assert info.state == state
    assert info.error.startswith(type(error).__name__)


def test_the_notes_of_an_error_say_where_it_was(world: World) -> None:
    error = ValueError("no such column")
    error.add_note("in scan 0.1 of 8, attempt 1")
    with pytest.raises(ValueError), world.record():
        raise error
    assert show(world.root, "j").info.error == "ValueError: no such column\nin scan 0.1 of 8, attempt 1"


def test_a_silent_driver_is_lost_and_its_job_can_be_gone_on_with(world: World) -> None:
    first = world.record()
    first.__enter__()
    first.note(Event("stage", 0, -1, 0.0, {"tasks": 1}))
    first.beat()
    cancel(world.root, "j", now=lambda: world.now_s)
    world.now_s += LEASE_S + 1
    assert world.state() == "lost"
    with pytest.raises(InvalidArgument, match="it is lost"):
        cancel(world.root, "j", now=lambda: world.now_s)
    with world.record() as second:
        second.beat()
        assert world.state() == "running"
        assert second.info.id == "j"
    assert not world.cancelled, "the old request to cancel was meant for the old driver"
    assert show(world.root, "j").events == ()


def test_a_job_of_the_same_name_that_runs_keeps_it(world: World) -> None:
    with world.record() as first, world.record() as second:
        assert first.info.id == "j"
        assert second.info.id.startswith("j-")
        assert len(jobs(world.root)) == 2


def test_cancel_reaches_the_driver_once(world: World) -> None:
    with pytest.raises(RuntimeError), world.record() as record:
        record.beat()
        assert not world.cancelled
        cancel(world.root, "j", now=lambda: world.now_s)
        record.beat()
        record.beat()
        assert world.cancelled == ["j"]
        raise RuntimeError("whatever a cancelled task says")
    assert world.state() == "cancelled"
    with pytest.raises(InvalidArgument, match="it is cancelled"):
        cancel(world.root, "j")


def test_printed_lines_bear_their_tasks_names(world: World) -> None:
    with world.record() as record:
        record.note(Event("stage", 3, -1, 0.0, {"label": "map", "tasks": 2}))
        for task, text in [(0, "one\ntw"), (1, "other"), (0, "o\n"), (0, "end\udc80")]:
            record.note(Event("output", 3, task, 0.1, {"text": text}))
        record.beat()
        assert "".join(logs(world.root, "j")) == "[map 3.0] one\n[map 3.0] two\n"
    lines = "".join(logs(world.root, "j")).splitlines()
    assert sorted(lines) == ["[map 3.0] end?", "[map 3.0] one", "[map 3.0] two", "[map 3.1] other"]


def test_many_events_go_to_several_files_in_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberflow.job.record._CHUNK_BYTES", 2_000)
    with world.record() as record:
        for number in range(100):
            record.note(Event("retry", 0, number, 0.0, {"error": "x" * 20}))
            if number % 7 == 0:
                record.beat()
    filesystem, path = fsspec.core.url_to_fs(f"{world.root}/jobs/j")
    assert len([name for name in filesystem.ls(path, detail=False) if "events-" in name]) > 2
    assert [event.task for event in show(world.root, "j").events] == list(range(100))


def test_sql_is_kept_once_a_stage_and_what_is_long_is_cut(world: World) -> None:
    with world.record() as record:
        for task in range(2):
            record.note(Event("task", 0, task, 0.0, {"attempt": "a", "sql": "x" * 10_000}))
    first, second = show(world.root, "j").events
    assert 4_000 < len(first.data["sql"]) < 5_000
    assert "sql" not in second.data


def test_a_full_disk_is_told_once_and_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "jobs").write_text("where the directory should be")
    world = World(str(tmp_path))
    with caplog.at_level(logging.WARNING), world.record() as record:
        record.use("a" * 32)
        record.note(Event("stage", 0, -1, 0.0, {"tasks": 1}))
        record.beat()
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "record of job j is incomplete" in caplog.text


def test_names_of_jobs_stay_in_their_directory(world: World) -> None:
    for id in ("../x", "a/b", "", ".x", "a b"):
        with pytest.raises(InvalidArgument, match="name of a job"):
            world.record(id)
        with pytest.raises(InvalidArgument, match="name of a job"):
            show(world.root, id)
    with pytest.raises(InvalidArgument, match="there is no job 'x'"):
        show(world.root, "x")


def test_what_is_no_record_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "empty").mkdir(parents=True)
    (tmp_path / "jobs" / "odd").mkdir()
    (tmp_path / "jobs" / "odd" / "job.json").write_text("{")
    (tmp_path / "jobs" / "file").write_text("")
    assert jobs(str(tmp_path)) == []


def test_the_thread_beats_until_it_is_stopped() -> None:
    beaten = threading.Semaphore(0)
    stop = start_thread(beaten.release, 0.001)
    for _ in range(3):
        assert beaten.acquire(timeout=60)
    stop()
    assert "emberflow-heartbeat" not in {thread.name for thread in threading.enumerate()}
