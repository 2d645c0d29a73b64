"""What one request has taken from disk, and what it leaves there as it goes on.

Does not know: bytes, or how they come and go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..cache.spec import PAGE_TOKENS


@dataclass(slots=True, eq=False)
class Trail:
    """Of a request that runs. Pages are counted from the beginning of its prompt."""

    prompt_tokens: int
    keys: list[bytes]
    """Of its pages, as far as they were needed."""
    pages_max: int | None
    """Pages after which nothing is kept; None: everything is."""
    interval_tokens: int | None
    """States are kept every so many tokens; None: nowhere."""
    cached_tokens: int = 0
    """Of its prompt, those that were not computed, or (`replayed_tokens`) for their windows only."""
    replayed_tokens: int = 0
    """The last ones of `cached_tokens`, that are computed again."""
    stored: int = 0
    """Pages whose rows are there, or on their way."""
    ends: frozenset[int] = frozenset()
    """Numbers of pages whose last states are kept beside those of the interval: of the prompt, of a common prefix."""
    unstored: list[tuple[int, Tensor]] = field(default_factory=list)
    """The states of the last page of an answer so far, if it turns out to be the last one: (pages, payload)."""
    is_broken: bool = False
    """A page was not taken, or is not finite: nothing that comes after it is kept. What waits is from before it."""
    is_lost: bool = False
    """A page that waited was not taken: what waits is from behind it, and `is_broken` as well."""

    def replays(self, tokens: int) -> bool:
        """Whether so many tokens of it are only there to have their windows."""
        return self.cached_tokens - self.replayed_tokens <= tokens < self.cached_tokens

    def keeps_states(self, pages: int) -> bool:
        """Whether the states at the end of so many pages are kept."""
        if self.interval_tokens is None:
            return False
        return pages in self.ends or pages * PAGE_TOKENS % self.interval_tokens == 0

    def cut(self, begin: int, end: int) -> int:
        """Where a chunk that could go from `begin` to `end` ends, at `begin` if it cannot go on.

        Replays go on in whole pages; states are those at the end of a chunk.
        """
        if self.replays(begin):
            end = min(end, self.cached_tokens)
            return end - (end - begin) % PAGE_TOKENS
        return min([end, *self._next_ends(begin)])

    def _next_ends(self, begin: int) -> Iterable[int]:
        if self.interval_tokens is not None:
            yield (begin // self.interval_tokens + 1) * self.interval_tokens
            yield from (pages * PAGE_TOKENS for pages in self.ends if pages * PAGE_TOKENS > begin)
