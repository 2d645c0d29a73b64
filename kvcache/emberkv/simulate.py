"""What a cache of some capacity and policy would have hit on a trace, without a byte of it.

A request first hits as far as a prefix of its pages is there; then all its pages are there, and the policy says which
ones go. A page of the trace is a page of the cache, the short last one too.

Does not know: bytes, models, time. Capacities are in pages.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import compress
from typing import Protocol

from emberfs.errors import LimitExceeded

from .admission import Sightings
from .trace import Trace
from .units import UnitRule


class Policy(Protocol):
    """Which pages are there."""

    stored: int
    """Pages that came in, again ones too."""
    evicted: int

    def request(self, pages: Sequence[int]) -> int:
        """How many of the first `pages` are there; afterwards all are that may be."""


class Fifo:
    """The page that came first goes first, whatever continues it."""

    _renews = False
    """A page that was used goes to the young end."""

    def __init__(self, capacity: int | None) -> None:
        self.stored = self.evicted = 0
        self._capacity = capacity
        self._pages: OrderedDict[int, None] = OrderedDict()

    def request(self, pages: Sequence[int]) -> int:
        there, known = self._pages, len(self._pages)
        hits = _leading(pages, there)
        for page in reversed(pages):
            there[page] = None
            if self._renews:
                there.move_to_end(page)
        self.stored += len(there) - known
        if self._capacity is not None:
            while len(there) > self._capacity:
                there.popitem(last=False)
                self.evicted += 1
        return hits


class Lru(Fifo):
    """Leaf first, the one with the oldest use: what the service does. The recency of a page is the newest of any page
    that continues it.

    A request uses all its pages at once. They go to the young end in the order last to first, so that no page ever lies
    before one that continues it: the old end is always a leaf.
    """

    _renews = True


class SecondUse(Lru):
    """`Lru` of pages that were asked for twice: the first time leaves a mark only, in the service's own table."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self._sightings = Sightings()

    def request(self, pages: Sequence[int]) -> int:
        keys = [sha256(b"%d" % page).digest() for page in pages]
        there = {key for key, page in zip(keys, pages, strict=True) if page in self._pages}
        wanted = self._sightings.wanted(0, keys, [b"", *keys[:-1]], there.__contains__)
        return super().request(list(compress(pages, wanted)))


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP'23), Figure 5: a small queue S, a main queue M, and a ghost queue G of names only.

    Pages of a request come in last to first, as in `Lru`.
    """

    SMALL_SHARE = 0.1
    USES_MAX = 3

    def __init__(self, capacity: int | None) -> None:
        self.stored = self.evicted = 0
        self._capacity = capacity
        self._small_max = 0 if capacity is None else max(1, int(capacity * self.SMALL_SHARE))
        self._uses: dict[int, int] = {}
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghost: OrderedDict[int, None] = OrderedDict()

    def request(self, pages: Sequence[int]) -> int:
        hits = _leading(pages, self._uses)
        for page in reversed(pages):
            if page in self._uses:
                self._uses[page] = min(self._uses[page] + 1, self.USES_MAX)
                continue
            while self._capacity is not None and len(self._uses) >= self._capacity:
                self._evict()
            self._uses[page] = 0
            self.stored += 1
            if page in self._ghost:
                del self._ghost[page]
                self._main.append(page)
            else:
                self._small.append(page)
        return hits

    def _evict(self) -> None:
        if len(self._small) >= self._small_max or not self._main:
            self._evict_small()
        else:
            self._evict_main()

    def _evict_small(self) -> None:
        page = self._small.popleft()
        if self._uses[page] > 1:
            self._main.append(page)
            self._uses[page] = 0
            return
        self._drop(page)
        self._ghost[page] = None
        assert self._capacity is not None
        if len(self._ghost) > self._capacity - self._small_max:
            self._ghost.popitem(last=False)

    def _evict_main(self) -> None:
        page = self._main.popleft()
        if self._uses[page] > 0:
            self._uses[page] -= 1
            self._main.append(page)
        else:
            self._drop(page)

    def _drop(self, page: int) -> None:
        del self._uses[page]
        self.evicted += 1


POLICIES: dict[str, Callable[[int | None], Policy]] = {
    "lru": Lru,
    "second-use": SecondUse,
    "fifo": Fifo,
    "s3fifo": S3Fifo,
}


def _leading(pages: Sequence[int], there: OrderedDict[int, None] | dict[int, int]) -> int:
    for number, page in enumerate(pages):
        if page not in there:
            return number
    return len(pages)


# ---- pages


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a policy made of a trace."""

    policy: str
    capacity: int | None
    """In pages; None: without end."""
    pages: int
    hit_pages: int
    tokens: int
    hit_tokens: int
    requests: int
    hit_requests: int
    """With one page at least."""
    stored: int
    evicted: int

    @property
    def page_rate(self) -> float:
        return self.hit_pages / self.pages

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / self.tokens

    def fields(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "page_rate": self.page_rate, "token_rate": self.token_rate}


