"""What a store has left, shared out among the namespaces of a server: how much each may hold.

A cache gives way to what others put there. An eviction gives its room back only once it is written down, and for this
there has to be room, too: from a store that is full nothing could leave. So some is left free, and what is missing to
that the namespaces give, each in proportion to what it has.

    enough left    what a namespace has, and its share of what is above the reserve
    too little     what it has, less its share of what is missing

What the store says is a second or two old, and may be wrong. While it says the same again nothing more is given, and
what was given has to be seen: in what is left, or in what others have taken of it. Who gives in vain some times hardly
gives more until the figure changes: a cache that emptied itself at once would help nobody.

Does not know: what is evicted, or what else is in the store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

log = logging.getLogger("emberline.kv")

RESERVE_SHARE = 1 / 32
RESERVE_BYTES_MIN, RESERVE_BYTES_MAX = 16 << 20, 16 << 30
"""Of what the namespaces have and the store has left: for logs, and for what others write until the next look."""
TELLING_SHARE = 1 / 8
"""Of the reserve: when so much was given it is looked whether it is seen."""
VAIN_MAX = 3
AGAIN_LOOKS = 12
"""Who has stopped gives once more after so many looks nonetheless: what fills the disk may be no file of the store.
Then after twice as many, and so on."""
GROWS_LOOKS = 12
"""Who grew is taken for one that grows for so many looks: it may pause, or put as much as it evicts."""


class _Look(NamedTuple):
    """What there was at some time."""

    free_bytes: int
    used_bytes: int
    held: Mapping[str, int]


class Room:
    """See the module."""

    def __init__(self) -> None:
        self._last = _Look(0, 0, {})
        self._limits: Mapping[str, int] = {}
        self._since: _Look | None = None
        """When giving began, or was last seen."""
        self._vain = 0
        """So often in a row it was not."""
        self._stopped_bytes: int | None = None
        """What the store had left when giving was given up."""
        self._stopped_looks, self._again_looks = 0, AGAIN_LOOKS
        self._grew: dict[str, int] = {}
        """Namespace -> looks since it grew; none for long ones."""

    def share(self, free_bytes: int, used_bytes: int, held: Mapping[str, int]) -> Mapping[str, int]:
        """What each namespace may hold, by name, where the store has so much left, and they hold so much of what is
        taken; in bytes."""
        now = _Look(free_bytes, used_bytes, dict(held))
        reserve = int((sum(held.values()) + free_bytes) * RESERVE_SHARE)
        reserve = min(max(reserve, RESERVE_BYTES_MIN), RESERVE_BYTES_MAX)
        if free_bytes >= reserve:
            self._since, self._vain, self._stopped_bytes = None, 0, None
            limits = self._grown(free_bytes - reserve, held)
        elif self._gives_no_more(now, reserve):
            limits = {name: self._limits.get(name, size) for name, size in held.items()}
        else:
            total = max(sum(held.values()), 1)
            limits = {name: max(size - (reserve - free_bytes) * size // total, 0) for name, size in held.items()}
        self._last, self._limits = now, limits
        return limits

    def _grown(self, spare_bytes: int, held: Mapping[str, int]) -> dict[str, int]:
        """Three quarters of it for those that grow, the rest for those that may begin to."""
        grew = {name: looks + 1 for name, looks in self._grew.items() if name in held and looks < GROWS_LOOKS}
        grew |= {name: 0 for name, size in held.items() if size > self._last.held.get(name, size)}
        self._grew, growing = grew, grew.keys()
        still = held.keys() - growing
        of_growing = spare_bytes if not still else spare_bytes * 3 // 4 if growing else 0
        shares = {name: of_growing // len(growing) for name in growing}
        shares |= {name: (spare_bytes - of_growing) // len(still) for name in still}
        return {name: size + shares[name] for name, size in held.items()}

    def _gives_no_more(self, now: _Look, reserve: int) -> bool:
        if self._stopped_bytes is not None:
            if abs(now.free_bytes - self._stopped_bytes) < reserve // 4:
                self._stopped_looks += 1
                if self._stopped_looks < self._again_looks:
                    return True
                self._stopped_looks, self._again_looks = 0, 2 * self._again_looks
                return False
            self._since, self._vain, self._stopped_bytes = None, 0, None
        if self._since is None:
            self._since = now
        elif now[:2] == self._last[:2]:
            return True  # What was given since is not in it yet.
        since = self._since
        given = sum(max(size - now.held[name], 0) for name, size in since.held.items() if name in now.held)
        if given < reserve * TELLING_SHARE:
            return False
        self._since = now
        left, taken = now.free_bytes - since.free_bytes, now.used_bytes - since.used_bytes
        self._vain = 0 if 2 * (left + taken) >= -given else self._vain + 1
        if self._vain < VAIN_MAX:
            return False
        self._stopped_bytes, self._stopped_looks, self._again_looks = now.free_bytes, 0, AGAIN_LOOKS
        log.warning("the store has %d bytes left, however much the cache gives: it hardly gives more", now.free_bytes)
        return True
