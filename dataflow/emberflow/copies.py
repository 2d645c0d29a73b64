"""Copies, in this process's memory, of files of a store that the queries of a session read again and again.

What fsspec reads for DuckDB comes through Python: DuckDB holds the interpreter's lock while it copies the bytes, twice,
and its threads wait for each other. A file of this machine it reads by itself. So a file of which half as much was read
as it is long is read once more, whole, and checked by the store as ever, into a file in memory that has no name
(memfd). Queries that begin from then on read that one. To copy a byte costs about as much as to read it through Python:
a session that then reads no more has paid for three times what it read.

Invariants: a copy stands for a file only while the file's row is the one that it was copied under, so what was written
anew is read anew; whoever writes into a file in place changes its row when he syncs or closes. What a query was given
stays until the query has ended. All copies, those that only such a query still has too, have at most the bytes allowed.

Names do not leak: only scans of Parquet are given copies, in queries that say nothing of file names. Directories that
are columns (`year=2020/`) are in the names of copies, too, and errors are about the file of the store.

Does not know: which queries there are. Any number of threads may use one.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import resource
import shutil
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import duckdb
import pyarrow as pa

IDLE_S = 60.0
"""A copy that no query was given for so long makes room for others."""

_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
COPIES_MAX = 256 if _DESCRIPTORS == resource.RLIM_INFINITY else min(256, _DESCRIPTORS // 10)
"""Each has a descriptor, and those that DuckDB opens of it."""
_STEP_BYTES = 1 << 20
_FILES_MAX = 10_000
"""Of which it is known how much was read."""
_IS_POSSIBLE = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")
_MAY_NAME = re.compile("parquet_|glob|query")
"""Of functions that give names of files, however they are quoted; `query()` runs a text that was made anywhere."""
_KEY = re.compile(r"[^/=]+=[^/]*/")


class Copies:
    """Of one session. `directory` is the session's own; what they may hold is asked for when the first one is made."""

    def __init__(self, directory: str, limit_bytes: Callable[[], int]) -> None:
        self._directory = directory
        self._limit_bytes = functools.cache(limit_bytes)
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        """By URL, as far as something was read of them."""
        self._held: weakref.WeakSet[_Copy] = weakref.WeakSet()
        self._being_made: set[str] = set()
        self._current = _Current()
        self._serial = itertools.count(1)

    @property
    def size_bytes(self) -> int:
        """Of all copies."""
        return sum(copy.size_bytes for copy in list(self._held))

    def note(self, url: str, row: Any, size_bytes: int) -> None:
        """So much was read of a file that has this row."""
        if not _IS_POSSIBLE:
            return
        with self._lock:
            file = self._files.get(url)
            if file is None or file.row != row:
                file = self._files[url] = _File(row)
                if len(self._files) > _FILES_MAX:
                    self._files.popitem(last=False)
            file.read_bytes += size_bytes

    @contextmanager
    def lent(self, text: str) -> Iterator[Loan]:
        """What a query of this text is given until it has ended, and all that reads for it."""
        with self._lock:
            is_any = any(file.is_worth for file in self._files.values())
        paths = _paths_of(text) if is_any else frozenset()
        loan = Loan(paths, os.path.join(self._directory, f"copies-{next(self._serial)}"))
        try:
            yield loan
        finally:
            loan.end()

    @contextmanager
    def binding(self, loan: Loan) -> Iterator[None]:
        """In the block, in this thread, that query and no other one is bound: it may be given copies."""
        before, self._current.loan = self._current.loan, loan
        try:
            yield
        finally:
            self._current.loan = before

    def stand_ins(self, asked: str, urls: Sequence[str], open_file: Callable[[str], Any]) -> list[str] | None:
        """Local files with the bytes of these, which are what the query asked for by `asked`; None unless there are
        such of all of them. `open_file` opens one for reading."""
        loan = self._current.loan
        if loan is None or asked not in loan.paths or not urls:
            return None
        if any("\\" in url for url in urls):
            return None  # To DuckDB that separates directories, in local names.
        with self._lock:
            files = [self._files[url] for url in urls if url in self._files and self._files[url].is_worth]
        if len(files) < len(urls) or not self._may_hold(files):
            return None
        copies = []
        for url in urls:
            if (copy := self._copy(url, open_file)) is None:
                return None
            copies.append(copy)
        for file in files:
            file.used_s = time.monotonic()
        return loan.take(urls, copies)

    def close(self) -> None:
        """Lets go of all copies."""
        with self._lock:
            self._files.clear()

    def _copy(self, url: str, open_file: Callable[[str], Any]) -> _Copy | None:
        """The copy of a file as it is now, made if it is worth that."""
        try:
            handle = open_file(url)
        except OSError:
            return None  # Who reads it otherwise says so.
        with handle:
            row = handle.inode_to_read
            with self._lock:
                file = self._files.get(url)
                if file is None or file.row != row:
                    self._files.pop(url, None)
                    return None
                if file.copy is not None or not file.is_worth or url in self._being_made:
                    return file.copy
                copy = self._room_for(handle.size)
                if copy is None:
                    return None
                self._being_made.add(url)
                file.used_s = time.monotonic()
            # Without the lock: it may take a while, and other queries do not wait for it.
            try:
                is_whole = copy.fill(handle)
            finally:
                with self._lock:
                    self._being_made.remove(url)
            with self._lock:
                file.copy, file.is_refused = (copy, False) if is_whole else (None, True)
                return file.copy

    def _may_hold(self, files: Sequence[_File]) -> bool:
        """Whether copies of all of them fit beside each other."""
        return len(files) <= COPIES_MAX and sum(file.row.length for file in files) <= self._limit_bytes()

    def _room_for(self, size_bytes: int) -> _Copy | None:
        """Memory for a copy, if there is some when copies that were not used for a while are dropped."""

        def fits() -> bool:
            return len(self._held) < COPIES_MAX and self.size_bytes + size_bytes <= self._limit_bytes()

        until_s = time.monotonic() - IDLE_S
        for file in sorted(self._files.values(), key=lambda file: file.used_s):
            if fits():
                break
            if file.copy is not None and file.used_s < until_s:
                file.copy, file.read_bytes = None, 0
        with suppress(OSError):
            if fits():
                copy = _Copy(size_bytes)
                self._held.add(copy)
                return copy
        return None


