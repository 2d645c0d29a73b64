"""The engine under cp, put, get and sync: what to copy is planned first, then copied by several threads.

Invariants: nothing is written before the plan stands; a file that fails does not stop the others; nothing is deleted
unless everything else succeeded. Results come in the order of the plan. An interrupt leaves complete files and no
half one, and the next run skips what is complete.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from .entry import Entry, find_entry, get_entry, relative_to, walk
from .filecopy import copy_file, has_directories, have_same_content, is_complete
from .location import Location

_WINDOW_PER_JOB = 4
"""Files handed to the threads ahead of the one whose result is awaited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """How to copy."""

    jobs: int = 16
    """Files under way at once. A store makes the small ones among them durable together."""
    checksum: bool = False
    """Compare contents instead of size and time, and read every copy back."""
    dry_run: bool = False
    """Say what would be done."""
    force: bool = False
    """Copy even what looks complete."""

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= 256:
            raise ValueError(f"jobs must be between 1 and 256, not {self.jobs}")


@dataclass(frozen=True, slots=True)
class Copy:
    """One file to copy."""

    source: Location
    entry: Entry
    target: Location
    existing: Entry | None
    """What is at the target now."""


@dataclass(slots=True)
class Plan:
    """Everything a transfer will do."""

    copies: list[Copy] = field(default_factory=list)
    directories: list[Location] = field(default_factory=list)
    """To be made, parents first."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(URL, why) of what cannot be copied: links to nowhere or to directories, pipes, devices."""
    links_followed: int = 0
    """Symbolic links that are copied as the files they lead to."""
    deletions: list[tuple[Location, Entry]] = field(default_factory=list)
    """Extra in the target, children first. Only sync makes these."""

    @property
    def total_bytes(self) -> int:
        return sum(copy.entry.size_bytes for copy in self.copies)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file."""

    action: str
    """copy, skip, delete or fail."""
    source: str
    target: str
    size_bytes: int
    error: str = ""


def plan_copy(plan: Plan, source: Location, target: Location, *, recursive: bool, mirror: bool = False) -> None:
    """Add the copying of `source` to be `target` itself. `mirror` plans the deletion of what else is there.

    Raises FileNotFoundError, IsADirectoryError (without `recursive`), and ValueError if one lies inside the other.
    """
    root = get_entry(source.fs, source.path)
    existing_root = find_entry(target.fs, target.path)
    refuse_overlap(source, target, mirror=mirror)
    if not root.is_dir:
        if existing_root is not None and existing_root.is_dir:
            raise IsADirectoryError(f"cannot replace a directory by a file: {target.url}")
        _plan_entry(plan, source, root, target, existing_root)
        return
    if not recursive:
        raise IsADirectoryError(f"is a directory, pass -r to copy it: {source.url}")
    if existing_root is not None and not existing_root.is_dir:
        raise NotADirectoryError(f"cannot replace a file by a directory: {target.url}")
    existing: dict[str, Entry] = {}
    if existing_root is not None:
        walked = walk(target.fs, target.path, with_parts=mirror)
        existing = {relative_to(entry.path, target.path): entry for _, entry in walked}
    else:
        plan.directories.append(target)
    wanted = set()
    for _, entry in walk(source.fs, source.path):
        relative = relative_to(entry.path, source.path)
        wanted.add(relative)
        _plan_entry(plan, source.at(entry.path), entry, target.join(relative), existing.get(relative))
    if mirror:
        extra = [entry for relative, entry in existing.items() if relative not in wanted]
        plan.deletions.extend((target.at(entry.path), entry) for entry in reversed(extra))


def refuse_overlap(source: Location, target: Location, *, mirror: bool) -> None:
    """A tree cannot be copied into itself, and a mirror would delete a source that lies in it."""
    if source.protocol != target.protocol or source.fs != target.fs:
        return
    inner, outer = _canonical(target), _canonical(source)
    if inner == outer:
        raise ValueError(f"source and target are the same: {source.url}")
    if inner.startswith(outer.rstrip("/") + "/"):
        raise ValueError(f"the target lies inside the source: {target.url}")
    if mirror and outer.startswith(inner.rstrip("/") + "/"):
        raise ValueError(f"the source lies inside the target and would be deleted: {source.url}")


def _canonical(location: Location) -> str:
    return os.path.realpath(location.path) if location.protocol in {"file", "local"} else location.path


def _plan_entry(plan: Plan, source: Location, entry: Entry, target: Location, existing: Entry | None) -> None:
    if entry.is_dir and entry.link_target is not None:
        plan.left_out.append((source.url, "a symbolic link to a directory"))
    elif entry.is_dir:
        if existing is None or not existing.is_dir:
            plan.directories.append(target)
    elif entry.is_file:
        plan.copies.append(Copy(source, entry, target, existing))
        plan.links_followed += entry.link_target is not None
    else:
        plan.left_out.append((source.url, "a broken symbolic link" if entry.kind == "link" else "not a regular file"))


class Transfer:
    """One run of a plan."""

    def __init__(self, plan: Plan, config: TransferConfig, *, on_bytes: Callable[[int], None]) -> None:
        self._plan = plan
        self._config = config
        self._on_bytes = on_bytes
        self._stop = threading.Event()

    def run(self) -> Iterator[Outcome]:
        """Do it all, one outcome per file. Interrupted, it stops the files under way before it goes on raising."""
        failed = False
        yield from self._make_directories()
        for outcome in self._in_parallel(self._plan.copies):
            failed = failed or outcome.action == "fail"
            yield outcome
        if failed and self._plan.deletions:
            yield Outcome("fail", "", "", 0, "nothing was deleted, because not everything was copied")
        else:
            yield from self._delete()

    def _make_directories(self) -> Iterator[Outcome]:
        if self._config.dry_run:
            return
        for directory in self._plan.directories:
            try:
                if has_directories(directory):
                    directory.fs.makedirs(directory.path, exist_ok=True)
            except Exception as error:
                yield Outcome("fail", "", directory.url, 0, _sentence(error))

    def _in_parallel(self, copies: Iterable[Copy]) -> Iterator[Outcome]:
        pending: deque[Future[Outcome]] = deque()
        executor = ThreadPoolExecutor(self._config.jobs, thread_name_prefix="emberline-copy")
        try:
            for copy in copies:
                pending.append(executor.submit(self._one, copy))
                if len(pending) > self._config.jobs * _WINDOW_PER_JOB:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            self._stop.set()
            executor.shutdown(wait=True, cancel_futures=True)

    def _one(self, copy: Copy) -> Outcome:
        source, target = copy.source.url, copy.target.url
        size_bytes = copy.entry.size_bytes
        try:
            if self._is_done(copy):
                self._on_bytes(size_bytes)
                return Outcome("skip", source, target, size_bytes)
            if copy.existing is not None and copy.existing.is_dir:
                raise IsADirectoryError("a directory is in the way")
            if not self._config.dry_run:
                copy_file(
                    copy.source, copy.entry, copy.target,
                    on_bytes=self._on_bytes, stop=self._stop, verify=self._config.checksum,
                )  # fmt: skip
            return Outcome("copy", source, target, size_bytes)
        except Exception as error:
            return Outcome("fail", source, target, size_bytes, _sentence(error))

    def _is_done(self, copy: Copy) -> bool:
        existing = copy.existing
        if existing is None or not existing.is_file or self._config.force:
            return False
        if self._config.checksum:
            same_size = existing.size_bytes == copy.entry.size_bytes
            return same_size and have_same_content(copy.source, copy.target, stop=self._stop)
        return is_complete(copy.entry, existing, protocol=copy.target.protocol)

    def _delete(self) -> Iterator[Outcome]:
        for location, entry in self._plan.deletions:
            is_real_directory = entry.is_dir and entry.link_target is None
            try:
                if not self._config.dry_run:
                    if not is_real_directory:
                        location.fs.rm_file(location.path)
                    elif has_directories(location):
                        location.fs.rmdir(location.path)
                yield Outcome("delete", "", location.url, entry.size_bytes)
            except Exception as error:
                yield Outcome("fail", "", location.url, 0, _sentence(error))


def _sentence(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{error or type(error).__name__}"
