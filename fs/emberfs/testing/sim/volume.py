"""What a directory of files holds, in the page cache and on the medium, and what a crash may leave of it.

A `Volume` is a pure state machine over `Operation`s: `SimDisk` drives one and may keep the log; `crash_states` plays a
log again and enumerates what a machine that died after it may find.

The model of a crash:
  - A block (4 KiB) that was written and not yet synced reaches the medium or not, whatever happens to other blocks:
    writes are lost, kept and reordered freely. Within a block each sector (512 bytes) is on its own: a torn write.
  - A sector holds one of the contents it had in the page cache since the last sync, never a mixture.
  - A file's growth is kept or lost like a write; a file whose name was not synced is there or not.
  - A failed sync leaves its writes readable and makes them nobody's duty: any part may be on the medium, and a later
    sync that succeeds does not cover them.

Does not know: time, latency, callers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

BLOCK_BYTES = 4096
SECTOR_BYTES = 512
WHOLE = (1 << BLOCK_BYTES // SECTOR_BYTES) - 1
"""The mask of all sectors of a block; bit 0 is the first sector."""
ZEROS = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Open:
    """The file is made if it is absent."""

    name: str


@dataclass(frozen=True, slots=True)
class Write:
    """One payload reaches the page cache."""

    name: str
    offset: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Allocate:
    """Space is reserved and the file grows to hold it."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Punch:
    """The range becomes zeros and its whole blocks are given back."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync of one file ended, well or not. It began after operation number `began`, and covers those before it."""

    name: str
    began: int
    failed: bool = False


@dataclass(frozen=True, slots=True)
class SyncDirectory:
    """A sync of the names ended; it covers the operations before number `began`."""

    began: int


@dataclass(frozen=True, slots=True)
class Flip:
    """The medium turns one bit of a byte that is synced."""

    name: str
    offset: int
    bit: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something of the test's own happened here, such as a commit of the KV: `label` says what."""

    label: Any


Operation = Open | Write | Allocate | Punch | Sync | SyncDirectory | Flip | Mark


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file on the medium. A block that is absent from `blocks` reads as zeros."""

    blocks: Mapping[int, bytes] = field(default_factory=dict)
    size: int = 0
    allocated: Set[int] = frozenset()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset+length) as far as the file reaches."""
        end = min(offset + length, self.size)
        parts = [self.blocks.get(block, ZEROS)[start:stop] for block, start, stop in _pieces(offset, end)]
        return b"".join(parts)


Image = Mapping[str, FileImage]
"""What a machine finds after a restart: name -> file."""


@dataclass(slots=True)
class _Change:
    """What one unsynced operation did to a file."""

    number: int
    blocks: list[tuple[int, int, bytes]]
    """(block, mask of the sectors it wrote, content of the whole block in the page cache afterwards)"""
    size: int
    """The file is at least this long, if the change is kept."""
    allocates: range
    frees: range
    is_doomed: bool = False
    """A sync of it failed."""


KEEP = -1
DROP = -2
Fates = Mapping[int, int]
"""Number of an unsynced operation -> KEEP, DROP, or the seed of how it is torn."""


