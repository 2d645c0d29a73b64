"""Nodes that come, die, return and are replaced, and that nobody serves what the chain has taken from it."""

from __future__ import annotations

import pytest
from emberfs.errors import AlreadyExists, Conflict, EmberError
from emberfs.messages import (
    AcceptLoss,
    AddNode,
    ClusterStatus,
    DrainNode,
    GetConfig,
    GetRouting,
    Heartbeat,
    SetConfig,
    SetupChains,
)
from emberfs.routing import Chain, Node, Role, TargetState
from emberfs.settings import Settings
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.manager_fakes import FakeNode, Managers, all_serving, drift, until

SETTINGS = Settings()
FAULTS = [
    "cut",
    "one-way",
    "slow",
    "heal",
    "heal",
    "die",
    "wipe",
    "restart",
    "manager",
    "all-well",
    "drain",
    "add",
    "lease",
]


async def cluster(sim: SimRuntime, *, nodes: int = 3, managers: int = 1) -> tuple[Managers, list[FakeNode]]:
    """All-serving: three replicas (or as many as there are nodes), two targets a disk."""
    made = await Managers(sim, count=managers).start()
    running = [FakeNode(made, f"n{number}").start() for number in range(nodes)]
    while len((await made.call(ClusterStatus())).nodes) < nodes:
        await sim.sleep(0.05)
    await made.call(SetupChains(min(nodes, 3), 2))
    await all_serving(made, replicas=min(nodes, 3))
    await until(sim, lambda: all(node.serving() for node in running))
    return made, running


async def stop(managers: Managers, nodes: list[FakeNode]) -> None:
    for node in nodes:
        await node.kill()
    await managers.close()


def test_a_dead_node_is_taken_off_in_its_time_and_returns_to_all_serving() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        await nodes[0].kill()
        killed_s = sim.now_s()
        while all(len(chain.serving) == 3 for chain in (await managers.chains()).values()):
            await sim.sleep(0.01)
        assert SETTINGS.dead_after_s - 0.5 <= sim.now_s() - killed_s <= SETTINGS.dead_after_s + 0.3
        assert all(len(chain.serving) == 2 for chain in (await managers.chains()).values())
        status = await managers.call(ClusterStatus())
        assert [each.alive for each in status.nodes] == [False, True, True]
        nodes[0].start()
        await all_serving(managers, replicas=3)
        await stop(managers, nodes)

    for seed in range(4):
        run(seed, main)


def test_failover_goes_on_after_a_mistake_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim, nodes=4)
        with monkeypatch.context() as patch:
            patch.setattr("emberfs.manager.service.plan_moves", _mistaken)
            await nodes[0].kill()
            await sim.sleep(SETTINGS.dead_after_s + 1.0)
            assert all(len(chain.serving) < 3 for chain in await _chains_of(managers, nodes[0].name))
        nodes[0].start()
        await all_serving(managers, replicas=3)
        await stop(managers, nodes)

    run(0, main)


def test_a_manager_stands_again_after_an_exception_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        with monkeypatch.context() as patch:
            patch.setattr(managers.links[0], "carry", _mistaken)
            await until(sim, lambda: managers.primary is None)
        await until(sim, lambda: managers.primary is not None)
        await all_serving(managers, replicas=3)
        await stop(managers, nodes)

    run(0, main)


def _mistaken(*_: object, **__: object) -> None:
    raise RuntimeError("a mistake")


async def _chains_of(managers: Managers, node: str) -> list[Chain]:
    routing = (await managers.call(GetRouting())).routing
    chains = [target.chain for target in routing.targets if target.node == node]
    assert chains
    return [chain for chain in routing.chains if chain.id in chains]


def test_a_quick_restart_makes_a_new_version_of_every_chain_it_serves_in() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        before = await managers.chains()
        await nodes[1].kill()
        nodes[1].start()
        await sim.sleep(1.0)
        after = await managers.chains()
        assert {chain: each.version + 1 for chain, each in before.items()} == {
            chain: each.version for chain, each in after.items()
        }
        assert all(len(chain.serving) == 3 for chain in after.values())
        await stop(managers, nodes)

    run(0, main)


def test_a_wiped_disk_is_filled_again_before_it_serves() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        await nodes[2].kill()
        nodes[2].wipe()
        nodes[2].start()
        seen = set()
        while not seen >= {TargetState.SYNCING, TargetState.SERVING} or len(seen) < 3:
            for chain in (await managers.chains()).values():
                seen |= {each.state for each in chain.targets}
            assert sim.now_s() < 60
            await sim.sleep(0.02)
        await all_serving(managers, replicas=3)
        await stop(managers, nodes)

    run(0, main)


