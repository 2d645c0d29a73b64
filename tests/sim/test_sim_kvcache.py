"""The KV cache in the simulated cluster: every moment at which a server may die, walks at random, planted bugs found.

Each time some of the moments; all of them, and more walks: `pytest tests/sim/test_sim_kvcache.py --sim-seeds=200`, or
`-k "takeover and killed" --seed=N` for all of some.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest

from tests.sim.cache_bugs import BUGS
from tests.sim.cache_plays import ACTS, DEATHS, play, rehearse
from tests.sim.cache_walk import walk

ALL_SEEDS = 200
"""With so many seeds every moment has its turn."""
SEEDS_PER_MOMENT = 8
"""With fewer, so many seeds are worth one moment of each act and death."""

MOMENTS = 8
"""A planted bug is found within so many, or so many walks."""

WALKED = [("gives space back under a lease", 62), ("leaves files of the one before", 2)]
"""Planted bugs that walks find, too, and a seed that did when this was written."""

rehearsed = cache(rehearse)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("act", ACTS)
def test_whoever_dies_in_an_act_nothing_is_lost_or_left(act: str, death: str, seeds: Sequence[int]) -> None:
    count = rehearsed(act, seeds[0])[death]
    is_all = len(seeds) == 1 or len(seeds) >= ALL_SEEDS
    some = random.Random(f"{act} {death} {len(seeds)}").sample(
        range(count), min(max(len(seeds) // SEEDS_PER_MOMENT, 1), count)
    )
    for number in range(count) if is_all else some:
        play(act, death, number + 1, seeds[0])


def test_walks_at_random_lose_nothing(seeds: Sequence[int]) -> None:
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen += walk(seed)
    if len(seeds) > 1:
        each = "read", "stored", "known", "Evicted", "Moved", "SegmentRetired", "takeovers", "checked"
        assert min(seen[what] for what in each) >= len(seeds), seen


@pytest.mark.parametrize(("bug", "seed"), WALKED)
def test_a_walk_finds_a_planted_bug(bug: str, seed: int) -> None:
    with BUGS[bug].plant(), pytest.raises(Exception) as caught:
        for each in range(seed, seed + MOMENTS):
            walk(each)
    assert BUGS[bug].finding in "".join(traceback.format_exception(caught.value))


def test_a_walk_replays_the_same() -> None:
    assert walk(5) == walk(5)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    planted = BUGS[bug]
    with planted.plant(), pytest.raises(Exception) as caught:
        if not planted.first:
            rehearse(planted.act, 0)
        for number in range(planted.first, planted.first + MOMENTS):
            play(planted.act, planted.death, number, 0)
    story = "".join(traceback.format_exception(caught.value))
    assert planted.finding in story and "seed 0" in story
