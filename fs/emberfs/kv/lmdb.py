"""The embedded KV: one LMDB environment in a directory, durable at every commit.

Rules, each for a way in which LMDB bites:
  - The map is large and sparse; if it fills up nevertheless it is doubled between two commits, while nobody reads.
  - An environment is opened once per process: LMDB's file locks do not survive a second one.
  - In a forked child an inherited environment is never touched: its calls raise StoreClosed, the child opens its own.
  - A write transaction begins and ends inside one `_apply`, on one thread; a read transaction inside one primitive.
    No LMDB object outlives a call, so nobody can use up the reader slots.
  - LMDB copies pages on write, so a deletion needs space, too. `reserve_bytes` past the last used page are always
    allocated. When they cannot be topped up the store is low on space: only commits that reclaim are taken, and they
    find the reserve. It recovers by itself, as the top-up is tried again before each refusal.

Conflicts are known only for commits made through this object: the owner of the directory keeps other processes out.
Does not know: what is stored, or who else is in the directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb

from ..errors import NoSpace, StoreBusy, StoreFormat, TargetFailed
from ..runtime import Runtime
from .batch import Batch, Row, resolve
from .transaction import OptimisticKV

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
READERS_MAX = 126
LOCK_FILE_BYTES = 64 * (READERS_MAX + 2)
"""LMDB's header and reader table, a cache line each."""
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
PAGES_PER_COMMIT = 8
"""Pages that every commit may take beside its data: free list, roots, slack."""
MAP_GROWTH_MAX = 8
"""Doublings of the map in one commit: enough for the largest group in the smallest map."""

_opened: weakref.WeakValueDictionary[tuple[int, int], LmdbKV] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True, slots=True)
class LmdbConfig:
    """How one environment is opened."""

    map_size_bytes: int = 1 << 40
    """Address space to map: neither memory nor disk. Grows by itself when it is too small."""
    reserve_bytes: int = 512 << 10
    """Disk space kept for deletions on a full disk. An empty store takes one and a half times as much."""

    def __post_init__(self) -> None:
        if self.map_size_bytes < 1 << 16:
            raise ValueError(f"map_size_bytes is at least 65536, not {self.map_size_bytes}")
        if self.reserve_bytes < 1 << 16:
            raise ValueError(f"reserve_bytes is at least 65536, not {self.reserve_bytes}")


