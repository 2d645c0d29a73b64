"""The embedded store: every role in this process, on one directory, over the memory transport.

    store/
      superblock.json    format, store id, shape; written once, checked at every open
      owner.lock         flock of the owning process; its content (pid, since) is for people
      meta/              the metadata KV (LMDB)
      target-1/          a target: index/ (LMDB) and the block files

This is the wiring, and the only place where the services meet the real clock, disk and threads. One process owns a
store at a time; clients of one process share it. After a fork the child inherits nothing: see `forget_after_fork`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .client.core import Core
from .disk import LocalDisk
from .engine import ChunkEngine, EngineConfig
from .errors import AlreadyExists, InvalidPath, LimitExceeded, StoreBusy, StoreFormat
from .kv import LmdbKV
from .meta import ClientChunkOps, MetaConfig, MetaService
from .meta.dump import load
from .portal import Portal
from .runtime import AsyncioRuntime
from .storage import StorageService
from .transport import MemoryConnection
from .urls import SCHEME, SUPERBLOCK

STORE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Settings of an embedded store. `targets` is fixed when the store is made; the rest holds for this process."""

    targets: int | None = None
    """Target directories (disks, if you mount them so), that new files are dealt over. None: 1 for a new store."""
    reserve_bytes: int = 64 << 20
    """New data is refused (NoSpace) when the disk has less than this left."""
    gc_delay_s: float = 300.0
    """Seconds that readers of an unlinked or replaced file may go on."""
    trash_s: float = 7 * 86400.0
    """Seconds that removed files stay in the trash."""

    def __post_init__(self) -> None:
        if self.targets is not None and not (isinstance(self.targets, int) and 1 <= self.targets <= 256):
            raise LimitExceeded(f"targets must be 1 to 256: {self.targets!r}")
        for name in ("reserve_bytes", "gc_delay_s", "trash_s"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0):
                raise LimitExceeded(f"{name} must be a number, 0 or more: {value!r}")


class StoreVersion(msgspec.Struct, frozen=True):
    """The part of every superblock, however new."""

    format: int


class Superblock(msgspec.Struct, frozen=True):
    """What a directory says of itself."""

    format: int
    store: str
    """Random id in hex."""
    targets: int
    created_ns: int
    crc: int = 0
    """CRC32 of the JSON with this field 0."""

    def sealed(self) -> Superblock:
        """With its checksum."""
        return msgspec.structs.replace(self, crc=zlib.crc32(msgspec.json.encode(msgspec.structs.replace(self, crc=0))))


class EmbeddedStore:
    """A store that this process owns. Get one from `stores.acquire`."""

    def __init__(self, directory: Path, config: StoreConfig) -> None:
        self.directory = directory
        self.config = config
        self.forked = False
        self.closed = False
        self.url = f"{SCHEME}{directory}"
        _make_directory(directory)
        self._lock_file = _take_ownership(directory)
        try:
            self.superblock = _read_or_write_superblock(directory, config)
            self.runtime = AsyncioRuntime()
        except BaseException:
            _give_up(self._lock_file)
            raise
        self.portal = Portal(self.runtime)
        self._closers: list[Any] = []
        self._disks: list[LocalDisk] = []
        try:
            self.portal.run(self._start())
        except BaseException:
            with contextlib.suppress(Exception):  # The first error is the one that says why.
                self.shut()
            raise

    async def _start(self) -> None:
        directory, runtime = self.directory, self.runtime
        self.engines: dict[int, ChunkEngine] = {}
        for number in range(1, self.superblock.targets + 1):
            target = directory / f"target-{number}"
            (target / "index").mkdir(parents=True, exist_ok=True)
            index = LmdbKV.open(target / "index", runtime)
            self._closers.append(index)
            engine_config = EngineConfig(reserve_bytes=self.config.reserve_bytes)
            disk = LocalDisk(str(target), runtime)
            self._disks.append(disk)
            engine = await ChunkEngine.open(disk, index, runtime, config=engine_config)
            self._closers.append(engine)
            self.engines[number] = engine
        storage = MemoryConnection(StorageService(self.engines, runtime))
        self.chains = dict.fromkeys(self.engines, storage)
        used = any(engine.allocator.used_blocks().values() for engine in self.engines.values())
        if used and not (directory / "meta" / "data.mdb").exists():
            raise StoreFormat(
                f"{directory} has data but its metadata is gone: bring {directory}/meta back, or load a dump with "
                f"`emberline fs load FILE ember://{directory}`"
            )
        (directory / "meta").mkdir(exist_ok=True)
        self.meta_kv = LmdbKV.open(directory / "meta", runtime)
        self._closers.append(self.meta_kv)
        meta_config = MetaConfig(
            gc_delay_s=self.config.gc_delay_s,
            trash_s=self.config.trash_s,
            chain_count=len(self.engines),
            stripe=len(self.engines),
        )
        self.chunk_ops = ClientChunkOps(self.chains)
        self.meta_service = MetaService(self.meta_kv, runtime, self.chunk_ops, config=meta_config)
        self._closers.append(self.meta_service)
        await self.meta_service.start()
        self.meta = MemoryConnection(self.meta_service)

    @property
    def id(self) -> str:
        """The store's random id."""
        return self.superblock.store

    def free_bytes(self) -> int:
        """Bytes the file system of the fullest target has left."""
        return min(disk.free_bytes() for disk in self._disks)

    def core(self) -> Core:
        """A new client of this store, with an id of its own."""
        return Core(self.runtime, self.meta, self.chains)

    def shut(self) -> None:
        """Let the calls end, close the services in the reverse order of their start, then give the directory up.

        Closes everything, whatever fails on the way, and then raises the first error.
        """
        self.closed = True
        errors: list[Exception] = []
        self.portal.drain()
        for closer in reversed(self._closers):
            try:
                self.portal.run_last(closer.close())
            except Exception as error:
                errors.append(error)
        self.runtime.stop()
        _give_up(self._lock_file)
        if errors:
            raise errors[0]

    def forget_after_fork(self) -> None:
        """In the child: touch nothing but our copies of file descriptors. The parent goes on as if nothing was."""
        self.forked = True
        _inherited.append(self)


