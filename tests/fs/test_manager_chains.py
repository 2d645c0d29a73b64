"""Where chains go: the first placement, nodes that join and nodes that are drained."""

from __future__ import annotations

from collections import Counter

import pytest
from emberfs.errors import AlreadyExists, Conflict, LimitExceeded, NotFound
from emberfs.manager.chains import DiskSlot, Layout, Move, disks_for, place_round_robin, plan_moves
from emberfs.manager.rows import NodeRow
from emberfs.messages import AddNode, ClusterStatus, DrainNode, GetRouting, RemoveNode, SetupChains
from emberfs.routing import Chain, ChainTarget, Node, Role, Target, TargetState
from emberfs.testing.sim.loop import SimRuntime, run
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.fs.manager_fakes import FakeNode, Managers, all_serving, until

# ---- the first placement


def slots(hosts: list[int], *, racks: int = 1) -> list[DiskSlot]:
    """hosts[i] disks on host i."""
    return [
        DiskSlot(f"n{host}.{disk}", f"h{host}", f"r{host % racks}" if racks > 1 else "")
        for host, count in enumerate(hosts)
        for disk in range(count)
    ]


@settings(deadline=None)
@given(
    hosts=st.lists(st.integers(1, 4), min_size=1, max_size=7), replicas=st.integers(1, 4), per_disk=st.integers(1, 6)
)
def test_a_chain_never_has_two_targets_on_a_host(hosts: list[int], replicas: int, per_disk: int) -> None:
    disks = slots(hosts)
    groups = place_round_robin(disks, replicas, per_disk)
    assert all(len({disk.host for disk in group}) == replicas for group in groups)
    load = Counter(disk for group in groups for disk in group)
    assert all(count <= per_disk for count in load.values())
    if len(set(hosts)) == 1 and len(hosts) >= replicas:
        assert len(groups) == len(disks) * per_disk // replicas, "equal hosts are filled"


def test_racks_are_kept_apart_where_it_is_possible() -> None:
    groups = place_round_robin(slots([1] * 6, racks=3), 3, 4)
    assert len(groups) == 8
    assert all(len({disk.rack for disk in group}) == 3 for group in groups)
    assert len(Counter(group[0] for group in groups)) > 2, "heads take turns"


def test_too_few_hosts_are_refused_and_one_host_alone_is_a_cluster_too() -> None:
    nodes = [Node(f"n{number}", Role.STORAGE, "", b"", host="h") for number in range(3)]
    disks, same_host = disks_for(nodes, 3, 2)
    assert same_host and len({disk.host for disk in disks}) == 3
    with pytest.raises(Conflict, match="3 replicas need 3 hosts with a storage node, and 2 are there"):
        disks_for([*nodes, Node("n4", Role.STORAGE, "", b"", host="h2")], 3, 2)
    with pytest.raises(Conflict):
        disks_for([], 1, 1)
    with pytest.raises(LimitExceeded):
        disks_for(nodes, 0, 1)


# ---- moves


def layout(chains: dict[int, str], nodes: str, *, joining: str = "", draining: str = "", dead: str = "") -> Layout:
    """chains: id -> the nodes that hold it, a letter each; a capital leaves."""
    rows = {
        name: NodeRow(Node(name, Role.STORAGE, "", b"", draining=name in draining), True, name in joining)
        for name in nodes
    }
    targets = {
        f"{chain}{name}".encode(): Target(f"{chain}{name}".encode(), name.lower(), chain)
        for chain, names in chains.items()
        for name in names
    }
    made = {
        chain: Chain(
            chain,
            1,
            tuple(
                ChainTarget(f"{chain}{name}".encode(), TargetState.SERVING, leaving=name.isupper()) for name in names
            ),
            sum(name.islower() for name in names),
        )
        for chain, names in chains.items()
    }
    return Layout(made, targets, rows, alive=set(nodes) - set(dead), same_host=True)


def test_a_draining_node_gives_to_the_least_loaded_a_few_chains_at_a_time() -> None:
    chains = {1: "ab", 2: "ac", 3: "ab"}
    assert plan_moves(layout(chains, "abcd", draining="a"), limit=2) == [Move(1, b"1a", "d"), Move(2, b"2a", "d")]
    assert plan_moves(layout(chains | {4: "aBc"}, "abcd", draining="a"), limit=1) == [Move(4, b"4a", "d")]
    assert plan_moves(layout(chains, "abcd", draining="a", dead="d"), limit=1) == [Move(1, b"1a", "c")]
    assert plan_moves(layout({1: "ab"}, "ab", draining="a"), limit=2) == [], "nobody can take it"


def test_only_a_joining_node_is_filled() -> None:
    chains = dict.fromkeys(range(1, 7), "ab")
    assert plan_moves(layout(chains, "abc"), limit=4) == []
    assert len(plan_moves(layout(chains, "abc", joining="c"), limit=100)) == 4, "12 targets on 3 nodes"
    assert plan_moves(layout(chains, "abc", joining="c", dead="c"), limit=100) == []


