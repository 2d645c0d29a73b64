"""How much may be under way on one connection: the client keeps within it, the server closes on one who does not.

A window, and not a server that stops reading: what comes late on a connection may be what the calls before it wait for
(a `Vouch` behind many `Forward`s). So small calls wait for the count only, and large ones wait at the client.
"""

from __future__ import annotations

SMALL_BYTES_MAX = 16 << 10
"""A call up to this weight is not counted in bytes."""


class Window:
    """The calls of one connection: how many, and how many bytes of requests and of buffers to fill."""

    def __init__(self, calls_max: int, bytes_max: int) -> None:
        self.calls = 0
        self.bytes = 0
        self._calls_max = calls_max
        self._bytes_max = bytes_max

    def has_room(self, weight: int) -> bool:
        """True if a call of so many bytes may begin."""
        if self.calls >= self._calls_max:
            return False
        return weight <= SMALL_BYTES_MAX or self.bytes + weight <= self._bytes_max

    def take(self, weight: int) -> None:
        """A call begins."""
        self.calls += 1
        self.bytes += weight if weight > SMALL_BYTES_MAX else 0

    def give(self, weight: int) -> None:
        """A call has ended."""
        self.calls -= 1
        self.bytes -= weight if weight > SMALL_BYTES_MAX else 0