_inherited: list[EmbeddedStore] = []
"""Stores of our parent process. Kept, so that no finalizer touches the parent's LMDB environment or event loop."""

_lock_files: set[int] = set()
"""Of all stores of this process, those too that are just being opened."""


def forget_locks_after_fork() -> None:
    """In the child: the locks are the parent's."""
    for lock_file in _lock_files:
        # The lock is the open file's, which we share: closing our copy leaves the parent's lock alone.
        os.close(lock_file)
    _lock_files.clear()


def restore_metadata(directory: Path, lines: Iterable[str]) -> None:
    """Load a metadata dump into a store that is not open and whose `meta` directory is empty or gone.

    Raises StoreBusy, StoreFormat, AlreadyExists (there is metadata already: move `meta` away first).
    """
    _make_directory(directory)
    lock_file = _take_ownership(directory)
    try:
        _read_or_write_superblock(directory, StoreConfig())
        meta, new = directory / "meta", directory / "meta.new"
        if (meta / "data.mdb").exists():
            raise AlreadyExists(f"there is metadata already: move {meta} away, then load again", str(directory))
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        runtime = AsyncioRuntime()
        portal = Portal(runtime)
        try:
            kv = LmdbKV.open(new, runtime)
            try:
                portal.run(load(kv, lines))
            finally:
                portal.run(kv.close())
        finally:
            runtime.stop()
        # Whole now: a load that failed leaves the store as it was.
        if meta.exists():
            meta.rmdir()
        new.rename(meta)
    finally:
        _give_up(lock_file)


def _make_directory(directory: Path) -> None:
    """Make sure that `directory` is there and ours to use. Raises StoreFormat, and touches nothing of a stranger."""
    for parent in directory.parents:
        if (parent / SUPERBLOCK).exists():
            raise InvalidPath(f"{directory} is inside the store {parent}; a path in it is ember://{parent}/!/…")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreFormat(f"{directory} is not an emberline store: a file is in the way") from error
    strangers = {entry.name for entry in directory.iterdir()} - {SUPERBLOCK, "owner.lock", "superblock.new"}
    # Looked for last: a store that somebody is making at this moment has it before anything else.
    if strangers and not (directory / SUPERBLOCK).exists():
        raise StoreFormat(
            f"{directory} is not an emberline store and not empty (it holds {min(strangers)!r}); "
            "give an empty or a new directory"
        )


def _give_up(lock_file: int) -> None:
    """The reverse of `_take_ownership`."""
    _lock_files.discard(lock_file)
    os.close(lock_file)


def _take_ownership(directory: Path) -> int:
    """Lock the directory for this process; returns the lock's file descriptor. Raises StoreBusy."""
    path = directory / "owner.lock"
    lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock_file, 4096, 0)
        os.close(lock_file)
        try:
            pid = int(json.loads(owner)["pid"])
        except (ValueError, KeyError, TypeError):
            pid = None
        who = f"process {pid}" if pid is not None else "another process"
        advice = "close it there first (one process at a time)"
        if pid == os.getppid():
            advice = "it is our parent: close the store there before it forks, or use threads instead of processes"
        raise StoreBusy(f"{who} owns this store; {advice}", str(directory), pid=pid) from None
    _lock_files.add(lock_file)
    os.ftruncate(lock_file, 0)
    os.pwrite(lock_file, json.dumps({"pid": os.getpid()}).encode(), 0)
    return lock_file


def _read_or_write_superblock(directory: Path, config: StoreConfig) -> Superblock:
    path = directory / SUPERBLOCK
    if not path.exists():
        superblock = Superblock(STORE_FORMAT, os.urandom(16).hex(), config.targets or 1, time.time_ns()).sealed()
        _write_durably(path, msgspec.json.format(msgspec.json.encode(superblock)))
        return superblock
    content = path.read_bytes()
    try:
        # The format first and alone: what else a newer one says is not known.
        store_format = msgspec.json.decode(content, type=StoreVersion).format
        if store_format > STORE_FORMAT:
            raise StoreFormat(
                f"{directory} has store format {store_format}; this emberline reads up to {STORE_FORMAT}: upgrade it"
            )
        superblock = msgspec.json.decode(content, type=Superblock)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"{path} is damaged: {error}") from error
    if superblock.sealed() != superblock:
        raise StoreFormat(f"{path} is damaged: its checksum does not match")
    if config.targets not in (None, superblock.targets):
        raise StoreFormat(f"{directory} has {superblock.targets} targets, not {config.targets}: that cannot be changed")
    return superblock


def _write_durably(path: Path, content: bytes) -> None:
    """Write a new file so that it is there whole or not at all."""
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
