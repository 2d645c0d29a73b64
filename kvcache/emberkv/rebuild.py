"""An index made anew from the pages themselves, for a namespace that has lost its own.

Every segment is read: a page is where a header says that it is a page of this very place, and the checksums of both
are right. In segments that were begun later, and behind in one, lies what is newer: of two pages with one key that one
counts.

What a log knew and no page does comes back wrong in no byte, but not as it was:
  - A page that was evicted or removed and is not overwritten yet is back. So are those of a tenant that was erased, if
    their segments had not gone.
  - All is as if used when it was written; pins are gone.
  - A page whose parent is not found is an orphan, as after a put: invisible, and it goes unless the parent comes.
  - Whose pages those with a tenant's number are is told by the roster beside the index, or by whoever asks for this.
    A header says what its writer wrote: who may write to the store may have made one in another tenant's name.

Invariant: nothing is written before all segments are read; then the owner's first snapshot makes the index. So it may
be ended and begun anew at any time.

Does not know: services. Nobody may serve the namespace meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emberfs.checksum import crc32c
from emberfs.errors import Corruption, EmberError
from emberfs.runtime import Runtime

from .files import Files
from .index import Index
from .journal import Put, QuotaSet, SegmentAdded, SegmentSealed, TenantAdded
from .namespace import Namespace
from .ownership import Ownership
from .page import HEADER_BYTES, MAGIC, PLACE, Header, decode_header
from .recovery import IndexReader
from .roster import Roster, read_roster
from .segments import SECTOR_BYTES, SEGMENT_BYTES_DEFAULT
from .wal import Wal

READ_BYTES = 8 << 20
GRANULE_BYTES = 4096
"""Around a damaged place so much is given up at least."""
YOUNGER_S = 1e-3
"""Between the stamps of a segment's pages and of those of the next one."""


@dataclass(slots=True)
class Rebuilt:
    """What was found."""

    segments: int = 0
    read_bytes: int = 0
    pages: int = 0
    """Payloads, each kind for itself."""
    live_bytes: int = 0
    orphans: int = 0
    """Keys that nobody finds until a page before them is put again."""
    replaced_pages: int = 0
    """There is a newer one of their key."""
    damaged_pages: int = 0
    """A header that is right before a payload that is not, or a piece of a header: half-written ones, too."""
    foreign_pages: int = 0
    """Of a kind that the namespace has not, or of another size."""
    nameless: dict[int, int] = field(default_factory=dict)
    """Number of a tenant that nobody knows the name of -> its pages, which are left out."""
    tenants: dict[str, int] = field(default_factory=dict)
    """Name -> pages."""


