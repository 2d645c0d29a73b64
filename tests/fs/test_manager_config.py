"""The configuration in a running cluster: kept, handed out, and leases that change under nodes that hold them."""

from __future__ import annotations

import pytest
from emberfs.errors import Conflict
from emberfs.messages import ClusterStatus, ConfigReply, GetConfig, Heartbeat, HeartbeatReply, SetConfig, SetupChains
from emberfs.routing import Node, Role
from emberfs.settings import Config, Settings
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.manager_fakes import FakeNode, Managers, all_serving, until

META = Node("d1", Role.META, "d1:1", b"1")


async def config_of(managers: Managers) -> Config:
    reply = await managers.call(GetConfig())
    assert isinstance(reply, ConfigReply)
    return reply.config


def test_a_configuration_is_kept_and_changed_by_version() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        assert await config_of(managers) == Config(1, Settings().values(), (), 3.0)
        after = (await managers.call(SetConfig(1, {"moves_max": 9, "trash_s": 5}))).config
        assert (after.version, after.chosen) == (2, ("moves_max", "trash_s"))
        assert (after.values["moves_max"], after.values["trash_s"]) == (9, 5.0)
        with pytest.raises(Conflict):
            await managers.call(SetConfig(1, {"moves_max": 8}))
        await managers.close()
        again = await Managers(sim, kv=managers.kv).start()
        assert await config_of(again) == after
        unset = (await again.call(SetConfig(2, {}, ["moves_max"]))).config
        assert (unset.version, unset.chosen, unset.values["moves_max"]) == (3, ("trash_s",), Settings().moves_max)
        await again.close()

    run(0, main)


def test_a_heartbeat_brings_the_configuration_once() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()

        async def beat(version: int) -> HeartbeatReply:
            return await managers.call(Heartbeat(META, [], 0, 0, version))  # type: ignore[no-any-return]

        first = await beat(0)
        assert first.config == await config_of(managers)
        assert (await beat(1)).config is None
        await managers.configure(dead_after_s=6)
        news = await beat(1)
        assert news.config is not None and (news.config.version, news.config.waits_s) == (2, 6.0)
        assert (first.lease_s, news.lease_s) == (2.5, 5.0)
        await managers.close()

    run(0, main)


async def cluster(sim: SimRuntime, *, managers: int = 1) -> tuple[Managers, list[FakeNode]]:
    made = await Managers(sim, count=managers).start()
    nodes = [FakeNode(made, f"n{number}").start() for number in range(3)]
    while len((await made.call(ClusterStatus())).nodes) < 3:
        await sim.sleep(0.05)
    await made.call(SetupChains(3, 2))
    await all_serving(made, replicas=3)
    await until(sim, lambda: all(node.serving() for node in nodes))
    return made, nodes


async def taken_off_after_s(managers: Managers) -> float:
    """Seconds from now on until a chain is short of a replica."""
    begin_s = managers.sim.now_s()
    while all(len(chain.serving) == 3 for chain in (await managers.chains()).values()):
        await managers.sim.sleep(0.01)
    return managers.sim.now_s() - begin_s


@pytest.mark.parametrize("primary_changes", [False, True])
def test_a_shorter_lease_is_not_believed_in_before_the_longer_ones_are_over(primary_changes: bool) -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim, managers=2)
        await managers.configure(dead_after_s=12)
        await sim.sleep(1.0)
        nodes[0].link.is_cut = True  # With a lease of 10 s.
        await managers.configure(dead_after_s=3)
        if primary_changes:
            old = managers.primary
            assert old is not None
            managers.links[managers.services.index(old)].is_cut = True
        after_s = await taken_off_after_s(managers)
        assert not nodes[0].serving(), "it was waited for"
        assert 10.0 < after_s < 13.0 + 2.0 * primary_changes
        await until(sim, lambda: managers.primary is not None)
        # The long leases are over, everywhere.
        await until(sim, lambda: managers.primary is not None and managers.primary._cluster.config.waits_s == 3.0)
        nodes[1].link.is_cut = True
        begin_s = sim.now_s()
        while all(len(chain.serving) == 2 for chain in (await managers.chains()).values()):
            await sim.sleep(0.01)
        assert sim.now_s() - begin_s < 3.5
        for node in nodes:
            await node.kill()
        await managers.close()

    run(0, main)


def test_a_longer_lease_is_waited_for() -> None:
    async def main(sim: SimRuntime) -> None:
        managers, nodes = await cluster(sim)
        await managers.configure(dead_after_s=9)
        await sim.sleep(1.0)
        nodes[0].link.is_cut = True
        assert await taken_off_after_s(managers) > 8.0
        assert not nodes[0].serving()
        for node in nodes:
            await node.kill()
        await managers.close()

    run(0, main)
