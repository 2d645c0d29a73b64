"""The disk seam: one directory of files, as a chunk engine sees it.

Reads and writes come in batches. `LocalDisk` tries a whole batch inline (`RWF_NOWAIT`) and hands only what was cold to
a worker; `testing.sim` has a disk in memory that loses unsynced data, tears, flips bits and fills up.

Contract, the same for every implementation:
  - A write is durable only after `sync` of its file returned. Until then a crash may keep any part of it, in any order.
  - A failed `sync` loses the right to be tried again: what it covered may be gone although a second call would succeed.
  - Reading past the end of the file, or in a hole, gives zeros up to the asked length only where bytes exist; short
    reads are reported by their count.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import fiemap
from .runtime import Runtime
from .stopwatch import current

Buffer = memoryview

START_BYTES_MIN = 128 << 10
"""A write of so many bytes is begun at once: the disk is at it while the rest is copied, not from the sync on."""
SYNC_FILE_RANGE_WRITE = 0x02
_CANNOT_PUNCH = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM))
"""A file system that does not know how, or a filter that forbids it."""

ReadItem = tuple[int, Sequence[Buffer], int]
"""(file, destinations filled in order, offset in bytes)"""
Landed = Callable[[int, int], None]
WriteItem = tuple[int, Buffer, int]
"""(file, payload, offset in bytes)"""


class Disk(Protocol):
    """A flat directory of files, addressed by small integers from `open`."""

    def open(self, name: str) -> int:
        """Open a file for reading and writing, made when absent. The name is durable after `sync_directory`."""

    def size(self, file: int) -> int:
        """The file's length in bytes."""

    def allocate(self, file: int, offset: int, length: int) -> None:
        """Reserve space for [offset, offset+length); the file grows to hold it. Raises OSError ENOSPC."""

    def punch(self, file: int, offset: int, length: int) -> bool:
        """Give the space of [offset, offset+length) back: zeros from then on. False: the file system cannot."""

    def allocated_bytes(self, file: int) -> int:
        """What the file takes of the file system: less than its length where it has holes."""

    def holes(self, file: int) -> list[tuple[int, int]]:
        """[begin, end) of what takes no space, in order; none where the file system does not tell."""

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on the file system."""

    def drop_cache(self, file: int, offset: int, length: int) -> None:
        """Ask that the next read of the range comes from the medium, not from memory."""

    async def read(self, items: Sequence[ReadItem], landed: Landed | None = None) -> list[int]:
        """Fill the destinations; returns the bytes read per item. Raises the first OSError.

        `landed(index, bytes read)` is called as soon as an item is there, in whichever thread read it.
        """

    async def write(self, items: Sequence[WriteItem]) -> None:
        """Write every payload in full, or raise the first OSError."""

    async def sync(self, files: Sequence[int]) -> None:
        """Make every earlier write to `files` durable."""

    async def sync_directory(self) -> None:
        """Make the names made by `open` durable."""

    def close(self) -> None:
        """Close every file. Makes nothing durable."""


class LocalDisk:
    """A directory of the local file system. Files are opened once and kept.

    It is the directory that was there at the beginning, whatever is mounted over it or renamed later: block files are
    opened at first use, and those of another disk must not be taken for ours.
    """

    def __init__(self, directory: str, runtime: Runtime) -> None:
        """Raises OSError if there is no such directory."""
        self._path = directory
        self._runtime = runtime
        self._opened: int | None = None
        self._directory()
        self._files: dict[str, int] = {}

    def which(self) -> tuple[int, int]:
        """Device and inode of the directory: what is at its path may be another one by now."""
        status = os.fstat(self._directory())
        return status.st_dev, status.st_ino

    def open(self, name: str) -> int:
        if name not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._files[name] = os.open(name, flags, 0o600, dir_fd=self._directory())
        return self._files[name]

    def size(self, file: int) -> int:
        return os.fstat(file).st_size

    def allocate(self, file: int, offset: int, length: int) -> None:
        os.posix_fallocate(file, offset, length)

    def punch(self, file: int, offset: int, length: int) -> bool:
        keep_size_and_punch = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        while _libc.fallocate(file, keep_size_and_punch, offset, length) != 0:
            error = ctypes.get_errno()
            if error in _CANNOT_PUNCH:
                return False
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error))
        return True

    def allocated_bytes(self, file: int) -> int:
        return os.fstat(file).st_blocks * 512

    def holes(self, file: int) -> list[tuple[int, int]]:
        return fiemap.holes(file, self.size(file))

    def free_bytes(self) -> int:
        status = os.fstatvfs(self._directory())
        return status.f_bavail * status.f_frsize

    def drop_cache(self, file: int, offset: int, length: int) -> None:
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)

    async def read(self, items: Sequence[ReadItem], landed: Landed | None = None) -> list[int]:
        if (watch := current.get()) is not None:
            watch.begin_disk()
            try:
                return await self._read(items, landed)
            finally:
                watch.end_disk()
        if self._runtime.may_block():
            return self._runtime.block(_read_all, items, landed)  # Spared the coroutine: it is the shortest way.
        return await self._read(items, landed)

    async def _read(self, items: Sequence[ReadItem], landed: Landed | None) -> list[int]:
        if self._runtime.may_block():
            return self._runtime.block(_read_all, items, landed)
        counts: list[int] = []
        cold: list[tuple[int, ReadItem]] = []
        for index, (file, destinations, offset) in enumerate(items):
            try:
                count = os.preadv(file, destinations, offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                count = -1
            counts.append(count)
            # A short count is either the end of the file or where the page cache ended: the worker finds out.
            if count < sum(map(len, destinations)):
                cold.append((index, items[index]))
            elif landed is not None:
                landed(index, count)
        if cold:
            numbers = [index for index, _ in cold]
            late_landed = None if landed is None else lambda index, count: landed(numbers[index], count)
            late = await self._runtime.offload_read(_read_all, [item for _, item in cold], late_landed)
            for (index, _), count in zip(cold, late, strict=True):
                counts[index] = count
        return counts

    async def write(self, items: Sequence[WriteItem]) -> None:
        await self._wait(_write_all, items)

    async def sync(self, files: Sequence[int]) -> None:
        await self._wait(_sync_all, files)

    async def sync_directory(self) -> None:
        await self._wait(os.fsync, self._directory())

    async def _wait(self, blocking: Callable[..., None], argument: Any) -> None:
        watch = current.get()
        if watch is not None:
            watch.begin_disk()
        try:
            await self._runtime.offload(blocking, argument)
        finally:
            if watch is not None:
                watch.end_disk()

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def _directory(self) -> int:
        """Once closed, a disk that is used again is what is at its path then."""
        if self._opened is None:
            self._opened = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._opened


def _read_all(items: Sequence[ReadItem], landed: Landed | None) -> list[int]:
    counts = []
    for index, (file, destinations, offset) in enumerate(items):
        count = os.preadv(file, destinations, offset)
        if count and count < sum(map(len, destinations)):
            count = _read_rest(file, destinations, offset, count)
        counts.append(count)
        if landed is not None:
            landed(index, count)
    return counts


def _read_rest(file: int, destinations: Sequence[Buffer], offset: int, done: int) -> int:
    """Go on after a short read until the end of the file or of the destinations."""
    skipped = 0
    for destination in destinations:
        start = max(done - skipped, 0)
        while start < len(destination):
            count = os.preadv(file, [destination[start:]], offset + skipped + start)
            if count == 0:
                return done
            start += count
            done += count
        skipped += len(destination)
    return done


def _write_all(items: Sequence[WriteItem]) -> None:
    for file, payload, offset in items:
        done = 0
        while done < len(payload):
            done += os.pwrite(file, payload[done:] if done else payload, offset + done)
        if done >= START_BYTES_MIN:
            # What the disk says of it is left for the sync to find: no flag here waits, and takes the error away.
            _libc.sync_file_range(file, offset, done, SYNC_FILE_RANGE_WRITE)


def _sync_all(files: Sequence[int]) -> None:
    for file in files:
        os.fdatasync(file)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
