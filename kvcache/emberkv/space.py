"""Room in a namespace: what is evicted, what is compacted, and which files go.

    live pages   <= live_share x capacity        else the coldest leaves are evicted, of tenants over their quota first
    segments     <= capacity                      else the emptiest segment is compacted: its live pages move
    dead ones    retired by the journal, then removed once no lease can reach them

Order of an eviction, each durable before the next: the tombstone, then the retirement of the segment, then its file
goes after the last lease. A crash between any two leaves a file that the next owner removes.

Does not know: clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from emberfs.checksum import crc32c
from emberfs.errors import EmberError, LimitExceeded
from emberfs.runtime import Runtime

from .files import Files
from .journal import Evicted, Moved, SegmentAdded, SegmentRetired, SegmentSealed, Unplaced
from .leases import Leases
from .page import HEADER_BYTES, PLACE, Place, decode_header, encode_header
from .segments import Segment
from .table import NO_PARENT, ORPHAN
from .wal import Wal

COMPACTION = 0
"""The writer of the service itself."""
WORKING_SEGMENTS = 4
"""Room for so many is left beside what is alive: one is written to, one is compacted into, some are to go."""
COMPACT_BYTES = 8 << 20
"""So much of a segment is moved at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceConfig:
    """How much a namespace may hold."""

    capacity_bytes: int
    """Of segments on disk, dead pages too. Never exceeded."""
    live_share: float = 0.9
    """Of the capacity, for live pages; the rest is for what is dead and not yet given back. In (0, 1)."""
    ttl_s: float = 72 * 3600.0
    """A page that was not used for so long goes; with it all below it, never what is above."""
    orphan_s: float = 60.0
    """A page whose parent did not come for so long goes."""
    evictions_per_s: float = 20_000.0
    """The pace of removals by age: no burst of tombstones when a whole day expires at once."""

    def __post_init__(self) -> None:
        if self.capacity_bytes < 1 << 20:
            raise LimitExceeded(f"the capacity must be at least 1 MiB, not {self.capacity_bytes} bytes")
        if not 0 < self.live_share < 1:
            raise LimitExceeded(f"live_share must be in (0, 1), not {self.live_share}")
        if min(self.ttl_s, self.orphan_s, self.evictions_per_s) <= 0:
            raise LimitExceeded("ttl_s, orphan_s and evictions_per_s must be above 0")


@dataclass(slots=True)
class SpaceCounts:
    """What was done for room since the start."""

    evicted_pages: int = 0
    expired_pages: int = 0
    moved_bytes: int = 0
    """By compaction: what write amplification is made of."""
    freed_bytes: int = 0
    removed_segments: int = 0


