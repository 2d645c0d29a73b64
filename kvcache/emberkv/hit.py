"""What a match found: how many pages, where they lie, and the lease on them.

It may be sent to another process, which reads under it: see `Hit.encode`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from .journal import split
from .keys import KEY_BYTES

GRANT_PAGES = 64
"""A grant is of so many pages of a hit."""


class Hit(msgspec.Struct, frozen=True, array_like=True):
    """The longest usable prefix of a chain of keys."""

    pages: int
    """How many of the keys, from the first on."""
    tokens: int
    reason: str
    """Why it is no longer. "whole": it is all. Of the next page: "absent" (never put, or long gone), "pending" (being
    written), "parent missing" (put, but what it hangs on is not there), "evicted" (for room), "expired", "removed",
    "damaged", "kind N missing"; "no state": of a kind that is needed at the end only. "no answer": the service is
    away, and was not asked."""
    lease: int
    """0: there is none."""
    chain: bytes
    """The keys asked for, one after the other."""
    places: tuple[bytes, ...]
    """Of each kind the places of the pages, 16 bytes each; zeros where the kind has none."""
    tenant: int
    """Its number, as page headers have it."""
    known_pages: int = 0
    """How many of the first pages are there, though an engine cannot go on from all of them: `pages` at least."""
    parts_at: int = 0
    """Not 0: after so many pages the chain parts from another one, and nobody kept states there. Whoever computes them
    should put them with the last of these pages, so that a third request goes on from there (`units`)."""
    grants: tuple[bytes, ...] = ()
    """What a reader may read the pages under: of the first GRANT_PAGES, and so on. Empty: there are none."""

    @property
    def keys(self) -> list[bytes]:
        """Of the pages that were found."""
        return self.keys_of(0, self.pages)

    def keys_of(self, first: int, count: int) -> list[bytes]:
        """Of `count` pages from page `first` on."""
        return split(self.chain[first * KEY_BYTES : (first + count) * KEY_BYTES], KEY_BYTES)

    def grants_of(self, first: int, count: int) -> list[bytes]:
        """Of each of `count` pages from page `first` on what it is read under; empty without grants."""
        return [self.grants[page // GRANT_PAGES] for page in range(first, first + count)] if self.grants else []

    def encode(self) -> bytes:
        """As bytes, for another process of the tenant."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Hit:
        """Opposite of `encode`. Raises ValueError."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a hit: {error}") from error


class Browsed(NamedTuple):
    """Some pages of a tenant."""

    hit: Hit
    """To read them by. They are no chain."""
    parents: list[bytes]
    """Of each the key of the page before it."""
    next: int
    """Where to go on; 0: these were the last ones."""
