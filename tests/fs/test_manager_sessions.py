"""Client sessions: opened durably, kept by extending, ended by silence, and told to every server."""

from __future__ import annotations

import pytest
from emberfs.errors import InvalidPath, ProtocolError, SessionExpired
from emberfs.messages import CloseClient, ClusterStatus, Done, ExtendSession, GetRouting, OpenSession
from emberfs.settings import Settings
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.manager_fakes import FakeNode, Managers, until

ALICE, BOB = b"a" * 16, b"b" * 16
TIMEOUT_S = Settings().session_timeout_s


def test_servers_hear_of_sessions_as_they_open_and_close() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        node = FakeNode(managers, "n0").start()
        await managers.call(OpenSession(ALICE, "a laptop"))
        await until(sim, lambda: node.sessions == {ALICE}, within_s=1.0)
        await managers.call(OpenSession(BOB))
        await until(sim, lambda: node.sessions == {ALICE, BOB}, within_s=1.0)
        version = node.sessions_version
        await managers.call(OpenSession(BOB))
        await managers.call(CloseClient(ALICE))
        await managers.call(CloseClient(ALICE))
        await until(sim, lambda: node.sessions == {BOB}, within_s=1.0)
        assert node.sessions_version == version + 1, "what changes nothing is no news"
        with pytest.raises(SessionExpired):
            await managers.call(ExtendSession(ALICE))
        await node.kill()
        await managers.close()

    run(0, main)


def test_a_silent_client_is_given_up_and_one_that_extends_is_not() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        await managers.call(OpenSession(ALICE))
        await managers.call(OpenSession(BOB))
        opened_s = sim.now_s()
        while sim.now_s() < opened_s + TIMEOUT_S - 1.0:
            await sim.sleep(5.0)
            assert await managers.call(ExtendSession(BOB)) == Done()
        assert (await managers.call(ClusterStatus())).sessions == 2
        await sim.sleep(6.5)
        assert (await managers.call(ClusterStatus())).sessions == 1
        with pytest.raises(SessionExpired):
            await managers.call(ExtendSession(ALICE))
        await managers.call(ExtendSession(BOB))
        await managers.close()

    run(0, main)


def test_a_new_primary_gives_everybody_the_full_time() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim, count=2).start()
        await managers.call(OpenSession(ALICE))
        await sim.sleep(TIMEOUT_S - 5.0)
        old = managers.primary
        assert old is not None
        await old.close()
        await sim.sleep(TIMEOUT_S - 5.0)
        assert (await managers.call(ClusterStatus())).sessions == 1
        await sim.sleep(10.0)
        assert (await managers.call(ClusterStatus())).sessions == 0
        await managers.close()

    run(0, main)


def test_bad_ids_and_foreign_requests_are_refused() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        with pytest.raises(InvalidPath):
            await managers.call(OpenSession(b"short"))
        with pytest.raises(ProtocolError):
            await managers.call(Done())
        await managers.close()

    run(0, main)


def test_a_question_for_a_newer_routing_waits_for_it() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        first = (await managers.call(GetRouting())).routing
        asked_s = sim.now_s()
        assert (await managers.call(GetRouting(first.version))).routing is None
        assert sim.now_s() == asked_s
        assert (await managers.call(GetRouting(first.version, wait_s=2.0))).routing is None
        assert asked_s + 2.0 <= sim.now_s() < asked_s + 2.1
        waiting = sim.spawn(managers.call(GetRouting(first.version, wait_s=20.0)), "follower")
        await sim.sleep(1.0)
        node = FakeNode(managers, "n0").start()
        newer = (await waiting).routing
        assert newer.version > first.version and [each.name for each in newer.nodes] == ["n0"]
        assert sim.now_s() < asked_s + 4.0
        await node.kill()
        await managers.close()

    run(0, main)
