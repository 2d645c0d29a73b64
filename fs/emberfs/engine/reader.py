"""Verified reads of blocks: from records to disk reads, and the check of what came back.

A read covers whole granules (the checksum's unit): the caller's bytes land in the caller's buffer, the rest of the
first and last granule in scratch memory, all by one `preadv` a step, and one CRC call per piece checks the lot.

Does not know: which record is the newest, or who may read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from struct import Struct

from ..checksum import crc32c, first_bad_granule
from ..disk import Disk, ReadItem
from ..errors import Corruption
from ..types import describe_chunk
from .allocator import Allocator, position_class, stride_bytes
from .extents import Known
from .record import Extent, decode_committed, sums_bytes

_sum_at = Struct("<I").unpack_from

STEP_BYTES = 1 << 20
"""Read and checked in one go: fits a core's L2 cache, so that the check does not fetch the bytes from memory again."""


class ReadRequest:
    """One range of one chunk on its way through a batch. Only `extent` says whether the rest is set."""

    __slots__ = (
        "begin",  # where the granules begin, in bytes from the start of the chunk
        "chunk",
        "count",  # bytes of the caller's range that exist
        "error",
        "extent",  # what is read; None: nothing
        "first",  # index of the first granule
        "granule_log2",
        "last",  # one past the last granule
        "length",  # bytes of the granules together
        "pieces",  # where the granules go, in order
        "sums",
    )

    begin: int
    first: int
    granule_log2: int
    last: int
    length: int
    pieces: list[memoryview]
    sums: bytes

    def __init__(self, chunk: bytes) -> None:
        self.chunk = chunk
        self.count = 0
        self.error: Corruption | None = None
        self.extent: Extent | None = None


Step = tuple[ReadRequest, int, int, list[memoryview]]
"""(request, first granule, one past the last, where they go): what is read and checked in one go."""


