"""The index of a namespace in memory: which pages there are, what hangs on what, and which goes first.

A *slot* is one key of one tenant: a node of the prefix tree, with one place per kind. Its columns are arrays, so that a
page costs some 350 bytes.

Invariants:
  - Only a leaf that nobody holds is evicted: no prefix is ever cut in its middle to make room.
  - A slot is as recent as the most recent slot below it. Only the slot that was asked for is stamped; those above it
    get the stamp when a leaf goes, or by `spread_stamps`. So a match costs one stamp, and the order is that of LRU over
    whole prefixes.
  - A slot whose parent is not there yet is an orphan, and nobody finds it. Parents form no rings: a slot that would be
    above itself stays an orphan.

Does not know: time (it is told), files, or who asks.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .journal import split
from .keys import KEY_BYTES, ROOT
from .page import HEADER_BYTES, PLACE, Place

NO_PARENT = -1
ORPHAN = -2
FREE = -3
"""In the column of parents."""

NO_STATE = "no state"
"""Why a match is no longer: of a kind that is needed at the end only."""
PLACES = np.dtype([("segment", "<u4"), ("offset", "<u4"), ("length", "<u4"), ("crc", "<u4")])
"""Segment 0: the page is not there."""
_SLOTS_MIN = 1024
BROWSE_SLOTS = 65_536
"""So many are looked at in one go."""
RUN_MIN = 8
"""To find shorter runs of slots costs more than it saves."""
_WORD_BYTES = 8
_KEY_WORDS = KEY_BYTES // _WORD_BYTES
_RUN_WORDS_MAX = 512 * _KEY_WORDS
"""So much is compared at once, however soon it ends: a chain may be long, and its runs short."""
_ramp = array("i", range(_SLOTS_MIN))
"""0, 1, 2, ..."""


class Found(NamedTuple):
    """The longest usable prefix."""

    slots: Any
    """A range, or an array."""
    ends: list[int]
    """The slots that no other of them hangs below: whoever keeps these keeps all. Of a chain that is the last."""
    reason: str
    """Why it is no longer: "whole", "miss" (never put, or evicted), "damaged", "kind N missing", "no state"."""


class PageTable:
    """See the module. `trailing`: of each kind None (needed on every page), or on how many of the last pages."""

    def __init__(self, trailing: Sequence[int | None]) -> None:
        assert trailing and trailing[0] is None
        self.trailing = tuple(trailing)
        self._needed = [kind for kind, last in enumerate(trailing) if last is None]
        """The kinds that are needed on every page."""
        self.keys: list[bytes] = []
        self._key_words = np.zeros(_SLOTS_MIN * _KEY_WORDS, np.uint64)
        """The same, one after the other: runs of them are compared at once."""
        self.parent = array("i")
        self.children = array("I")
        self.first = array("i")
        """The first of its children; -1: it has none."""
        self.next = array("i")
        self.before = array("i")
        """The child of the same parent after it, and before it; -1: there is none."""
        self.used_s = array("d")
        self.held = array("I")
        """Leases on it."""
        self.pinned_s = array("d")
        """Until when it is pinned."""
        self.tenant = array("H")
        self.places: list[Any] = [np.zeros(_SLOTS_MIN, PLACES) for _ in trailing]
        self._is_there = [bytearray() for _ in trailing]
        """Of each kind and slot 1, or 0 where there is no page."""
        self.count = 0
        self.live_bytes = 0
        """Pages with their headers."""
        self.tenant_bytes: list[int] = []
        self._slots: list[dict[bytes, int]] = []
        """Tenant -> key -> slot."""
        self._leaves: list[list[tuple[float, int, bytes]]] = []
        """Tenant -> a heap of (stamp when it was pushed, slot, key). Looked at again when it comes up."""
        self._parked: set[int] = set()
        """Leaves that came up while they were held: they are in no heap until they are let go."""
        self._pins: list[list[tuple[float, int, bytes]]] = []
        """Tenant -> the same for pinned ones: a heap of (until when, slot, key)."""
        self._free: list[int] = []
        self._waiting: dict[tuple[int, bytes], dict[int, None]] = {}
        """(tenant, key that is not there) -> the orphans."""
        self._awaited: dict[int, bytes] = {}
        """Orphan -> the key that it waits for."""
        self._laid: dict[int, array[int]] = {}
        """Segment -> slot * kinds + kind of every page that was laid there. Some are elsewhere by now, or gone."""
        self._stamped: set[int] = set()
        """Those above them may not have the stamp yet."""

    # --- finding ---------------------------------------------------------------------------------------------------

    def add_tenant(self) -> int:
        """The number of a new tenant, from 0."""
        self._slots.append({})
        self._leaves.append([])
        self._pins.append([])
        self.tenant_bytes.append(0)
        return len(self._slots) - 1

    def slot(self, tenant: int, key: bytes) -> int | None:
        """Of a page that can be found."""
        slot = self._slots[tenant].get(key)
        return None if slot is None or self.parent[slot] == ORPHAN else slot

    def any_slot(self, tenant: int, key: bytes) -> int | None:
        """The same, orphans too."""
        return self._slots[tenant].get(key)

    def match(self, tenant: int, keys: bytes) -> Found:
        """The longest prefix of a chain of keys, one after the other, that a reader can use, over all kinds."""
        slots = self._by_runs(tenant, keys)
        is_chain = slots is not None
        if slots is None:
            slots = self._one_by_one(tenant, keys)
        reason = "whole" if len(slots) * KEY_BYTES == len(keys) else "miss"
        for kind in self._needed:
            if (there := self._there(slots, kind)) < len(slots):
                slots, reason = slots[:there], "damaged" if kind == 0 else f"kind {kind} missing"
        if len(slots) and len(self._needed) < len(self.trailing):
            usable = self._usable(slots)
            if usable < len(slots):
                slots = slots[:usable]
                reason = NO_STATE
        if not len(slots):
            return Found(slots, [], reason)
        return Found(slots, [int(slots[-1])] if is_chain else self._ends(slots.tolist()), reason)

    def _by_runs(self, tenant: int, keys: bytes) -> Any:
        """The slots of `keys` up to the first that is not there, if they lie in runs; None: look each of them up.

        Pages that were put one after the other mostly have slots one after the other. The keys of such a run are
        compared at once, which costs a tenth of looking each up. Each slot hangs on the one before, in a run and
        between them.
        """
        find, parent, last = self._slots[tenant].get, self.parent, -1
        begin, runs, words = 0, [], np.frombuffer(keys, np.uint64)
        while begin < len(keys) and (slot := find(keys[begin : begin + KEY_BYTES])) is not None:
            if parent[slot] == ORPHAN or (begin and parent[slot] != last):
                return None
            count = self._run(slot, words[begin // _WORD_BYTES :][:_RUN_WORDS_MAX])
            if parent[slot + 1 : slot + count] != _numbers(slot, slot + count - 1):
                return None
            begin, last = begin + count * KEY_BYTES, slot + count - 1
            runs.append(range(slot, slot + count))
            if count < RUN_MIN and begin < len(keys) and keys[begin : begin + KEY_BYTES] in self._slots[tenant]:
                return None
        if len(runs) == 1:
            return runs[0]
        return np.concatenate([np.arange(run.start, run.stop) for run in runs]) if runs else range(0)

    def _run(self, slot: int, asked: Any) -> int:
        """How many of the keys that are asked for are those of the slots from `slot` on."""
        there = self._key_words[slot * _KEY_WORDS : slot * _KEY_WORDS + len(asked)]
        differs = (there != asked[: len(there)]).tobytes().find(1)
        return (len(there) if differs < 0 else differs) // _KEY_WORDS

    def _one_by_one(self, tenant: int, keys: bytes) -> Any:
        """The same by looking each up, however they hang."""
        slots = list(iter(map(self._slots[tenant].get, split(keys, KEY_BYTES)).__next__, None))
        parent = self.parent
        parents = [parent[slot] for slot in slots]
        if ORPHAN in parents:
            del slots[parents.index(ORPHAN) :]
        return np.array(slots, np.intp)

    def _there(self, slots: Any, kind: int) -> int:
        """How many of the first of `slots` have a page of a kind."""
        if isinstance(slots, range):
            missing = self._is_there[kind].find(0, slots.start, slots.stop) - slots.start
        else:
            missing = np.frombuffer(self._is_there[kind], np.uint8).take(slots).tobytes().find(0)
        return len(slots) if missing < 0 else missing

    def packed(self, slots: Any, kind: int) -> bytes:
        """Where the pages of `slots`, as a match found them, lie, one after the other."""
        return self.places[kind][_rows(slots)].tobytes()  # type: ignore[no-any-return]

    def _ends(self, slots: Sequence[int]) -> list[int]:
        parents = [self.parent[slot] for slot in slots[1:]]
        return [*(a for a, b in zip(slots, parents, strict=False) if a != b), slots[-1]]

    def _usable(self, slots: Any) -> int:
        """How many pages, so that each trailing kind is there on as many of the last as it has to be."""
        usable = np.ones(len(slots) + 1, bool)
        for kind, last in enumerate(self.trailing):
            if last is None:
                continue
            gone = np.concatenate([[0], np.cumsum(self.places[kind]["segment"][_rows(slots)] == 0)])
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

    def put_chain(
        self, tenant: int, keys: Sequence[bytes], parent: bytes, kind: int, places: Sequence[Place], *, now_s: float
    ) -> bool:
        """`put` of pages that hang on each other, the first on `parent`: what most puts are, in a third of the time.

        False, and nothing has changed: some of them have slots, or orphans wait for some.
        """
        named, waiting = self._slots[tenant], self._waiting
        if len({parent, *keys}) <= len(keys) or not named.keys().isdisjoint(keys):
            return False
        if waiting and any((tenant, key) in waiting for key in keys):
            return False
        top = self._add(tenant, keys[0], parent, now_s)
        slots = [top, *self._extend(tenant, top, keys[1:], now_s)]
        # Those below have its stamp, so it alone is to tell those above it.
        if len(slots) > 1:
            heapq.heappush(self._leaves[tenant], (now_s, slots[-1], keys[-1]))
        self._key_words.reshape(-1, _KEY_WORDS)[slots] = np.frombuffer(b"".join(keys), np.uint64).reshape(
            -1, _KEY_WORDS
        )
        self.places[kind][slots] = np.frombuffer(b"".join([PLACE.pack(*place) for place in places]), PLACES)
        there, kinds, size = self._is_there[kind], len(self.places), 0
        for slot, place in zip(slots, places, strict=True):
            there[slot] = 1
            if (laid := self._laid.get(place.segment)) is None:
                laid = self._laid[place.segment] = array("Q")
            laid.append(slot * kinds + kind)
            size += HEADER_BYTES + place.length
        self.live_bytes += size
        self.tenant_bytes[tenant] += size
        return True

    def _extend(self, tenant: int, above: int, keys: Sequence[bytes], now_s: float) -> list[int]:
        """New slots, each below the one before, the first below `above`, which is new, too. Their names in
        `_key_words` and their pages are the caller's to note."""
        slots = [self._free.pop() for _ in range(min(len(self._free), len(keys)))]
        slots += self._grow(len(keys) - len(slots))
        named, names, parent, first, children = self._slots[tenant], self.keys, self.parent, self.first, self.children
        following, before, held, pinned_s = self.next, self.before, self.held, self.pinned_s
        for slot, key in zip(slots, keys, strict=True):
            names[slot], named[key] = key, slot
            parent[slot], first[above], children[above] = above, slot, 1
            following[slot] = before[slot] = first[slot] = -1
            children[slot] = held[slot] = 0
            pinned_s[slot], self.used_s[slot], self.tenant[slot] = 0.0, now_s, tenant
            above = slot
        self.count += len(slots)
        return slots

    def replace(self, slot: int, kind: int, place: Place) -> None:
        """Its page, which is not there, is at `place` now."""
        self.places[kind][slot] = tuple(place)
        self._is_there[kind][slot] = 1
        if place.segment not in self._laid:
            self._laid[place.segment] = array("Q")
        self._laid[place.segment].append(slot * len(self.places) + kind)
        size = HEADER_BYTES + place.length
        self.live_bytes += size
        self.tenant_bytes[self.tenant[slot]] += size

    def _add(self, tenant: int, key: bytes, parent: bytes, now_s: float) -> int:
        slot = self._free.pop() if self._free else self._grow(1)[0]
        self._name(slot, key)
        self.tenant[slot] = tenant
        self.used_s[slot] = now_s
        self.children[slot] = self.held[slot] = 0
        self.pinned_s[slot] = 0.0
        self.first[slot] = self.next[slot] = self.before[slot] = -1
        self.count += 1
        if parent == ROOT:
            self.parent[slot] = NO_PARENT
        elif (above := self._slots[tenant].get(parent)) is not None:
            self._hang(slot, above)
        else:
            self.await_parent(slot, parent)
        self._slots[tenant][key] = slot
        orphans = self._waiting.get((tenant, key))
        self._stamped.add(slot)
        if orphans:
            top = self._top(slot)
            for orphan in list(orphans):
                if orphan != top:  # Else it is above this very slot.
                    self._adopt_orphan(orphan, slot)
        if not self.children[slot]:
            heapq.heappush(self._leaves[tenant], (now_s, slot, key))
        return slot

    def _name(self, slot: int, key: bytes) -> None:
        """It is the slot of a key; b"": of none."""
        self.keys[slot] = key
        self._key_words[slot * _KEY_WORDS : (slot + 1) * _KEY_WORDS] = np.frombuffer(key or ROOT, np.uint64)

    def _top(self, slot: int) -> int:
        while self.parent[slot] >= 0:
            slot = self.parent[slot]
        return slot

    def _adopt_orphan(self, slot: int, above: int) -> None:
        self._forget_orphan(slot)
        self._hang(slot, above)

    def _grow(self, count: int) -> range:
        """New rows, in no use yet."""
        slots = range(len(self.keys), len(self.keys) + count)
        self.keys += [b""] * count
        for there in self._is_there:
            there.extend(bytes(count))
        for column in (
            *(self.parent, self.children, self.first, self.next, self.before),
            *(self.used_s, self.held, self.pinned_s, self.tenant),
        ):
            column.frombytes(bytes(column.itemsize * count))
        while slots.stop > len(self.places[0]):
            self.places = [_doubled(each) for each in self.places]
            self._key_words = _doubled(self._key_words)
        return slots

    def _hang(self, slot: int, above: int) -> None:
        self.parent[slot] = above
        self.children[above] += 1
        after = self.first[above]
        self.next[slot], self.before[slot] = after, -1
        if after >= 0:
            self.before[after] = slot
        self.first[above] = slot

    def _unhang(self, slot: int, above: int) -> None:
        before, after = self.before[slot], self.next[slot]
        if before >= 0:
            self.next[before] = after
        else:
            self.first[above] = after
        if after >= 0:
            self.before[after] = before
        self.children[above] -= 1

    def touch(self, slot: int, now_s: float) -> None:
        """It was asked for."""
        if now_s > self.used_s[slot]:
            self.used_s[slot] = now_s
            self._stamped.add(slot)

    def spread_stamps(self) -> None:
        """Those above what was asked for are as recent."""
        for slot in sorted(self._stamped, key=self.used_s.__getitem__, reverse=True):
            stamp_s, above = self.used_s[slot], self.parent[slot]
            while above >= 0 and self.used_s[above] < stamp_s:
                self.used_s[above] = stamp_s
                above = self.parent[above]
        self._stamped.clear()

    def hold(self, slot: int) -> None:
        """Keep it, and with it all above it, until it is let go as often."""
        self.held[slot] += 1

    def let_go(self, slot: int) -> None:
        """Opposite of `hold`."""
        assert self.held[slot] > 0
        self.held[slot] -= 1
        if not self.held[slot] and slot in self._parked:
            self._parked.remove(slot)
            self._push_leaf(slot)

    def pin(self, slot: int, until_s: float) -> None:
        """Keep it, and with it all above it, until then."""
        is_sooner = until_s < self.pinned_s[slot]
        self.pinned_s[slot] = until_s
        if is_sooner:
            self._push_leaf(slot)

    def _push_leaf(self, slot: int) -> None:
        if not self.children[slot]:
            heapq.heappush(self._leaves[self.tenant[slot]], (self.used_s[slot], slot, self.keys[slot]))

    def unplace(self, slot: int, kind: int) -> Place | None:
        """Its page is not there any more: what lies below is out of reach until it is put again. What was there."""
        place = self.place(slot, kind)
        if place is not None:
            self.places[kind][slot] = (0, 0, 0, 0)
            self._is_there[kind][slot] = 0
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
            self._forget_orphan(slot)
        elif above >= 0:
            self._unhang(slot, above)
            self.touch(above, self.used_s[slot])
            self._push_leaf(above)
        self._name(slot, b"")
        self.parent[slot] = FREE
        self._free.append(slot)
        self.count -= 1
        return gone

    def _forget_orphan(self, slot: int) -> None:
        where = self.tenant[slot], self._awaited.pop(slot)
        orphans = self._waiting[where]
        del orphans[slot]
        if not orphans:
            del self._waiting[where]

    # --- what goes first -------------------------------------------------------------------------------------------

    def coldest(self, tenant: int, now_s: float) -> int | None:
        """The leaf of a tenant that was not used for longest, of those that nobody holds or has pinned."""
        heap, pins = self._leaves[tenant], self._pins[tenant]
        while pins and pins[0][0] <= now_s:
            _, slot, key = heapq.heappop(pins)
            if self._is_leaf(tenant, slot, key):
                heapq.heappush(heap, (self.used_s[slot], slot, key))
        while heap:
            stamp, slot, key = heap[0]
            if not self._is_leaf(tenant, slot, key):
                heapq.heappop(heap)  # It went, or has pages below it by now. It comes again when they are gone.
            elif self.used_s[slot] > stamp:
                heapq.heapreplace(heap, (self.used_s[slot], slot, key))
            elif self.held[slot]:
                heapq.heappop(heap)
                self._parked.add(slot)
            elif self.pinned_s[slot] > now_s:
                heapq.heappop(heap)
                heapq.heappush(pins, (self.pinned_s[slot], slot, key))
            else:
                return slot
        return None

    def _is_leaf(self, tenant: int, slot: int, key: bytes) -> bool:
        """Whether an entry of a heap still means a leaf."""
        is_same = self.parent[slot] != FREE and self.keys[slot] == key and self.tenant[slot] == tenant
        return is_same and not self.children[slot]

    def waiting(self) -> Iterator[tuple[bytes, list[int]]]:
        """(a key that is not there, the orphans that wait for it)."""
        for (_, key), slots in self._waiting.items():
            yield key, list(slots)

    def orphans(self, *, without: Container[int] = ()) -> list[int]:
        """Slots whose parent is not there, but for those of some tenants."""
        return [slot for (tenant, _), slots in self._waiting.items() if tenant not in without for slot in slots]

    # --- what a snapshot knows ---------------------------------------------------------------------------------------

    def adopt(self, tenant: int, slots: dict[bytes, int]) -> None:
        """Of a table that was filled by columns: where the keys of a tenant are."""
        self._slots[tenant] = slots

    def adopt_leaves(self, tenant: int, heap: list[tuple[float, int, bytes]]) -> None:
        """The same for its leaves: (stamp, slot, key), a heap."""
        self._leaves[tenant] = heap

    def adopt_keys(self, column: bytes) -> None:
        """The same for the keys of its slots, one after the other."""
        self.keys, words = split(column, KEY_BYTES), np.frombuffer(column, np.uint64)
        self._key_words = np.concatenate([words, np.zeros(max(len(words), _SLOTS_MIN * _KEY_WORDS), np.uint64)])

    def adopt_places(self) -> None:
        """The same for its pages."""
        self._is_there = [bytearray((each["segment"][: len(self.keys)] != 0).tobytes()) for each in self.places]
        for kind, places in enumerate(self.places):
            order = np.argsort(places["segment"], kind="stable")
            segments, begins = np.unique(places["segment"][order], return_index=True)
            codes = np.split(order.astype(np.uint64) * len(self.places) + kind, begins[1:])
            for segment, mine in zip(segments.tolist(), codes, strict=True):
                if segment:
                    self._laid.setdefault(segment, array("Q")).frombytes(mine.astype("<u8").tobytes())

    def await_parent(self, slot: int, parent: bytes) -> None:
        """A slot is an orphan."""
        self.parent[slot] = ORPHAN
        self._awaited[slot] = parent
        self._waiting.setdefault((self.tenant[slot], parent), {})[slot] = None

    # --- all of it ---------------------------------------------------------------------------------------------------

    def slots(self) -> Any:
        """Every slot in use, as an array."""
        return np.flatnonzero(np.asarray(self.parent, dtype=np.int32) != FREE)

    def some_of(self, tenant: int, after: int, count: int) -> tuple[list[int], int]:
        """(at most `count` slots of a tenant from slot `after` on, no orphans; where to go on, 0 at the end)."""
        end = min(after + BROWSE_SLOTS, len(self.keys))
        tenants = np.asarray(self.tenant[after:end], np.uint16)
        mine = np.flatnonzero((tenants == tenant) & (np.asarray(self.parent[after:end], np.int32) > ORPHAN))
        slots: list[int] = (mine[:count] + after).tolist()
        following = slots[-1] + 1 if len(mine) > count else end
        return slots, following if following < len(self.keys) else 0

    def parent_key(self, slot: int) -> bytes:
        """Of the page before it."""
        above = self.parent[slot]
        assert above > ORPHAN
        return ROOT if above == NO_PARENT else self.keys[above]

    def slots_of(self, tenant: int) -> Mapping[bytes, int]:
        """Its keys, orphans too, and their slots, as they are now."""
        return self._slots[tenant]

    def children_of(self, slot: int) -> list[int]:
        """What hangs on it."""
        found, child = [], self.first[slot]
        while child >= 0:
            found.append(child)
            child = self.next[child]
        return found

    def below(self, slots: Iterable[int]) -> list[int]:
        """`slots`, and all that hang below them; each behind all that hang below it."""
        found: dict[int, None] = {}
        for top in slots:
            if top in found:
                continue
            begin, stack = [], [top]
            while stack:
                slot = stack.pop()
                begin.append(slot)
                stack.extend(child for child in self.children_of(slot) if child not in found)
            found.update(dict.fromkeys(reversed(begin)))
        return list(found)

    def above(self, slots: Iterable[int]) -> set[int]:
        """`slots`, and all that they hang below."""
        found: set[int] = set()
        for slot in slots:
            while slot >= 0 and slot not in found:
                found.add(slot)
                slot = self.parent[slot]
        return found

    def in_segment(self, segment: int) -> list[tuple[int, int]]:
        """(slot, kind) of each page that lies in a segment, in the order in which they lie."""
        kinds = len(self.places)
        found: list[tuple[int, int, int]] = []
        for code in set(self._laid.get(segment, ())):  # A page that went may have come to its slot again.
            slot, kind = divmod(code, kinds)
            there, offset, *_ = self.places[kind][slot].item()
            if there == segment:
                found.append((offset, slot, kind))
        return [(slot, kind) for _, slot, kind in sorted(found)]

    def forget_segment(self, segment: int) -> None:
        """Nothing will lie in it any more."""
        self._laid.pop(segment, None)


def _rows(slots: Any) -> Any:
    """As an index of columns."""
    return slice(slots.start, slots.stop) if isinstance(slots, range) else slots


def _doubled(column: Any) -> Any:
    """With as many rows again."""
    return np.concatenate([column, np.zeros_like(column)])


def _numbers(begin: int, end: int) -> array[int]:
    """Those of a range."""
    if end > len(_ramp):
        _ramp.extend(range(len(_ramp), 2 * end))
    return _ramp[begin:end]
