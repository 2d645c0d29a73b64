"""Where the time of one request, or of one call of a client, goes: to a disk, to other servers, or to neither.

Whoever serves a request starts a stopwatch and makes it the `current` one; tasks that are spawned meanwhile inherit it.
The seams tell it when they begin and end to wait: the disk and the group commits, and the network.

Invariants:
  - The parts add up. What overlaps is counted once, and as the disk's: while a disk is waited for, nothing else is.
  - Who waits for a flush that somebody else leads waits for the disk.

Does not know: what is measured. In an event loop a wait includes that for the loop itself, once its end has come.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol


class Sent(Protocol):
    """Who wants to know of the requests that were sent on behalf of a stopwatch."""

    def record(self, kind: str, *, whole_s: float, payload_bytes: int, error: str) -> None:
        """One more; `error` is "" for one that was answered."""


class Stopwatch:
    """Runs from the moment it is made. Touched by whoever has the baton only."""

    __slots__ = ("_clock", "_disks", "_servers", "_since_s", "began_s", "disk_s", "sent", "servers_s")

    def __init__(self, clock: Callable[[], float], sent: Sent | None = None) -> None:
        self._clock = clock
        self._disks = 0
        self._servers = 0
        self._since_s = 0.0
        self.disk_s = 0.0
        self.servers_s = 0.0
        self.sent = sent
        self.began_s = clock()

    def begin_disk(self) -> None:
        """From here on a disk is waited for."""
        if not self._disks:
            now_s = self._clock()
            if self._servers:
                self.servers_s += now_s - self._since_s
            self._since_s = now_s
        self._disks += 1

    def end_disk(self) -> None:
        """Of one `begin_disk`."""
        self._disks -= 1
        if not self._disks:
            now_s = self._clock()
            self.disk_s += now_s - self._since_s
            self._since_s = now_s

    def begin_servers(self) -> None:
        """From here on another server is waited for."""
        if not self._servers and not self._disks:
            self._since_s = self._clock()
        self._servers += 1

    def end_servers(self) -> None:
        """Of one `begin_servers`."""
        self._servers -= 1
        if not self._servers and not self._disks:
            self.servers_s += self._clock() - self._since_s

    def stop(self) -> float:
        """Seconds since it was made; what is still waited for counts up to now. It is of no use afterwards."""
        now_s = self._clock()
        if self._disks:
            self.disk_s += now_s - self._since_s
        elif self._servers:
            self.servers_s += now_s - self._since_s
        return now_s - self.began_s


current: ContextVar[Stopwatch | None] = ContextVar("emberfs-stopwatch", default=None)
"""The stopwatch of what runs here."""