@settings(deadline=None)
@given(hosts=st.integers(3, 8), per_disk=st.integers(1, 8), replicas=st.integers(1, 3))
def test_a_joining_node_gets_its_fair_share_and_no_move_is_wasted(hosts: int, per_disk: int, replicas: int) -> None:
    groups = place_round_robin(slots([1] * hosts), replicas, per_disk)
    names = "abcdefgh"[:hosts]
    chains = {number: "".join(names[int(disk.host[1:])] for disk in group) for number, group in enumerate(groups, 1)}
    made = layout(chains, names + "z", joining="z")
    moves = plan_moves(made, limit=10_000)
    share = len(groups) * replicas // (hosts + 1)
    assert len(moves) == share == made.load["z"]
    assert len({move.chain for move in moves}) == len(moves)


# ---- in a cluster


async def joined(managers: Managers, nodes: list[FakeNode]) -> None:
    while len((await managers.call(ClusterStatus())).nodes) < len(nodes):
        await managers.sim.sleep(0.05)


async def held(managers: Managers) -> Counter[str]:
    routing = (await managers.call(GetRouting())).routing
    return Counter(target.node for target in routing.targets)


async def stop(managers: Managers, nodes: list[FakeNode]) -> None:
    for node in nodes:
        await node.kill()
    await managers.close()


def test_setup_waits_for_its_targets_and_is_done_once() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        with pytest.raises(Conflict, match="0 are there"):
            await managers.call(SetupChains(3, 2))
        nodes = [FakeNode(managers, f"n{number}").start() for number in range(3)]
        await joined(managers, nodes)
        nodes[2].link.is_cut = True
        await managers.call(SetupChains(3, 2))
        await managers.call(SetupChains(3, 2))
        with pytest.raises(AlreadyExists):
            await managers.call(SetupChains(2, 2))
        await sim.sleep(2.0)
        chains = await managers.chains()
        assert {chain.version for chain in chains.values()} == {0} and len(chains) == 2
        nodes[2].link.is_cut = False
        await all_serving(managers, replicas=3)
        assert {chain.version for chain in (await managers.chains()).values()} == {1}
        await stop(managers, nodes)

    run(0, main)


@pytest.mark.parametrize("seed", range(3))
def test_a_new_node_gets_its_share_while_every_chain_keeps_its_replicas(seed: int) -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        nodes = [FakeNode(managers, f"n{number}").start() for number in range(3)]
        await joined(managers, nodes)
        await managers.call(SetupChains(3, 8))
        await all_serving(managers, replicas=3)
        nodes.append(FakeNode(managers, "new").start())
        await joined(managers, nodes)
        await sim.sleep(5.0)
        assert (await held(managers))["new"] == 0, "nothing moves unasked"
        await managers.call(AddNode("new"))
        while (await held(managers))["new"] < 6 or any(
            len(chain.targets) > 3 for chain in (await managers.chains()).values()
        ):
            chains = (await managers.chains()).values()
            assert all(len(chain.serving) >= 3 for chain in chains)
            assert sum(len(chain.targets) > 3 for chain in chains) <= 4, "moves_max"
            assert sim.now_s() < 60.0
            await sim.sleep(0.02)
        assert sorted((await held(managers)).values()) == [6, 6, 6, 6]
        await all_serving(managers, replicas=3)
        assert len(nodes[3].disk) == 6
        await stop(managers, nodes)

    run(seed, main)


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_drained_node_ends_up_empty_and_can_be_removed(is_dead: bool) -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        nodes = [FakeNode(managers, f"n{number}").start() for number in range(4)]
        await joined(managers, nodes)
        await managers.call(SetupChains(3, 6))
        await all_serving(managers, replicas=3)
        if is_dead:
            await nodes[0].kill()
        with pytest.raises(Conflict, match="drain it first"):
            await managers.call(RemoveNode("n0"))
        await managers.call(DrainNode("n0"))
        with pytest.raises(Conflict, match="2 would be left"):
            await managers.call(DrainNode("n1"))
        while "n0" in await held(managers):
            assert sim.now_s() < 60.0
            await sim.sleep(0.1)
        await all_serving(managers, replicas=3)
        if not is_dead:
            await until(sim, lambda: not nodes[0].disk)
            with pytest.raises(Conflict, match="stop it first"):
                await managers.call(RemoveNode("n0"))
            await nodes[0].kill()
            await sim.sleep(4.0)
        await managers.call(RemoveNode("n0"))
        for request in (RemoveNode("n0"), AddNode("n0"), DrainNode("n0")):
            with pytest.raises(NotFound):
                await managers.call(request)
        assert [node.name for node in (await managers.call(GetRouting())).routing.nodes] == ["n1", "n2", "n3"]
        await stop(managers, nodes)

    run(0, main)


def test_a_planned_chain_moves_without_ever_having_begun() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        nodes = [FakeNode(managers, f"n{number}").start() for number in range(4)]
        await joined(managers, nodes)
        nodes[0].link.is_cut = True
        await managers.call(SetupChains(3, 3))
        await managers.call(DrainNode("n0"))
        await all_serving(managers, replicas=3)
        assert "n0" not in await held(managers)
        await stop(managers, nodes)

    run(0, main)


def test_a_chain_that_moves_does_not_count_twice() -> None:
    made = layout({1: "aBc"}, "abc")
    assert made.load == {"a": 1, "c": 1}
    assert made.moving == {1}
    assert replace(made.chains[1], replicas=2).has_enough
