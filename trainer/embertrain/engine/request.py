"""A request: a prompt, how to go on from it, and what has come of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..cache.cache import Rows
from .sampling import Sampling

if TYPE_CHECKING:
    from ..prefix import Trail

Finish = Literal["stop", "length", "cancelled", "not finite"]


@dataclass(slots=True, eq=False)
class Request:
    """What the caller may read; `Engine` alone changes it."""

    number: int
    """In the order of submission; of two the lower one goes first."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    new_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    """Why it has ended; None: it has not."""
    preempted: int = 0
    """How often it had to give its place in the cache away."""
    length: int = 0
    """Tokens whose rows are in the cache, or in `rows`."""
    sequence: int | None = None
    """Its sequence in the cache; None: it waits, or has ended."""
    rows: Rows | None = None
    """What it takes back into the cache."""
    trail: Trail | None = None
    """What it has from disk and leaves there; None: it has not run, or there is no prefix reuse."""

    @property
    def count(self) -> int:
        """Tokens there are, of prompt and answer."""
        return len(self.prompt_ids) + len(self.new_ids)

    @property
    def cached_tokens(self) -> int:
        """Of its prompt, those that came from disk."""
        return 0 if self.trail is None else self.trail.cached_tokens

    def ids(self, begin: int, end: int) -> list[int]:
        """Tokens `begin` to `end`."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[begin:end], *self.new_ids[max(0, begin - prompt) : max(0, end - prompt)]]

    @property
    def decodes(self) -> bool:
        """Whether its next row is that of a token of its own."""
        return bool(self.new_ids) and self.length == self.count - 1


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of a request. `request.finish` says whether it was the last; a stop token is told as well."""

    request: Request
    id: int
