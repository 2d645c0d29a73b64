"""The memory KV under the simulated loop: the suite, and what only many schedules show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import Conflict
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import Transaction, decode_int, encode_int
from emberfs.testing.kv import KVConformance
from emberfs.testing.sim.loop import SimRuntime, run


class TestSimulatedKV(KVConformance):
    @pytest.fixture(params=range(3))
    def runtime(self, request: pytest.FixtureRequest) -> Iterator[SimRuntime]:
        runtime = SimRuntime(request.param)
        yield runtime
        runtime.loop.close()

    @pytest.fixture
    def run(self, runtime: SimRuntime) -> Callable[..., Any]:
        return runtime.loop.run_until_complete

    @pytest.fixture
    def make_kv(self, runtime: SimRuntime) -> Callable[[], MemoryKV]:
        return lambda: slow_kv(runtime)


class CountingKV(MemoryKV):
    """Counts the groups it applied."""

    groups = 0

    def _apply(self, group: Any) -> None:
        self.groups += 1
        super()._apply(group)


def slow_kv(runtime: SimRuntime) -> CountingKV:
    """A KV whose commits take as long as an offloaded call."""
    return CountingKV(runtime, persist=lambda: runtime.offload(lambda: None))


def test_concurrent_increments_lose_no_update(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> None:
        kv = slow_kv(runtime)

        async def increment(transaction: Transaction) -> None:
            count = decode_int(await transaction.get(b"count"))
            await runtime.offload(lambda: None)
            transaction.put(b"count", encode_int(count + 1))

        await asyncio.gather(*(kv.run(increment) for _ in range(12)))
        assert decode_int(await kv.begin().get(b"count")) == 12
        await kv.close()

    for seed in seeds:
        run(seed, main)


def test_commits_that_meet_are_applied_together(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> int:
        kv = slow_kv(runtime)

        async def write(number: int) -> None:
            transaction = kv.begin()
            transaction.put(b"%d" % number, b"")
            await transaction.commit()

        await asyncio.gather(*(write(number) for number in range(32)))
        await kv.close()
        assert len(kv.snapshot()) == 32
        return kv.groups

    groups = [run(seed, main) for seed in seeds]
    assert max(groups) < 32


def test_cancelled_commits_happen_whole_or_not_at_all_and_hold_nobody_up(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> None:
        kv = slow_kv(runtime)
        rng = runtime.random("cancel")

        async def write(number: int) -> None:
            transaction = kv.begin()
            transaction.put(b"left %d" % number, b"")
            transaction.put(b"right %d" % number, b"")
            await transaction.commit()

        tasks = [runtime.spawn(write(number), f"write-{number}") for number in range(16)]
        # The first one leads the group commit, if a caller leads at all.
        victims = [0, *rng.sample(range(1, 16), 5)]
        for victim in victims:
            await runtime.sleep(rng.choice([0, 1e-4]))
            tasks[victim].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await kv.close()
        rows = kv.snapshot()
        for number, outcome in enumerate(outcomes):
            written = [b"%s %d" % (side, number) in rows for side in (b"left", b"right")]
            assert written in ([True, True], [False, False])
            assert outcome is None or (number in victims and isinstance(outcome, asyncio.CancelledError))
            assert outcome is not None or all(written)

    for seed in seeds:
        run(seed, main)


def test_transfers_under_conflict_keep_the_sum(seeds: Sequence[int]) -> None:
    """Two accounts, transfers that read both, readers that must never see money that is not there."""

    async def main(runtime: SimRuntime) -> None:
        kv = slow_kv(runtime)
        transaction = kv.begin()
        transaction.add(b"a", 100)
        transaction.add(b"b", 100)
        await transaction.commit()

        async def transfer(transaction: Transaction) -> None:
            balance = decode_int(await transaction.get(b"a"))
            await runtime.offload(lambda: None)
            other = decode_int(await transaction.get(b"b"))
            transaction.put(b"a", encode_int(balance - 1))
            transaction.put(b"b", encode_int(other + 1))

        async def audit() -> None:
            transaction = kv.begin()
            try:
                first = decode_int(await transaction.get(b"a"))
                await runtime.offload(lambda: None)
                assert first + decode_int(await transaction.get(b"b")) == 200
            except Conflict:
                pass

        await asyncio.gather(*(work() for _ in range(8) for work in (lambda: kv.run(transfer), audit)))
        assert decode_int(await kv.begin().get(b"b")) == 108
        await kv.close()

    for seed in seeds:
        run(seed, main)
