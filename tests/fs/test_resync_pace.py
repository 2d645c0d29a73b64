"""How fast replicas are brought up to date: the caps of recovery and migration, and that neither waits for the other.

Run: pytest tests/fs/test_resync_pace.py
"""

from __future__ import annotations

import asyncio

import pytest
from emberfs.engine import Action
from emberfs.routing import Chain, ChainTarget, TargetState
from emberfs.settings import Settings
from emberfs.storage.pace import Pace, Paces
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.types import chunk_id

from tests.fs.chain_fakes import SERVING, SYNCING, ReplicaChain, on_chain

KIB, MIB = 1 << 10, 1 << 20


async def rate_of(pace: Pace, runtime: SimRuntime, *, seconds: float) -> float:
    """Bytes per second that somebody gets who asks for 64 KiB again and again."""
    begin_s, sent, never = runtime.now_s(), 0, runtime.future()
    while runtime.now_s() < begin_s + seconds:
        await pace.take(64 * KIB, never)
        sent += 64 * KIB
    return sent / (runtime.now_s() - begin_s)


def test_both_caps_hold_and_neither_slows_the_other() -> None:
    async def main(runtime: SimRuntime) -> None:
        paces = Paces(runtime, parallel=1)
        paces.retune(Settings(resync_bytes_per_s=40 * MIB, migration_bytes_per_s=10 * MIB))
        alone = await rate_of(paces.recovery, runtime, seconds=10.0)
        tasks = [
            runtime.spawn(rate_of(pace, runtime, seconds=10.0), "sender")
            for pace in (paces.recovery, paces.migration, paces.migration)
        ]
        recovery, *migrations = [await task for task in tasks]
        assert alone == pytest.approx(40 * MIB, rel=0.01)
        assert recovery == pytest.approx(40 * MIB, rel=0.01)
        assert sum(migrations) == pytest.approx(10 * MIB, rel=0.02), "two share one cap"
        # Somebody who moves holds the only turn of its kind; a recovery begins all the same.
        assert await paces.migration.begin(runtime.future())
        assert await paces.recovery.begin(runtime.future())

    run(0, main)


def test_another_cap_holds_for_those_who_wait_already() -> None:
    async def main(runtime: SimRuntime) -> None:
        pace, never = Pace(runtime, bytes_per_s=1 * MIB, parallel=1), runtime.future()
        await pace.take(64 * MIB, never)
        begin_s = runtime.now_s()
        waiting = runtime.spawn(pace.take(MIB, never), "waits")
        await runtime.sleep(4.0)
        assert not waiting.done()
        pace.retune(10 * MIB)
        await waiting
        assert runtime.now_s() - begin_s == pytest.approx(10.0), "4 MiB in 4 s, 60 MiB in 6 s"
        await runtime.sleep(100.0)
        begin_s = runtime.now_s()
        for _ in range(11):
            await pace.take(MIB, never)
        assert runtime.now_s() - begin_s == pytest.approx(1.0, abs=0.11), "nothing was saved up"

    run(0, main)


def test_who_need_not_send_any_more_waits_no_longer() -> None:
    async def main(runtime: SimRuntime) -> None:
        pace, stop = Pace(runtime, bytes_per_s=1 * MIB, parallel=1), runtime.future()
        await pace.take(64 * MIB, stop)
        waiting = runtime.spawn(pace.take(1, stop), "waits")
        await runtime.sleep(1.0)
        stop.set_result(None)
        await waiting
        assert runtime.now_s() < 2.0

    run(0, main)


@pytest.mark.parametrize(
    ("states", "replicas", "is_migration"),
    [
        ("SERVING SERVING SYNCING", 3, False),
        ("SERVING SERVING SERVING SYNCING", 3, True),  # One of those that serve leaves.
        ("SERVING SERVING SYNCING OFFLINE", 3, False),  # It died meanwhile.
        ("SERVING SYNCING", 1, True),
    ],
)
def test_a_chain_that_has_all_its_replicas_only_moves(states: str, replicas: int, is_migration: bool) -> None:
    async def main(runtime: SimRuntime) -> None:
        paces = Paces(runtime, parallel=1)
        targets = [ChainTarget(bytes([n]) * 16, TargetState[state]) for n, state in enumerate(states.split())]
        assert paces.of(Chain(1, 7, tuple(targets), replicas)) is (paces.migration if is_migration else paces.recovery)

    run(0, main)


@pytest.mark.parametrize(("replicas", "seconds"), [(3, 2.0), (2, 8.0)])
def test_a_resync_goes_at_the_pace_of_its_kind(replicas: int, seconds: float) -> None:
    """16 MiB in 16 chunks; 8 MiB/s to a replica that the chain lacks, 2 MiB/s to one more than it wants."""

    async def work(chain: ReplicaChain) -> None:
        chain.change({"a": SERVING, "b": SERVING})
        for index in range(16):
            update = chain.update(Action.WRITE, bytes(MIB), chunk=chunk_id(9, index))
            await chain.send("a", update._replace(granule_log2=16))
        for member in chain.members.values():
            settings = Settings(resync_bytes_per_s=8 * MIB, migration_bytes_per_s=2 * MIB)
            member.paces.retune(settings)
        begin_s = chain.runtime.now_s()
        chain.change({"a": SERVING, "b": SERVING, "c": SYNCING}, replicas=replicas)
        progress = chain["b"].replica.resync.progress
        assert progress is not None and progress.is_migration == (replicas == 2)
        await chain.until(lambda: is_done(chain))
        # The first chunk is sent at once.
        assert chain.runtime.now_s() - begin_s == pytest.approx(seconds * 15 / 16, rel=0.15)

    async def is_done(chain: ReplicaChain) -> bool:
        await asyncio.sleep(0)
        progress = chain["b"].replica.resync.progress
        return progress is not None and progress.is_done

    on_chain(work)
