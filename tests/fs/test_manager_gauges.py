"""The numbers of the manager's metrics page: only a primary tells how the cluster is."""

from __future__ import annotations

from emberfs.messages import ClusterStatus, OpenSession, SetupChains
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.manager_fakes import FakeNode, Managers, all_serving, until


def test_the_gauges_follow_the_chains() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim, count=2).start()
        (idle,) = [service for service in managers.services if not service.is_primary]
        assert idle.gauges() == {"manager_is_primary": 0}

        primary = managers.primary
        assert primary is not None
        nodes = [FakeNode(managers, f"n{number}").start() for number in range(3)]
        while len((await managers.call(ClusterStatus())).nodes) < 3:
            await sim.sleep(0.05)
        await managers.call(SetupChains(2, 2))
        await managers.call(OpenSession(b"c" * 16, "a client"))
        await all_serving(managers, replicas=2)

        def shown(kind: str) -> float:
            return primary.gauges()[kind]

        await until(sim, lambda: shown("chains_degraded") == 0)
        version = shown("routing_version")
        assert primary.gauges() == {
            "manager_is_primary": 1,
            "chains_total": 3,
            "chains_degraded": 0,
            "chains_down": 0,
            "chains_lost": 0,
            "nodes_dead": 0,
            "client_sessions": 1,
            "routing_version": version,
        }

        # Each pair of the three nodes has one chain.
        await nodes[0].kill()
        await until(sim, lambda: shown("chains_degraded") == 2)
        assert (shown("nodes_dead"), shown("chains_down")) == (1, 0)
        await nodes[1].kill()
        await until(sim, lambda: shown("chains_degraded") == 3)
        assert (shown("nodes_dead"), shown("chains_down"), shown("chains_lost")) == (2, 1, 0)
        nodes[1].wipe()
        nodes[1].start()
        await until(sim, lambda: shown("chains_lost") == 1)
        assert (shown("nodes_dead"), shown("chains_down")) == (1, 0)
        assert shown("routing_version") > version
        await nodes[1].kill()
        await nodes[2].kill()
        await managers.close()

    run(0, main)
