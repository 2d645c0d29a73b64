"""The door by which clients of a server's host come with their memory: an abstract unix socket, and keys to it.

A key is said over a connection that has let its client in already, is good once and not for long, and makes the client
what it was there: whoever else finds the socket is refused.

Does not know: sockets, or regions.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from ..errors import AccessDenied
from .handshake import Certificate

KEYS_MAX = 1024
"""Keys that were given out and not used; the oldest go."""


class Door:
    """Of one listener."""

    def __init__(self, address: str, random_bytes: Callable[[int], bytes]) -> None:
        self.address = address
        self._random_bytes = random_bytes
        self._keys: dict[str, Certificate | None] = {}

    def offer(self, certificate: Certificate | None) -> tuple[str, str]:
        """(address, key) for a client that was let in with `certificate`."""
        while len(self._keys) >= KEYS_MAX:
            del self._keys[next(iter(self._keys))]
        key = self._random_bytes(16).hex()
        self._keys[key] = certificate
        return self.address, key

    def enter(self, key: str) -> Certificate | None:
        """What the owner of `key` has proved. Raises AccessDenied."""
        for known in self._keys:
            if hmac.compare_digest(known.encode(), key.encode()):
                return self._keys.pop(known)
        raise AccessDenied("no such key to this door: it was used already, or it is old")
