"""Blocks: which of them are taken, in memory and on disk.

A size class is a power of two from 64 KiB to 64 MiB with one data file; a block is a slot of that file. Blocks are
tracked in groups of 256, a bitmap each. Two views are kept:

  - `taken`: blocks nobody else may be given now. Grows at `allocate`, shrinks at `release`.
  - `durable`: what the group rows in the index say. Changes only in the transaction that commits the records that
    name (or no longer name) the blocks, so after a crash every block is either named by a record or free.

Classes from SIDE_SUMS_CLASS_MIN up have room for two slots of checksums behind each block (see `record`).

Does not know: records, checksums, or when anything is synced.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterable

from ..disk import Disk
from ..errors import NoSpace, TargetFailed

CLASS_LOG2_MIN = 16
CLASS_LOG2_MAX = 26
GROUP_BLOCKS = 256
GROUP_FULL = (1 << GROUP_BLOCKS) - 1
GROWTH_BYTES_MIN = 1 << 20
GROWTH_BYTES_MAX = 64 << 20
SIDE_SUMS_CLASS_MIN = 21
"""2 MiB with 4 KiB granules is the smallest block whose sums may exceed 1 KiB."""

_INDEX_MASK = (1 << 56) - 1


def class_for(length: int) -> int:
    """Log2 of the smallest size class that holds `length` bytes."""
    assert 0 <= length <= 1 << CLASS_LOG2_MAX
    return max(CLASS_LOG2_MIN, (length - 1).bit_length())


def side_slot_bytes(class_log2: int) -> int:
    """Bytes of one of the two checksum slots behind a block (0: the class has none). 4 bytes per 4 KiB granule."""
    return 0 if class_log2 < SIDE_SUMS_CLASS_MIN else max(4096, 1 << class_log2 >> 10)


def stride_bytes(class_log2: int) -> int:
    """Distance between two blocks in the data file."""
    return (1 << class_log2) + 2 * side_slot_bytes(class_log2)


def position_class(position: int) -> int:
    """Log2 of the size class of a position."""
    return position >> 56


def position_index(position: int) -> int:
    """Index of the block in its class."""
    return position & _INDEX_MASK


class SizeClass:
    """The blocks of one size: a data file and two bitmaps per group."""

    def __init__(self, class_log2: int, disk: Disk) -> None:
        self.class_log2 = class_log2
        self.stride = stride_bytes(class_log2)
        self._disk = disk
        self._file: int | None = None
        self.taken: list[int] = []
        self.durable: list[int] = []
        self._open_groups: list[int] = []
        """A heap of groups that may have a free block; lowest first keeps the file dense."""
        self._in_heap: set[int] = set()
        """The groups of the heap, so that each is there once."""
        self._file_bytes = 0

    @property
    def file(self) -> int:
        """The data file, opened (and made) at first use: an empty store has no block files."""
        if self._file is None:
            self._file = self._disk.open(f"blocks-{_size_name(self.class_log2)}")
            self._file_bytes = self._disk.size(self._file)
        return self._file

    @property
    def file_bytes(self) -> int:
        """Length of the data file as it is on the disk."""
        return self._disk.size(self.file)

    def load_group(self, group: int, bitmap: int) -> None:
        """Take over a group row at open."""
        self._grow_groups(group + 1)
        self.taken[group] = self.durable[group] = bitmap

    def _grow_groups(self, count: int) -> None:
        while len(self.taken) < count:
            self._open_group(len(self.taken))
            self.taken.append(0)
            self.durable.append(0)

    def _open_group(self, group: int) -> None:
        if group not in self._in_heap:
            self._in_heap.add(group)
            heapq.heappush(self._open_groups, group)

    def allocate(self, *, reserve_bytes: int) -> int:
        """Take the lowest free block; returns its index. Raises NoSpace before the disk is down to `reserve_bytes`.

        Raises TargetFailed if the disk fails to reserve the space.
        """
        while self._open_groups and self.taken[self._open_groups[0]] == GROUP_FULL:
            self._in_heap.remove(heapq.heappop(self._open_groups))
        if not self._open_groups:
            self._grow_groups(len(self.taken) + 1)
        group = self._open_groups[0]
        free = ~self.taken[group] & GROUP_FULL
        index = group * GROUP_BLOCKS + (free & -free).bit_length() - 1
        self._ensure_file((index + 1) * self.stride, reserve_bytes)
        self.taken[group] |= free & -free
        return index

    def _ensure_file(self, end: int, reserve_bytes: int) -> None:
        """Grow the file to hold `end` bytes, in steps that double from 1 to 64 MiB."""
        file = self.file
        if end <= self._file_bytes:
            return
        need = end - self._file_bytes
        step = max(need, min(GROWTH_BYTES_MAX, max(GROWTH_BYTES_MIN, self._file_bytes)))
        headroom = self._disk.free_bytes() - reserve_bytes
        if headroom < step:
            step = need
        if headroom < step:
            raise NoSpace(
                f"disk is full: {max(headroom, 0)} bytes left above the reserve of {reserve_bytes}; "
                "remove files, then run `emberline fs trash empty` and `emberline fs gc --now`"
            )
        try:
            self._disk.allocate(file, self._file_bytes, step)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    "disk is full: remove files, then run `emberline fs trash empty` and `emberline fs gc --now`"
                ) from error
            raise TargetFailed(f"space could not be reserved: {error}") from error
        self._file_bytes += step

    def release(self, index: int) -> None:
        """Give a block back; it may be handed out at once."""
        group, bit = divmod(index, GROUP_BLOCKS)
        assert self.taken[group] >> bit & 1, "released twice"
        self.taken[group] &= ~(1 << bit)
        self._open_group(group)

    def trim(self) -> int:
        """Give the space of wholly free groups back to the file system. Returns the bytes punched.

        Nothing may allocate meanwhile: a block handed out between the look at its group and the punch loses its bytes.
        """
        punched = 0
        end = self.file_bytes if self.taken else 0
        for group, taken in enumerate(self.taken):
            begin = group * GROUP_BLOCKS * self.stride
            if not taken and begin < end:
                length = min(GROUP_BLOCKS * self.stride, end - begin)
                self._disk.punch(self.file, begin, length)
                punched += length
        return punched


def _size_name(class_log2: int) -> str:
    return f"{1 << class_log2 - 10}K" if class_log2 < 20 else f"{1 << class_log2 - 20}M"


class Allocator:
    """All size classes of one target."""

    def __init__(self, disk: Disk, *, reserve_bytes: int) -> None:
        self._disk = disk
        self._reserve_bytes = reserve_bytes
        self.used_bytes = 0
        """In blocks that records name."""
        self.classes = {log2: SizeClass(log2, disk) for log2 in range(CLASS_LOG2_MIN, CLASS_LOG2_MAX + 1)}

    def allocate(self, length: int) -> int:
        """A free block for `length` bytes, as a position. Nothing durable changes. Raises NoSpace, TargetFailed."""
        class_log2 = class_for(length)
        return class_log2 << 56 | self.classes[class_log2].allocate(reserve_bytes=self._reserve_bytes)

    def release(self, position: int) -> None:
        """Give back a block that no durable record names."""
        self.classes[position_class(position)].release(position_index(position))

    def place(self, position: int) -> tuple[int, int]:
        """(file, offset of the block in bytes)."""
        size_class = self.classes[position >> 56]
        return size_class.file, (position & _INDEX_MASK) * size_class.stride

    def place_side(self, position: int, slot: int) -> tuple[int, int]:
        """(file, offset of checksum slot `slot` of the block in bytes)."""
        file, offset = self.place(position)
        class_log2 = position_class(position)
        return file, offset + (1 << class_log2) + slot * side_slot_bytes(class_log2)

    def group_rows(self, named: Iterable[int], freed: Iterable[int]) -> dict[tuple[int, int], int]:
        """The group rows of a transaction whose records newly name `named` and no longer name `freed`.

        {(class log2, group): bitmap}. Call `adopt` with it once the transaction is durable.
        """
        rows: dict[tuple[int, int], int] = {}
        for position, present in [*((p, True) for p in named), *((p, False) for p in freed)]:
            class_log2, (group, bit) = position_class(position), divmod(position_index(position), GROUP_BLOCKS)
            bitmap = rows.get((class_log2, group), self.classes[class_log2].durable[group])
            assert bool(bitmap >> bit & 1) != present, "a block named twice, or freed twice"
            rows[class_log2, group] = bitmap ^ 1 << bit
        return rows

    def adopt(self, rows: dict[tuple[int, int], int]) -> None:
        """The group rows are durable now."""
        for (class_log2, group), bitmap in rows.items():
            durable = self.classes[class_log2].durable
            self.used_bytes += (bitmap.bit_count() - durable[group].bit_count()) << class_log2
            durable[group] = bitmap

    def load_group(self, class_log2: int, group: int, bitmap: int) -> None:
        """Take over a group row at open."""
        self.classes[class_log2].load_group(group, bitmap)
        self.used_bytes += bitmap.bit_count() << class_log2

    def free_bytes(self) -> int:
        """What the disk has left above the reserve. Raises OSError."""
        return max(self._disk.free_bytes() - self._reserve_bytes, 0)

    def trim(self) -> int:
        """Punch out wholly free groups of every class. Returns the bytes given back."""
        return sum(size_class.trim() for size_class in self.classes.values())

    def used_blocks(self) -> dict[int, int]:
        """{size class log2: blocks named by records}."""
        return {
            log2: sum(bitmap.bit_count() for bitmap in size_class.durable)
            for log2, size_class in self.classes.items()
            if size_class.durable
        }
