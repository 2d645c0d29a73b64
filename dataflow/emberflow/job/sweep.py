"""The sweep: takes away what no job needs any more.

In this order, under one root:
- what attempts have left in a step: data that no `.won` names, an hour old, or of a job that is lost;
- steps that nobody has used for as long as they are kept; then, the longest unused first, as many as it takes to come
  under a size;
- hidden directories of datasets that lost jobs were writing;
- records of jobs as old, and what is kept for jobs by their names, when none of that name is known.

Invariants: nothing that a running job names is touched. A step loses its `.won` files before its data, so whoever looks
meanwhile sees a step of which less is done; whoever looked a moment before finds data missing, which a job makes again.
So any number of sweeps may run at once, beside any jobs. Only names that jobs give are ever removed.
"""

from __future__ import annotations

import datetime
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from ..appending import is_partly_done, take_back
from ..errors import FlowError, InvalidArgument
from ..sources import STAGING_PREFIX, StorageOptions, open_kept
from .history import LEASE_S, JobInfo, jobs, jobs_at, load, names, remove_file, seen
from .steps import Output

RETENTION_S = 7 * 86_400.0
"""How long steps and records are kept after their last use."""

# An attempt's data comes to be named, or is removed, within moments of its end.
_GRACE_S = 3_600.0
_STEP = re.compile(r"[0-9a-f]{32}")
_DATA = re.compile(r"(\d{5,})-[0-9a-f]+\.exchange")
_WON = re.compile(r"(\d{5,})\.won")
# What is to become a `.won`, on a local disk.
_TEMPORARY = re.compile(r"\.new-.+")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(slots=True)
class Swept:
    """What was removed, as URLs or paths; in a dry run, what would have been."""

    attempts: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    stagings: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    size_bytes: int = 0
    """Freed under the root."""
    kept_bytes: int = 0
    """In the steps that are left."""
    errors: list[str] = field(default_factory=list)
    """What could not be removed, and why."""


def sweep(
    root: str,
    *,
    storage_options: StorageOptions | None = None,
    retention_s: float = RETENTION_S,
    size_bytes_max: int | None = None,
    lease_s: float = LEASE_S,
    now: Callable[[], float] = time.time,
    dry_run: bool = False,
) -> Swept:
    """Removes what no job needs. Steps used within `retention_s` stay, if all are within `size_bytes_max`."""
    if retention_s < 0 or (size_bytes_max is not None and size_bytes_max < 0):
        raise InvalidArgument("what is kept, by time or by size, is not less than nothing")
    sweeping = _Sweep(root, storage_options or {}, lease_s, now, dry_run)
    steps = list(sweeping.steps())
    for step in steps:
        sweeping.attempts(step)
    sweeping.unused(steps, retention_s, size_bytes_max)
    for info in sweeping.infos.values():
        if info.state == "lost" and info.staging is not None:
            sweeping.staging(info, info.staging)
    sweeping.records(retention_s)
    sweeping.moments(retention_s)
    return sweeping.swept


def _is_of(id: str, name: str) -> bool:
    """Whether a job is one of those called `name`: they are `name-1`, `name-2`; `name-1-3f2a` beside a running one."""
    return re.fullmatch(re.escape(name) + r"-\d+(-[0-9a-f]{4})?", id) is not None


@dataclass(slots=True)
class _Step:
    identity: str
    files: dict[str, Mapping[str, Any]]
    """By name, as the filesystem tells of them."""
    used_s: float

    @property
    def size_bytes(self) -> int:
        return sum(int(file["size"] or 0) for file in self.files.values())


