"""Segments: append-only files that pages are written to. What of each is alive, and who may write to it.

    open      one writer appends to it; places are handed out in order and never twice
    sealed    nobody writes to it any more
    retired   nothing in it is alive and the journal says so; its file goes when no lease can reach it

A place that was handed out is used or lost; it never comes back, and numbers of segments do not either, so
(segment, offset) names one page for ever.

Does not know: what the pages are, or how files are kept.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .page import HEADER_BYTES, PAGE_BYTES_MAX, Place

SEGMENT_BYTES_DEFAULT = 64 << 20
SEGMENTS_MIN = 256
"""Of a full namespace. With fewer, more of what is dead lies where it is worth no compaction, and one moves more."""
FITTED_BYTES_MIN = 1 << 16
"""The store's smallest block."""
SECTOR_BYTES = 4096
"""The store appends to a chunk in place where it ends at a multiple of this; else it writes the chunk anew."""
PAGES_PER_SEGMENT_MIN = 4
"""Of large pages a segment has room for so many, so that its last piece is a small part of it."""


def segment_bytes_for(capacity_bytes: int) -> int:
    """How large segments are, if pages allow it."""
    return min(SEGMENT_BYTES_DEFAULT, capacity_bytes // SEGMENTS_MIN)


class State(enum.IntEnum):
    """Of a segment."""

    OPEN = 1
    SEALED = 2
    RETIRED = 3


@dataclass(slots=True)
class Segment:
    """One segment."""

    id: int
    size_bytes: int
    state: State = State.OPEN
    writer: int = 0
    """Who appends to it: a session; 0 for the service's own compaction."""
    end: int = 0
    """Places before it were handed out."""
    live_bytes: int = 0
    """Pages with headers that the index names."""
    pending_bytes: int = 0
    """Places that were handed out, and are neither committed nor given up."""
    has_file: bool = True
    """False while it is made: places in it are given to nobody before."""
    unknown_bytes: int = 0
    """Before `end`, that an earlier process may have handed out, or not: nobody knows of a page there."""
    moved_bytes: int = 0
    """Pages that compaction has written elsewhere: until its file goes they are there twice."""
    left_s: float = float("-inf")
    """When pages that leases reach were moved or taken out of it last."""
    since_lease: int = 0
    """This lease and those before it were given when it was not begun: they know no place in it."""
    leases: set[int] = field(default_factory=set)
    """Those that may reach a page which was moved out of it."""
    gone_after_lease: int = 0
    """Leases up to this one may reach a page that was taken out of it."""
    granted_until_s: float = float("-inf")
    """Until then somebody may write to it under a grant, whether or not it may."""

    @property
    def is_retired(self) -> bool:
        """Only its file is left."""
        return self.state is State.RETIRED

    @property
    def is_settled(self) -> bool:
        """Nobody writes to it, and it can be compacted."""
        return self.state is State.SEALED and self.end > 0 and not self.pending_bytes

    @property
    def room(self) -> int:
        """Bytes that can still be handed out."""
        return self.size_bytes - self.end if self.state is State.OPEN else 0


class Segments:
    """All segments of a namespace."""

    def __init__(self, *, segment_bytes: int = SEGMENT_BYTES_DEFAULT) -> None:
        self.segment_bytes = segment_bytes
        self.by_id: dict[int, Segment] = {}
        self.next_id = 1
        self.disk_bytes = 0
        """What the files take: places that were handed out, also of what is dead by now."""
        self._open: dict[int, Segment] = {}
        """Writer -> the segment that it appends to."""
        self._dead: dict[int, Segment] = {}
        """Sealed ones in which nothing is alive, nor may be soon, by their numbers."""
        self._retired: dict[int, Segment] = {}

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.by_id.values())

    def leaving_bytes(self, since_s: float) -> int:
        """What retired ones take for leases on what left them since then."""
        return sum(each.end for each in self._retired.values() if each.left_s >= since_s)

    def granted_bytes(self, now_s: float) -> int:
        """What retired ones take for grants to write to them."""
        return sum(each.end for each in self._retired.values() if each.granted_until_s > now_s)

    def waiting(self, since_s: float, now_s: float) -> list[Segment]:
        """Retired ones that wait for such leases, or for grants."""
        retired = self._retired.values()
        return [each for each in retired if each.left_s >= since_s or each.granted_until_s > now_s]

    @property
    def going_bytes(self) -> int:
        """What sealed ones take in which nothing is alive: retired or not yet."""
        return sum(each.end for some in (self._dead, self._retired) for each in some.values())

    @property
    def unknown_bytes(self) -> int:
        """What may have been handed out, and is not known to have been."""
        return sum(each.unknown_bytes for each in self if each.unknown_bytes)

    @property
    def are_small(self) -> bool:
        """On the whole their files are less than half as large as they might be."""
        return 2 * self.disk_bytes < sum(each.size_bytes for each in self)

    @property
    def open_room(self) -> int:
        """Bytes that can still be handed out of open ones."""
        return sum(each.room for each in self._open.values())

    @property
    def promised_bytes(self) -> int:
        """What the files take, with the room that open segments still have."""
        return self.disk_bytes + self.open_room

    def fit(self, limit_bytes: int, capacity_bytes: int) -> None:
        """New ones are as large as is right for a namespace that may hold so much of its capacity now."""
        self.segment_bytes = segment_bytes_for(capacity_bytes)
        if (fitting := segment_bytes_for(limit_bytes)) < self.segment_bytes:
            # In steps: a limit changes all the time, and a spare of another size goes.
            self.segment_bytes = max((1 << fitting.bit_length()) >> 1, FITTED_BYTES_MIN)

    def open_for(self, writer: int, payload_bytes: int) -> Segment | None:
        """The segment of a writer, if a page fits into it. None: it needs a new one."""
        segment = self._open.get(writer)
        is_fit = segment is not None and segment.has_file and segment.room >= HEADER_BYTES + payload_bytes
        return segment if is_fit else None

    def of_writer(self, writer: int) -> Segment | None:
        """The open segment of a writer."""
        return self._open.get(writer)

    def idle(self) -> Segment | None:
        """The open segment that was begun first, of those whose writer is not at it now; a client's before ours."""
        idle = [each for each in self._open.values() if not each.pending_bytes]
        return min(idle, key=lambda each: (not each.writer, each.id), default=None)

    def size_for(self, payload_bytes: int) -> int:
        """How large a new segment has to be."""
        assert payload_bytes <= PAGE_BYTES_MAX
        size_bytes = max(self.segment_bytes, PAGES_PER_SEGMENT_MIN * (HEADER_BYTES + payload_bytes))
        return size_bytes + -size_bytes % SECTOR_BYTES

    def add(self, writer: int, size_bytes: int) -> Segment:
        """A new open segment."""
        segment = Segment(self.next_id, size_bytes, writer=writer)
        self.next_id += 1
        self.by_id[segment.id] = segment
        assert writer not in self._open, "a writer's segment is sealed before its next one"
        self._open[writer] = segment
        return segment

    def hand_out(self, segment: Segment, payload_bytes: int) -> Place:
        """A place for one page. Its checksum is not known yet: 0."""
        return self.hand_out_all(segment, [payload_bytes])[0]

    def hand_out_all(self, segment: Segment, lengths: Sequence[int]) -> list[Place]:
        """Places for pages, one after the other."""
        places, end = [], segment.end
        for length in lengths:
            places.append(Place(segment.id, end, length, 0))
            end += HEADER_BYTES + length
        assert segment.state is State.OPEN and end <= segment.size_bytes
        segment.pending_bytes += end - segment.end
        self._extend(segment, end)
        return places

    def _extend(self, segment: Segment, end: int) -> None:
        self.disk_bytes += end - segment.end
        segment.end = end

    def _look(self, segment: Segment) -> None:
        """Whether it is dead by now, or not any more."""
        if segment.state is State.SEALED and not segment.live_bytes and not segment.pending_bytes:
            self._dead[segment.id] = segment
        else:
            self._dead.pop(segment.id, None)

    def align(self, segment: Segment) -> None:
        """What is handed out next begins a sector: who writes what was handed out before fills up its last one."""
        if segment.state is State.OPEN:
            self._extend(segment, segment.end + -segment.end % SECTOR_BYTES)

    def settle(self, places: Iterable[Place]) -> None:
        """Of places that were handed out it is known now whether they hold pages."""
        for number, _, length, _ in places:
            segment = self.by_id[number]
            segment.pending_bytes -= HEADER_BYTES + length
            assert segment.pending_bytes >= 0
            self._look(segment)

    def revive(self, places: Iterable[Place]) -> None:
        """The index names pages at `places`."""
        for number, offset, length, _ in places:
            segment, end = self.by_id[number], offset + HEADER_BYTES + length
            segment.live_bytes += end - offset
            if end > segment.end:  # In a replay nothing was handed out.
                self._extend(segment, end)
            if not segment.live_bytes - (end - offset):
                self._look(segment)

    def bury(self, place: Place) -> None:
        """The index does not name the page at `place` any more."""
        segment = self.by_id[place.segment]
        segment.live_bytes -= place.end - place.offset
        assert segment.live_bytes >= 0
        if not segment.live_bytes:
            self._look(segment)

    def seal(self, segment: Segment, end: int = 0) -> None:
        """Nothing is handed out of it any more; if it was before `end`, by an earlier process, that counts."""
        if segment.state is State.OPEN:
            segment.state = State.SEALED
            if self._open.get(segment.writer) is segment:
                del self._open[segment.writer]
        if end > segment.end:
            self._extend(segment, end)
        self._look(segment)

    def restore(self, number: int, size_bytes: int, state: State, end: int, live_bytes: int) -> None:
        """One of a snapshot."""
        segment = self.by_id[number] = Segment(number, size_bytes, state, end=end, live_bytes=live_bytes)
        self.disk_bytes += end
        if segment.is_retired:
            self._retired[number] = segment
        self._look(segment)

    def inherit(self) -> None:
        """Nobody goes on writing to what an earlier process had open. How much of it was handed out it told nobody: all
        of it may have been."""
        for segment in self:
            if segment.state is State.OPEN:
                segment.unknown_bytes = segment.size_bytes - segment.end
                self.seal(segment, segment.size_bytes)

    def retire(self, segment: Segment) -> None:
        """Nothing in it is alive. Its file may go after the last lease."""
        assert not segment.live_bytes and not segment.pending_bytes
        self.seal(segment)
        segment.state = State.RETIRED
        self._look(segment)
        self._retired[segment.id] = segment

    def drop(self, segment: Segment) -> None:
        """Its file is gone."""
        assert segment.state is State.RETIRED
        del self.by_id[segment.id], self._retired[segment.id]
        self.disk_bytes -= segment.end

    def spent(self) -> list[Segment]:
        """Open ones that something was written to, and in which nothing is alive, nor may be soon."""
        return [each for each in self._open.values() if each.end and not each.live_bytes and not each.pending_bytes]

    def dead(self) -> list[Segment]:
        """Sealed ones in which nothing is alive."""
        return list(self._dead.values())

    def retired(self) -> list[Segment]:
        """Those of which only the file is left."""
        return list(self._retired.values())

    def sealed(self) -> list[Segment]:
        """Those that nobody writes to, and that can be compacted."""
        return [each for each in self if each.is_settled]