class BlockReader:
    """Reads and verifies extents of one target."""

    def __init__(self, disk: Disk, allocator: Allocator) -> None:
        self._disk = disk
        self._allocator = allocator

    def requests(
        self,
        chunks: Sequence[bytes],
        rows: Sequence[bytes | None],
        offsets: Sequence[int],
        destinations: Sequence[memoryview],
    ) -> list[ReadRequest]:
        """One request per item, ready for `read`; a damaged record becomes the item's error."""
        requests = []
        for chunk, row, offset, destination in zip(chunks, rows, offsets, destinations, strict=True):
            request = ReadRequest(chunk)
            requests.append(request)
            if row is not None:
                try:
                    extent, granule_log2 = decode_committed(chunk, row)
                except Corruption as error:
                    request.error = error
                    continue
                if extent is not None and offset < extent.length and destination:
                    _aim(request, extent, granule_log2, offset, destination)
        return requests

    def known_requests(
        self,
        chunks: Sequence[bytes],
        known: Sequence[Known | None],
        offsets: Sequence[int],
        destinations: Sequence[memoryview],
    ) -> list[ReadRequest]:
        """`requests` for chunks of which everything is known."""
        requests = []
        for chunk, each, offset, destination in zip(chunks, known, offsets, destinations, strict=True):
            assert each is not None
            request = ReadRequest(chunk)
            requests.append(request)
            if offset < each.extent.length and destination:
                _aim(request, each.extent, each.granule_log2, offset, destination)
                request.sums = each.sums
        return requests

    async def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read and verify; each request ends with its `count` or its `error`."""
        items: list[ReadItem] = []
        steps: list[Step] = []
        for request in requests:
            extent = request.extent
            if extent is None:
                continue
            if extent.slot is not None and not request.sums:
                try:
                    request.sums = await self.sums(request.chunk, extent, request.granule_log2)
                except Corruption as error:
                    request.error = error
                    continue
            file, block = self._allocator.place(extent.position)
            if request.length <= STEP_BYTES:
                items.append((file, request.pieces, block + request.begin))
                steps.append((request, request.first, request.last, request.pieces))
                continue
            for step in _steps(request):
                items.append((file, step[3], block + (step[1] << request.granule_log2)))
                steps.append(step)
        if not items:
            return
        try:
            await self._disk.read(items, partial(_verify, steps))
        except OSError:
            await self._read_one_by_one(items, steps)

    async def _read_one_by_one(self, items: Sequence[ReadItem], steps: Sequence[Step]) -> None:
        """After a failed read: a bad sector must not hide what can be read."""
        for index, item in enumerate(items):
            try:
                (count,) = await self._disk.read([item])
            except OSError as error:
                request, first, *_ = steps[index]
                request.error = _corruption(request, f"{error} (the block cannot be read)", first)
            else:
                _verify(steps, index, count)

    def drop_cache(self, extent: Extent) -> None:
        """Ask that the next read of the extent and of its sums comes from the medium."""
        file, offset = self._allocator.place(extent.position)
        self._disk.drop_cache(file, offset, stride_bytes(position_class(extent.position)))

    async def read_extent(
        self, chunk: bytes, extent: Extent, granule_log2: int, offset: int, destination: memoryview
    ) -> None:
        """Fill `destination` from `offset` of `extent`, which holds that much. Raises Corruption."""
        if not destination:
            return
        request = ReadRequest(chunk)
        _aim(request, extent, granule_log2, offset, destination)
        await self.read([request])
        if request.error is not None:
            raise request.error
        assert request.count == len(destination)

    async def sums(self, chunk: bytes, extent: Extent, granule_log2: int) -> bytes:
        """The packed sums of an extent, from the record or from beside its block. Raises Corruption."""
        if extent.slot is None:
            return extent.sums
        packed = memoryview(bytearray(sums_bytes(extent.length, granule_log2)))
        file, offset = self._allocator.place_side(extent.position, extent.slot)
        (count,) = await self._disk.read([(file, [packed], offset)])
        if count != len(packed) or crc32c(packed) != extent.side_crc:
            name = describe_chunk(chunk)
            raise Corruption(f"the checksums beside the block of chunk {name} are damaged", chunk=name, offset=0)
        return bytes(packed)


def _verify(steps: Sequence[Step], index: int, count: int) -> None:
    """Check one step. Runs where the bytes were read: they are in that core's cache, and nobody's baton is held."""
    request, first, last, pieces = steps[index]
    sums = request.sums
    running = _sum_at(sums, 4 * first - 4)[0] if first else 0
    for piece in pieces:
        running = crc32c(piece, running)
        count -= len(piece)
    if count == 0 and running == _sum_at(sums, 4 * last - 4)[0]:
        return
    if count:
        request.error = _corruption(request, "the block file is too short", first)
        return
    block = memoryview(b"".join(pieces))
    bad = first_bad_granule(block, sums, granule=1 << request.granule_log2, first=first)
    request.error = _corruption(request, "checksum mismatch", first if bad is None else bad)


def _corruption(request: ReadRequest, what: str, granule_index: int) -> Corruption:
    offset, name = granule_index << request.granule_log2, describe_chunk(request.chunk)
    return Corruption(f"{what} in chunk {name} at offset {offset}", chunk=name, offset=offset)


def _steps(request: ReadRequest) -> Iterator[Step]:
    """A request that is longer, in steps of at most STEP_BYTES."""
    pieces = deque(request.pieces)
    for first in range(request.first, request.last, STEP_BYTES >> request.granule_log2):
        last = min(first + (STEP_BYTES >> request.granule_log2), request.last)
        left = min(last << request.granule_log2, request.begin + request.length) - (first << request.granule_log2)
        cut = []
        while left:
            piece = pieces.popleft()
            if len(piece) > left:
                pieces.appendleft(piece[left:])
                piece = piece[:left]
            cut.append(piece)
            left -= len(piece)
        yield (request, first, last, cut)


def _aim(request: ReadRequest, extent: Extent, granule_log2: int, offset: int, destination: memoryview) -> None:
    """Lay the caller's range over whole granules."""
    count = len(destination)
    end = offset + count
    pieces = [destination]
    if end > extent.length:
        end = extent.length
        count = end - offset
        pieces = [destination[:count]]
    first = offset >> granule_log2
    last = (end + (1 << granule_log2) - 1) >> granule_log2
    begin, stop = first << granule_log2, last << granule_log2
    if stop > extent.length:
        stop = extent.length
    if offset > begin:
        pieces.insert(0, memoryview(bytearray(offset - begin)))
    if stop > end:
        pieces.append(memoryview(bytearray(stop - end)))
    request.extent, request.granule_log2, request.sums, request.pieces = extent, granule_log2, extent.sums, pieces
    request.first, request.last, request.begin, request.length, request.count = first, last, begin, stop - begin, count