def test_a_second_process_with_a_running_nodes_name_is_kept_out() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        before = await managers.chains()
        impostor = FakeNode(managers, "n0").start()
        await sim.sleep(10.0)
        assert await managers.chains() == before
        await nodes[0].kill()
        # Nobody speaks for the old process now: when its lease is over the new one is let in, with an empty disk.
        await all_serving_on(managers, impostor)
        await stop(managers, [*nodes, impostor])

    run(0, main)


async def all_serving_on(managers: Managers, node: FakeNode) -> None:
    await until(managers.sim, lambda: bool(node.serving()))
    await all_serving(managers, replicas=3)


@pytest.mark.parametrize("late_ms", range(2900, 3700, 80))
def test_a_late_heartbeat_is_not_answered_with_the_old_routing_while_its_node_is_taken_off(late_ms: int) -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        managers.links[0].delay_s_max = 0.4  # The change takes its time.
        node = nodes[0]
        await node.kill()
        await sim.sleep(late_ms / 1000)
        me = Node(node.name, Role.STORAGE, f"{node.name}:1", node.incarnation, host=node.name)
        reply = await managers.call(Heartbeat(me, node.reports(), node.routing.version))
        routing = reply.routing or node.routing
        serves = [chain.id for chain in routing.chains if any(each.target in node.disk for each in chain.serving)]
        end_s = sim.now_s() + SETTINGS.lease_s
        while sim.now_s() < end_s:
            for chain in (await managers.chains()).values():
                assert chain.id not in serves or len(chain.serving) == 3
            await sim.sleep(0.02)
        await stop(managers, nodes)

    run(late_ms, main)


def test_a_heartbeat_from_before_a_node_knew_its_targets_takes_nothing_from_it() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        before = await managers.chains()
        node = nodes[0]
        me = Node(node.name, Role.STORAGE, f"{node.name}:1", node.incarnation, host=node.name)
        for _ in range(20):
            await managers.call(Heartbeat(me, [], 0))
            await sim.sleep(0.05)
        assert await managers.chains() == before
        await stop(managers, nodes)

    run(0, main)


def test_what_a_process_said_before_it_died_takes_nothing_from_its_successor() -> None:
    """Its heartbeat is late and the first one of that process that arrives: nobody knows yet that it is an old one."""

    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        first, dead, last = (Node("meta1", Role.META, "h:1", incarnation) for incarnation in (b"1", b"2", b"3"))
        known = (await managers.call(Heartbeat(first, [], 0))).routing.version
        await managers.call(Heartbeat(last, [], known))
        with pytest.raises(Conflict, match="learn that first"):
            await managers.call(Heartbeat(dead, [], known))
        await managers.call(Heartbeat(last, [], known))
        await managers.close()

    run(0, main)


def test_what_an_old_incarnation_still_says_is_refused() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        old, new = (Node("meta1", Role.META, "h:1", incarnation) for incarnation in (b"1", b"2"))
        known = (await managers.call(Heartbeat(old, [], 0))).routing.version
        await managers.call(Heartbeat(new, [], known))
        with pytest.raises(AlreadyExists, match="must stop"):
            await managers.call(Heartbeat(old, [], 0))
        with pytest.raises(AlreadyExists, match="choose another"):
            await managers.call(Heartbeat(Node("meta1", Role.KV, "h:1", b"3"), [], 0))
        routing = (await managers.call(GetRouting())).routing
        assert [node.incarnation for node in routing.nodes] == [b"2"]
        await managers.close()

    run(0, main)


def test_a_lost_chain_waits_for_the_operator() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim, nodes=2)
        for node in nodes:
            await node.kill()
            await sim.sleep(5.0)
        nodes[1].wipe()  # The last to serve.
        for node in nodes:
            node.start()
        await sim.sleep(10.0)
        chains = await managers.chains()
        assert chains and all(chain.is_lost for chain in chains.values())
        for chain in chains.values():
            survivor = next(each.target for each in chain.targets if each.target in nodes[0].disk)
            await managers.call(AcceptLoss(chain.id, survivor))
            with pytest.raises(Conflict):
                await managers.call(AcceptLoss(chain.id, survivor))
        await all_serving(managers, replicas=2)
        await stop(managers, nodes)

    run(0, main)


@pytest.mark.parametrize("seed", range(4))
def test_losing_the_primary_manager_takes_no_node_off(seed: int) -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim, managers=2)
        before = await managers.chains()
        old = managers.primary
        assert old is not None
        managers.links[managers.services.index(old)].is_cut = True
        gaps = 0
        for _ in range(1000):
            await sim.sleep(0.01)
            gaps += any(not node.serving() for node in nodes)
        assert gaps == 0, "no lease ran out"
        assert await managers.chains() == before
        await stop(managers, nodes)

    run(seed, main)