class _File:
    def __init__(self, image: FileImage) -> None:
        self.image = image  # on the medium, as of the last sync
        self.blocks = dict(image.blocks)  # in the page cache: what a read sees
        self.size = image.size
        self.allocated = set(image.allocated)
        self.changes: list[_Change] = []

    def write(self, number: int, offset: int, payload: bytes) -> None:
        end = offset + len(payload)
        touched = _block_range(offset, end)
        blocks = self._overlay(
            offset, end, lambda position, length: payload[(begin := position - offset) : begin + length]
        )
        self._change(_Change(number, blocks, end, allocates=touched, frees=range(0)))

    def allocate(self, number: int, offset: int, length: int) -> None:
        touched = _block_range(offset, offset + length)
        self._change(_Change(number, [], offset + length, allocates=touched, frees=range(0)))

    def punch(self, number: int, offset: int, length: int) -> None:
        end = offset + length
        blocks = self._overlay(offset, end, lambda position, length: bytes(length), only_present=True)
        whole = range(-(-offset // BLOCK_BYTES), end // BLOCK_BYTES)
        self._change(_Change(number, blocks, 0, allocates=range(0), frees=whole))

    def _overlay(
        self, offset: int, end: int, content: Callable[[int, int], bytes], *, only_present: bool = False
    ) -> list[tuple[int, int, bytes]]:
        """The blocks of [offset, end) with `content(position, length)` laid over them."""
        blocks = []
        for block, start, stop in _pieces(offset, end):
            if only_present and block not in self.blocks:
                continue
            before = self.blocks.get(block, ZEROS)
            after = before[:start] + content(block * BLOCK_BYTES + start, stop - start) + before[stop:]
            first, last = start // SECTOR_BYTES, (stop - 1) // SECTOR_BYTES
            blocks.append((block, (2 << last) - (1 << first), after))
        return blocks

    def _change(self, change: _Change) -> None:
        self.changes.append(change)
        for block, _, content in change.blocks:
            self.blocks[block] = content
        self.size = max(self.size, change.size)
        self.allocated.update(change.allocates)
        self.allocated.difference_update(change.frees)

    def sync(self, began: int) -> None:
        covered = [change for change in self.changes if change.number < began]
        synced = [change for change in covered if not change.is_doomed]
        self.image = _kept(self.image, synced, {})
        # What was doomed earlier may still lie on the medium, except where a synced write came after it.
        later: dict[int, int] = {}
        for change in reversed(covered):
            if change.is_doomed:
                change.blocks = [
                    (block, mask & ~later.get(block, 0), content) for block, mask, content in change.blocks
                ]
            else:
                for block, mask, _ in change.blocks:
                    later[block] = later.get(block, 0) | mask
        self.changes = [change for change in self.changes if change.number >= began or change.is_doomed]

    def doom(self, began: int) -> None:
        for change in self.changes:
            change.is_doomed |= change.number < began

    def flip(self, offset: int, bit: int) -> None:
        block, position = divmod(offset, BLOCK_BYTES)
        dirty = any(block == dirty_block for change in self.changes for dirty_block, _, _ in change.blocks)
        assert not dirty, "the bit would be overwritten by what is not yet synced"
        content = bytearray(self.blocks.get(block, ZEROS))
        content[position] ^= 1 << bit
        self.blocks[block] = bytes(content)
        self.image = FileImage({**self.image.blocks, block: bytes(content)}, self.image.size, self.image.allocated)


class Volume:
    """The state after a sequence of operations."""

    def __init__(self, image: Image | None = None) -> None:
        self.operations_count = 0
        self._files = {name: _File(file) for name, file in (image or {}).items()}
        self._new_names: dict[str, int] = {}

    def apply(self, operation: Operation) -> None:
        """Take the next operation. It must be possible: the file is open, the space is there."""
        number = self.operations_count
        self.operations_count += 1
        match operation:
            case Open(name) if name not in self._files:
                self._files[name] = _File(FileImage())
                self._new_names[name] = number
            case Write(name, offset, payload):
                self._files[name].write(number, offset, payload)
            case Allocate(name, offset, length):
                self._files[name].allocate(number, offset, length)
            case Punch(name, offset, length):
                self._files[name].punch(number, offset, length)
            case Sync(name, began, failed):
                self._files[name].doom(began) if failed else self._files[name].sync(began)
            case SyncDirectory(began):
                self._new_names = {name: made for name, made in self._new_names.items() if made >= began}
            case Flip(name, offset, bit):
                self._files[name].flip(offset, bit)

    def names(self) -> list[str]:
        """Every file, sorted."""
        return sorted(self._files)

    def view(self, name: str) -> FileImage:
        """The file as a read sees it now. It moves with the next operation."""
        file = self._files[name]
        return FileImage(file.blocks, file.size, file.allocated)

    def allocated_bytes(self) -> int:
        """The space in use, of all files."""
        return sum(len(file.allocated) for file in self._files.values()) * BLOCK_BYTES

    def unsynced(self) -> list[int]:
        """The numbers of the operations that a crash now may undo, oldest first."""
        numbers = [change.number for file in self._files.values() for change in file.changes]
        return sorted([*numbers, *self._new_names.values()])

    def crash(self, fates: Fates) -> Image:
        """What a machine that dies now finds. An operation without a fate is kept."""
        return {
            name: _kept(file.image, file.changes, fates)
            for name, file in sorted(self._files.items())
            if name not in self._new_names or fates.get(self._new_names[name], KEEP) == KEEP
        }


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """One way to die: after `operations_count` operations, with `image` on the medium."""

    operations_count: int
    mark: Mark | None
    """The last mark before the crash."""
    fates: Fates
    """How `image` came about, for the message of a failing test."""
    image: Image


def crash_points(
    operations: Sequence[Operation], *, limit: int, rng: random.Random, initial: Image | None = None
) -> Iterator[CrashPoint]:
    """Up to `limit` legal images for each point between two operations, before the first and after the last."""
    volume = Volume(initial)
    mark = None
    for count in range(len(operations) + 1):
        for fates, image in _some_crashes(volume, limit, rng):
            yield CrashPoint(count, mark, fates, image)
        if count < len(operations):
            operation = operations[count]
            volume.apply(operation)
            mark = operation if isinstance(operation, Mark) else mark


def crash_states(
    operations: Sequence[Operation], *, limit: int, rng: random.Random, initial: Image | None = None
) -> Iterator[Image]:
    """Up to `limit` images that a machine may find that died right after `operations`."""
    volume = Volume(initial)
    for operation in operations:
        volume.apply(operation)
    for _, image in _some_crashes(volume, limit, rng):
        yield image


def random_fates(unsynced: Sequence[int], rng: random.Random) -> Fates:
    """Each operation kept, lost or torn, as likely."""
    return {number: rng.choice([KEEP, DROP, rng.getrandbits(32)]) for number in unsynced}


def _some_crashes(volume: Volume, limit: int, rng: random.Random) -> Iterator[tuple[Fates, Image]]:
    """Up to `limit` images, all different."""
    seen: list[Image] = []
    for fates in _some_fates(volume.unsynced(), limit, rng):
        image = volume.crash(fates)
        if image not in seen:
            seen.append(image)
            yield fates, image
        if len(seen) >= limit:
            return


def _some_fates(unsynced: Sequence[int], limit: int, rng: random.Random) -> Iterator[Fates]:
    """All kept; all lost; each one lost or torn alone; then random ones."""
    yield {}
    if not unsynced:
        return
    yield dict.fromkeys(unsynced, DROP)
    alone: list[Fates] = [{number: fate} for number in unsynced for fate in (DROP, rng.getrandbits(32))]
    if len(alone) + 2 > limit:
        # Not all fit: half of the room is for random ones.
        alone = rng.sample(alone, min(len(alone), limit // 2))
    yield from alone
    for _ in range(limit):
        yield random_fates(unsynced, rng)


def _kept(image: FileImage, changes: Sequence[_Change], fates: Fates) -> FileImage:
    """`image` with those parts of `changes` on it that `fates` let live."""
    if not changes:
        return image
    blocks = dict(image.blocks)
    allocated = set(image.allocated)
    size = image.size
    for change in changes:
        fate = fates.get(change.number, KEEP)
        if fate == DROP:
            continue
        torn = None if fate == KEEP else random.Random(fate)
        if torn is None or torn.random() < 0.5:
            size = max(size, change.size)
        for block, mask, content in change.blocks:
            survives = mask if torn is None else mask & torn.choice([0, WHOLE, torn.getrandbits(8)])
            if survives:
                blocks[block] = _merged(blocks.get(block, ZEROS), content, survives)
        allocated.update(change.allocates)
        allocated.difference_update(change.frees)
    return FileImage(blocks, size, frozenset(allocated))


def _merged(before: bytes, after: bytes, mask: int) -> bytes:
    """`before` with the sectors of `mask` taken from `after`."""
    if mask == WHOLE:
        return after
    sectors = (
        (after if mask >> sector & 1 else before)[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
        for sector in range(BLOCK_BYTES // SECTOR_BYTES)
    )
    return b"".join(sectors)


def _block_range(begin: int, end: int) -> range:
    """The blocks that [begin, end) touches."""
    return range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)) if begin < end else range(0)


def _pieces(begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """[begin, end) cut at blocks: (block, first byte in it, end in it)."""
    for block in _block_range(begin, end):
        start = block * BLOCK_BYTES
        yield block, max(begin - start, 0), min(end - start, BLOCK_BYTES)
