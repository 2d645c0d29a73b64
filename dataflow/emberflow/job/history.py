"""What is known of jobs: their records, read by anybody, at any time.

    <root>/jobs/<id>/job.json             what it is, how it goes, which steps it uses; rewritten at every heartbeat
    <root>/jobs/<id>/explain.txt          its plan
    <root>/jobs/<id>/events-00000.jsonl   what it told, one event a line
    <root>/jobs/<id>/output-00000.log     what its tasks printed, each line with the task's name
    <root>/jobs/<id>/cancel               somebody wants it to end

A job whose heartbeat is older than the lease counts as lost. The lease is compared across machines, so their clocks
must agree within seconds.

Does not know: how records are written (`record.py`).
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import msgspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import InvalidArgument
from ..sources import StorageOptions, open_kept
from .event import Event

LEASE_S = 30.0
"""A job that was not heard of for so long counts as lost: six heartbeats, so that a slow store is not a dead driver."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("emberline", "duckdb", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree
            pass
    return found


class JobInfo(msgspec.Struct, kw_only=True):
    """The content of `job.json`. Times are Unix seconds."""

    id: str
    name: str = ""
    """For people: what it makes."""
    state: str = "running"
    """running, done, failed, cancelled; read back also lost: running, but not heard of for the lease."""
    query: str = ""
    started_s: float = 0.0
    seen_s: float = 0.0
    """The latest heartbeat."""
    ended_s: float | None = None
    host: str = ""
    pid: int = 0
    """Of the driver."""
    steps: list[str] = []
    """The identities of the steps that it makes or reads."""
    staging: str | None = None
    """The hidden directory of the dataset that it writes."""
    target: str | None = None
    """Where that dataset goes."""
    stages: int = 0
    tasks: int = 0
    tasks_done: int = 0
    """Of the stages that have begun."""
    error: str = ""
    versions: dict[str, str] = msgspec.field(default_factory=_versions)

    @property
    def last_s(self) -> float:
        """When it was last alive."""
        return self.seen_s if self.ended_s is None else self.ended_s


# ---- looking


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """All of a record."""

    info: JobInfo
    events: tuple[Event, ...] = ()
    explain: str = ""
    output: str = ""


def jobs(
    root: str,
    *,
    storage_options: StorageOptions | None = None,
    lease_s: float = LEASE_S,
    now: Callable[[], float] = time.time,
) -> list[JobInfo]:
    """The jobs known under `root`, the latest first."""
    filesystem, path = jobs_at(root, storage_options or {})
    ids = [name for name in names(filesystem, path) if _ID.fullmatch(name)]
    found = (load(filesystem, f"{path}/{id}") for id in ids)
    infos = [seen(info, now(), lease_s) for info in found if info is not None]
    return sorted(infos, key=lambda info: (-info.started_s, info.id))


def show(
    root: str,
    id: str,
    *,
    storage_options: StorageOptions | None = None,
    lease_s: float = LEASE_S,
    now: Callable[[], float] = time.time,
) -> JobRecord:
    """Everything known of a job. Raises `InvalidArgument` for one that is not there."""
    filesystem, path, info = _find(root, id, storage_options)
    lines = b"".join(_chunks(filesystem, path, "events-")).splitlines()
    try:
        explain = filesystem.cat_file(f"{path}/explain.txt").decode()
    except FileNotFoundError:
        explain = ""
    return JobRecord(
        info=seen(info, now(), lease_s),
        events=tuple(msgspec.json.decode(line, type=Event) for line in lines),
        explain=explain,
        output=b"".join(_chunks(filesystem, path, "output-")).decode(),
    )


def logs(root: str, id: str, *, storage_options: StorageOptions | None = None) -> Iterator[str]:
    """What a job's tasks have printed, in whole lines."""
    filesystem, path, _ = _find(root, id, storage_options)
    return (chunk.decode() for chunk in _chunks(filesystem, path, "output-"))


def cancel(
    root: str,
    id: str,
    *,
    storage_options: StorageOptions | None = None,
    lease_s: float = LEASE_S,
    now: Callable[[], float] = time.time,
) -> None:
    """Asks for a job's end; its driver sees it with its next heartbeat. Raises `InvalidArgument` for a job that does
    not run."""
    filesystem, path, info = _find(root, id, storage_options)
    state = seen(info, now(), lease_s).state
    if state != "running":
        raise InvalidArgument(f"job {id} cannot be cancelled: it is {state}")
    filesystem.pipe_file(f"{path}/cancel", b"")


def _find(root: str, id: str, options: StorageOptions | None) -> tuple[Any, str, JobInfo]:
    check_id(id)
    filesystem, directory = jobs_at(root, options or {})
    path = f"{directory}/{id}"
    info = load(filesystem, path)
    if info is None:
        raise InvalidArgument(f"there is no job {id!r} under {root}")
    return filesystem, path, info


def load(filesystem: Any, path: str) -> JobInfo | None:
    """None: there is none, or what is there is nothing that we wrote."""
    try:
        return msgspec.json.decode(filesystem.cat_file(f"{path}/job.json"), type=JobInfo)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def seen(info: JobInfo, now_s: float, lease_s: float) -> JobInfo:
    """The job as it counts now: nobody writes that a driver is gone."""
    if info.state == "running" and now_s - info.seen_s > lease_s:
        return msgspec.structs.replace(info, state="lost")
    return info


def _chunks(filesystem: Any, path: str, prefix: str) -> Iterator[bytes]:
    for name in sorted(names(filesystem, path)):
        if name.startswith(prefix):
            yield filesystem.cat_file(f"{path}/{name}")


def names(filesystem: Any, path: str) -> list[str]:
    """What is in a directory; nothing, if it is not there."""
    try:
        entries = filesystem.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]


def jobs_at(root: str, options: StorageOptions) -> tuple[Any, str]:
    """Where the records under `root` are."""
    return open_kept(f"{root.rstrip('/')}/jobs", options)


def check_id(id: str) -> None:
    """Refuses a name that could lead out of its directory, or that a shell would take for something else."""
    if not _ID.fullmatch(id):
        raise InvalidArgument(f"the name of a job is letters, digits, '_', '.' and '-', at most 200, not {id!r}")


def replace_file(filesystem: Any, path: str, data: bytes) -> None:
    """Makes `data` the file, so that a reader sees the old bytes or the new ones. Other filesystems do so themselves;
    a local one cuts the file to nothing first."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, data)
        return
    temporary = f"{path}.new-{os.getpid()}"
    try:
        filesystem.pipe_file(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        remove_file(filesystem, temporary)
        raise


def remove_file(filesystem: Any, path: str) -> None:
    """Removes a file that may be gone already."""
    try:
        filesystem.rm_file(path)
    except FileNotFoundError:
        pass
