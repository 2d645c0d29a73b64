"""The index of a namespace in memory: which pages there are, what hangs on what, and which goes first.

A *slot* is one key of one tenant: a node of the prefix tree, with one place per kind. Its columns are arrays, so that a
page costs some 300 bytes.

Invariants:
  - Only a leaf that nobody holds is evicted: no prefix is ever cut in its middle to make room.
  - A slot is as recent as the most recent slot below it. Only the slot that was asked for is stamped; a leaf that goes
    leaves its stamp to its parent. So a match costs one stamp, and the order is that of LRU over whole prefixes.
  - A slot whose parent is not there yet is an orphan, and nobody finds it.

Does not know: time (it is told), files, or who asks.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .keys import ROOT
from .page import HEADER_BYTES, Place

NO_PARENT = -1
ORPHAN = -2
FREE = -3
"""In the column of parents."""

PLACES = np.dtype([("segment", "<u4"), ("offset", "<u4"), ("length", "<u4"), ("crc", "<u4")])
"""Segment 0: the page is not there."""
_SLOTS_MIN = 1024


class Found(NamedTuple):
    """The longest usable prefix."""

    slots: list[int]
    reason: str
    """Why it is no longer: "whole", "miss" (never put, or evicted), "damaged", "kind N missing", "no state"."""


class PageTable:
    """See the module. `trailing`: of each kind None (needed on every page), or on how many of the last pages."""

    def __init__(self, trailing: Sequence[int | None]) -> None:
        assert trailing and trailing[0] is None
        self.trailing = tuple(trailing)
        self.keys: list[bytes] = []
        self.parent = array("i")
        self.children = array("I")
        self.used_s = array("d")
        self.held = array("I")
        """Leases on it."""
        self.pinned_s = array("d")
        """Until when it is pinned."""
        self.tenant = array("H")
        self.places: list[Any] = [np.zeros(_SLOTS_MIN, PLACES) for _ in trailing]
        self.count = 0
        self.live_bytes = 0
        """Pages with their headers."""
        self.tenant_bytes: list[int] = []
        self._slots: list[dict[bytes, int]] = []
        """Tenant -> key -> slot."""
        self._leaves: list[list[tuple[float, int, bytes]]] = []
        """Tenant -> a heap of (stamp when it was pushed, slot, key). Looked at again when it comes up."""
        self._free: list[int] = []
        self._waiting: dict[tuple[int, bytes], list[int]] = {}
        """(tenant, key that is not there) -> the orphans."""

    # --- finding ---------------------------------------------------------------------------------------------------

    def add_tenant(self) -> int:
        """The number of a new tenant, from 0."""
        self._slots.append({})
        self._leaves.append([])
        self.tenant_bytes.append(0)
        return len(self._slots) - 1

    def slot(self, tenant: int, key: bytes) -> int | None:
        """Of a page that can be found."""
        slot = self._slots[tenant].get(key)
        return None if slot is None or self.parent[slot] == ORPHAN else slot

    def any_slot(self, tenant: int, key: bytes) -> int | None:
        """The same, orphans too."""
        return self._slots[tenant].get(key)

    def match(self, tenant: int, keys: Sequence[bytes]) -> Found:
        """The longest prefix of the chain `keys` that a reader can use, over all kinds."""
        found = list(map(self._slots[tenant].get, keys))
        reason = "whole"
        if None in found:
            del found[found.index(None) :]
            reason = "miss"
        slots: list[int] = found  # type: ignore[assignment]  # No None is left.
        if slots and self.parent[slots[0]] == ORPHAN:
            return Found([], "miss")
        for kind, last in enumerate(self.trailing):
            if last is None and slots:
                there = self.places[kind]["segment"][slots] != 0
                if not there.all():
                    del slots[int(there.argmin()) :]
                    reason = "damaged" if kind == 0 else f"kind {kind} missing"
        if slots and any(last is not None for last in self.trailing):
            usable = self._usable(slots)
            if usable < len(slots):
                del slots[usable:]
                reason = "no state"
        return Found(slots, reason)

    def _usable(self, slots: list[int]) -> int:
        """How many pages, so that each trailing kind is there on as many of the last as it has to be."""
        usable = np.ones(len(slots) + 1, bool)
        for kind, last in enumerate(self.trailing):
            if last is None:
                continue
            gone = np.concatenate([[0], np.cumsum(self.places[kind]["segment"][slots] == 0)])
            ends = np.arange(len(slots) + 1)
            usable &= gone[ends] == gone[np.maximum(ends - last, 0)]
        return int(np.flatnonzero(usable)[-1])  # Of no page nothing is missing.

    def place(self, slot: int, kind: int) -> Place | None:
        """Where its page lies."""
        row = self.places[kind][slot]
        return Place(*(int(each) for each in row)) if row["segment"] else None

    # --- changing --------------------------------------------------------------------------------------------------

    def put(self, tenant: int, key: bytes, parent: bytes, kind: int, place: Place, *, now_s: float) -> int:
        """A page is there. Returns its slot. Over one that was there already it takes that one's place."""
        slot = self._slots[tenant].get(key)
        if slot is None:
            slot = self._add(tenant, key, parent, now_s)
        else:
            self.touch(slot, now_s)
        self.unplace(slot, kind)
        self.replace(slot, kind, place)
        return slot

    def replace(self, slot: int, kind: int, place: Place) -> None:
        """Its page, which is not there, is at `place` now."""
        self.places[kind][slot] = tuple(place)
        size = HEADER_BYTES + place.length
        self.live_bytes += size
        self.tenant_bytes[self.tenant[slot]] += size

    def _add(self, tenant: int, key: bytes, parent: bytes, now_s: float) -> int:
        slot = self._free.pop() if self._free else self._grow()
        self.keys[slot] = key
        self.tenant[slot] = tenant
        self.used_s[slot] = now_s
        self.children[slot] = self.held[slot] = 0
        self.pinned_s[slot] = 0.0
        self._slots[tenant][key] = slot
        self.count += 1
        if parent == ROOT:
            self.parent[slot] = NO_PARENT
        else:
            above = self._slots[tenant].get(parent)
            if above is None:
                self.parent[slot] = ORPHAN
                self._waiting.setdefault((tenant, parent), []).append(slot)
            else:
                self._hang(slot, above)
        for child in self._waiting.pop((tenant, key), ()):
            self._hang(child, slot)
        if not self.children[slot]:
            heapq.heappush(self._leaves[tenant], (now_s, slot, key))
        return slot

    def _grow(self) -> int:
        slot = len(self.keys)
        self.keys.append(b"")
        for column in (self.parent, self.children, self.used_s, self.held, self.pinned_s, self.tenant):
            column.append(0)
        if slot >= len(self.places[0]):
            self.places = [np.concatenate([each, np.zeros(len(each), PLACES)]) for each in self.places]
        return slot

    def _hang(self, slot: int, above: int) -> None:
        self.parent[slot] = above
        self.children[above] += 1

    def touch(self, slot: int, now_s: float) -> None:
        """It was asked for."""
        if now_s > self.used_s[slot]:
            self.used_s[slot] = now_s

    def hold(self, slot: int) -> None:
        """Keep it, and with it all above it, until it is let go as often."""
        self.held[slot] += 1

    def let_go(self, slot: int) -> None:
        """Opposite of `hold`."""
        assert self.held[slot] > 0
        self.held[slot] -= 1

    def unplace(self, slot: int, kind: int) -> Place | None:
        """Its page is not there any more: what lies below is out of reach until it is put again. What was there."""
        place = self.place(slot, kind)
        if place is not None:
            self.places[kind][slot] = (0, 0, 0, 0)
            size = HEADER_BYTES + place.length
            self.live_bytes -= size
            self.tenant_bytes[self.tenant[slot]] -= size
        return place

    def remove(self, slot: int) -> list[Place]:
        """Forget a leaf that nobody holds. Where its pages were."""
        assert not self.children[slot] and not self.held[slot], "only a leaf that nobody holds goes"
        tenant, key, above = self.tenant[slot], self.keys[slot], self.parent[slot]
        gone = [place for kind in range(len(self.places)) if (place := self.unplace(slot, kind)) is not None]
        del self._slots[tenant][key]
        if above == ORPHAN:
            self._forget_orphan(tenant, slot)
        elif above >= 0:
            self.children[above] -= 1
            self.touch(above, self.used_s[slot])
            if not self.children[above]:
                heapq.heappush(self._leaves[tenant], (self.used_s[above], above, self.keys[above]))
        self.keys[slot] = b""
        self.parent[slot] = FREE
        self._free.append(slot)
        self.count -= 1
        return gone

    def _forget_orphan(self, tenant: int, slot: int) -> None:
        for where, orphans in self._waiting.items():
            if where[0] == tenant and slot in orphans:
                orphans.remove(slot)
                if not orphans:
                    del self._waiting[where]
                return

    # --- what goes first -------------------------------------------------------------------------------------------

    def coldest(self, tenant: int, now_s: float) -> int | None:
        """The leaf of a tenant that was not used for longest, of those that nobody holds or has pinned."""
        heap, kept = self._leaves[tenant], []
        found = None
        while heap:
            stamp, slot, key = heapq.heappop(heap)
            if (
                self.parent[slot] == FREE
                or self.keys[slot] != key
                or self.tenant[slot] != tenant
                or self.children[slot]
            ):
                continue  # It went, or has pages below it by now. It comes again when they are gone.
            if self.used_s[slot] > stamp:
                heapq.heappush(heap, (self.used_s[slot], slot, key))
                continue
            kept.append((stamp, slot, key))
            if not self.held[slot] and self.pinned_s[slot] <= now_s:
                found = slot
                break
        for entry in kept:
            heapq.heappush(heap, entry)
        return found

    def waiting(self) -> Iterator[tuple[bytes, list[int]]]:
        """(a key that is not there, the orphans that wait for it)."""
        for (_, key), slots in self._waiting.items():
            yield key, slots

    # --- what a snapshot knows ---------------------------------------------------------------------------------------

    def adopt(self, tenant: int, slots: dict[bytes, int]) -> None:
        """Of a table that was filled by columns: where the keys of a tenant are."""
        self._slots[tenant] = slots

    def adopt_leaves(self, tenant: int, heap: list[tuple[float, int, bytes]]) -> None:
        """The same for its leaves: (stamp, slot, key), a heap."""
        self._leaves[tenant] = heap

    def await_parent(self, slot: int, parent: bytes) -> None:
        """The same for an orphan."""
        self._waiting.setdefault((self.tenant[slot], parent), []).append(slot)

    # --- all of it ---------------------------------------------------------------------------------------------------

    def slots(self) -> Any:
        """Every slot in use, as an array."""
        return np.flatnonzero(np.asarray(self.parent, dtype=np.int32) != FREE)

    def of_tenant(self, tenant: int) -> list[int]:
        """Its slots."""
        return list(self._slots[tenant].values())

    def below(self, slots: Sequence[int]) -> list[int]:
        """`slots`, and all that hang below them."""
        found = list(dict.fromkeys(slots))
        level = [slot for slot in found if self.children[slot]]
        known = set(found)
        while level:
            hung = np.flatnonzero(np.isin(np.asarray(self.parent, np.int32), level)).tolist()
            fresh = [slot for slot in hung if slot not in known]
            known.update(fresh)
            found += fresh
            level = [slot for slot in fresh if self.children[slot]]
        return found

    def below_first(self, slots: Sequence[int]) -> list[int]:
        """`slots`, each behind all of them that hang below it."""
        depth: dict[int, int] = {}
        for slot in slots:
            path = []
            while slot >= 0 and slot not in depth:
                path.append(slot)
                slot = self.parent[slot]
            base = depth[slot] if slot >= 0 else -1
            for step, each in enumerate(reversed(path), 1):
                depth[each] = base + step
        return sorted(slots, key=lambda slot: -depth[slot])

    def in_segment(self, segment: int) -> list[tuple[int, int]]:
        """(slot, kind) of each page that lies in a segment, in the order in which they lie."""
        found: list[tuple[int, int, int]] = []
        for kind, places in enumerate(self.places):
            slots = np.flatnonzero(places["segment"] == segment)
            found.extend(zip(places["offset"][slots].tolist(), slots.tolist(), [kind] * len(slots), strict=True))
        return [(slot, kind) for _, slot, kind in sorted(found)]
