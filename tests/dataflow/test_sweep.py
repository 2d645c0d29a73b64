"""What a sweep takes away, and what it must not. Run: pytest tests/dataflow"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
from emberflow.errors import InvalidArgument
from emberflow.files import FileOutput
from emberflow.job.history import JobInfo, jobs
from emberflow.job.steps import Output, Place
from emberflow.job.sweep import RETENTION_S, Swept, sweep

HOUR_S = 3600.0
STEP, OTHER, THIRD = "a" * 32, "b" * 32, "c" * 32


class Keep:
    """A root with steps and records, looked at some time from now: files are as old as they are."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.fs, self.path = fsspec.core.url_to_fs(root)
        self.start_s = time.time()

    def step(self, identity: str, *, data: tuple[str, ...] = ("00000-aa",), won: dict[int, str] | None = None) -> None:
        """A step with these attempts' data, 100 bytes each, and the attempts that won."""
        place = Place(f"{self.root}/steps/{identity}")
        place.prepare()
        for name in data:
            self.fs.pipe_file(f"{self.path}/steps/{identity}/{name}.exchange", b"x" * 100)
        for index, attempt in ({0: "aa"} if won is None else won).items():
            url = place.data_url(index, attempt)
            place.publish(index, Output(attempt=attempt, rows=1, size_bytes=100, url=url))

    def job(self, id: str, *, state: str = "running", silent_s: float = 0.0, **fields: Any) -> None:
        seen_s = self.start_s - silent_s
        info = JobInfo(id=id, state=state, started_s=seen_s, seen_s=seen_s, **fields)
        if state != "running":
            info.ended_s = seen_s
        self.fs.makedirs(f"{self.path}/jobs/{id}", exist_ok=True)
        self.fs.pipe_file(f"{self.path}/jobs/{id}/job.json", msgspec.json.encode(info))
        self.fs.pipe_file(f"{self.path}/jobs/{id}/events-00000.jsonl", b"")

    def files(self, identity: str) -> list[str]:
        path = f"{self.path}/steps/{identity}"
        return sorted(name.rsplit("/", 1)[-1] for name in self.fs.find(path))

    def sweep(self, later_s: float = 0.0, **options: Any) -> Swept:
        return sweep(self.root, now=lambda: self.start_s + later_s, **options)


@pytest.fixture
def keep(root: str) -> Keep:
    return Keep(root)


def test_nothing_under_nothing(keep: Keep) -> None:
    assert keep.sweep() == Swept()


def test_what_attempts_left_goes_after_an_hour(keep: Keep) -> None:
    keep.step(STEP, data=("00000-aa", "00000-bb", "00001-cc", "00002-dd"), won={0: "aa", 2: "dd"})
    assert keep.sweep(HOUR_S / 2).attempts == []
    swept = keep.sweep(2 * HOUR_S)
    assert sorted(path.rsplit("/", 1)[-1] for path in swept.attempts) == ["00000-bb.exchange", "00001-cc.exchange"]
    assert swept.size_bytes == 200
    assert keep.files(STEP) == ["00000-aa.exchange", "00000.won", "00002-dd.exchange", "00002.won"]
    assert swept.kept_bytes > 200


def test_what_a_lost_job_left_goes_at_once(keep: Keep) -> None:
    for identity in (STEP, OTHER):
        keep.step(identity, data=("00000-aa", "00001-bb"))
    keep.job("gone", silent_s=100, steps=[STEP])
    assert [path.rsplit("/", 2)[-2] for path in keep.sweep().attempts] == [STEP]
    assert keep.files(STEP) == ["00000-aa.exchange", "00000.won"]
    assert len(keep.files(OTHER)) == 3


def test_nothing_that_a_running_job_names_is_touched(keep: Keep) -> None:
    keep.step(STEP, data=("00000-aa", "00001-bb"))
    keep.job("gone", silent_s=10 * RETENTION_S, steps=[STEP])
    keep.job("live", silent_s=-30 * RETENTION_S, steps=[STEP])
    swept = keep.sweep(30 * RETENTION_S, size_bytes_max=0)
    assert (swept.attempts, swept.steps) == ([], [])
    assert len(keep.files(STEP)) == 3
    assert [path.rsplit("/", 1)[-1] for path in swept.records] == ["gone"]