class Space:
    """See the module."""

    def __init__(
        self, files: Files, runtime: Runtime, directory: str, wal: Wal, leases: Leases, config: SpaceConfig
    ) -> None:
        self.config = config
        self.counts = SpaceCounts()
        self.pending_bytes: Counter[int] = Counter()
        """Tenant -> places that it reserved, and has not committed or given up."""
        self._files, self._runtime, self._directory = files, runtime, directory
        self._wal, self._leases = wal, leases
        self._index = wal.index
        self._clock_offset_s = runtime.wall_ns() / 1e9 - runtime.now_s()

    def stamp_s(self) -> float:
        """Now, for stamps that outlive the process: wall clock at the start, and from there on monotonic."""
        return self._clock_offset_s + self._runtime.now_s()

    def path(self, segment: int) -> str:
        """Where its file is."""
        return f"{self._directory}/{segment:08x}"

    def live_bytes_max(self, page_bytes: int) -> int:
        """Live pages beyond it are evicted, for a page of that size: some segments are being filled or compacted."""
        working = WORKING_SEGMENTS * self._index.segments.size_for(page_bytes)
        return min(int(self.config.capacity_bytes * self.config.live_share), self.config.capacity_bytes - working)

    # --- eviction --------------------------------------------------------------------------------------------------

    def make_live_room(self, size: int, tenant: int) -> bool:
        """Evict until `size` more bytes of `tenant` fit. False: not even without what nobody holds."""
        table, quota = self._index.table, self._index.quotas[tenant]
        while quota and table.tenant_bytes[tenant] + self.pending_bytes[tenant] + size > quota:
            if not self._evict_coldest([tenant]):
                return False
        while table.live_bytes + self._index.segments.pending_bytes + size > self.live_bytes_max(size):
            if not self._evict_coldest(range(len(self._index.tenants))):
                return False
        return True

    def _evict_coldest(self, tenants: Sequence[int]) -> bool:
        table, now_s = self._index.table, self.stamp_s()
        found = [slot for tenant in tenants if (slot := table.coldest(tenant, now_s)) is not None]
        if not found:
            return False
        self.evict([min(found, key=lambda slot: table.used_s[slot])])
        self.counts.evicted_pages += 1
        return True

    def evict(self, slots: Sequence[int]) -> None:
        """Tombstones for leaves, in this order."""
        table = self._index.table
        for slot in slots:
            self._wal.note(Evicted(table.tenant[slot], table.keys[slot]))

    def expire(self, count_max: int) -> int:
        """Evict what was not used for `ttl_s`, and orphans: at most so many. How many."""
        table, now_s = self._index.table, self.stamp_s()
        count = 0
        for tenant in range(len(self._index.tenants)):
            while count < count_max:
                slot = table.coldest(tenant, now_s)
                if slot is None or table.used_s[slot] + self.config.ttl_s > now_s:
                    break
                self.evict([slot])
                count += 1
        for slot in [slot for _, slots in table.waiting() for slot in slots]:
            if table.used_s[slot] + self.config.orphan_s <= now_s and count < count_max:
                count += self.cut([slot])
        self.counts.expired_pages += count
        return count

    def cut(self, slots: Sequence[int]) -> int:
        """Take slots out with all below them; of what is held only the pages, it goes later. How many went."""
        table = self._index.table
        doomed = table.below_first(table.below(slots))
        count = 0
        for slot in doomed:
            for kind in range(len(table.places)):
                if table.place(slot, kind) is not None:
                    self._wal.note(Unplaced(table.tenant[slot], kind, table.keys[slot]))
            if not table.held[slot] and not table.children[slot]:
                self.evict([slot])
                count += 1
        return count

    # --- segments --------------------------------------------------------------------------------------------------

    async def new_segment(self, writer: int, payload_bytes: int) -> Segment | None:
        """An open segment for a writer. None: there is no room for one now."""
        segments = self._index.segments
        size_bytes = segments.size_for(payload_bytes)
        if not await self._make_disk_room(size_bytes):
            return None
        self._wal.note(SegmentAdded(segments.next_id, size_bytes, writer))
        segment = segments.by_id[segments.next_id - 1]
        await self._files.create(self.path(segment.id), size_bytes)
        return segment

    async def _make_disk_room(self, size_bytes: int) -> bool:
        segments = self._index.segments
        capacity = self.config.capacity_bytes - size_bytes  # One more, which compaction may need to give any back.
        while segments.promised_bytes + size_bytes > capacity:
            if await self.collect():
                continue
            victim = segments.emptiest()
            if victim is None or victim.live_bytes + size_bytes > capacity:
                return False
            if not await self.compact(victim):
                return False
        return True

    async def collect(self) -> int:
        """Retire what is dead, and remove the files that no lease can reach any more. How many files went."""
        segments = self._index.segments
        dead = segments.dead()
        if dead:
            self._wal.note(*(SegmentRetired(each.id) for each in dead))
            await self._wal.flush()
            for each in dead:
                each.gone_after_s = self._leases.latest_end_s
        gone = [each for each in segments if each.is_retired and each.gone_after_s <= self._runtime.now_s()]
        for segment in gone:
            await self._files.remove(self.path(segment.id))
            segments.drop(segment)
            self.counts.freed_bytes += segment.end
            self.counts.removed_segments += 1
        return len(gone)

    async def compact(self, victim: Segment) -> bool:
        """Move what is alive in a segment elsewhere. False: there was no room for it."""
        table = self._index.table
        pages = table.in_segment(victim.id)
        while pages:
            batch, size = [], 0
            while pages and size < COMPACT_BYTES:
                slot, kind = pages.pop(0)
                place = table.place(slot, kind)
                if place is not None and place.segment == victim.id:
                    batch.append((slot, kind, table.keys[slot], place))
                    size += place.end - place.offset
            if batch and not await self._move(batch):
                return False
        return True

    async def _move(self, batch: Sequence[tuple[int, int, bytes, Place]]) -> bool:
        segments, table = self._index.segments, self._index.table
        source = self.path(batch[0][3].segment)
        data = await self._files.read(source, [(each.offset, each.end - each.offset) for _, _, _, each in batch])
        for entry, page in zip(batch, data, strict=True):
            slot, kind, key, old = entry
            if table.keys[slot] != key or table.place(slot, kind) != old:
                continue  # It went, or was put again, meanwhile.
            if page is None or not is_page(page, old, key):
                self._wal.note(Unplaced(table.tenant[slot], kind, key))
                continue
            segment = segments.open_for(COMPACTION, old.length) or await self._reserve_segment(old.length)
            if segment is None:
                return False
            place = segments.hand_out(segment, old.length)._replace(crc=old.crc)
            head = encode_header(place, key=key, parent=self._parent(slot), kind=kind, tenant=table.tenant[slot])
            try:
                await self._files.write(self.path(segment.id), place.offset, head + page[HEADER_BYTES:])
            finally:
                segments.settle(place)
            if table.keys[slot] == key and table.place(slot, kind) == old:
                self._wal.note(Moved(table.tenant[slot], kind, key, PLACE.pack(*place)))
                self.counts.moved_bytes += place.end - place.offset
        return True

    async def _reserve_segment(self, payload_bytes: int) -> Segment | None:
        """For compaction, which may use the last room there is: it gives back more than it takes."""
        segments = self._index.segments
        size_bytes = segments.size_for(payload_bytes)
        self._wal.note(SegmentAdded(segments.next_id, size_bytes, COMPACTION))
        segment = segments.by_id[segments.next_id - 1]
        try:
            await self._files.create(self.path(segment.id), size_bytes)
        except EmberError:
            self._wal.note(SegmentSealed(segment.id, 0))
            return None
        return segment

    def _parent(self, slot: int) -> bytes:
        above = self._index.table.parent[slot]
        return bytes(32) if above in (NO_PARENT, ORPHAN) else self._index.table.keys[above]

    async def remove_strangers(self) -> int:
        """Files in the directory of segments that the index does not name: an earlier owner's. How many."""
        names = await self._files.names(self._directory)
        known = {self.path(each.id).rpartition("/")[2] for each in self._index.segments}  # Noted before they are made.
        strangers = [name for name in names if name not in known]
        for name in strangers:
            await self._files.remove(f"{self._directory}/{name}")
        return len(strangers)


def is_page(page: bytes, place: Place, key: bytes) -> bool:
    """It is the page of `key` that was written to `place`."""
    header = decode_header(page)
    return (
        header is not None
        and header.key == key
        and header.place == place
        and crc32c(memoryview(page)[HEADER_BYTES:]) == place.crc
    )