class Rebuild:
    """One of a namespace in `directory`. `tenants`: names by their numbers; none: as the roster has them."""

    def __init__(
        self, files: Files, runtime: Runtime, directory: str, namespace: Namespace, *, tenants: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.report = Rebuilt()
        self._files, self._runtime, self._directory, self._namespace = files, runtime, directory, namespace
        self._tenants = tenants
        self._stamp_s = runtime.wall_ns() / 1e9
        self._index = Index([kind.trailing for kind in namespace.kinds], segment_bytes=SEGMENT_BYTES_DEFAULT)
        self._found: defaultdict[int, int] = defaultdict(int)
        """Number of a tenant -> its pages."""

    async def is_needed(self) -> bool:
        """The index that is there cannot be read, or there is none."""
        reader = IndexReader(self._files, self._runtime, f"{self._directory}/index", lambda: self._index)
        try:
            return await reader.read(1 << 30) is None
        except (EmberError, ValueError, OSError):
            return True

    async def segments(self) -> list[tuple[int, int]]:
        """(number, bytes) of each."""
        names = await self._files.names(f"{self._directory}/segments")
        return [(int(name, 16), await self._files.size(f"{self._directory}/segments/{name}")) for name in names]

    async def scan(self, advance: Callable[[int], None] = lambda count: None) -> Rebuilt:
        """Read all segments. `advance` is told how many bytes were read."""
        roster = Roster(list(self._tenants), [0] * len(self._tenants))
        if not self._tenants:
            roster = await read_roster(self._files, self._directory)
        for number, (name, quota) in enumerate(zip(roster.tenants, roster.quotas, strict=True)):
            self._index.apply(TenantAdded(name))
            self._index.apply(QuotaSet(number, quota))
        found = await self.segments()
        for at, (segment, size_bytes) in enumerate(found):
            data = await self._read(segment, size_bytes, advance)
            scanned = await self._runtime.offload(scan_segment, data, segment)
            self._take(segment, scanned, stamp_s=self._stamp_s - YOUNGER_S * (len(found) - at))
        self._sum_up(len(found))
        return self.report

    async def _read(self, segment: int, size_bytes: int, advance: Callable[[int], None]) -> bytearray:
        data = bytearray(size_bytes)
        for begin in range(0, size_bytes, READ_BYTES):
            end = min(begin + READ_BYTES, size_bytes)
            await self._read_into(segment, data, begin, end)
            advance(end - begin)
        self.report.read_bytes += size_bytes
        return data

    async def _read_into(self, segment: int, data: bytearray, begin: int, end: int) -> None:
        """What cannot be read stays zeros: less and less is tried around it."""
        (piece,) = await self._files.read(f"{self._directory}/segments/{segment:08x}", [(begin, end - begin)])
        if piece is not None:
            data[begin:end] = piece
        elif end - begin > GRANULE_BYTES:
            middle = begin + max((end - begin) // 2 // GRANULE_BYTES, 1) * GRANULE_BYTES
            await self._read_into(segment, data, begin, middle)
            await self._read_into(segment, data, middle, end)

    def _take(self, segment: int, scanned: Scanned, *, stamp_s: float) -> None:
        index, report = self._index, self.report
        report.damaged_pages += scanned.damaged
        index.apply(SegmentAdded(segment, scanned.end, 0))
        groups: defaultdict[tuple[int, int], list[Header]] = defaultdict(list)
        for header in scanned.pages:
            kinds = self._namespace.kinds
            if header.kind >= len(kinds) or kinds[header.kind].payload_bytes not in (0, header.place.length):
                report.foreign_pages += 1
            elif header.tenant >= len(index.tenants):
                report.nameless[header.tenant] = report.nameless.get(header.tenant, 0) + 1
            else:
                groups[header.tenant, header.kind].append(header)
        for (tenant, kind), headers in groups.items():
            keys, parents = b"".join(each.key for each in headers), b"".join(each.parent for each in headers)
            places = b"".join(PLACE.pack(*each.place) for each in headers)
            self._found[tenant] += len(headers)
            index.apply(Put(tenant, kind, keys, parents, places, stamp_s))
        index.apply(SegmentSealed(segment, scanned.end))

    def _sum_up(self, segments: int) -> None:
        index, report = self._index, self.report
        table = index.table
        report.segments = segments
        placed = [places["segment"][: len(table.keys)] != 0 for places in table.places]
        report.pages = sum(int(there.sum()) for there in placed)
        report.live_bytes = table.live_bytes
        report.orphans = len(table.below(slot for _, slots in table.waiting() for slot in slots))
        report.replaced_pages = sum(self._found.values()) - report.pages
        report.tenants = {name: len(table.slots_of(number)) for number, name in enumerate(index.tenants)}
        for segment in list(index.segments):
            if not segment.live_bytes:
                del index.segments.by_id[segment.id]  # Nothing names it: whoever serves next removes its file.

    async def write(self) -> None:
        """Make what was found the index. Raises Unavailable: somebody serves the namespace; ReadOnly."""
        ownership = await Ownership.take(
            self._files, self._runtime, f"{self._directory}/owner", address="emberline kv rebuild", may_wait=False
        )
        known = {segment for segment, _ in await self.segments()}
        if not {segment.id for segment in self._index.segments} <= known:
            raise Corruption(f"segments of {self._directory} went while they were read: rebuild it again")
        owning = self._runtime.spawn(ownership.keep(), "kv-owner")
        try:
            index = f"{self._directory}/index"
            wal = await Wal.recover(self._files, self._runtime, index, ownership, self._index, is_new=True)
            await wal.close()
        finally:
            owning.cancel()
        await ownership.beat(released=True)


@dataclass(slots=True)
class Scanned:
    """Of one segment."""

    pages: list[Header]
    damaged: int
    end: int
    """Nothing but zeros lies behind."""


def scan_segment(data: bytearray, segment: int) -> Scanned:
    """Every page that lies whole in the bytes of a segment, in order."""
    view, pages, damaged, expected = memoryview(data), [], 0, 0
    at = data.find(MAGIC)
    while at >= 0:
        header = decode_header(view[at : at + HEADER_BYTES])
        following = at + len(MAGIC)
        if header is not None and header.place[:2] == (segment, at) and header.place.end <= len(data):
            following = expected = header.place.end  # What a payload holds is no header.
            if crc32c(view[at + HEADER_BYTES : header.place.end]) == header.place.crc:
                pages.append(header)
            else:
                damaged += 1
        elif header is None and (at == expected or at % SECTOR_BYTES == 0):
            damaged += 1
        at = data.find(MAGIC, following)
    end = len(data.rstrip(b"\0"))
    return Scanned(pages, damaged, min(end + -end % SECTOR_BYTES, len(data)))
