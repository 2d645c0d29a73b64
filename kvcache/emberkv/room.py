"""What a store has left, shared out among the namespaces of a server: how much each may hold.

A cache gives way to what others put there. An eviction gives its room back only once it is written down, and for this
there has to be room, too: from a store that is full nothing could leave. So some is left free, and what is missing to
that the namespaces give, each in proportion to what it has.

    enough left    what a namespace has, and its share of what is above the reserve
    too little     what it has, less its share of what is missing

What the store says may be wrong, or late, or be taken by others as fast as it is given. Who gives and sees nothing of
it stops after some looks: a cache that emptied itself would help nobody.

Does not know: what is evicted, or what else is in the store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger("emberline.kv")

RESERVE_SHARE = 1 / 32
RESERVE_BYTES_MIN, RESERVE_BYTES_MAX = 16 << 20, 16 << 30
"""Of what the namespaces have and the store has left: for logs, and for what others write until the next look."""
VAIN_LOOKS_MAX = 3


class Room:
    """See the module."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}
        self._held: dict[str, int] = {}
        """At the last look."""
        self._free_bytes = 0
        self._vain_looks = 0
        """So often in a row something was given, and nothing of it was seen."""

    def share(self, free_bytes: int, held: Mapping[str, int]) -> Mapping[str, int]:
        """What each namespace may hold in bytes, by name, where the store has so much left and they hold so much."""
        total = sum(held.values())
        reserve = min(max(int((total + free_bytes) * RESERVE_SHARE), RESERVE_BYTES_MIN), RESERVE_BYTES_MAX)
        spare = free_bytes - reserve
        if spare >= 0:
            self._vain_looks = 0
            # Those that do not grow leave their shares to those that do, and may begin to.
            growing = {name for name, size in held.items() if size > self._held.get(name, 0)}
            limits = {name: size + spare // len(growing | {name}) for name, size in held.items()}
        elif self._is_in_vain(free_bytes, total):
            limits = {name: self._limits.get(name, size) for name, size in held.items()}
        else:
            limits = {name: max(size + spare * size // max(total, 1), 0) for name, size in held.items()}
        self._held, self._free_bytes, self._limits = dict(held), free_bytes, limits
        return limits

    def _is_in_vain(self, free_bytes: int, total: int) -> bool:
        if free_bytes > self._free_bytes:
            self._vain_looks = 0
        elif total < sum(self._held.values()):
            self._vain_looks += 1
            if self._vain_looks == VAIN_LOOKS_MAX:
                log.warning(
                    "the store has %d bytes left, and no more since the cache gave some: it gives no more", free_bytes
                )
        return self._vain_looks >= VAIN_LOOKS_MAX
