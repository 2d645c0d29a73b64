"""What a service did since its start: numbers that only grow, made by whoever starts it and handed to the pools.

A namespace that is lost and taken over again goes on counting where it was.

Does not know: who reads them, or what there is now (`figures`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from emberfs.histogram import Histogram

DEPARTED_SLOTS = 1 << 17
"""1 MiB for each namespace."""
_CAUSES = ("", "evicted", "expired", "removed", "damaged")


class Departed:
    """Why keys went that are not there any more, as far as it is remembered: a younger one may take an older's slot.

    Only told to people: nothing depends on it. It begins empty with each process.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * DEPARTED_SLOTS))

    def note(self, key: bytes, cause: str) -> None:
        """It goes: "evicted" (for room), "expired" (by age, or its parent never came), "removed", "damaged"."""
        slot, mark = _slot_of(key)
        self._slots[slot] = mark | _CAUSES.index(cause)

    def cause(self, key: bytes) -> str | None:
        """None: nobody remembers that it was ever there."""
        slot, mark = _slot_of(key)
        found = self._slots[slot]
        return _CAUSES[found & 0xFF] or None if found & ~0xFF == mark else None


def _slot_of(key: bytes) -> tuple[int, int]:
    """(a slot by the key's first bytes, a mark of its others)."""
    return int.from_bytes(key[:4]) % DEPARTED_SLOTS, int.from_bytes(key[4:11]) << 8


@dataclass(slots=True)
class PoolCounts:
    """Of one namespace."""

    matches: int = 0
    matched_pages: int = 0
    asked_pages: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    """Why a match was no longer, by reason."""
    looked_up_pages: int = 0
    """Each for itself, not as a chain."""
    found_pages: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    """Pages that were looked up and are not there, by reason."""
    puts: Counter[str] = field(default_factory=Counter)
    """Pages by what became of them."""
    put_bytes: int = 0
    damaged_pages: int = 0
    partings: int = 0
    """Matches that were told where to keep states."""
    unleased_hits: int = 0
    """Without a lease, since their tenant has too many."""


class ServiceCounts:
    """Of a service: its requests, and the counts of its namespaces."""

    def __init__(self) -> None:
        self.requests: dict[str, Histogram] = {}
        """By kind of request: how long they took, from the start of their handler on."""
        self.errors: Counter[tuple[str, str]] = Counter()
        """(kind of request, class of the error)"""
        self._namespaces: dict[str, PoolCounts] = {}

    def namespace(self, name: str) -> PoolCounts:
        """The counts of a namespace, which stay when it is lost."""
        return self._namespaces.setdefault(name, PoolCounts())

    def served(self, request: str, seconds: float, error: str = "") -> None:
        """A request has ended; `error`: the class of what it ended with."""
        if request not in self.requests:
            self.requests[request] = Histogram()
        self.requests[request].record(seconds)
        if error:
            self.errors[request, error] += 1
