"""Where an engine with a sliding window keeps its window's states, and so where a prefix of its can be taken up.

DeepSeek-V4's rule: the compressed entries are small and kept of every page; the states of the window are as large as
many pages, and kept only at the ends of a request's input and output, every so many tokens, and where two requests
were seen to part. A hit ends where there are states (api-docs.deepseek.com, "Context Caching"). V4.1's bounded replay
keeps no states: a hit may end at any page, and the engine computes the last window of it again.

Everything is counted in whole pages from the start of a request. In a namespace the states are a kind of their own with
the policy "trailing:1".

Does not know: keys, bytes, where pages are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from emberfs.errors import LimitExceeded

INTERVAL_TOKENS = 8192
"""Keeps 97 of 100 hits with one state in ten pages of 512 tokens (docs/experiments.md)."""

WINDOW_TOKENS = 128
"""Of DeepSeek V4 and V4.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a request can take from the cache."""

    known_pages: int
    """Leading pages whose compressed entries are there."""
    pages: int
    """Leading pages that it can start from."""
    tokens: int
    """In those."""
    recompute_tokens: int
    """The last ones of `tokens`, which the engine computes again to have its window. Their entries are not stored."""
    parts_at: int = 0
    """After so many of the known pages the request parts from another one; 0: it does not, or there are states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRule:
    """Which pages keep the states of the window at their end."""

    page_tokens: int
    interval_tokens: int | None = INTERVAL_TOKENS
    """Every so many tokens, a multiple of the page; None: nowhere but at ends."""
    sees_common: bool = True
    """Keep them too where a request parts from another one, as the service saw: a third one then hits."""
    replays: bool = False
    """Keep none: each hit has its last window computed again."""
    window_tokens: int = WINDOW_TOKENS

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.window_tokens < 1:
            raise LimitExceeded("a page and a window have a token at least")
        if self.interval_tokens is not None and (
            self.interval_tokens < self.page_tokens or self.interval_tokens % self.page_tokens
        ):
            raise LimitExceeded(
                f"interval_tokens is a multiple of the {self.page_tokens} of a page, not {self.interval_tokens}"
            )

    def plan(self, known_pages: int, has_states: Callable[[int], bool], *, parts: bool = False) -> Plan:
        """For a request with its first `known_pages` there; `has_states` of a page, counted from 0; `parts`: others go
        on otherwise after these pages."""
        pages = known_pages
        while pages and not self.replays and not has_states(pages - 1):
            pages -= 1
        return self.plan_of(known_pages, pages, parts_at=known_pages if parts and pages < known_pages else 0)

    def plan_of(self, known_pages: int, pages: int, *, parts_at: int) -> Plan:
        """The same of a `Hit`, by its fields of these names."""
        tokens = pages * self.page_tokens
        recompute = min(tokens, self.window_tokens) if self.replays else 0
        return Plan(known_pages=known_pages, pages=pages, tokens=tokens, recompute_tokens=recompute,
                    parts_at=parts_at)  # fmt: skip

    def states(self, ends: Iterable[int], *, plan: Plan) -> list[int]:
        """Pages, from 0, that the request of this plan keeps states of: only ones that it computes has it states of.

        `ends` are token counts: the end of its input, and of input and output together. Of each the last whole page is
        meant.
        """
        if self.replays:
            return []
        last_pages = [end // self.page_tokens for end in ends]
        kept = set(last_pages)
        if self.interval_tokens is not None:
            step = self.interval_tokens // self.page_tokens
            kept.update(range(step, max(last_pages, default=0) + 1, step))
        if self.sees_common:
            kept.add(plan.parts_at)
        return sorted(pages - 1 for pages in kept if pages > plan.pages)