class LmdbKV(OptimisticKV):
    """An ordered transactional KV in one directory of the local disk."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str], runtime: Runtime, config: LmdbConfig | None = None) -> LmdbKV:
        """Open or create the store in `directory`.

        Raises StoreBusy (open in this process already), StoreFormat (the file is not ours or damaged), NoSpace.
        """
        return cls(Path(directory), runtime, config or LmdbConfig())

    def __init__(self, directory: Path, runtime: Runtime, config: LmdbConfig) -> None:
        super().__init__(runtime)
        directory.mkdir(parents=True, exist_ok=True)
        status = directory.stat()
        self._identity = (status.st_dev, status.st_ino)
        if self._identity in _opened:
            raise StoreBusy("the store is open in this process already: share that one", str(directory))
        self._path = directory / DATA_FILE
        self._config = config
        self._env = _open_environment(directory, config.map_size_bytes)
        self._env.reader_check()
        self._page_bytes: int = self._env.stat()["psize"]
        if self._path.stat().st_size < self._used_end():
            self._env.close()
            raise StoreFormat(f"{self._path} is damaged: it is shorter than what it says it holds")
        self._allocated_end = self._used_end()
        self._allocate(config.reserve_bytes)
        _opened[self._identity] = self

    # Reading.

    def _get(self, key: bytes) -> bytes | None:
        transaction = self._env.begin()
        value: bytes | None = transaction.get(key)
        transaction.abort()
        return value

    def _get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._env.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def _scan(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[Row]:
        rows: list[Row] = []
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            if not reverse:
                found = cursor.set_range(begin)
                items = cursor.iternext()
            else:
                # To the first key at or after `end`, then one back; behind the last key, to the last.
                found = cursor.prev() if cursor.set_range(end) else cursor.last()
                items = cursor.iterprev()
            if not found:
                return rows
            for row in items:
                if (row[0] < begin) if reverse else (row[0] >= end):
                    break
                rows.append(row)
                if len(rows) == limit:
                    break
        return rows

    # Writing.

    def _may_lead(self) -> bool:
        return self._runtime.may_block()

    async def _apply_group(self, group: Sequence[Batch]) -> None:
        for _ in range(MAP_GROWTH_MAX):
            try:
                return await self._runtime.offload(self._apply, group)
            except lmdb.MapFullError:
                # No reader can be active here: reads run to their end under the baton, which we hold again.
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        raise NoSpace(f"the map of {self._path} cannot grow any more")

    def _apply(self, group: Sequence[Batch]) -> None:
        """One LMDB transaction. Blocks, and runs on any thread; touches only what nobody else uses meanwhile."""
        headroom_bytes = self._config.reserve_bytes + self._growth_bytes_max(group)
        if not all(batch.reclaims for batch in group) and not self._allocate(headroom_bytes):
            raise NoSpace("the disk is full: only deletions are taken until there is space again", str(self._path))
        try:
            with self._env.begin(write=True) as transaction:
                for batch in group:
                    _write(transaction, batch)
        except lmdb.Error as error:
            if error.code in OUT_OF_SPACE:
                raise NoSpace("the disk is full", str(self._path)) from error
            raise
        # Whatever the commit took from the reserve, give back now rather than when the disk is full.
        self._allocate(self._config.reserve_bytes)

    def _used_end(self) -> int:
        """The first byte of the data file that no page uses."""
        return (int(self._env.info()["last_pgno"]) + 1) * self._page_bytes

    def _growth_bytes_max(self, group: Sequence[Batch]) -> int:
        """What the file may grow by: new data with half-filled pages, and a copy of each page on the way to a row."""
        stat = self._env.stat()
        writes = sum(len(batch.writes) + len(batch.clears) for batch in group)
        copied = min(writes * (stat["depth"] + 1), stat["branch_pages"] + stat["leaf_pages"])
        return 2 * sum(batch.size_bytes for batch in group) + (copied + PAGES_PER_COMMIT) * self._page_bytes

    def _allocate(self, headroom_bytes: int) -> bool:
        """Have `headroom_bytes` of disk allocated past the last used page; False if the disk is full."""
        needed_end = self._used_end() + headroom_bytes
        if needed_end <= self._allocated_end:
            return True
        # Half a reserve more than asked for, so that not every commit comes here.
        end = needed_end + self._config.reserve_bytes // 2
        try:
            _allocate_file(self._path, self._allocated_end, end)
        except NoSpace:
            return False
        self._allocated_end = end
        return True

    # Letting go.

    def _release(self) -> None:
        del _opened[self._identity]
        self._env.close()

    def _disown(self) -> None:
        """In a forked child: never touch the environment again."""
        # Nor may the end of this interpreter close it: that could wait for a thread which the fork left behind.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._env))
        self._closed = "this store was opened before a fork: open it again in the child process"
        self._version = -1


def _open_environment(directory: Path, map_size_bytes: int) -> lmdb.Environment:
    data_path = directory / DATA_FILE
    is_new = not data_path.exists()
    # LMDB maps its lock file as a sparse one: on a full disk the first touch would be a bus error.
    _allocate_file(directory / LOCK_FILE, 0, LOCK_FILE_BYTES)
    try:
        return lmdb.open(
            str(directory),
            map_size=map_size_bytes,
            sync=True,
            metasync=True,
            writemap=False,
            max_readers=READERS_MAX,
        )
    except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError) as error:
        raise StoreFormat(f"{data_path} is damaged or not a key-value store: {error}") from error
    except lmdb.Error as error:
        if is_new:
            data_path.unlink(missing_ok=True)
        if error.code in OUT_OF_SPACE:
            raise NoSpace("the disk is full", str(directory)) from error
        raise TargetFailed(f"the key-value store cannot be opened: {error}", str(directory)) from error


def _allocate_file(path: Path, begin: int, end: int) -> None:
    """Have the disk space of bytes [begin, end) of a file allocated, making the file if need be."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(file, begin, end - begin)
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise NoSpace("the disk is full", str(path)) from error
        raise
    finally:
        os.close(file)


def _write(transaction: lmdb.Transaction[bytes], batch: Batch) -> None:
    for begin, end in batch.clears:
        with transaction.cursor() as cursor:
            found = cursor.set_range(begin)
            while found and cursor.key() < end:
                # Deleting moves on to the next row; behind the last one the key is empty.
                cursor.delete()
                found = bool(cursor.key())
    for key, write in batch.writes.items():
        value = resolve(write, transaction.get(key)) if isinstance(write, tuple) else write
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


def _disown_inherited() -> None:
    for kv in list(_opened.values()):
        kv._disown()
    _opened.clear()
    # py-lmdb has a registry of its own, which takes the parent's environments for ours, and lets them be forgotten
    # only by closing them. Ours does its work, so here it gets to see no files.
    library_registry = sys.modules.get("lmdb._envid")
    if library_registry is not None:
        library_registry.env_keys = lambda path, subdir: ()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_disown_inherited)