class _Sweep:
    """One sweep over one root."""

    def __init__(
        self, root: str, options: StorageOptions, lease_s: float, now: Callable[[], float], dry_run: bool
    ) -> None:
        self._options = options
        self._lease_s = lease_s
        self._now = now
        self._dry_run = dry_run
        self._fs, self._steps = open_kept(f"{root.rstrip('/')}/steps", options)
        self._jobs = jobs_at(root, options)[1]
        self.infos = {info.id: info for info in jobs(root, storage_options=options, lease_s=lease_s, now=now)}
        self.swept = Swept()

    # ---- steps

    def steps(self) -> Iterator[_Step]:
        """All there are."""
        used_s: dict[str, float] = {}
        for info in self.infos.values():
            for identity in info.steps:
                used_s[identity] = max(used_s.get(identity, 0.0), info.last_s)
        for identity in names(self._fs, self._steps):
            if _STEP.fullmatch(identity):
                files = self._files(f"{self._steps}/{identity}")
                newest_s = max((self._time(file) for file in files.values()), default=0.0)
                yield _Step(identity, files, max(newest_s, used_s.get(identity, 0.0)))

    def _files(self, path: str) -> dict[str, Mapping[str, Any]]:
        try:
            entries = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(entry["name"]): entry for entry in entries if entry["type"] == "file"}

    def _time(self, file: Mapping[str, Any]) -> float:
        """When a file was written; now, if its filesystem does not say."""
        for key in _TIMES:
            value = file.get(key)
            if isinstance(value, datetime.datetime):
                return value.timestamp()
            if isinstance(value, int | float):
                return float(value)
        return self._now()

    def attempts(self, step: _Step) -> None:
        """Removes what attempts have left in a step that no job works on."""
        is_lost = any(info.state == "lost" and step.identity in info.steps for info in self.infos.values())
        oldest_s = self._now() - _GRACE_S
        left = [name for name in self._unnamed(step) if is_lost or self._time(step.files[name]) < oldest_s]
        if not left or self._is_used(step.identity):
            return
        for name in left:
            path = f"{self._steps}/{step.identity}/{name}"
            if self._remove(path, self.swept.attempts, partial(remove_file, self._fs, path)):
                self.swept.size_bytes += int(step.files.pop(name)["size"] or 0)

    def _unnamed(self, step: _Step) -> Iterator[str]:
        attempts: dict[str, list[str]] = {}
        for name in step.files:
            if match := _DATA.fullmatch(name):
                attempts.setdefault(match[1], []).append(name)
            elif _TEMPORARY.fullmatch(name):
                yield name
        for index, found in attempts.items():
            if f"{index}.won" not in step.files:
                yield from found
            # One file and a `.won`: they belong together. Reading every manifest would cost as much as the job did.
            elif len(found) > 1 and (output := self._won(step, index)) is not None:
                yield from (name for name in found if name != posixpath.basename(output.url))

    def _won(self, step: _Step, index: str) -> Output | None:
        """What counts for a task; None if that cannot be read, which is a job's to deal with."""
        try:
            data = self._fs.cat_file(f"{self._steps}/{step.identity}/{index}.won")
            return msgspec.msgpack.decode(data, type=Output)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def unused(self, steps: list[_Step], retention_s: float, size_bytes_max: int | None) -> None:
        """Removes steps: those unused for so long, then the longest unused until the rest is small enough."""
        kept_bytes = sum(step.size_bytes for step in steps)
        oldest_s = self._now() - retention_s
        for step in sorted(steps, key=lambda step: step.used_s):
            is_too_much = size_bytes_max is not None and kept_bytes > size_bytes_max
            if (step.used_s < oldest_s or is_too_much) and not self._is_used(step.identity):
                path = f"{self._steps}/{step.identity}"
                if self._remove(path, self.swept.steps, partial(self._remove_step, step)):
                    kept_bytes -= step.size_bytes
                    self.swept.size_bytes += step.size_bytes
        self.swept.kept_bytes = kept_bytes

    def _remove_step(self, step: _Step) -> None:
        for name in sorted(step.files, key=lambda name: _WON.fullmatch(name) is None):
            remove_file(self._fs, f"{self._steps}/{step.identity}/{name}")
        self._remove_directory(f"{self._steps}/{step.identity}")

    def _is_used(self, identity: str) -> bool:
        """Whether a running job names the step, asked anew: jobs begin, and begin stages, while we sweep."""
        for id in names(self._fs, self._jobs):
            known = self.infos.get(id)
            if known is None or known.state in ("running", "lost"):
                info = load(self._fs, f"{self._jobs}/{id}")
                if info is not None:
                    self.infos[id] = seen(info, self._now(), self._lease_s)
        return any(info.state == "running" and identity in info.steps for info in self.infos.values())

    # ---- what else jobs leave

    def staging(self, info: JobInfo, url: str) -> None:
        """Removes the hidden directory of a dataset that a lost job was writing. If the job died between the two
        renames of an overwrite, the old files go back first, once nobody can be about to do the second; if it died
        while it appended, what it had added goes, once nobody can be about to add more."""
        filesystem, path = open_kept(url, self._options)
        path = path.rstrip("/")
        if not posixpath.basename(path).startswith(STAGING_PREFIX) or not filesystem.exists(path):
            return
        old, back = f"{path}/old", ""
        is_half = is_partly_done(filesystem, path)
        target = "" if info.target is None else open_kept(info.target, self._options)[1].rstrip("/")
        if filesystem.exists(old) or is_half:
            if not target or self._now() - info.last_s < _GRACE_S:
                return
            back = "" if is_half else target

        def remove() -> None:
            self._forget_files(info, path)
            if is_half:
                take_back(filesystem, path, target)
            if back and not filesystem.exists(back):
                filesystem.mv(old, back, recursive=True)
            filesystem.rm(path, recursive=True)

        self._remove(url, self.swept.stagings, remove)

    def _forget_files(self, info: JobInfo, path: str) -> None:
        """What wrote files below `path` is no longer done: whoever goes on with the job must not count on them."""
        for identity in info.steps:
            files = self._files(f"{self._steps}/{identity}")
            won = [match[1] for name in files if (match := _WON.fullmatch(name))]
            step = _Step(identity, files, 0.0)
            first = self._won(step, won[0]) if won else None
            if first is not None and any(f"{path}/" in file.staged_url for file in first.files):
                for index in won:
                    remove_file(self._fs, f"{self._steps}/{identity}/{index}.won")

    def records(self, retention_s: float) -> None:
        """Removes records of jobs that ended, or were last heard of, so long ago."""
        oldest_s = self._now() - retention_s
        for id, known in self.infos.items():
            path = f"{self._jobs}/{id}"
            info = load(self._fs, path)
            if info is None or known.state == "running" or info.last_s >= oldest_s:
                continue
            self._remove(path, self.swept.records, partial(self._remove_record, path))

    def moments(self, retention_s: float) -> None:
        """Removes the `<name>.now` of names that no job has any more, and what was to become one."""
        left = [id for id in names(self._fs, self._jobs) if f"{self._jobs}/{id}" not in self.swept.records]
        for name, file in self._files(self._jobs).items():
            age_s = self._now() - self._time(file)
            stem = name.removesuffix(".now")
            is_old = stem != name and age_s > retention_s and not any(_is_of(id, stem) for id in left)
            if is_old or (_TEMPORARY.fullmatch(name) and age_s > _GRACE_S):
                path = f"{self._jobs}/{name}"
                self._remove(path, self.swept.records, partial(remove_file, self._fs, path))

    def _remove_record(self, path: str) -> None:
        # The name of the job last: without it nobody would find the rest.
        for name in sorted(names(self._fs, path), key=lambda name: name == "job.json"):
            remove_file(self._fs, f"{path}/{name}")
        self._remove_directory(path)

    # ---- removing

    def _remove_directory(self, path: str) -> None:
        try:
            self._fs.rmdir(path)
        except OSError:
            # Object stores have none; elsewhere something new is in it, or it is gone.
            pass

    def _remove(self, what: str, removed: list[str], action: Callable[[], None]) -> bool:
        """Whether `action` removed `what`, or would have. One failure does not keep us from the rest."""
        if not self._dry_run:
            try:
                action()
            except FileNotFoundError:
                return False  # another sweep was first
            except (OSError, FlowError) as error:
                self.swept.errors.append(f"{what}: {type(error).__name__}: {error}")
                return False
        removed.append(what)
        return True
