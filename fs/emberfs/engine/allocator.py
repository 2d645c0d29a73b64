"""Blocks: which of them are taken, in memory and on disk.

A size class is a power of two from 64 KiB to 64 MiB with one data file; a block is a slot of that file. Blocks are
tracked in groups of 256, a bitmap each. Two views are kept:

  - `taken`: blocks nobody else may be given now. Grows at `allocate`, shrinks at `release`.
  - `durable`: what the group rows in the index say. Changes only in the transaction that commits the records that
    name (or no longer name) the blocks, so after a crash every block is either named by a record or free.

Classes from SIDE_SUMS_CLASS_MIN up have room for two slots of checksums behind each block (see `record`).

Free blocks keep their space, for the next of their size. Where the disk has none left for another size they give it
back, and are *holes* from then on: those are taken last, if there is room on the disk for them again.

Does not know: records, checksums, or when anything is synced.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterable, Iterator

from ..disk import Disk
from ..errors import NoSpace, TargetFailed

CLASS_LOG2_MIN = 16
CLASS_LOG2_MAX = 26
GROUP_BLOCKS = 256
GROUP_FULL = (1 << GROUP_BLOCKS) - 1
GROWTH_BYTES_MIN = 1 << 20
GROWTH_BYTES_MAX = 64 << 20
TRIM_BYTES, TRIM_BYTES_MAX = 16 << 20, 128 << 20
"""Given back at a time, the second where so much is lacking: nothing else of the store runs meanwhile."""
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
        self._taken_count = 0
        self._holes: dict[int, int] = {}
        """Group -> its holes, if it has any."""
        self._holes_count = 0
        self._knows_holes = False
        self._trims_from = -1
        """The group that the last trim ended with."""
        self._can_punch = True

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
        self._taken_count += bitmap.bit_count() - self.taken[group].bit_count()
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

    def _free(self, group: int) -> int:
        """Its blocks that are neither taken nor holes."""
        return ~(self.taken[group] | self._holes.get(group, 0)) & GROUP_FULL

    def allocate(self, *, reserve_bytes: int) -> int:
        """Take the lowest free block, or a hole rather than let the file grow; returns its index.

        Raises NoSpace before the disk is down to `reserve_bytes`, TargetFailed if it fails to reserve the space.
        """
        file = self.file
        self._find_holes()
        while self._open_groups and not self._free(self._open_groups[0]):
            self._in_heap.remove(heapq.heappop(self._open_groups))
        if not self._open_groups:
            self._grow_groups(len(self.taken) + 1)
        group = self._open_groups[0]
        bit = _lowest_bit(self._free(group))
        need = (group * GROUP_BLOCKS + bit + 1) * self.stride - self._file_bytes
        if need > 0 and self._holes:
            group, holes = next(reversed(self._holes.items()))  # The lowest that were made last.
            bit = _lowest_bit(holes)
            self._reserve(file, (group * GROUP_BLOCKS + bit) * self.stride, self.stride, reserve_bytes)
            self._set_holes(group, holes & ~(1 << bit))
        elif need > 0:
            self._grow(file, need, reserve_bytes)
        self.taken[group] |= 1 << bit
        self._taken_count += 1
        return group * GROUP_BLOCKS + bit

    def _grow(self, file: int, need: int, reserve_bytes: int) -> None:
        """Let the file grow by at least `need` bytes, in steps that double from 1 to 64 MiB while there is room."""
        step = max(need, min(GROWTH_BYTES_MAX, max(GROWTH_BYTES_MIN, self._file_bytes)))
        if self._disk.free_bytes() - reserve_bytes < step:
            step = need
        self._reserve(file, self._file_bytes, step, reserve_bytes)
        self._file_bytes += step

    def _reserve(self, file: int, offset: int, length: int, reserve_bytes: int) -> None:
        headroom = self._disk.free_bytes() - reserve_bytes
        if headroom < length:
            raise NoSpace(
                f"disk is full: {max(headroom, 0)} bytes left above the reserve of {reserve_bytes}; "
                "remove files, then run `emberline fs trash empty` and `emberline fs gc --now`"
            )
        try:
            self._disk.allocate(file, offset, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    "disk is full: remove files, then run `emberline fs trash empty` and `emberline fs gc --now`"
                ) from error
            raise TargetFailed(f"space could not be reserved: {error}") from error

    def release(self, index: int) -> None:
        """Give a block back; it may be handed out at once."""
        group, bit = divmod(index, GROUP_BLOCKS)
        assert self.taken[group] >> bit & 1, "released twice"
        self.taken[group] &= ~(1 << bit)
        self._taken_count -= 1
        self._open_group(group)

    @property
    def idle_bytes(self) -> int:
        """What free blocks take of the disk. Raises OSError."""
        if not self.taken:
            return 0
        tail = self._disk.size(self.file) % self.stride  # Less than a block: of no use yet.
        return max(self._disk.allocated_bytes(self.file) - self._taken_count * self.stride - tail, 0)

    def trim(self, bytes_max: int) -> int:
        """Give the space of free blocks back to the file system: so many bytes, or a block. Returns how many; 0: there
        is nothing to give, or the file system cannot take it. Raises OSError.

        Nothing may allocate meanwhile: a block handed out between the look at its group and the punch loses its bytes.
        """
        if not self.taken or not self._can_punch:
            return 0
        self._find_holes()
        punched, file, blocks = 0, self.file, self._file_bytes // self.stride
        if blocks <= self._taken_count + self._holes_count:
            return 0  # Who writes to a full disk asks with every block.
        count = min(len(self.taken), -(-blocks // GROUP_BLOCKS))
        for step in range(count):
            group = (self._trims_from - step) % count
            in_file = (1 << min(blocks - group * GROUP_BLOCKS, GROUP_BLOCKS)) - 1
            for begin, end in _runs(self._free(group) & in_file):
                end = min(end, begin + max((bytes_max - punched) // self.stride, 1))
                length = (end - begin) * self.stride
                try:
                    self._can_punch = self._disk.punch(file, (group * GROUP_BLOCKS + begin) * self.stride, length)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    return punched  # So full that it cannot note this down: at another time it can.
                if not self._can_punch:
                    return punched
                self._set_holes(group, self._holes.get(group, 0) | (1 << end) - (1 << begin))
                punched += length
                if punched >= bytes_max:
                    self._trims_from = group
                    return punched
        return punched

    def _find_holes(self) -> None:
        """Once, when all groups are known: holes are the free blocks that the file has no space for, or not for all."""
        if self._knows_holes:
            return
        file = self.file
        try:
            found = self._disk.holes(file)
        except OSError as error:
            raise TargetFailed(f"the disk does not say where it has space: {error}") from error
        self._knows_holes = True
        blocks = self._file_bytes // self.stride
        for begin, end in found:
            first, last = begin // self.stride, min(-(-end // self.stride), blocks)
            for group in range(first // GROUP_BLOCKS, -(-last // GROUP_BLOCKS)):
                self._grow_groups(group + 1)
                low, high = (min(max(at - group * GROUP_BLOCKS, 0), GROUP_BLOCKS) for at in (first, last))
                holes = (1 << high) - (1 << low) & ~self.taken[group]
                self._set_holes(group, self._holes.get(group, 0) | holes)

    def _set_holes(self, group: int, holes: int) -> None:
        self._holes_count += holes.bit_count() - self._holes.pop(group, 0).bit_count()
        if holes:
            self._holes[group] = holes


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of the runs of ones."""
    while bits:
        begin = _lowest_bit(bits)
        end = _lowest_bit(~(bits | (1 << begin) - 1))
        yield begin, end
        bits &= -1 << end


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
        size_class = self.classes[class_log2]
        try:
            index = size_class.allocate(reserve_bytes=self._reserve_bytes)
        except NoSpace:
            if not self._make_room(size_class.stride):
                raise
            index = size_class.allocate(reserve_bytes=self._reserve_bytes)
        return class_log2 << 56 | index

    def _make_room(self, length: int) -> bool:
        """Give back what blocks of other sizes have to spare, if there is enough of it. Raises TargetFailed.

        No more than takes a moment: where much is lacking, since others have filled the disk, the next ones go on.
        """
        try:
            lacking = length + self._reserve_bytes - self._disk.free_bytes()
            is_there = self.idle_bytes() >= lacking
        except OSError as error:
            raise TargetFailed(f"the disk does not say how much it has left: {error}") from error
        # Else it would be gone, to whatever else fills this disk, and nothing won.
        return is_there and self.trim(min(max(lacking, TRIM_BYTES), TRIM_BYTES_MAX)) > 0

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

    def idle_bytes(self) -> int:
        """What free blocks take of the disk: new data may have that, too. Raises OSError."""
        return sum(size_class.idle_bytes for size_class in self.classes.values())

    def trim(self, bytes_max: int) -> int:
        """Give the space of free blocks back, large ones first: so many bytes, or a block. Returns how many.

        Raises TargetFailed.
        """
        punched = 0
        try:
            for size_class in reversed(self.classes.values()):
                if punched < bytes_max:
                    punched += size_class.trim(bytes_max - punched)
        except TargetFailed:
            raise
        except OSError as error:
            raise TargetFailed(f"space could not be given back: {error}") from error
        return punched

    def used_blocks(self) -> dict[int, int]:
        """{size class log2: blocks named by records}."""
        return {
            log2: sum(bitmap.bit_count() for bitmap in size_class.durable)
            for log2, size_class in self.classes.items()
            if size_class.durable
        }