def test_everything_outlives_the_managers() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        before = (await managers.call(GetRouting())).routing
        await managers.close()
        again = await Managers(sim, kv=managers.kv).start()
        assert (await again.call(GetRouting())).routing == before
        for node in nodes:
            await node.kill()
        await again.close()

    run(0, main)


@pytest.mark.parametrize("seed", range(12))
def test_no_node_serves_what_the_chain_has_taken_from_it(seed: int) -> None:
    """Partitions (also one-way), slow messages, deaths, wiped disks and lost primaries, on clocks that drift 2 %."""

    async def main(sim: SimRuntime) -> None:
        rng = sim.random("faults")
        managers = await Managers(sim, count=2, rates=[drift(rng), drift(rng)]).start()
        nodes = [FakeNode(managers, f"n{number}", rate=drift(rng)).start() for number in range(4)]
        while len((await managers.call(ClusterStatus())).nodes) < 4:
            await sim.sleep(0.05)
        await managers.call(SetupChains(3, 3))
        await all_serving(managers, replicas=3)
        end_s = sim.now_s() + 120.0
        changes = 0
        while sim.now_s() < end_s:
            await _one_fault(rng, managers, nodes)
            fault_end_s = sim.now_s() + rng.uniform(0.1, 4.0)
            before = await managers.chains()
            while sim.now_s() < fault_end_s:
                await _check_fences(managers, nodes)
                await sim.sleep(0.01)
            changes += await managers.chains() != before
        assert changes, "the faults did nothing"
        await _heal(managers, nodes)
        for chain in (await managers.chains()).values():
            if chain.is_lost:
                await _accept(managers, chain.id)
        await all_serving(managers, replicas=3)
        await stop(managers, nodes)

    run(seed, main)


async def _check_fences(managers: Managers, nodes: list[FakeNode]) -> None:
    chains = await managers.chains()
    managers.primary  # noqa: B018 (asserts that there is at most one)
    for node in nodes:
        for chain, target, version in node.serving():
            states = {each.target: each.state for each in chains[chain].targets}
            assert states.get(target) == TargetState.SERVING, (
                f"{node.name} would answer readers of version {version} of chain {chain}: {chains[chain]}"
            )


async def _one_fault(rng, managers: Managers, nodes: list[FakeNode]) -> None:  # type: ignore[no-untyped-def]
    node, link = rng.choice(nodes), rng.choice(managers.links)
    match rng.choice(FAULTS):
        case "cut":
            node.link.is_cut = True
        case "one-way":
            node.link.loses_answers = True
        case "slow":
            node.link.delay_s_max = 4.0
        case "heal":
            node.link.is_cut = node.link.loses_answers = False
            node.link.delay_s_max = 0.05
        case "die" if node.is_running:
            await node.kill()
        case "wipe" if not node.is_running and all(other.is_running for other in nodes if other is not node):
            node.wipe()
            node.start()
        case "restart" if not node.is_running:
            node.start()
        case "restart":
            await node.kill()
            node.start()
        case "manager":
            link.is_cut = True
        case "all-well":
            for each in managers.links + [other.link for other in nodes]:
                each.is_cut = each.loses_answers = False
        case "lease" if managers.primary is not None:
            # Nodes go on under the leases that they have, whatever the next ones are like.
            await _configure(managers, rng.choice([2.0, 3.0, 6.0, 10.0]))
        case "drain" | "add" as order if managers.primary is not None:
            try:
                await managers.primary.handle((DrainNode if order == "drain" else AddNode)(node.name))
            except EmberError:
                pass  # Cut off, or too few would be left.


async def _configure(managers: Managers, dead_after_s: float) -> None:
    try:
        version = (await managers.primary.handle(GetConfig())).config.version  # type: ignore[union-attr]
        await managers.primary.handle(SetConfig(version, {"dead_after_s": dead_after_s}))  # type: ignore[union-attr]
    except (AttributeError, EmberError):
        pass  # No primary any more, or cut off.


async def _heal(managers: Managers, nodes: list[FakeNode]) -> None:
    for link in managers.links + [node.link for node in nodes]:
        link.is_cut = link.loses_answers = False
        link.delay_s_max = 0.005
    for node in nodes:
        if not node.is_running:
            node.start()
    await managers.sim.sleep(30.0)


async def _accept(managers: Managers, chain_id: int) -> None:
    chain = (await managers.chains())[chain_id]
    await managers.call(AcceptLoss(chain_id, chain.targets[0].target))
