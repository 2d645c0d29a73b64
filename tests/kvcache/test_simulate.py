"""Policies on traces: published figures, and LRU against a slow model. Run: pytest tests/kvcache/test_simulate.py"""

from __future__ import annotations

import pytest
from emberfs.errors import LimitExceeded
from emberkv.simulate import POLICIES, Lru, S3Fifo, capacities_for, simulate
from emberkv.trace import Request, Trace
from hypothesis import given
from hypothesis import strategies as st

from tests.kvcache.traces import chat_trace, conversations


def test_second_use_writes_a_fifth_and_hits_more_in_a_small_cache() -> None:
    trace = conversations()
    for capacity, hits, stored in ((3_000, 12.55, 69_464), (10_000, 20.61, 46_224)):
        found = simulate(trace, "second-use", capacity)
        assert (round(100 * found.page_rate, 2), found.stored) == (hits, stored)


class LeafFirst:
    """The rule in words: of the pages that no other continues, the one used longest ago goes, the deepest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[int, tuple[int, int]] = {}
        self.parents: dict[int, int | None] = {}
        self.now = 0

    def request(self, pages: list[int]) -> int:
        hits = next((number for number, page in enumerate(pages) if page not in self.used), len(pages))
        self.now += 1
        for depth, page in enumerate(pages):
            self.used[page] = (self.now, -depth)
            self.parents[page] = pages[depth - 1] if depth else None
        while len(self.used) > self.capacity:
            leaves = self.used.keys() - {self.parents[page] for page in self.used}
            del self.used[min(leaves, key=lambda page: self.used[page])]
        return hits


def chain(choices: list[int]) -> list[int]:
    """Numbers of the prefixes of a list of digits."""
    page, pages = 0, []
    for choice in choices:
        page = page * 4 + choice + 1
        pages.append(page)
    return pages


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_lru_is_leaf_first(paths: list[list[int]], capacity: int) -> None:
    fast, slow = Lru(capacity), LeafFirst(capacity)
    for path in paths:
        assert fast.request(chain(path)) == slow.request(chain(path))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40), st.integers(1, 12))
def test_no_policy_holds_more_than_its_capacity(paths: list[list[int]], capacity: int) -> None:
    for policy in POLICIES.values():
        cache = policy(capacity)
        for path in paths:
            cache.request(chain(path))
            assert cache.stored - cache.evicted <= capacity


def test_a_prefix_outlives_what_continues_it() -> None:
    cache = Lru(4)
    cache.request([1, 2, 3])
    cache.request([10])
    cache.request([20])  # of five pages one goes: 3, the leaf used longest ago, although 1 and 2 are as old
    assert cache.request([1, 2, 3]) == 2


def test_a_request_longer_than_the_cache_leaves_its_beginning() -> None:
    for policy in (Lru(3), POLICIES["fifo"](3)):
        policy.request([1, 2, 3, 4, 5])
        assert policy.request([1, 2, 3, 4, 5]) == 3


def test_s3_fifo_lets_one_use_pass() -> None:
    cache = S3Fifo(10)
    for _ in range(3):
        cache.request([1])
    for page in range(100, 140):
        cache.request([page])
    assert cache.request([1]) == 1
    assert cache.request([100]) == 0


def test_the_short_last_page_counts_by_its_tokens() -> None:
    requests = (Request(0, 600, 1, (1, 2)), Request(1, 600, 1, (1, 2)), Request(2, 512, 1, (1,)))
    outcome = simulate(Trace(requests, 512))
    assert (outcome.hit_pages, outcome.pages, outcome.page_rate) == (3, 5, 0.6)
    assert (outcome.hit_tokens, outcome.tokens) == (600 + 512, 1712)
    assert (outcome.hit_requests, outcome.requests, outcome.stored, outcome.evicted) == (2, 3, 2, 0)


def test_each_hit_is_told() -> None:
    hits: list[int] = []
    outcome = simulate(chat_trace(seed=3), on_hit=hits.append)
    assert len(hits) == outcome.requests
    assert sum(hits) == outcome.hit_tokens


def test_more_capacity_never_hits_less_by_lru() -> None:
    trace = chat_trace(seed=2)
    rates = [simulate(trace, "lru", capacity).page_rate for capacity in capacities_for(trace)]
    assert rates == sorted(rates)
    assert rates[-1] == simulate(trace).page_rate
    assert 0.3 < rates[-1] < 0.9


def test_a_curve_ends_where_everything_has_room() -> None:
    trace = chat_trace(seed=2)
    capacities = capacities_for(trace, points=3)
    assert len(capacities) == 3
    assert capacities[-2] < trace.unique_pages <= capacities[-1]


def test_a_cache_without_a_page_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="a page at least"):
        simulate(chat_trace(seed=1, requests=5), capacity=0)


# ---- the published trace


def test_a_cache_without_end_hits_what_was_published() -> None:
    outcome = simulate(conversations())
    assert f"{outcome.page_rate:.2%} {outcome.token_rate:.2%}" == "36.64% 37.36%"


@pytest.mark.parametrize(("capacity", "rate"), [(10_000, 0.2115), (30_000, 0.3255), (50_000, 0.3545)])
def test_lru_reaches_its_figures(capacity: int, rate: float) -> None:
    assert simulate(conversations(), "lru", capacity).page_rate >= rate


def test_policies_that_do_not_know_prefixes_trail_from_ten_thousand_pages_on() -> None:
    trace = conversations()
    for capacity in (10_000, 30_000):
        lru, fifo, s3fifo = (simulate(trace, policy, capacity).page_rate for policy in ("lru", "fifo", "s3fifo"))
        assert lru > s3fifo > fifo
