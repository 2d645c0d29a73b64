"""Leases on pages: whoever matched a prefix may count on its pages for a while.

A lease is a duration on the clock of the service, held by the request that took it, and ends by itself. It is no
promise that readers rely on to be right: a page read too late is found out by its header and checksum.

Does not know: pages. A lease holds slots, which the table protects while they are held.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence, Set

LEASE_S_MAX = 3600.0
_STALE_MAX = 1000
"""Entries that mean nothing any more; with more of them the order of ends is made anew."""


class Leases:
    """Who holds what, until when. Times are seconds of one monotonic clock."""

    def __init__(self, hold: Callable[[int], None], let_go: Callable[[int], None]) -> None:
        self._hold, self._let_go = hold, let_go
        self._held: dict[int, tuple[float, tuple[int, ...], int]] = {}
        """Lease -> (end, slots, owner), in the order of their numbers."""
        self._owners: Counter[int] = Counter()
        self._ends: deque[tuple[float, int]] = deque()
        """(end, lease) in their order: those of one duration end in the order in which they were taken. Of one that was
        extended or let go an entry stays until its time."""
        self._early: list[tuple[float, int]] = []
        """A heap of those that end before one that was taken before them."""
        self._next = 1

    def __len__(self) -> int:
        return len(self._held)

    def count_of(self, owner: int) -> int:
        """How many it has."""
        return self._owners[owner]

    @property
    def newest(self) -> int:
        """The number of the last one that was taken; 0: there was none."""
        return self._next - 1

    @property
    def first_end_s(self) -> float | None:
        """When the next one ends, or ended or was extended: not later. None: there is none."""
        return min(ends[0] for ends in (self._ends, self._early) if ends)[0] if self._held else None

    def are_held(self, leases: Set[int], *, after: int, up_to: int) -> bool:
        """One of those has not ended, or one that was taken behind the lease `after` and not behind `up_to`."""
        if any(lease in self._held for lease in leases):
            return True
        for lease in self._held if up_to > after else ():  # In the order of their numbers.
            if lease > after:
                return lease <= up_to
        return False

    def of_slots(self, slots: Set[int], *, after: int) -> set[int]:
        """Those that hold one of `slots`, and were taken behind the lease `after`."""
        return {lease for lease, (_, held, _) in self._held.items() if lease > after and not slots.isdisjoint(held)}

    def slots(self) -> set[int]:
        """All that are held."""
        return {slot for _, slots, _ in self._held.values() for slot in slots}

    def take(self, slots: Sequence[int], *, owner: int, duration_s: float, now_s: float) -> int:
        """A new lease on `slots`. Its number, which means nothing to other owners."""
        lease, self._next = self._next, self._next + 1
        end_s = now_s + min(duration_s, LEASE_S_MAX)
        self._held[lease] = (end_s, tuple(slots), owner)
        self._owners[owner] += 1
        self._push(end_s, lease)
        for slot in slots:
            self._hold(slot)
        return lease

    def extend(self, lease: int, *, owner: int, duration_s: float, now_s: float) -> bool:
        """Let it last for `duration_s` from now. False: it is over, or another owner's."""
        self.expire(now_s)
        held = self._held.get(lease)
        if held is None or held[2] != owner:
            return False
        end_s = max(held[0], now_s + min(duration_s, LEASE_S_MAX))
        self._held[lease] = (end_s, held[1], owner)
        self._push(end_s, lease)
        return True

    def _push(self, end_s: float, lease: int) -> None:
        if self._ends and end_s < self._ends[-1][0]:
            heapq.heappush(self._early, (end_s, lease))
        else:
            self._ends.append((end_s, lease))
        if len(self._ends) + len(self._early) > 2 * len(self._held) + _STALE_MAX:
            self._ends = deque(sorted((held[0], number) for number, held in self._held.items()))
            self._early = []

    def release(self, leases: Iterable[int], *, owner: int) -> int:
        """End some now. How many of them there were."""
        mine = [lease for lease in leases if lease in self._held and self._held[lease][2] == owner]
        for lease in mine:
            self._end(lease)
        return len(mine)

    def _end(self, lease: int) -> None:
        _, slots, owner = self._held.pop(lease)
        self._owners[owner] -= 1
        for slot in slots:
            self._let_go(slot)

    def expire(self, now_s: float) -> None:
        """End those whose time is over."""
        while self._ends and self._ends[0][0] <= now_s:
            self._end_if_due(self._ends.popleft()[1], now_s)
        while self._early and self._early[0][0] <= now_s:
            self._end_if_due(heapq.heappop(self._early)[1], now_s)

    def _end_if_due(self, lease: int, now_s: float) -> None:
        held = self._held.get(lease)
        if held is not None and held[0] <= now_s:
            self._end(lease)
