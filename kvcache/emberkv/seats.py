"""Who is seated at the service: a client in a namespace, as one tenant, and one writer of its segments.

Invariants: a seat is what a client shows with each request, and nobody may guess another one's. One that nothing was
heard of for long ends, and with it what it reserved.

Does not know: tokens, messages.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass

from emberfs.errors import LimitExceeded
from emberfs.runtime import Runtime

from .errors import SeatGone, StaleOwner
from .pool import Pool

SEAT_S = 600.0
"""A seat that nothing was heard of for so long ends."""
SEATS_MAX = 4096
"""Of one tenant in one namespace."""


@dataclass(slots=True)
class Seat:
    """One client in one namespace."""

    pool: Pool
    tenant: int
    number: int
    policy: str
    """Of its puts: one of `admission.PUT_POLICIES`."""
    heard_s: float


class Seats:
    """All of a service."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._seats: dict[int, Seat] = {}

    def __len__(self) -> int:
        return len(self._seats)

    def take(self, pool: Pool, tenant: int, policy: str) -> Seat:
        """A new seat. Raises LimitExceeded."""
        if sum(each.pool is pool and each.tenant == tenant for each in self._seats.values()) >= SEATS_MAX:
            raise LimitExceeded(f"a tenant has at most {SEATS_MAX} clients in a namespace: close some")
        number = int.from_bytes(self._runtime.random_bytes(8)) >> 1
        self._seats[number] = seat = Seat(pool, tenant, number, policy, self._runtime.now_s())
        return seat

    def of(self, number: int) -> Seat:
        """Whose it is; it was heard of. Raises SeatGone."""
        seat = self._seats.get(number)
        if seat is None:
            raise SeatGone(f"seat {number} is not taken: open the namespace again")
        if seat.pool.is_lost:
            raise SeatGone("another server has taken this namespace over")
        seat.heard_s = self._runtime.now_s()
        return seat

    def leave(self, seat: Seat) -> None:
        """It ends: what it reserved will not come."""
        del self._seats[seat.number]
        seat.pool.end_writer(seat.number)

    def policies(self, pool: Pool) -> dict[int, Counter[str]]:
        """Tenant -> how many of its clients in a namespace put by which policy."""
        found: dict[int, Counter[str]] = {}
        for seat in self._seats.values():
            if seat.pool is pool:
                found.setdefault(seat.tenant, Counter())[seat.policy] += 1
        return found

    async def keep_up(self) -> None:
        """Look after them, for ever."""
        while True:
            await self._runtime.sleep(SEAT_S / 10)
            limit_s = self._runtime.now_s() - SEAT_S
            for seat in list(self._seats.values()):
                if seat.heard_s < limit_s:
                    with contextlib.suppress(StaleOwner):
                        self.leave(seat)