HitListener = Callable[[int], None]
"""Is told the tokens of each request's hit."""


def simulate(
    trace: Trace, policy: str = "lru", capacity: int | None = None, *, on_hit: HitListener | None = None
) -> Outcome:
    """The trace against an empty cache. Raises LimitExceeded for a capacity without a page."""
    if capacity is not None and capacity < 1:
        raise LimitExceeded(f"a cache has a page at least, not {capacity}")
    cache = POLICIES[policy](capacity)
    hit_pages = hit_tokens = hit_requests = 0
    for request in trace.requests:
        hits = cache.request(request.pages)
        tokens = request.tokens_of(hits, trace.page_tokens)
        hit_pages += hits
        hit_tokens += tokens
        hit_requests += hits > 0
        if on_hit is not None:
            on_hit(tokens)
    return Outcome(
        policy=policy,
        capacity=capacity,
        pages=trace.pages,
        hit_pages=hit_pages,
        tokens=trace.input_tokens,
        hit_tokens=hit_tokens,
        requests=len(trace.requests),
        hit_requests=hit_requests,
        stored=cache.stored,
        evicted=cache.evicted,
    )


def capacities_for(trace: Trace, *, points: int = 9) -> list[int]:
    """Round capacities for a curve: 1, 2, 5 times powers of ten, the last one with room for every page."""
    steps = [base * 10**power for power in range(2, 12) for base in (1, 2, 5)]
    last = next(index for index, step in enumerate(steps) if step >= trace.unique_pages)
    return steps[max(0, last + 1 - points) : last + 1]


# ---- units


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitOutcome:
    """What a rule for window states made of a trace, in a cache without end that keeps whole pages only."""

    pages: int
    """All of the trace, short ones too: what the rates are of."""
    stored_pages: int
    states: int
    page_hits: int
    """Pages that hit if every page had its states."""
    unit_hits: int
    tokens: int
    hit_tokens: int
    recomputed_tokens: int
    """Of the hit tokens: what the engine still computes, to have its window."""

    @property
    def page_rate(self) -> float:
        return self.page_hits / self.pages

    @property
    def unit_rate(self) -> float:
        return self.unit_hits / self.pages

    @property
    def kept_share(self) -> float:
        """Of the hits that states everywhere would give."""
        return self.unit_hits / self.page_hits if self.page_hits else 1.0

    @property
    def state_share(self) -> float:
        """Of the pages: how many have states."""
        return self.states / self.stored_pages if self.stored_pages else 0.0

    def fields(self) -> dict[str, object]:
        """For JSON."""
        rates = {name: getattr(self, name) for name in ("page_rate", "unit_rate", "kept_share", "state_share")}
        return {**asdict(self), **rates}


def simulate_units(trace: Trace, rule: UnitRule) -> UnitOutcome:
    """The trace by a rule of units. Raises LimitExceeded where the rule has other pages than the trace."""
    if rule.page_tokens != trace.page_tokens:
        raise LimitExceeded(f"the rule has pages of {rule.page_tokens} tokens, the trace of {trace.page_tokens}")
    there: set[int] = set()
    continued: set[int] = set()
    """Pages after which some request went on."""
    states: set[int] = set()
    page_hits = unit_hits = hit_tokens = recomputed = 0
    for request in trace.requests:
        whole = request.whole_pages(trace.page_tokens)
        pages = request.pages[:whole]
        known = next((number for number, page in enumerate(pages) if page not in there), whole)
        parts = 0 < known < whole and pages[known - 1] in continued
        plan = rule.plan(known, lambda page, pages=pages: pages[page] in states, parts=parts)  # type: ignore[misc]
        page_hits += known
        unit_hits += plan.pages
        hit_tokens += plan.tokens
        recomputed += plan.recompute_tokens
        states.update(pages[page] for page in rule.states([request.input_tokens], plan=plan))
        there.update(pages)
        continued.update(pages[:-1])
    return UnitOutcome(
        pages=trace.pages,
        stored_pages=len(there),
        states=len(states),
        page_hits=page_hits,
        unit_hits=unit_hits,
        tokens=trace.input_tokens,
        hit_tokens=hit_tokens,
        recomputed_tokens=recomputed,
    )
