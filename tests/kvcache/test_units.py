"""Where window states are kept, and what then hits. Run: pytest tests/kvcache/test_units.py"""

from __future__ import annotations

from typing import Any

import pytest
from emberfs.errors import LimitExceeded
from emberkv.simulate import simulate, simulate_units
from emberkv.trace import Request, Trace
from emberkv.units import Plan, UnitRule

from tests.kvcache.traces import chat_trace, conversations


def rule(**fields: Any) -> UnitRule:
    return UnitRule(**{"page_tokens": 64, "interval_tokens": 256, **fields})


def plan(rule: UnitRule, known: int, *states: int) -> Plan:
    return rule.plan(known, set(states).__contains__)


def test_a_hit_ends_where_there_are_states() -> None:
    found = plan(rule(), 10, 3, 6, 12)
    assert (found.known_pages, found.pages, found.tokens, found.recompute_tokens) == (10, 7, 448, 0)
    assert plan(rule(), 3, 3).pages == 0
    assert plan(rule(), 4, 3).pages == 4
    assert plan(rule(), 0).tokens == 0


def test_states_are_kept_at_ends_and_at_intervals() -> None:
    none = plan(rule(), 0)
    assert rule().states([700], plan=none) == [3, 7, 9]  # 10 whole pages: every 4th, and the last
    assert rule().states([700, 1000], plan=none) == [3, 7, 9, 11, 14]  # of input, and of input and output
    assert rule(interval_tokens=None).states([700], plan=none) == [9]
    assert rule().states([63], plan=none) == []


def test_only_what_is_computed_has_states() -> None:
    assert rule().states([700], plan=plan(rule(), 8, 7)) == [9]
    assert rule().states([700], plan=plan(rule(), 10, 9)) == []


def test_the_third_request_of_a_common_prefix_hits() -> None:
    """A+B, then A+C, then A+D, as DeepSeek's page on context caching tells it."""
    a = tuple(range(3))
    requests = tuple(Request(n, 5 * 64, 1, (*a, 10 + n, 20 + n)) for n in range(3))
    found = simulate_units(Trace(requests, 64), rule(interval_tokens=None))
    assert (found.page_hits, found.unit_hits, found.states) == (6, 3, 4)
    blind = simulate_units(Trace(requests, 64), rule(interval_tokens=None, sees_common=False))
    assert (blind.page_hits, blind.unit_hits, blind.states) == (6, 0, 3)


def test_a_replay_hits_at_every_page_and_says_what_to_compute() -> None:
    replay = rule(replays=True)
    found = plan(replay, 10)
    assert (found.pages, found.tokens, found.recompute_tokens) == (10, 640, 128)
    assert plan(replay, 1).recompute_tokens == 64
    assert plan(replay, 0).recompute_tokens == 0
    assert replay.states([700], plan=found) == []


def test_states_everywhere_hit_as_pages_do() -> None:
    trace = chat_trace(seed=5)
    everywhere = simulate_units(trace, UnitRule(page_tokens=512, interval_tokens=512))
    assert everywhere.unit_hits == everywhere.page_hits
    assert everywhere.states == everywhere.stored_pages
    replayed = simulate_units(trace, UnitRule(page_tokens=512, replays=True))
    assert (replayed.unit_hits, replayed.states) == (everywhere.page_hits, 0)
    assert 0 < replayed.recomputed_tokens <= 128 * len(trace.requests)
    assert everywhere.page_hits <= simulate(trace).hit_pages
    sparse = simulate_units(trace, UnitRule(page_tokens=512, interval_tokens=None))
    assert sparse.states < everywhere.states
    assert sparse.unit_hits < everywhere.unit_hits


@pytest.mark.parametrize(
    "fields", [{"interval_tokens": 100}, {"interval_tokens": 0}, {"page_tokens": 0}, {"window_tokens": 0}]
)
def test_a_rule_that_can_not_be_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(LimitExceeded):
        rule(**fields)


def test_a_rule_is_of_the_pages_of_its_trace() -> None:
    with pytest.raises(LimitExceeded, match="of 64 tokens, the trace of 512"):
        simulate_units(chat_trace(seed=1, requests=5), rule())


def test_states_at_ends_and_every_8192_tokens_keep_most_hits_of_the_conversations() -> None:
    found = simulate_units(conversations(), UnitRule(page_tokens=512, sees_common=False))
    assert (found.states, found.stored_pages) == (17_561, 170_899)
    assert f"{found.unit_rate:.2%} of {found.page_rate:.2%}" == "35.52% of 36.60%"
    assert found.kept_share >= 0.970
    assert found.state_share <= 1 / 9


def test_common_prefixes_add_a_percent_of_hits_for_few_states() -> None:
    found = simulate_units(conversations(), UnitRule(page_tokens=512))
    assert found.kept_share >= 0.980
    assert found.state_share <= 1 / 9