def _paths_of(text: str) -> frozenset[str]:
    """The paths and patterns of a query that may be read from copies: none if it may ask for names of files."""
    from .plan.scantext import find, may_read_files  # Of no use to a query that nothing is lent to.

    rest, scans = find(text)
    if "filename" in text.lower() or _MAY_NAME.search(rest.lower()) or may_read_files(rest):
        return frozenset()
    others = {path for scan in scans.values() if scan.function != "read_parquet" for path in scan.paths}
    paths = {path for scan in scans.values() if scan.function == "read_parquet" for path in scan.paths}
    return frozenset(paths - others)


class _File:
    """What is known of a file, while its row is this one."""

    __slots__ = ("copy", "is_refused", "read_bytes", "row", "used_s")

    def __init__(self, row: Any) -> None:
        self.row = row
        self.read_bytes = 0
        self.copy: _Copy | None = None
        self.used_s = 0.0
        self.is_refused = False
        """It could not be copied."""

    @property
    def is_worth(self) -> bool:
        """Whether it has a copy, or should have one."""
        return not self.is_refused and (self.copy is not None or 2 * self.read_bytes >= self.row.length)


class _Copy:
    """The bytes of a file, in memory until nothing refers to them."""

    def __init__(self, size_bytes: int) -> None:
        self.descriptor = -1
        self.size_bytes = size_bytes
        self.descriptor = os.memfd_create("emberflow-copy", os.MFD_CLOEXEC)

    def fill(self, handle: Any) -> bool:
        """Reads the file to its end; False if that cannot be, for whatever reason."""
        buffer = memoryview(bytearray(_STEP_BYTES))
        done = 0
        with suppress(OSError):
            while done < self.size_bytes and (count := handle.readinto(buffer)):
                done += count
                left = buffer[:count]
                while left:
                    left = left[os.write(self.descriptor, left) :]
        is_whole = done == self.size_bytes
        if not is_whole:
            self.close()  # Now, since an error may refer to it for long.
        return is_whole

    def close(self) -> None:
        """Gives the memory back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.size_bytes = -1, 0

    def __del__(self) -> None:
        self.close()


def _descriptor_path(copy: _Copy) -> str:
    return f"/proc/self/fd/{copy.descriptor}"


class Loan:
    """The copies that one query was given, under names that are gone when it has ended."""

    def __init__(self, paths: frozenset[str], directory: str) -> None:
        self.paths = paths
        self.directory = directory
        self._made: set[str] = set()
        """Directories."""
        self._copies: list[_Copy] = []
        self._urls: dict[str, str] = {}
        """By the name of the copy."""

    def take(self, urls: Sequence[str], copies: Sequence[_Copy]) -> list[str] | None:
        """Names of local files for copies of these; None if there can be none."""
        is_one = len(urls) == 1 and not _KEY.search(urls[0])
        names = [_descriptor_path(copies[0])] if is_one else self._links(urls, copies)
        if names is None:
            return None
        self._copies += copies
        self._urls |= dict(zip(names, urls, strict=True))
        return names

    def _links(self, urls: Sequence[str], copies: Sequence[_Copy]) -> list[str] | None:
        """Names in the order that those of the store have, since DuckDB sorts what a pattern gives, and with the same
        keys of partitions, which are columns."""
        names = [f"{self.directory}/{url.partition('://')[2].lstrip('/')}" for url in urls]
        for url, name, copy in zip(urls, names, copies, strict=True):
            # Keys that the directory has itself; and no name leads out of it.
            if _KEY.findall(url) != _KEY.findall(name) or os.path.normpath(name) != name:
                return None
            try:
                if (parent := os.path.dirname(name)) not in self._made:
                    os.makedirs(parent, exist_ok=True)
                    self._made.add(parent)
                with suppress(FileExistsError):  # Named twice in one query.
                    os.symlink(_descriptor_path(copy), name)
            except (OSError, ValueError):
                return None  # The local filesystem has no such names.
        return names

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the block that name a copy name the file of the store instead."""
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            message = str(error)
            for name in sorted(self._urls, key=len, reverse=True):
                message = message.replace(name, self._urls[name])
            if message == str(error):
                raise
            raise type(error)(message) from error

    def end(self) -> None:
        """Lets go of the copies."""
        self._copies.clear()
        if self._made:
            shutil.rmtree(self.directory, ignore_errors=True)


class _Current(threading.local):
    """The loan of the query that this thread binds at the moment."""

    loan: Loan | None = None
