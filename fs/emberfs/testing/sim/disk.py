"""`SimDisk`: the disk seam in memory, with every fault a disk may have.

    disk = SimDisk(runtime, record=True)
    ...                                                     # the service works on it
    for point in crash_points(disk.operations, limit=8, rng=rng, initial=disk.initial):
        reopened = SimDisk.from_image(runtime, point.image)

The content of the files and the model of a crash are `volume`; here are the calls, their latency, and the
faults that a test orders: `fail_sync`, `fail_write`, `fail_read`, `flip_bit`, a capacity, and `crash`.

Invariants:
  - Each item of a batch happens at one moment of virtual time, other tasks run between items, and a cancelled batch may
    go on: the real disk hands batches to a worker, and nobody stops a worker.
  - With `record=True`, `operations` played on a `Volume` of `initial` gives this disk's state exactly.

Does not know: what is in the files.
"""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...disk import Buffer, Landed, ReadItem, WriteItem
from .loop import SimRuntime
from .process import SimProcess
from .volume import (
    BLOCK_BYTES,
    SECTOR_BYTES,
    Allocate,
    Flip,
    Image,
    Mark,
    Open,
    Operation,
    Punch,
    Sync,
    SyncDirectory,
    Volume,
    Write,
    random_fates,
)

CAPACITY_BYTES = 1 << 40


