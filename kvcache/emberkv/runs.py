"""Pages of a hit, one stretch after the other, each read into the same memory: for what reads more than fits.

Does not know: what the pages are read for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from .client import KVCache
from .hit import Hit
from .journal import split
from .page import NO_PLACE, PLACE, places_of

RUN_BYTES = 32 << 20
"""Of one stretch, or one page if that is larger."""


class Run(NamedTuple):
    """Pages that lie in memory until the next ones are read."""

    first: int
    """The first of them in the hit."""
    payloads: list[memoryview]
    are_good: list[bool]


class RunReader:
    """Reads by one cache. Not thread-safe. `reports` as in `get_into`."""

    def __init__(self, cache: KVCache, *, reports: bool = True) -> None:
        self._cache, self._reports = cache, reports
        self._memory = memoryview(b"")

    def read(self, hit: Hit, kind: int) -> Iterator[Run]:
        """All pages of a hit, each of which has a place of that kind."""
        name = self._cache.namespace.kinds[kind].name
        lengths = [place.length for place in places_of(hit.places[kind])]
        begin = 0
        while begin < len(lengths):
            end, size = begin, 0
            while end < len(lengths) and (end == begin or size + lengths[end] <= RUN_BYTES):
                size += lengths[end]
                end += 1
            payloads = self._room(lengths[begin:end])
            good = self._cache.get_into(hit, payloads, kind=name, first=begin, reports=self._reports)
            yield Run(begin, payloads, good)
            begin = end

    def _room(self, lengths: Sequence[int]) -> list[memoryview]:
        ends = list(accumulate(lengths))
        if len(self._memory) < ends[-1]:
            self._memory = self._cache.buffer(max(ends[-1], RUN_BYTES))
        return [self._memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def chosen(hit: Hit, kind: int, takes: Sequence[bool]) -> Hit:
    """Those pages of a hit that have that kind and are to be taken."""
    places, keys = [split(each, PLACE.size) for each in hit.places], hit.keys
    take = [i for i, is_taken in enumerate(takes) if is_taken and places[kind][i] != NO_PLACE]
    return Hit(
        len(take), 0, hit.reason, hit.lease, b"".join(keys[i] for i in take),
        tuple(b"".join(each[i] for i in take) for each in places), hit.tenant,
    )  # fmt: skip
