"""Compaction: the live pages of a segment that is mostly dead are moved into another one, so that its file can go.

What is cold in it is evicted rather than moved: it would be among the next to go. Which segments have little left that
will be asked for again is looked up for some at a time, for that is a look at all pages; before each it is checked
what it is worth by now.

Invariant: a page is named at its old place until its new one is written, and read there until the leases of that
moment have ended.

Does not know: why room is wanted.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Container, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from emberfs.checksum import crc32c

from .files import Files
from .journal import Moved, Unplaced
from .leases import Leases
from .page import HEADER_BYTES, PLACE, Header, Place, decode_header, encode_header
from .segments import SECTOR_BYTES, Segment
from .survey import bytes_by_segment, oldest_stamps, pinned, segments_of
from .table import PageTable
from .wal import Wal

if TYPE_CHECKING:
    from .space import Space

COMPACTION = 0
"""The writer of the service itself."""
COMPACT_BYTES = 8 << 20
"""So much of a segment is moved at a time."""
NEARLY_FULL = 0.7
"""Of what may be alive: with less, only dead pages are given back."""
GAIN_MIN = 0.05
"""Of a segment: less is not worth its compaction."""
RANKED = 8
"""So many victims are chosen by one look at all pages."""
THINNED = 4
"""So many segments are tried, of which pages go that are not the coldest of all."""
TURN_PAGES = 50
"""After so many that went, others have their turn."""
SOON_S = 60.0
"""A lease that ends later keeps a file for long: it is a poor victim that gives nothing back."""
CLEARED_SHARE = 0.5
"""Of the pages in files that can go, that are old enough to go where other files cannot."""
CLEARED_PAGES = 500
"""So many go at once, wherever they lie: what hangs below an old page is older still."""
VAIN_TIMES = 5.0
"""So many times as long as a look took that was in vain none follows: puts that are refused leave time for others."""


class Compaction:
    """See the module."""

    def __init__(self, space: Space, files: Files, wal: Wal, leases: Leases) -> None:
        self._space, self._files, self._wal, self._leases = space, files, wal, leases
        self._table, self._segments = wal.index.table, wal.index.segments
        self._victims: list[int] = []
        """The next ones, the best at the end."""
        self._victims_stay_s = math.inf
        """They were chosen among those whose files stay no longer."""
        self._vain_until_s = -math.inf
        self._cold_s = 0.0
        """What was used before that is evicted."""
        self._kept: set[int] = set()
        """Slots that were held or pinned when victims were chosen, and all above."""

    def room_for(self, victim: Segment) -> int:
        """So much of a segment can be moved: into what we have open, and another one as large."""
        last, size_bytes = self._segments.of_writer(COMPACTION), max(victim.size_bytes, self._segments.size_for(0))
        has_more = self._segments.promised_bytes + size_bytes <= self._space.config.capacity_bytes
        return (last.room if last is not None else 0) + (size_bytes if has_more else 0)

    @property
    def is_tight(self) -> bool:
        """There is a segment that has no room elsewhere, were all of it to be moved."""
        return any(self.room_for(each) < each.live_bytes for each in self._segments.sealed())

    async def compact_one(self, moved_bytes_max: int | None = None, *, stay_s: float = math.inf) -> bool:
        """Give back a segment in which little is left that will be asked for again, of those of which no more than so
        much has to be moved (None: as there is room for), and whose file leases keep for no longer than `stay_s`, and
        grants not at all, unless that is inf. Those that none keeps go first. False: there is none."""
        table, victim = self._table, self._next_victim(moved_bytes_max, stay_s)
        if victim is None:
            return False
        self._evict_cold([slot for slot, _ in table.in_segment(victim.id) if table.used_s[slot] < self._cold_s])
        return await self.compact(victim)

    def _next_victim(self, moved_bytes_max: int | None, stay_s: float) -> Segment | None:
        self._table.spread_stamps()  # What hangs on a page that is cold is not warm: it was not used since, either.
        is_ranked = False
        if self._victims_stay_s > stay_s:
            self._victims = []
        while True:
            while self._victims:
                victim = self._segments.by_id.get(self._victims.pop())
                if victim is not None and victim.is_settled:
                    warm_bytes = self._warm_bytes(victim)
                    if warm_bytes <= self._most_of(victim, moved_bytes_max) and self._is_worth_it(victim, warm_bytes):
                        return victim
            if is_ranked:
                return None
            self._rank(moved_bytes_max, stay_s)
            is_ranked = True

    def _rank(self, moved_bytes_max: int | None, stay_s: float = math.inf) -> None:
        """Choose the next victims, by a look at all pages."""
        table, now_s = self._table, self._space.stamp_s()
        is_full = table.live_bytes > NEARLY_FULL * self._space.live_bytes_max(0)
        self._cold_s = oldest_stamps(table, self._space.config.cold_share) if is_full else 0.0
        self._kept = table.above(self._leases.slots() | pinned(table, now_s))
        warm_bytes = bytes_by_segment(table, self._cold_s, now_s, self._kept)
        staying = self.staying(stay_s)
        reached = staying if stay_s == 0 else self.staying(0.0)
        found = []
        for each in self._segments.sealed():
            size = warm_bytes.get(each.id, 0)
            if each.id in staying:
                continue
            if size <= self._most_of(each, moved_bytes_max) and self._is_worth_it(each, size):
                found.append((size / each.end + (each.id in reached), each.id))
        self._victims = [victim for _, victim in sorted(found)[:RANKED][::-1]]
        self._victims_stay_s = stay_s

    async def thin_one(self, moved_bytes_max: int | None = None, *, stay_s: float = math.inf) -> bool:
        """Give back a segment of which too much is alive: leaves in it go, coldest first, until the rest may be moved.
        Of those that lose least; `stay_s` as above. False: there is none that has enough of what is dead, or of what
        nobody keeps."""
        self._table.spread_stamps()
        staying = self.staying(stay_s)
        reached = staying if stay_s == 0 else self.staying(0.0)
        wasted = [
            each
            for each in self._segments.sealed()
            if each.id not in staying
            and each.live_bytes < (1 - GAIN_MIN) * each.end
            and self._is_worth_it(each, min(each.live_bytes, self._most_of(each, moved_bytes_max)))
        ]

        def loss(each: Segment) -> tuple[bool, float]:
            return each.id in reached, (each.live_bytes - self._most_of(each, moved_bytes_max)) / each.end

        for victim in heapq.nsmallest(THINNED, wasted, key=loss):
            most_bytes = self._most_of(victim, moved_bytes_max)
            await self._thin(victim, most_bytes)
            if victim.live_bytes <= most_bytes:
                return await self.compact(victim)
        return False

    @property
    def was_in_vain(self) -> bool:
        """A look for files that can go found none lately."""
        return self._space.now_s() < self._vain_until_s

    def note_vain(self, since_s: float) -> None:
        """There was none; it was begun then."""
        now_s = self._space.now_s()
        self._vain_until_s = now_s + VAIN_TIMES * (now_s - since_s)

    async def clear_one(self) -> bool:
        """Give back a segment whose file nobody keeps, though all in it may be asked for again: of what lies in such
        files the older half may go. What is older still, but in files that stay, would give no room. False: there is
        none."""
        table, now_s = self._table, self._space.stamp_s()
        table.spread_stamps()
        staying = self.staying(0.0)
        free = [each for each in self._segments.sealed() if each.id not in staying]
        since_s = oldest_stamps(table, CLEARED_SHARE, within={each.id for each in free})
        since_s = math.nextafter(since_s, math.inf)  # As many may have one stamp.
        kept = table.above(self._leases.slots() | pinned(table, now_s))
        warm_bytes = bytes_by_segment(table, since_s, now_s, kept)

        def is_right(each: Segment, moved_bytes: int) -> bool:
            return moved_bytes <= self.room_for(each) and self._is_worth_it(each, moved_bytes)

        free = [each for each in free if is_right(each, warm_bytes.get(each.id, 0))]
        if not free:
            return False
        victim = min(free, key=lambda each: warm_bytes.get(each.id, 0) / each.end)
        old = [slot for slot, _ in table.in_segment(victim.id) if table.used_s[slot] < since_s]
        for slot in itertools.islice(table.below(old), CLEARED_PAGES):
            self._space.evict_leaf(slot)
        return is_right(victim, victim.live_bytes) and await self.compact(victim)

    async def _thin(self, victim: Segment, most_bytes: int) -> None:
        """Have leaves in a segment go, coldest first, until so much is alive in it."""
        table = self._table
        leaves = [self._leaf(slot) for slot in {slot for slot, _ in table.in_segment(victim.id)}]
        heapq.heapify(leaves)
        for count in itertools.count(1):
            if not leaves or victim.live_bytes <= most_bytes:
                return
            _, slot, key = heapq.heappop(leaves)
            above = table.parent[slot]
            if table.keys[slot] == key and self._space.evict_leaf(slot) and self._lies_in(above, victim):
                heapq.heappush(leaves, self._leaf(above))
            if count % TURN_PAGES == 0:
                await self._space.take_turns()

    def staying(self, stay_s: float) -> set[int]:
        """Segments whose files leases keep for longer, and those that grants keep; none if that is inf."""
        table, space = self._table, self._space
        if stay_s == math.inf:
            return set()
        held = segments_of(table, table.above(self._leases.slots(beyond_s=space.now_s() + stay_s)))
        now_s = space.stamp_s()
        return held | {each.id for each in self._segments if each.granted_until_s > now_s}

    def _most_of(self, victim: Segment, moved_bytes_max: int | None) -> int:
        return self.room_for(victim) if moved_bytes_max is None else moved_bytes_max

    def _leaf(self, slot: int) -> _Leaf:
        return _Leaf(self._table.used_s[slot], slot, self._table.keys[slot])

    def _lies_in(self, slot: int, segment: Segment) -> bool:
        return slot >= 0 and any(places["segment"][slot] == segment.id for places in self._table.places)

    def _is_worth_it(self, victim: Segment, warm_bytes: int) -> bool:
        """Else its pages would fill as much elsewhere."""
        page_bytes = self._table.live_bytes / max(self._table.count, 1)
        return warm_bytes + max(GAIN_MIN * victim.end, 2 * page_bytes) <= victim.end

    def _warm_bytes(self, victim: Segment) -> int:
        """What would be moved."""
        table, now_s, size = self._table, self._space.stamp_s(), 0
        for slot, kind in table.in_segment(victim.id):
            if table.used_s[slot] >= self._cold_s or slot in self._kept or table.pinned_s[slot] > now_s:
                size += HEADER_BYTES + int(table.places[kind]["length"][slot])
        return size

    def _evict_cold(self, slots: Sequence[int]) -> None:
        """They would be among the next to go: to move them first would be in vain. So does what is below them."""
        for slot in self._table.below(slots):
            self._space.evict_leaf(slot)

    async def compact(self, victim: Segment) -> bool:
        """Move what is alive in a segment elsewhere. False: there was no room for all of it."""
        pages = self._table.in_segment(victim.id)
        while pages:
            batch: list[_Page] = []
            while pages and sum(each.place.end - each.place.offset for each in batch) < COMPACT_BYTES:
                slot, kind = pages.pop()
                place = self._table.place(slot, kind)
                if place is not None and place.segment == victim.id:  # Else it went meanwhile.
                    batch.append(_Page(slot, kind, self._table.keys[slot], place))
            if batch and not await self._move(batch):
                return False
        return True

    async def _move(self, batch: Sequence[_Page]) -> bool:
        """Move pages of one segment: runs that lie side by side in one write."""
        segments = self._segments
        source = segments.by_id[batch[0].place.segment]
        ranges = [(each.place.offset, each.place.end - each.place.offset) for each in batch]
        data = await self._files.read(self._space.path(source.id), ranges)
        moved: list[tuple[_Page, Place, bytes]] = []
        try:
            has_room = await self._place_anew(zip(batch, data, strict=True), moved)
            if (last := segments.of_writer(COMPACTION)) is not None:
                segments.align(last)
            for segment, run in groupby(moved, key=lambda each: each[1].segment):
                pieces = list(run)
                written = b"".join(each[2] for each in pieces)
                written += bytes(-len(written) % SECTOR_BYTES)
                await self._files.write(self._space.path(segment), pieces[0][1].offset, written)
        finally:
            for _, place, _ in moved:
                segments.settle([place])
        # A lease protects a slot and all above it: of a page that is neither nobody was told where it lies.
        leased = _at_or_below(self._table, self._leases.slots(), {page.slot for page, _, _ in moved})
        if leases := self._leases.of_slots(leased, after=source.since_lease):
            source.leases |= leases
            source.left_s = self._space.stamp_s()
        for page, place, _ in moved:
            if self._is_there(page):
                self._wal.note(Moved(self._table.tenant[page.slot], page.kind, page.key, PLACE.pack(*place)))
                self._space.counts.moved_bytes += place.end - place.offset
                source.moved_bytes += place.end - place.offset
        return has_room

    async def _place_anew(
        self, pages: Iterable[tuple[_Page, bytes | None]], moved: list[tuple[_Page, Place, bytes]]
    ) -> bool:
        """Add to `moved` where each page goes, and its bytes there. False: there was no room for all."""
        segments = self._segments
        for page, data in pages:
            if not self._is_there(page):
                continue
            header = None if data is None else page_header(data, page.place, page.key)
            if data is None or header is None:
                self._space.departed.note(page.key, "damaged")
                self._wal.note(Unplaced(self._table.tenant[page.slot], page.kind, page.key))
                continue
            segment = segments.open_for(COMPACTION, page.place.length) or await self._new_for_compaction(page.place)
            if segment is None:
                return False
            place = segments.hand_out(segment, page.place.length)._replace(crc=page.place.crc)
            head = encode_header(place, key=page.key, parent=header.parent, kind=header.kind, tenant=header.tenant)
            moved.append((page, place, head + data[HEADER_BYTES:]))
        return True

    def _is_there(self, page: _Page) -> bool:
        """It did not go, and was not put again, since it was looked at."""
        table = self._table
        return table.keys[page.slot] == page.key and table.place(page.slot, page.kind) == page.place

    async def _new_for_compaction(self, place: Place) -> Segment | None:
        segments = self._segments
        size_bytes = segments.size_for(place.length)
        if segments.promised_bytes + size_bytes > self._space.config.capacity_bytes:
            return None
        return await self._space.add_segment(COMPACTION, size_bytes)


class _Leaf(NamedTuple):
    """A slot that may be one, ordered by its use."""

    used_s: float
    slot: int
    key: bytes


class _Page(NamedTuple):
    """A page that is being moved."""

    slot: int
    kind: int
    key: bytes
    place: Place


def _at_or_below(table: PageTable, slots: Iterable[int], tops: Container[int]) -> set[int]:
    """Of `slots` those that are among `tops`, or hang below one of them."""
    found, is_below = set(), dict[int, bool]()
    for slot in slots:
        path, at = [], slot
        while at >= 0 and at not in is_below and at not in tops:
            path.append(at)
            at = table.parent[at]
        is_so = at in tops or is_below.get(at, False)
        is_below.update(dict.fromkeys(path, is_so))
        if is_so:
            found.add(slot)
    return found


def page_header(page: bytes, place: Place, key: bytes) -> Header | None:
    """Of the page of `key` that was written to `place`; None: it is not that, or damaged."""
    header = decode_header(page)
    if header is None or header.key != key or header.place != place:
        return None
    return header if crc32c(memoryview(page)[HEADER_BYTES:]) == place.crc else None
