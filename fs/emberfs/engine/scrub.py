"""Finding damage before a reader does: `scrub` reads every byte from the medium, `check` compares index and bitmaps.

`scrub` runs beside readers and writers: what does not verify counts only if the record still says the same after the
read. `check` needs a target that nobody writes to, and says so when it is not. Both go on after a finding.

Memory is bounded by the bitmaps (one integer per 256 blocks) and by what is found, however many chunks there are.

Does not know: files, or where a good copy may be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from ..errors import Conflict, Corruption
from ..kv.types import Transaction
from ..runtime import Runtime
from ..types import describe_chunk
from .allocator import GROUP_BLOCKS, position_class, position_index
from .record import Extent, Record, decode_record, is_tombstone
from .replica import ChunkEngine
from .rows import PENDING, TOMBSTONE

PIECE_BYTES = 4 << 20
"""Read at once, and so lost to sight behind the first damaged granule in it."""
PASSES_MAX = 3
"""What changes while it is looked at is looked at again, so often. `scrub` then leaves the chunk to its writer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """"record", "data" (scrub), "leaked", "owned twice", "unmarked", "outside" or "misfiled" (check)."""
    chunk: str
    """As people read it (see `describe_chunk`); empty if no chunk is concerned."""
    offset: int
    """Bytes from the start of the chunk."""
    message: str
    repaired: bool = False


@dataclass(slots=True)
class ScrubReport:
    """What `scrub` read and found."""

    chunks: int = 0
    read_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


Pace = Callable[[int], Awaitable[object]]
"""Is told of bytes that were read; returns when more may be read."""


@dataclass(slots=True)
class CheckReport:
    """What `check` looked at and found."""

    chunks: int = 0
    blocks: int = 0
    """Blocks that records name."""
    findings: list[Finding] = field(default_factory=list)


