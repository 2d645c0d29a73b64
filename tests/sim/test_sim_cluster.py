"""The simulated cluster: a few seeds each time, replay, and every planted bug found.

More: `emberline sim --seeds 1000`, or `pytest tests/sim/test_sim_cluster.py --sim-seeds=200`; one again: `--seed=N`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from emberfs.testing.sim.campaign import Summary, Verdict, campaign, judge
from emberfs.testing.sim.simulation import OPERATIONS_MIN, VIRTUAL_S_MIN, simulate

from tests.sim.bugs import BUGS

FAULTS_MIN = 5


def test_nothing_is_lost_and_every_chain_becomes_whole(seeds: Sequence[int]) -> None:
    for seed in seeds:
        report = simulate(seed)
        assert report.operations >= OPERATIONS_MIN
        assert report.virtual_s >= VIRTUAL_S_MIN
        assert report.faults.total() >= FAULTS_MIN


def test_a_seed_replays_to_the_same_trace() -> None:
    assert simulate(3).trace_hash == simulate(3).trace_hash != simulate(4).trace_hash


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    plant, seeds_max = BUGS[bug]
    with plant(), pytest.raises(Exception) as caught:
        for seed in range(seeds_max):
            simulate(seed)
    assert "seed" in "".join(caught.value.__notes__)


def test_a_campaign_counts_what_its_seeds_did() -> None:
    summary = Summary()
    for verdict in campaign([0, 1], processes=1):
        summary.add(verdict)
    assert (summary.passed, summary.failed) == (2, [])
    assert summary.cells["serving", "up_to_date"] > 0


def test_a_failing_seed_is_told_with_its_story() -> None:
    plant, _ = BUGS["acknowledges before the tail"]
    summary = Summary()
    with plant():
        verdicts = map(judge, range(5))
        verdict: Verdict = next(each for each in verdicts if each.failure)
    summary.add(verdict)
    assert summary.failed == [verdict.seed]
    assert f"seed {verdict.seed}" in verdict.failure
