"""Puts of a namespace, in two steps.

A put is `reserve` (which pages are wanted, and where they go), then the writer writes them to their segment
itself, then `commit` with their checksums. A writer that dies in between leaves a reservation that runs out and a
segment that is sealed. Two writers of one key: the second is told that it is pending.

Does not know: who the writers are beyond their numbers, or how room is made.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberfs.errors import NotFound, ProtocolError
from emberfs.runtime import Runtime

from .admission import SECOND_USE, WRITE_THROUGH, Sightings
from .counts import PoolCounts
from .journal import Put
from .leases import Leases
from .page import HEADER_BYTES, PLACE, Place
from .segments import Segment
from .space import Space
from .wal import Wal

RESERVATION_S = 60.0
"""So long a writer has between `reserve` and `commit`."""
WRITER_SHARE = 0.5
"""Of what may be alive, one writer may have reserved so much at a time: more is refused."""
PATIENCE_S = 1.0
"""So long a put waits for leases to end that hold room back, if they do within it."""
LOOK_S = 0.02

STORED, KNOWN, PENDING, REFUSED, DEFERRED = range(5)
"""What becomes of a page: to be written, there already, being written by somebody else, no room for it, not before it
is put again."""
STATES = ("stored", "known", "pending", "refused", "deferred")
"""What each is called."""


@dataclass(slots=True)
class Reservation:
    """Places for pages, until they are committed or the time is over."""

    writer: int
    tenant: int
    kind: int
    ends_s: float
    keys: list[bytes]
    parents: list[bytes]
    places: list[Place]


class Puts:
    """See the module. `making_room`: held by who makes room or gives it back."""

    def __init__(
        self, runtime: Runtime, wal: Wal, space: Space, leases: Leases, counts: PoolCounts, making_room: asyncio.Lock
    ) -> None:
        self._runtime, self._wal, self._space, self._leases, self._counts = runtime, wal, space, leases, counts
        self._table, self._segments = wal.index.table, wal.index.segments
        self._making_room = making_room
        self._reservations: dict[int, Reservation] = {}
        self._pending: set[tuple[int, int, bytes]] = set()
        """(tenant, kind, key) that somebody is writing."""
        self._writers: Counter[int] = Counter()
        """Writer -> bytes that it reserved, and has neither committed nor given up."""
        self._sightings = Sightings()
        self._next = 1

    def __len__(self) -> int:
        return len(self._reservations)

    def is_pending(self, tenant: int, key: bytes) -> bool:
        """Somebody is writing it, of whichever kind."""
        kinds = range(len(self._table.places))
        return bool(self._pending) and any((tenant, kind, key) in self._pending for kind in kinds)

    async def reserve(
        self,
        writer: int,
        tenant: int,
        kind: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        lengths: Sequence[int],
        policy: str = WRITE_THROUGH,
    ) -> tuple[int, list[int], list[Place | None]]:
        """(a reservation, what becomes of each page, where those go that are to be written).

        Where there is no room because of leases that end soon, it waits for them.
        """
        wanted = [True] * len(keys)
        if policy == SECOND_USE:
            wanted = self._sightings.wanted(kind, keys, parents, lambda key: self._has_page(tenant, key))
        patience_ends_s = self._runtime.now_s() + PATIENCE_S
        states: list[int] = []
        places: list[Place | None] = []
        held = Reservation(writer, tenant, kind, self._runtime.now_s() + RESERVATION_S, [], [], [])
        number, self._next = self._next, self._next + 1
        self._reservations[number] = held
        try:
            if all(wanted):
                self._reserve_first(held, keys, parents, lengths)
                places += held.places
                states += [STORED] * len(places)
            first = len(places)
            for key, parent, length, is_wanted in zip(
                keys[first:], parents[first:], lengths[first:], wanted[first:], strict=True
            ):
                size = length if is_wanted else None
                state, place = await self._reserve_patiently(writer, tenant, kind, key, size, patience_ends_s)
                states.append(state)
                places.append(place)
                if place is not None:
                    self._writers[writer] += place.end - place.offset
                    held.keys.append(key)
                    held.parents.append(parent)
                    held.places.append(place)
                # To make room takes as long as it takes.
                held.ends_s = self._runtime.now_s() + RESERVATION_S
                if number not in self._reservations:
                    raise NotFound("its seat ended while places were looked for: put the pages again")
        except BaseException:
            self._reservations.pop(number, None)
            self._settle(held)
            raise
        if (segment := self._segments.of_writer(writer)) is not None:
            self._segments.align(segment)
        if not held.keys:
            del self._reservations[number]
            number = 0
        self._counts.puts.update(STATES[state] for state in states)
        return number, states, places

    async def _reserve_patiently(
        self, writer: int, tenant: int, kind: int, key: bytes, length: int | None, ends_s: float
    ) -> tuple[int, Place | None]:
        while True:
            state, place = await self._reserve_one(writer, tenant, kind, key, length)
            if state != REFUSED:
                return state, place
            first_end_s = self._leases.first_end_s
            if first_end_s is None or first_end_s > ends_s:
                return state, place
            await self._runtime.sleep(max(first_end_s - self._runtime.now_s(), LOOK_S))
            self._leases.expire(self._runtime.now_s())

    def _reserve_first(
        self, held: Reservation, keys: Sequence[bytes], parents: Sequence[bytes], lengths: Sequence[int]
    ) -> None:
        """Places for as many of the first pages as are new and fit into what the writer has open, at once: mostly that
        is all of them, and one at a time they take three times as long."""
        writer, tenant, kind = held.writer, held.tenant, held.kind
        segment = self._segments.of_writer(writer)
        if segment is None or not segment.has_file:
            return
        pending, there, room = self._pending, self._table.slots_of(tenant), segment.room
        found: dict[tuple[int, int, bytes], None] = {}
        size = 0
        for key, length in zip(keys, lengths, strict=True):
            name = (tenant, kind, key)
            if name in pending or key in there or name in found or size + HEADER_BYTES + length > room:
                break
            found[name] = None
            size += HEADER_BYTES + length
        count = len(found)
        if not count or not self._has_live_room(writer, tenant, size, max(lengths[:count])):
            return
        pending.update(found)
        self._space.promise(tenant, size)
        self._writers[writer] += size
        held.keys += keys[:count]
        held.parents += parents[:count]
        held.places += self._segments.hand_out_all(segment, lengths[:count])

    def _has_live_room(self, writer: int, tenant: int, size: int, length: int) -> bool:
        """There is room for so many bytes more of a writer, in pages of that length, or it is made."""
        limit = self._space.live_bytes_max(length)
        return self._writers[writer] + size <= limit * WRITER_SHARE and self._space.make_live_room(size, tenant, limit)

    async def _reserve_one(
        self, writer: int, tenant: int, kind: int, key: bytes, length: int | None
    ) -> tuple[int, Place | None]:
        """`length` None: it is not to be stored."""
        if (tenant, kind, key) in self._pending:
            return PENDING, None
        slot = self._table.any_slot(tenant, key)
        if slot is not None and self._table.place(slot, kind) is not None:
            if self._table.slot(tenant, key) is not None:  # An orphan is not renewed: it may wait for what never comes.
                self._table.touch(slot, self._space.stamp_s())
            return KNOWN, None
        if length is None:
            return DEFERRED, None
        size = HEADER_BYTES + length
        if not self._has_live_room(writer, tenant, size, length):
            return REFUSED, None
        place = None
        self._pending.add((tenant, kind, key))
        self._space.promise(tenant, size)
        try:
            segment = await self._segment_for(writer, length)
            if segment is not None:
                place = self._segments.hand_out(segment, length)
        finally:
            if place is None:
                self._pending.discard((tenant, kind, key))
                self._space.redeem(tenant, size)
        return (REFUSED, None) if place is None else (STORED, place)

    def _has_page(self, tenant: int, key: bytes) -> bool:
        slot = self._table.any_slot(tenant, key)
        return slot is not None and any(places["segment"][slot] for places in self._table.places)

    async def _segment_for(self, writer: int, length: int) -> Segment | None:
        while (segment := self._segments.open_for(writer, length)) is None:
            async with self._making_room:
                # Another request of the same writer may have made one meanwhile; and while one is made it may be
                # filled by such a request, or be sealed, since its writer's time is over. Then the next one is made.
                is_open = self._segments.open_for(writer, length) is not None
                if not is_open and await self._space.new_segment(writer, length) is None:
                    return None
        return segment

    def commit(self, number: int, writer: int, crcs: Sequence[int]) -> None:
        """The pages of a reservation are written. Raises NotFound: it has run out, or is not this writer's."""
        held = self._reservations.get(number)
        if held is None or held.writer != writer:
            raise NotFound(f"reservation {number} has run out: put the pages again")
        if len(crcs) != len(held.places) or not all(0 <= crc < 1 << 32 for crc in crcs):
            raise ProtocolError(f"a commit of {len(held.places)} pages has as many checksums, of 32 bits: not {crcs}")
        del self._reservations[number]
        blob = b"".join([PLACE.pack(*place[:3], crc) for place, crc in zip(held.places, crcs, strict=True)])
        size = sum(place.length for place in held.places)
        keys, parents = b"".join(held.keys), b"".join(held.parents)
        self._settle(held)
        self._wal.note(Put(held.tenant, held.kind, keys, parents, blob, self._space.stamp_s()))
        self._counts.put_bytes += size

    def reserved(self, number: int, writer: int) -> list[bytes]:
        """The keys of a reservation, in the order of its checksums; none if it has run out."""
        held = self._reservations.get(number)
        return list(held.keys) if held is not None and held.writer == writer else []

    def give_up(self, number: int, writer: int) -> None:
        """The pages of a reservation will not come."""
        held = self._reservations.get(number)
        if held is not None and held.writer == writer:
            del self._reservations[number]
            self._settle(held)

    def _settle(self, held: Reservation) -> None:
        self._segments.settle(held.places)
        size = sum(HEADER_BYTES + place.length for place in held.places)
        self._space.redeem(held.tenant, size)
        self._writers[held.writer] -= size
        self._pending.difference_update((held.tenant, held.kind, key) for key in held.keys)
        if not self._writers[held.writer]:
            del self._writers[held.writer]
        for each in (held.keys, held.parents, held.places):
            each.clear()

    def give_up_all(self, is_over: Callable[[Reservation], bool]) -> None:
        """Those of some."""
        for number, held in list(self._reservations.items()):
            if is_over(held):
                self.give_up(number, held.writer)

    def end_overdue(self, now_s: float) -> None:
        """Their writers may be dead. If one has nothing else that it may be at, its segment is sealed."""
        for overdue in [held for held in self._reservations.values() if held.ends_s <= now_s]:
            self.give_up_all(lambda held, overdue=overdue: held is overdue)  # type: ignore[misc]
            if not any(held.writer == overdue.writer for held in self._reservations.values()):
                self._space.end_segment(overdue.writer)
