"""The same batches of pages for everybody: random sequences, all pages of one at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import emberkv

from ..peers import Values
from ..runner import Subject, verify

if TYPE_CHECKING:
    from .rows import Size

KIB, MIB = 1 << 10, 1 << 20
BATCH = 16
ROTATION_BYTES = 64 * MIB
LEASE_S = 3600.0


class Pages:
    """A corpus, cut into pages; 16 that follow each other are a sequence."""

    def __init__(self, corpus: memoryview, page_bytes: int, size: Size) -> None:
        self.page_bytes = page_bytes
        self.sequences = len(corpus) // (BATCH * page_bytes)
        self.corpus = corpus[: self.sequences * BATCH * page_bytes]
        rng = random.Random(page_bytes)
        calls = max(size.pass_bytes // (BATCH * page_bytes), 1)
        self.calls = [rng.randrange(self.sequences) for _ in range(calls)]
        self.amount_mib = calls * BATCH * page_bytes / MIB
        self.name = f"{page_name(page_bytes)} x {BATCH}"

    def values(self) -> list[memoryview]:
        """Every page."""
        return [self.corpus[at : at + self.page_bytes] for at in range(0, len(self.corpus), self.page_bytes)]

    def numbers(self, sequence: int) -> list[int]:
        """Its pages."""
        return list(range(sequence * BATCH, (sequence + 1) * BATCH))

    def keys(self, cache: emberkv.KVCache) -> list[list[bytes]]:
        """Of each sequence."""
        tokens = cache.namespace.page_tokens
        return [cache.keys(range(at * BATCH * tokens, (at + 1) * BATCH * tokens)) for at in range(self.sequences)]

    def store(self, cache: emberkv.KVCache) -> None:
        """Put all of them."""
        values = self.values()
        for sequence, keys in enumerate(self.keys(cache)):
            begin = sequence * BATCH
            states = cache.put(keys, values[begin : begin + BATCH])
            verify(states == ["stored"] * BATCH, f"ours: {states}")
        cache.flush()

    # --- who reads them ----------------------------------------------------------------------------------------------

    def of(self, values: Values, memory: memoryview, who: str) -> Subject:
        """A peer."""
        return self._subject(lambda sequence, into: values.read(self.numbers(sequence), into), memory, who)

    def matched_once(self, cache: emberkv.KVCache, memory: memoryview, who: str = "ours") -> Subject:
        """Ours, the way an engine does it: the hits are there when pages are loaded."""
        hits = [cache.match(keys, lease_s=LEASE_S) for keys in self.keys(cache)]
        verify(all(hit.pages == BATCH for hit in hits), f"{who}: a page is missing")
        return self._subject(lambda sequence, into: _get(cache, hits[sequence], into, who), memory, who)

    def matched_each(self, cache: emberkv.KVCache, memory: memoryview, who: str = "match + get") -> Subject:
        """Ours, with a match of its own before each batch."""
        keys = self.keys(cache)
        return self._subject(lambda sequence, into: _get(cache, cache.match(keys[sequence]), into, who), memory, who)

    def _subject(self, read: Callable[[int, list[memoryview]], None], memory: memoryview, who: str) -> Subject:
        def work(check: bool) -> float:
            for call, sequence in enumerate(self.calls):
                into = self._into(memory, call)
                read(sequence, into)
                if check:
                    self.check(who, sequence, into)
            return self.amount_mib

        return work

    def _into(self, memory: memoryview, call: int) -> list[memoryview]:
        """Where the pages of a call go."""
        turns = len(memory) // (BATCH * self.page_bytes)
        begin = call % turns * BATCH * self.page_bytes
        return [memory[begin + at * self.page_bytes :][: self.page_bytes] for at in range(BATCH)]

    def check(self, who: str, sequence: int, into: Sequence[memoryview]) -> None:
        for number, view in zip(self.numbers(sequence), into, strict=True):
            wanted = self.corpus[number * self.page_bytes :][: self.page_bytes]
            verify(view == wanted, f"{who}: wrong bytes of page {number}")


def _get(cache: emberkv.KVCache, hit: emberkv.Hit, into: list[memoryview], who: str) -> None:
    verify(hit.pages == BATCH and all(cache.get_into(hit, into)), f"{who}: a page is missing")


def page_name(page_bytes: int) -> str:
    """56 KiB, 4.29 MiB."""
    return f"{page_bytes / MIB:.3g} MiB" if page_bytes >= MIB else f"{page_bytes / KIB:.3g} KiB"
