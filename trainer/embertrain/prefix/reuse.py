"""Prefix reuse as an engine sees it: a sequence is filled as far as there are pages of its prompt, and leaves its own.

Invariants: no call raises what befalls the service or the store, or begins to read rows when the time that was set is
up; what fails is a miss, and is computed. Rows that are not finite are kept for nobody. In batch-invariant mode pages
of a prompt are kept, each of which was computed in one piece; those of an answer, token by token, would have other
bits than a prompt of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv import Hit, KVCache, Namespace
from emberkv.adapters.door import Door
from emberkv.keys import ROOT, page_keys
from torch import Tensor

from ..cache.cache import Cache
from ..cache.spec import PAGE_TOKENS, CacheSpec
from .layout import Layout
from .reading import Reader
from .trail import Trail
from .windows import Windows
from .writing import Pages, Writer


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """What became of the pages so far."""

    read_bytes: int
    """Payloads that were read from the store and right."""
    stored_bytes: int
    """Payloads that the store took."""
    refused_pages: int
    """Pages that were not kept: no room, or no service."""


class Reuse:
    """Of one engine. Made by `Prefixes.open`; to be closed."""

    def __init__(
        self, door: Door, namespace: Namespace, spec: CacheSpec, layout: Layout, windows: Windows, *, answers: bool
    ) -> None:
        """`answers`: pages with tokens of an answer are kept, too."""
        self.namespace = namespace
        self._door, self._layout, self._answers = door, layout, answers
        self._keeps_states = len(namespace.kinds) > 1
        self._interval_tokens = windows.interval_tokens if self._keeps_states else None
        self._replay_tokens = windows.replay_tokens(spec)
        self._reader = Reader(layout, keeps_states=self._keeps_states, timeout_s=door.settings.timeout_s)
        self._writer = Writer(door)

    @property
    def replays(self) -> bool:
        """Whether hits have tokens computed again, in whole pages."""
        return self._replay_tokens > 0

    @property
    def counts(self) -> PrefixCounts:
        writer = self._writer
        return PrefixCounts(self._reader.read_bytes, writer.stored_bytes, writer.refused_pages)

    def restore(self, cache: Cache, sequence: int, prompt_ids: Sequence[int]) -> Trail:
        """Fill an empty sequence with the longest prefix of a prompt that leaves a token to compute."""
        whole = len(prompt_ids) // PAGE_TOKENS
        trail = Trail(
            prompt_tokens=len(prompt_ids),
            keys=self._keys(prompt_ids[: whole * PAGE_TOKENS]),
            pages_max=None if self._answers else whole,
            interval_tokens=self._interval_tokens,
            ends=frozenset([whole]),
        )
        usable = trail.keys[: (len(prompt_ids) - 1) // PAGE_TOKENS]
        if not usable:
            return trail

        def work(kv: KVCache) -> tuple[Hit, int]:
            hit = kv.match(usable, lease_s=self._door.settings.lease_s)
            is_worth_it = hit.pages * PAGE_TOKENS > self._replay_tokens
            return hit, self._reader.fill(kv, hit, cache, sequence) if is_worth_it else hit.pages

        found = self._door.call(work, None)
        if found is None:
            cache.truncate(sequence, 0)
            return trail
        self._note(trail, cache, sequence, *found)
        return trail

    def _note(self, trail: Trail, cache: Cache, sequence: int, hit: Hit, pages: int) -> None:
        """`pages` of a hit are good."""
        trail.stored = max(pages, hit.known_pages) if pages == hit.pages else pages
        trail.ends |= {hit.parts_at} - {0}
        tokens = cache.length(sequence)
        if tokens <= self._replay_tokens:
            cache.truncate(sequence, 0)
            return
        trail.cached_tokens, trail.replayed_tokens = tokens, self._replay_tokens
        if self._replay_tokens:
            cache.replay(sequence, tokens - self._replay_tokens)

    def reached(
        self, trail: Trail, cache: Cache, sequence: int, length: int, ids: Callable[[int, int], list[int]]
    ) -> None:
        """The sequence has so many tokens now: have what is new of it kept. `ids(begin, end)` are its tokens."""
        pages = length // PAGE_TOKENS
        if trail.pages_max is not None:
            pages = min(pages, trail.pages_max)
        end = pages * PAGE_TOKENS
        if trail.is_broken or length < trail.cached_tokens or end <= trail.cached_tokens:
            return
        if len(trail.keys) < pages:
            known = len(trail.keys)
            trail.keys += self._keys(ids(known * PAGE_TOKENS, end), parent=trail.keys[-1] if known else ROOT)
        is_end = length == end and self._keeps_states
        keeps_states = is_end and trail.keeps_states(pages)
        may_keep = is_end and length > trail.prompt_tokens and not keeps_states
        if pages <= trail.stored and not keeps_states and not may_keep:
            return
        first = min(trail.stored, pages)
        rows = cache.export(sequence, first * PAGE_TOKENS, end)
        if not all(bool(each.isfinite().all()) for each in rows.values()):
            trail.is_broken = True  # Whoever began behind such rows would end "not finite", too.
            return
        if pages > first:
            tokens = tuple(ids(first * PAGE_TOKENS, end))
            self._writer.add(Pages(trail, "rows", first, self._layout.pack_rows(rows, pages - first), tokens))
            trail.stored = pages
        if keeps_states or may_keep:
            states = self._layout.pack_states(rows)
            trail.unstored = [] if keeps_states else [(pages, states)]
            if keeps_states:
                self._add_states(trail, pages, states)

    def ended(self, trail: Trail) -> None:
        """Its request has ended: the last page of the answer is one that others may go on from."""
        for pages, states in trail.unstored:
            self._add_states(trail, pages, states)
        trail.unstored = []

    def flush(self) -> None:
        """All that was to be kept is there when this returns, or will not be."""
        self._writer.flush()

    def close(self) -> None:
        """The same, and the end. Closing twice is allowed."""
        self._writer.close()
        self._door.close()

    def _add_states(self, trail: Trail, pages: int, states: Tensor) -> None:
        self._writer.add(Pages(trail, "states", pages - 1, states[None], ()))

    def _keys(self, ids: Sequence[int], *, parent: bytes = ROOT) -> list[bytes]:
        settings = self._door.settings
        salt = settings.salt.encode()
        return page_keys(self.namespace, list(ids), tenant=settings.tenant, salt=salt, parent=parent)