class SimDisk:
    """`emberfs.disk.Disk` in memory. File numbers are stable: `open` of the same name gives the same one again."""

    def __init__(
        self,
        runtime: SimRuntime | SimProcess,
        *,
        initial: Image | None = None,
        capacity_bytes: int = CAPACITY_BYTES,
        record: bool = False,
    ) -> None:
        self.initial: Image = initial or {}
        self.operations: list[Operation] = []
        """Everything that happened, in order; empty unless `record`."""
        self._runtime = runtime
        self._capacity_bytes = capacity_bytes
        self._record = record
        self._volume = Volume(self.initial)
        self._names: list[str] = []  # a file's number is its place here
        self._opened: set[int] = set()
        self._is_crashed = False
        self._failing_syncs: list[int] = []
        self._failing_writes: list[int] = []
        self._bad_sectors: set[tuple[int, int]] = set()
        self._clean_copies: dict[tuple[int, int], bytes] = {}
        """(file, sector) -> what the page cache still holds of a sector that went bad on the medium."""

    @classmethod
    def from_image(
        cls,
        runtime: SimRuntime | SimProcess,
        image: Image,
        *,
        capacity_bytes: int = CAPACITY_BYTES,
        record: bool = False,
    ) -> SimDisk:
        """The disk that a machine finds after a restart."""
        return cls(runtime, initial=image, capacity_bytes=capacity_bytes, record=record)

    # ---- what a test orders

    def names(self) -> list[str]:
        """Every file, sorted."""
        return self._volume.names()

    def record_mark(self, label: Any) -> None:
        """Put something of the test's own into the log, such as the rows of the KV after a commit."""
        self._apply(Mark(label))

    def fail_sync(self, file: int) -> None:
        """The next sync of this file raises EIO; what it covered is durable in parts or not at all."""
        self._failing_syncs.append(file)

    def fail_write(self, file: int) -> None:
        """The next write to this file raises EIO after writing about half of its payload."""
        self._failing_writes.append(file)

    def fail_read(self, file: int, offset: int) -> None:
        """Reads of this byte's sector raise EIO until it is written again."""
        self._bad_sectors.add((file, offset // SECTOR_BYTES))

    def flip_bit(self, file: int, offset: int, *, bit: int = 0, is_cached: bool = False) -> None:
        """Turn a bit of a synced byte on the medium. If `is_cached`, reads notice only after `drop_cache`."""
        if is_cached:
            sector = offset // SECTOR_BYTES
            clean = self._volume.view(self._name(file)).read(sector * SECTOR_BYTES, SECTOR_BYTES)
            self._clean_copies.setdefault((file, sector), clean)
        self._apply(Flip(self._name(file), offset, bit))

    def peek(self, file: int, offset: int, length: int) -> bytes:
        """What a read would give now, in no time."""
        return self._volume.view(self._names[file]).read(offset, length)

    def crash(self, rng: random.Random) -> Image:
        """The power fails: a random legal image of what is left. Every later call on this disk raises EIO."""
        self._check_power()
        self._is_crashed = True
        return self._volume.crash(random_fates(self._volume.unsynced(), rng))

    def die(self) -> Image:
        """The process is killed: what it wrote is in the page cache, and stays. Every later call raises EIO."""
        self._check_power()
        self._is_crashed = True
        return self._volume.crash({})

    # ---- emberfs.disk.Disk

    def open(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
            self._apply(Open(name))
        file = self._names.index(name)
        self._opened.add(file)
        return file

    def size(self, file: int) -> int:
        return self._volume.view(self._name(file)).size

    def allocate(self, file: int, offset: int, length: int) -> None:
        if self._room(file, offset, length) < length:
            raise _error(errno.ENOSPC)
        self._apply(Allocate(self._name(file), offset, length))

    def punch(self, file: int, offset: int, length: int) -> bool:
        self._forget_faults(file, offset, length)
        self._apply(Punch(self._name(file), offset, length))
        return True

    def allocated_bytes(self, file: int) -> int:
        return len(self._volume.view(self._name(file)).allocated) * BLOCK_BYTES

    def holes(self, file: int) -> list[tuple[int, int]]:
        view = self._volume.view(self._name(file))
        blocks = [block for block in range(-(-view.size // BLOCK_BYTES)) if block not in view.allocated]
        return [(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES) for block in blocks]

    def free_bytes(self) -> int:
        return self._capacity_bytes - self._volume.allocated_bytes()

    def drop_cache(self, file: int, offset: int, length: int) -> None:
        for sector in _sectors(offset, length):
            self._clean_copies.pop((file, sector), None)

    async def read(self, items: Sequence[ReadItem], landed: Landed | None = None) -> list[int]:
        counts = await self._runtime.offload_steps([partial(self._read, *item) for item in items])
        for index, count in enumerate(counts):
            if landed is not None:
                landed(index, count)
        return counts

    async def write(self, items: Sequence[WriteItem]) -> None:
        await self._runtime.offload_steps([partial(self._write, *item) for item in items])

    async def sync(self, files: Sequence[int]) -> None:
        await self._runtime.offload_steps([step for file in files for step in self._moments(partial(self._sync, file))])

    async def sync_directory(self) -> None:
        await self._runtime.offload_steps(self._moments(lambda began: self._apply(SyncDirectory(began))))

    def close(self) -> None:
        self._opened.clear()

    # ---- one item at one moment

    def _read(self, file: int, destinations: Sequence[Buffer], offset: int) -> int:
        self._check_power()
        view = self._volume.view(self._name(file))
        length = sum(map(len, destinations))
        content = bytearray(view.read(offset, length))
        for sector in _sectors(offset, len(content)) if self._bad_sectors or self._clean_copies else ():
            if (clean := self._clean_copies.get((file, sector))) is not None:
                start = sector * SECTOR_BYTES - offset
                skipped = max(-start, 0)
                end = min(start + len(clean), len(content))
                content[max(start, 0) : end] = clean[skipped : end - start]
            elif (file, sector) in self._bad_sectors:
                raise _error(errno.EIO)
        source = memoryview(content)
        for destination in destinations:
            count = min(len(destination), len(source))
            destination[:count] = source[:count]
            source = source[count:]
        self._note("read", file, offset, content)
        return len(content)

    def _write(self, file: int, payload: Buffer, offset: int) -> None:
        self._check_power()
        content = bytes(payload)
        room = self._room(file, offset, len(content))
        failure = errno.ENOSPC if room < len(content) else 0
        if file in self._failing_writes:
            self._failing_writes.remove(file)
            room, failure = min(room, len(content) // 2), errno.EIO
        if written := content[:room]:
            self._forget_faults(file, offset, len(written))
            self._apply(Write(self._name(file), offset, written))
        self._note("write", file, offset, written)
        if failure:
            raise _error(failure)

    def _moments(self, end: Callable[[int], None]) -> list[Callable[[], None]]:
        """A sync takes time, and covers what was there when it began: `end` gets the count of operations till then."""
        began: list[int] = []

        def begin() -> None:
            self._check_power()
            began.append(self._volume.operations_count)

        return [begin, lambda: end(began[0])]

    def _sync(self, file: int, began: int) -> None:
        fails = file in self._failing_syncs
        if fails:
            self._failing_syncs.remove(file)
        self._apply(Sync(self._name(file), began, fails))
        if fails:
            raise _error(errno.EIO)

    def _room(self, file: int, offset: int, length: int) -> int:
        """How many of `length` bytes at `offset` the disk has space for, from the first one on."""
        allocated = self._volume.view(self._name(file)).allocated
        free_blocks = self.free_bytes() // BLOCK_BYTES
        for block in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)):
            free_blocks -= block not in allocated
            if free_blocks < 0:
                return max(block * BLOCK_BYTES - offset, 0)
        return length

    def _apply(self, operation: Operation) -> None:
        self._check_power()
        self._volume.apply(operation)
        if self._record:
            self.operations.append(operation)
        self._runtime.note(type(operation).__name__)

    def _name(self, file: int) -> str:
        if file not in self._opened:
            raise _error(errno.EBADF)
        return self._names[file]

    def _check_power(self) -> None:
        if self._is_crashed:
            raise _error(errno.EIO)

    def _forget_faults(self, file: int, offset: int, length: int) -> None:
        for sector in _sectors(offset, length) if self._bad_sectors or self._clean_copies else ():
            self._bad_sectors.discard((file, sector))
            self._clean_copies.pop((file, sector), None)

    def _note(self, verb: str, file: int, offset: int, content: bytes | bytearray) -> None:
        self._runtime.note(f"{verb} {self._name(file)} {offset} {len(content)} {zlib.crc32(content)}")


def _sectors(offset: int, length: int) -> range:
    """The sectors that [offset, offset+length) touches."""
    return range(offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES)) if length else range(0)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
