"""The simulated cluster: a few seeds each time, replay, and every planted bug found.

More: `emberline sim --seeds 1000`, or `pytest tests/sim/test_sim_cluster.py --sim-seeds=200`; one again: `--seed=N`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence

import pytest
from emberfs.errors import Conflict
from emberfs.messages import Heartbeat, HeartbeatReply
from emberfs.testing.sim.campaign import Summary, Verdict, campaign, judge
from emberfs.testing.sim.cluster import SimCluster
from emberfs.testing.sim.directed import ManagerFaults
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.testing.sim.simulation import OPERATIONS_MIN, VIRTUAL_S_MIN, SimConfig, simulate
from msgspec.structs import replace

from tests.sim.bugs import BUGS

FAULTS_MIN = 5
STALL_S_MAX = 1.0
"""Of one operation of a client, in virtual seconds."""


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
    planted = BUGS[bug]
    with planted.plant(), pytest.raises(Exception) as caught:
        for seed in range(planted.first, planted.first + planted.seeds):
            simulate(seed, config=planted.config())
    assert "seed" in "".join(caught.value.__notes__)
    story = "".join(traceback.format_exception(caught.value))
    assert not re.search("TypeError|AttributeError|NameError", story), "it is the plant that is broken"


def test_leases_that_become_shorter_harm_nothing() -> None:
    config = BUGS["shortens the wait with the lease"].config()
    for seed in range(3):
        assert simulate(seed, config=config).faults["shorter leases"] >= 2


def test_a_late_heartbeat_of_a_dead_process_does_not_take_its_successor_s_name() -> None:
    """It died before it was admitted, and what it said arrives after its successor was."""

    async def main(world: SimRuntime) -> None:
        cluster = SimCluster(world)
        await cluster.start()
        client, machine = await cluster.client("c1"), cluster.storage[0]
        node = machine.node
        assert node is not None
        late = Heartbeat(replace(node.node, incarnation=b"earlier."), node.reports(), 0, 0)
        ask = client.routes._managers.ask(late, HeartbeatReply, timeout_s=5.0)
        with pytest.raises(Conflict):
            await cluster.within(ask, client.process)
        await world.sleep(1.0)
        assert node.stopped_because is None
        assert cluster.is_whole(cluster.routing())
        cluster.stop()

    run(0, main)


@pytest.mark.parametrize("seed", range(4))
def test_killing_only_the_primary_manager_stalls_no_operation(seed: int) -> None:
    report = simulate(seed, config=SimConfig(faults=ManagerFaults, faults_gap_s=6.0))
    assert report.faults["kill"] >= 3
    assert report.longest_s < STALL_S_MAX


def test_a_campaign_counts_what_its_seeds_did() -> None:
    summary = Summary()
    for verdict in campaign([0, 1], processes=1):
        summary.add(verdict)
    assert (summary.passed, summary.failed) == (2, [])
    assert summary.cells["serving", "up_to_date"] > 0


def test_a_failing_seed_is_told_with_its_story() -> None:
    summary = Summary()
    with BUGS["acknowledges before the tail"].plant():
        verdicts = map(judge, range(5))
        verdict: Verdict = next(each for each in verdicts if each.failure)
    summary.add(verdict)
    assert summary.failed == [verdict.seed]
    assert f"seed {verdict.seed}" in verdict.failure
