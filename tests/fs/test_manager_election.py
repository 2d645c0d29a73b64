"""Several managers, one primary: the lease row, its timing under drift, and what an old primary can still do."""

from __future__ import annotations

import asyncio

import pytest
from emberfs.errors import LimitExceeded, StaleRouting
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import Transaction
from emberfs.manager import ManagerConfig, rows
from emberfs.messages import ClusterStatus, GetRouting, OpenSession, StatusReply
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.manager_fakes import Managers, until

SEEDS = range(8)
CLIENT = b"c" * 16


@pytest.mark.parametrize("seed", SEEDS)
def test_one_of_three_becomes_primary_and_the_others_name_it(seed: int) -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim, count=3).start()
        await sim.sleep(1.0)
        status = await managers.call(ClusterStatus())
        assert isinstance(status, StatusReply)
        refused = 0
        for service in managers.services:
            if service is not managers.primary:
                with pytest.raises(StaleRouting, match=f"the primary manager is at {status.primary}"):
                    await service.handle(GetRouting())
                refused += 1
        assert refused == 2
        await managers.close()

    run(seed, main)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_primary_that_is_cut_off_stops_before_another_begins(seed: int) -> None:
    """Whatever the clocks: `Managers.primary` asserts at each look that at most one acts."""

    async def main(sim: SimRuntime) -> None:
        rng = sim.random("rates")
        managers = await Managers(sim, count=3, rates=[rng.choice([0.98, 1.02]) for _ in range(3)]).start()
        for _ in range(4):
            await until(sim, lambda: managers.primary is not None)
            old = managers.primary
            assert old is not None
            link = managers.links[managers.services.index(old)]
            cut_s = sim.now_s()
            link.is_cut = True
            took_s = None
            while took_s is None:
                await sim.sleep(0.001)
                if managers.primary not in (None, old):
                    took_s = sim.now_s() - cut_s
            assert took_s < 2.0, "a second without a primary is what clients are promised"
            link.is_cut = False
        await managers.close()

    run(seed, main)


def test_a_lapse_of_the_only_manager_ends_when_the_kv_is_back() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        managers.links[0].is_cut = True
        await sim.sleep(20.0)
        assert managers.primary is None
        with pytest.raises(StaleRouting, match=r"key-value store for (19|20) s"):
            await managers.services[0].handle(GetRouting())
        managers.links[0].is_cut = False
        await until(sim, lambda: managers.primary is not None, within_s=2.0)
        await managers.close()

    run(0, main)


def test_what_an_old_primary_has_under_way_changes_nothing() -> None:
    async def main(sim: SimRuntime) -> None:
        kv = MemoryKV(sim)
        managers = await Managers(sim, count=2, kv=kv).start()
        old = managers.primary
        assert old is not None
        link = managers.links[managers.services.index(old)]
        link.delay_s_max = 60.0  # Its next commit is on its way for a long time.
        opening = sim.spawn(_outcome(old, OpenSession(CLIENT)), "opening")
        await until(sim, lambda: managers.primary not in (None, old))
        assert isinstance(await opening, StaleRouting)
        assert await rows.get_all(kv.begin(), rows.SESSIONS, rows.SessionRow) == {}
        link.delay_s_max = 0.0
        await managers.close()

    async def _outcome(service, request):  # type: ignore[no-untyped-def]
        try:
            return await service.handle(request)
        except StaleRouting as error:
            return error

    for seed in SEEDS:
        run(seed, main)


def test_after_a_commit_of_unknown_outcome_the_tables_are_read_again() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        link = managers.links[0]
        first = managers.services[0]
        link.loses_answers = True
        with pytest.raises(OSError, match="cut"):
            await first.handle(OpenSession(CLIENT))
        assert not first.is_primary
        link.loses_answers = False
        status = await managers.call(ClusterStatus())
        assert status.sessions == 1, "the row was written, whatever the answer was"
        await managers.close()

    run(0, main)


def test_a_caller_that_goes_away_does_not_undo_its_change() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim).start()
        link = managers.links[0]
        link.delay_s_max = 0.05
        caller = sim.spawn(_open(managers), "caller")
        await sim.sleep(0.001)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        link.delay_s_max = 0.0
        await sim.sleep(0.5)
        assert (await managers.call(ClusterStatus())).sessions == 1
        await managers.close()

    async def _open(managers: Managers) -> None:
        await managers.services[0].handle(OpenSession(CLIENT))

    run(3, main)


def test_a_primary_that_closes_hands_over_at_once() -> None:
    async def main(sim: SimRuntime) -> None:
        managers = await Managers(sim, count=2).start()
        old = managers.primary
        assert old is not None
        await old.close()
        closed_s = sim.now_s()
        await until(sim, lambda: managers.primary is not None)
        assert sim.now_s() - closed_s < 0.5
        await managers.close()

    run(1, main)


def test_a_damaged_row_is_not_believed() -> None:
    async def main(sim: SimRuntime) -> None:
        kv = MemoryKV(sim)

        async def spoil(txn: Transaction) -> None:
            txn.put(rows.FORMAT_KEY, rows.encode(rows.Format())[:-1] + b"?")

        await kv.run(spoil)
        managers = Managers(sim, kv=kv)
        await managers.services[0].start()
        await sim.sleep(5.0)
        assert managers.primary is None
        await managers.close()

    run(0, main)


@pytest.mark.parametrize("wrong", [{"takeover_s": 1.0}, {"renew_s": 0.6}, {"tick_s": 0}])
def test_timings_without_their_margin_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LimitExceeded):
        ManagerConfig(**wrong)
