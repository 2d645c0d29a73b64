"""Pages of a hit into a sequence of the cache.

Bytes go from the storage server into memory that is used again for every read (shared with it, where it is on this
host), and from there into the cache's pools. A page that is damaged, or went since the match, or that there is no time
for, ends the prefix there; of states that can't be read those before are tried. Nothing here is an error of the
caller's.

Invariant: the sequence has whole pages that were read and checked, and, where the layout has states, those of its end;
or it has nothing.
"""

from __future__ import annotations

import time

import torch
from emberfs.errors import DeadlineExceeded
from emberkv import Hit, KVCache
from emberkv.page import NO_PLACE, PLACE
from torch import Tensor

from ..cache.cache import Cache
from ..cache.spec import PAGE_TOKENS
from .layout import Layout

READ_BYTES = 64 << 20
"""So many are read at once, or one page that is larger."""
STATES_TRIED = 4
"""Places whose states could not be read, before it is a miss."""


class Reader:
    """Of one engine; one read at a time."""

    def __init__(self, layout: Layout, *, keeps_states: bool, timeout_s: float) -> None:
        self.read_bytes = 0
        """Payloads that were read and right, so far."""
        self._layout, self._keeps_states, self._timeout_s = layout, keeps_states, timeout_s
        self._memory: dict[str, tuple[KVCache, memoryview]] = {}

    def fill(self, kv: KVCache, hit: Hit, cache: Cache, sequence: int) -> int:
        """Pages that the empty sequence has now, of those of the hit. Raises EmberError, the sequence then in parts.

        After `timeout_s` no read is begun, but for one of the states that pages which are there cannot do without.
        """
        until_s = time.monotonic() + self._timeout_s
        wanted, there = hit.pages, None
        for _ in range(STATES_TRIED):
            states = None
            if self._keeps_states:
                wanted, states = self._states(kv, hit, wanted, until_s)
            if not wanted:
                break
            if there is None:
                there = self._rows(kv, hit, wanted, cache, sequence, until_s)
            if there >= wanted:
                if states is not None:
                    end = wanted * PAGE_TOKENS
                    cache.import_(sequence, end, end, self._layout.unpack_states(states.to(cache.device), end))
                return wanted
            wanted = there
        cache.truncate(sequence, 0)
        return 0

    def _states(self, kv: KVCache, hit: Hit, pages: int, until_s: float) -> tuple[int, Tensor | None]:
        """(the most pages at whose end there are states, and they); 0 if there are none."""
        tried = 0
        for page in reversed(range(pages)):
            if hit.places[1][page * PLACE.size : (page + 1) * PLACE.size] == NO_PLACE:
                continue
            memory = self._buffer(kv, "states", self._layout.states_bytes)
            if self._read(kv, hit, [memory], page, "states") == [True]:
                return page + 1, torch.frombuffer(memory, dtype=torch.uint8)
            tried += 1
            if tried == STATES_TRIED or time.monotonic() >= until_s:
                break
        return 0, None

    def _rows(self, kv: KVCache, hit: Hit, pages: int, cache: Cache, sequence: int, until_s: float) -> int:
        """How many of the first pages the sequence has now."""
        size = self._layout.rows_bytes
        most = min(pages, max(1, READ_BYTES // size))
        memory = self._buffer(kv, "rows", most * size)
        for first in range(0, pages, most):
            if time.monotonic() >= until_s:
                return first
            count = min(most, pages - first)
            views = [memory[at * size : (at + 1) * size] for at in range(count)]
            done = self._read(kv, hit, views, first, "rows")
            good = done.index(False) if False in done else count
            if good:
                payload = torch.frombuffer(memory[: good * size], dtype=torch.uint8).view(good, size)
                rows = self._layout.unpack_rows(payload.to(cache.device))
                cache.import_(sequence, first * PAGE_TOKENS, (first + good) * PAGE_TOKENS, rows)
            if good < count:
                return first + good
        return pages

    def _read(self, kv: KVCache, hit: Hit, views: list[memoryview], first: int, kind: str) -> list[bool]:
        """Raises DeadlineExceeded where the storage does not answer: no need to ask it again."""
        began_s = time.monotonic()
        done = kv.get_into(hit, views, kind=kind, first=first)
        if not any(done) and time.monotonic() - began_s >= self._timeout_s:
            raise DeadlineExceeded(f"no page within {self._timeout_s:g} s")
        self.read_bytes += sum(len(view) for view, good in zip(views, done, strict=True) if good)
        return done

    def _buffer(self, kv: KVCache, kind: str, size: int) -> memoryview:
        held = self._memory.get(kind)
        if held is None or held[0] is not kv or len(held[1]) < size:
            held = self._memory[kind] = (kv, kv.buffer(size))
        return held[1][:size]