def test_a_job_that_began_meanwhile_keeps_its_steps(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    keep.step(STEP)

    def looked(*_: object, **__: object) -> list[JobInfo]:
        keep.job("new", silent_s=-RETENTION_S - 1, steps=[STEP])
        return []

    monkeypatch.setattr("emberflow.job.sweep.jobs", looked)
    assert keep.sweep(RETENTION_S + 1).steps == []


def test_steps_are_kept_for_as_long_as_they_are_used(keep: Keep) -> None:
    for identity in (STEP, OTHER):
        keep.step(identity)
    keep.job("done", state="done", silent_s=-RETENTION_S / 2, steps=[OTHER])
    swept = keep.sweep(RETENTION_S + 10)
    assert [path.rsplit("/", 1)[-1] for path in swept.steps] == [STEP]
    assert keep.files(STEP) == []
    assert not keep.fs.exists(f"{keep.path}/steps/{STEP}")
    assert len(keep.files(OTHER)) == 2
    assert swept.records == []


def test_the_longest_unused_go_first_until_the_rest_is_small_enough(keep: Keep) -> None:
    for number, identity in enumerate((STEP, OTHER, THIRD)):
        keep.step(identity)
        keep.job(f"j{number}", state="done", silent_s=-100 * number - 100, steps=[identity])
    one_bytes = keep.sweep(dry_run=True).kept_bytes // 3
    swept = keep.sweep(400, size_bytes_max=2 * one_bytes + 1)
    assert [path.rsplit("/", 1)[-1] for path in swept.steps] == [STEP]
    assert swept.kept_bytes <= 2 * one_bytes + 1
    assert keep.sweep(400, size_bytes_max=2 * one_bytes + 1).steps == []


def test_a_dry_run_removes_nothing_and_tells_the_same(keep: Keep) -> None:
    keep.step(STEP, data=("00000-aa", "00001-bb"))
    keep.step(OTHER)
    keep.job("old", state="failed", steps=[STEP])
    before = keep.fs.find(keep.path)
    dry = keep.sweep(RETENTION_S + 10, dry_run=True)
    assert keep.fs.find(keep.path) == before
    assert keep.sweep(RETENTION_S + 10) == dry
    assert (len(dry.attempts), len(dry.steps), len(dry.records)) == (1, 2, 1)
    assert keep.fs.find(keep.path) == []
    assert jobs(keep.root) == []


def test_what_is_not_ours_stays(keep: Keep) -> None:
    for name in ("steps/notes/x", f"steps/{STEP}/notes.txt", "steps/readme", "jobs/mine/file", "data/y"):
        folder = f"{keep.path}/{name}".rsplit("/", 1)[0]
        keep.fs.makedirs(folder, exist_ok=True)
        keep.fs.pipe_file(f"{keep.path}/{name}", b"x")
    keep.step(STEP)
    keep.sweep(HOUR_S * 2)
    assert "notes.txt" in keep.files(STEP)
    keep.sweep(RETENTION_S * 2)
    for name in ("steps/notes/x", "steps/readme", "jobs/mine/file", "data/y"):
        assert keep.fs.exists(f"{keep.path}/{name}")


class Writing:
    """A lost job in the middle of a write."""

    def __init__(self, keep: Keep, *, silent_s: float = 100.0, name: str = ".emberflow-w") -> None:
        self.keep = keep
        self.target = f"{keep.path}/lake/hosts"
        self.staging = f"{keep.path}/lake/{name}"
        self.put(f"{self.staging}/attempts/00000-aa-000.parquet")
        keep.job("w", silent_s=silent_s, staging=f"{keep.root}/lake/{name}", target=f"{keep.root}/lake/hosts",
                 steps=[STEP, OTHER])  # fmt: skip

    def put(self, path: str) -> None:
        self.keep.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.keep.fs.pipe_file(path, b"rows")


def test_the_staging_of_a_lost_job_goes_and_what_wrote_it_is_not_done(keep: Keep) -> None:
    writing = Writing(keep)
    writing.put(f"{writing.target}/part-0.parquet")
    keep.step(STEP)
    keep.step(OTHER, data=(), won={})
    file = FileOutput("00000-aa-000.parquet", f"{writing.staging}/attempts/00000-aa-000.parquet", 1, 4)
    Place(f"{keep.root}/steps/{OTHER}").publish(0, Output(attempt="aa", rows=1, size_bytes=4, files=[file]))
    assert len(keep.sweep().stagings) == 1
    assert not keep.fs.exists(writing.staging)
    assert keep.fs.exists(f"{writing.target}/part-0.parquet")
    assert (len(keep.files(STEP)), keep.files(OTHER)) == (2, [])
    assert keep.sweep().stagings == []


def test_the_old_files_of_half_an_overwrite_come_back(keep: Keep) -> None:
    writing = Writing(keep)
    writing.put(f"{writing.staging}/old/part-0.parquet")
    assert keep.sweep().stagings == [], "its driver might only be slow, and about to rename"
    assert len(keep.sweep(2 * HOUR_S).stagings) == 1
    assert keep.fs.find(writing.target) == [f"{writing.target}/part-0.parquet"]
    assert not keep.fs.exists(writing.staging)


def test_a_whole_overwrite_is_left_as_it_is(keep: Keep) -> None:
    writing = Writing(keep)
    writing.put(f"{writing.staging}/old/part-0.parquet")
    writing.put(f"{writing.target}/part-1.parquet")
    keep.sweep(2 * HOUR_S)
    assert keep.fs.find(writing.target) == [f"{writing.target}/part-1.parquet"]
    assert not keep.fs.exists(writing.staging)


def test_half_an_append_is_taken_back(keep: Keep) -> None:
    writing = Writing(keep)
    for file in ("hosts/old.parquet", "hosts/a/new1.parquet", ".emberflow-w/new/a/new2.parquet"):
        writing.put(f"{keep.path}/lake/{file}")
    keep.fs.pipe_file(f"{writing.staging}/appending.json", b'["a/new1.parquet", "a/new2.parquet"]')
    assert keep.sweep().stagings == [], "its driver might only be slow, and about to move more"
    assert len(keep.sweep(2 * HOUR_S).stagings) == 1
    assert keep.fs.find(writing.target) == [f"{writing.target}/old.parquet"]
    assert not keep.fs.exists(writing.staging)


def test_a_whole_append_is_left_as_it_is(keep: Keep) -> None:
    writing = Writing(keep)
    writing.put(f"{writing.target}/new.parquet")
    keep.fs.pipe_file(f"{writing.staging}/appending.json", b'["new.parquet"]')
    assert len(keep.sweep(2 * HOUR_S).stagings) == 1
    assert keep.fs.find(writing.target) == [f"{writing.target}/new.parquet"]


def test_the_moments_of_names_that_no_job_has_go(keep: Keep) -> None:
    keep.job("kept-1", silent_s=-2 * RETENTION_S, state="done")
    keep.job("gone-12", state="done")
    for name in ("kept.now", "gone.now", "gone-more.now", ".new-abc"):
        keep.fs.pipe_file(f"{keep.path}/jobs/{name}", b"")
    assert keep.sweep(60.0).records == []
    dry = keep.sweep(RETENTION_S + 60, dry_run=True)
    assert keep.sweep(RETENTION_S + 60) == dry
    left = {path.rsplit("/", 1)[-1] for path in keep.fs.ls(f"{keep.path}/jobs", detail=False)}
    assert {name for name in left if name.endswith(".now") or name.startswith(".new")} == {"kept.now"}


@pytest.mark.parametrize("name", ["hosts2", ".emberflow"])
def test_only_hidden_directories_of_writes_are_removed(keep: Keep, name: str) -> None:
    writing = Writing(keep, name=name)
    keep.sweep(2 * HOUR_S)
    assert keep.fs.find(writing.staging)


def test_the_staging_of_a_job_that_runs_stays(keep: Keep) -> None:
    writing = Writing(keep, silent_s=0.0)
    keep.sweep(10)
    assert keep.fs.exists(writing.staging)


def test_what_cannot_be_removed_is_told_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Keep(str(tmp_path))
    for identity in (STEP, OTHER):
        keep.step(identity)
    rm_file = type(keep.fs).rm_file

    def refused(self: Any, path: str) -> None:
        if STEP in path:
            raise PermissionError(path)
        rm_file(self, path)

    monkeypatch.setattr(type(keep.fs), "rm_file", refused)
    swept = keep.sweep(RETENTION_S * 2)
    assert [path.rsplit("/", 1)[-1] for path in swept.steps] == [OTHER]
    assert "PermissionError" in swept.errors[0]


def test_limits_are_not_less_than_nothing(keep: Keep) -> None:
    for options in ({"retention_s": -1.0}, {"size_bytes_max": -1}):
        with pytest.raises(InvalidArgument, match="less than nothing"):
            keep.sweep(**options)