async def scrub(
    engine: ChunkEngine,
    *,
    runtime: Runtime,
    bytes_per_s_max: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ScrubReport:
    """Read every committed and pending byte and all checksums from the medium, and verify them.

    `progress(chunks, bytes)` is called after each chunk with what was done so far. Raises StoreClosed, and what reading
    the index raises; damage is in the report.
    """
    began_s = runtime.now_s()

    async def pace(_: int) -> None:
        if bytes_per_s_max is not None:
            due_s = began_s + scrubber.report.read_bytes / bytes_per_s_max
            if (early_s := due_s - runtime.now_s()) > 0:
                await runtime.sleep(early_s)

    scrubber = ChunkScrubber(engine, pace=pace)
    async for chunk, row in engine.records():
        await scrubber.scrub(chunk, row)
        if progress is not None:
            progress(scrubber.report.chunks, scrubber.report.read_bytes)
    return scrubber.report


class ChunkScrubber:
    """Reads chunks of one target back, one by one; all that it read and found is in `report`."""

    def __init__(self, engine: ChunkEngine, *, pace: Pace | None = None) -> None:
        """Between two pieces of a chunk `pace` may wait, or raise to end it: the target may be closed meanwhile."""
        self.report = ScrubReport()
        self._engine = engine
        self._pace = pace
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    async def scrub(self, chunk: bytes, row: bytes) -> list[Finding]:
        """What is wrong with a chunk. `row`: its record, undecoded, as it was a moment ago.

        Raises StoreClosed, and what reading the index raises.
        """
        found: list[Finding] = []
        for _ in range(PASSES_MAX):
            found = await self._verify(chunk, row)
            if not found:
                break
            rows = await self._engine.scan(chunk, chunk + b"\x00", limit=1)
            if not rows:
                return []
            if rows[0][1] == row:
                break
            row, found = rows[0][1], []
        self.report.chunks += not is_tombstone(row)
        self.report.findings += found
        return found

    async def _verify(self, chunk: bytes, row: bytes) -> list[Finding]:
        try:
            record = decode_record(chunk, row)
        except Corruption as error:
            return [Finding("record", describe_chunk(chunk), 0, error.message)]
        return [finding for extent in _extents(record) for finding in await self._verify_extent(chunk, record, extent)]

    async def _verify_extent(self, chunk: bytes, record: Record, extent: Extent) -> list[Finding]:
        found = []
        name = describe_chunk(chunk)
        try:
            # Read once, not again for each piece.
            sums = await self._engine.during(self._sums(chunk, extent, record.granule_log2))
        except Corruption as error:
            return [Finding("data", name, 0, error.message)]
        except OSError as error:
            return [Finding("data", name, 0, f"the checksums cannot be read: {error}")]
        extent = extent._replace(sums=sums, slot=None)
        for offset in range(0, extent.length, PIECE_BYTES):
            piece = self._buffer[: min(PIECE_BYTES, extent.length - offset)]
            read = self._engine.reader.read_extent(chunk, extent, record.granule_log2, offset, piece)
            try:
                await self._engine.during(read)
            except Corruption as error:
                found.append(Finding("data", name, error.offset or 0, error.message))
            except OSError as error:
                found.append(Finding("data", name, offset, f"chunk {name} cannot be read at {offset}: {error}"))
            self.report.read_bytes += len(piece)
            if self._pace is not None:
                await self._pace(len(piece))
        return found

    async def _sums(self, chunk: bytes, extent: Extent, granule_log2: int) -> bytes:
        self._engine.reader.drop_cache(extent)
        return await self._engine.reader.sums(chunk, extent, granule_log2)


async def check(engine: ChunkEngine, *, repair: bool = False) -> CheckReport:
    """Compare records, bitmaps and files: each named block is marked, inside its file, and named once; no other is.

    And the lists of pending versions and tombstones say what the records say. `repair` frees leaked blocks, unless a
    record is damaged: they may be its. Raises Conflict if the target is written to in each of a few tries.
    """
    checker = await _checked(engine)
    leaked = list(checker.leaked())
    repair = repair and bool(leaked) and not checker.is_record_damaged
    if repair:
        await engine.free_leaked(leaked)
    for position in leaked:
        message = f"block {_describe(position)} is marked as taken, and no record names it"
        checker.report.findings.append(Finding("leaked", "", 0, message, repaired=repair))
    return checker.report


async def _checked(engine: ChunkEngine) -> _Checker:
    """A checker that has read the index in one state."""
    passes = 0
    while True:
        passes += 1
        checker = _Checker(engine)
        try:
            await engine.during(checker.read(engine.snapshot()))
        except Conflict as error:
            if passes == PASSES_MAX:
                raise Conflict("the target is being written to: check it when nobody writes") from error
        else:
            return checker


class _Checker:
    def __init__(self, engine: ChunkEngine) -> None:
        self.report = CheckReport()
        self.is_record_damaged = False
        self._engine = engine
        self._marked: dict[tuple[int, int], int] = {}
        """(class log2, group) -> bitmap in the index."""
        self._named: dict[tuple[int, int], int] = {}
        """The same, of the blocks that records name."""

    async def read(self, snapshot: Transaction) -> None:
        async for class_log2, group, bitmap in self._engine.groups(at=snapshot):
            self._marked[class_log2, group] = bitmap
        pending = _Listing("pending versions", self._engine.listed(PENDING, at=snapshot))
        tombstones = _Listing("tombstones", self._engine.listed(TOMBSTONE, at=snapshot))
        async for chunk, row in self._engine.records(at=snapshot):
            self.report.chunks += not is_tombstone(row)
            try:
                record = decode_record(chunk, row)
                for what, has in ((pending, record.is_pending), (tombstones, record.tombstone is not None)):
                    if await what.names(chunk) != has:
                        self._found("misfiled", chunk, f"the list of {what.noun} is wrong about the chunk")
            except Corruption as error:
                self.is_record_damaged = True
                self.report.findings.append(Finding("record", describe_chunk(chunk), 0, error.message))
                continue
            longest: dict[int, Extent] = {}
            for extent in _extents(record):
                other = longest.setdefault(extent.position, extent)
                longest[extent.position] = max(extent, other, key=lambda each: each.length)
            for extent in longest.values():
                self._name(chunk, extent)

    def _name(self, chunk: bytes, extent: Extent) -> None:
        """Take note that `chunk` names the block of `extent`. Committed and pending may share one: it is named once."""
        class_log2, (group, bit) = (
            position_class(extent.position),
            divmod(position_index(extent.position), GROUP_BLOCKS),
        )
        block = _describe(extent.position)
        named = self._named.get((class_log2, group), 0)
        if named >> bit & 1:
            self._found("owned twice", chunk, f"block {block} is named by another chunk too")
        else:
            self.report.blocks += 1
        self._named[class_log2, group] = named | 1 << bit
        if not self._marked.get((class_log2, group), 0) >> bit & 1:
            self._found("unmarked", chunk, f"block {block} is named and not marked as taken: it may be given away")
        _, offset = self._engine.allocator.place(extent.position)
        if offset + extent.length > self._engine.allocator.classes[class_log2].file_bytes:
            self._found("outside", chunk, f"block {block} lies behind the end of its file")

    def _found(self, kind: str, chunk: bytes, message: str) -> None:
        name = describe_chunk(chunk)
        self.report.findings.append(Finding(kind, name, 0, f"{message} (chunk {name})"))

    def leaked(self) -> Iterator[int]:
        """The positions of blocks that are marked and not named."""
        for (class_log2, group), marked in self._marked.items():
            left = marked & ~self._named.get((class_log2, group), 0)
            while left:
                yield class_log2 << 56 | group * GROUP_BLOCKS + (left & -left).bit_length() - 1
                left &= left - 1


class _Listing:
    """A list of chunks in the index, walked beside the records: both are in the order of chunks."""

    def __init__(self, noun: str, chunks: AsyncIterator[bytes]) -> None:
        self.noun = noun
        self._chunks = chunks
        self._next: bytes | None = b""

    async def names(self, chunk: bytes) -> bool:
        """Whether `chunk`, which comes after all that were asked for, is on the list."""
        while self._next is not None and self._next < chunk:
            self._next = await anext(self._chunks, None)
        return self._next == chunk


def _extents(record: Record) -> list[Extent]:
    return [extent for extent in (record.committed, record.pending) if extent is not None]


def _describe(position: int) -> str:
    """A block as people read it: class and index."""
    return f"{1 << position_class(position) - 10}K/{position_index(position)}"
