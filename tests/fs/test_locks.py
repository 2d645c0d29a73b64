"""Locks by key, under many schedules."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from emberfs.locks import KeyedLocks
from emberfs.testing.sim.loop import Deadlock, SimRuntime, run

SEEDS = range(50)


def on_seeds(work: Callable[[SimRuntime], Awaitable[Any]]) -> None:
    for seed in SEEDS:
        run(seed, work)


def test_a_key_is_held_by_one_at_a_time_and_batches_never_wait_in_a_circle() -> None:
    async def main(runtime: SimRuntime) -> None:
        await crowd(runtime, KeyedLocks(runtime))

    on_seeds(main)


async def crowd(runtime: SimRuntime, locks: KeyedLocks) -> None:
    """Twenty callers, each of several batches of random keys in random order."""
    rng = runtime.random("keys")
    held: set[bytes] = set()

    async def caller() -> None:
        for _ in range(5):
            keys = [bytes([key]) for key in rng.sample(range(6), rng.randint(1, 4))]
            await locks.acquire(keys)
            assert not held & set(keys)
            held.update(keys)
            await runtime.sleep(rng.random())
            held.difference_update(keys)
            locks.release(keys)

    for task in [runtime.spawn(caller(), "caller") for _ in range(20)]:
        await task
    assert not locks._waiting, "free keys cost no memory"


def test_the_crowd_finds_locks_that_are_taken_in_the_callers_order() -> None:
    class Unsorted(KeyedLocks):
        async def acquire(self, keys: Sequence[bytes]) -> None:
            for key in keys:
                await super().acquire([key])

    async def main(runtime: SimRuntime) -> None:
        await crowd(runtime, Unsorted(runtime))

    with pytest.raises(Deadlock):
        on_seeds(main)


def test_a_key_goes_to_those_who_wait_in_the_order_they_came() -> None:
    async def main(runtime: SimRuntime) -> None:
        locks = KeyedLocks(runtime)
        order: list[int] = []

        async def caller(number: int) -> None:
            await locks.acquire([b"key"])
            order.append(number)
            await runtime.sleep(0.1)
            locks.release([b"key"])

        await locks.acquire([b"key"])
        tasks = []
        for number in range(10):
            tasks.append(runtime.spawn(caller(number), "caller"))
            await runtime.sleep(0.01)
        locks.release([b"key"])
        # A newcomer does not overtake them, though the lock is being handed over.
        tasks.append(runtime.spawn(caller(10), "newcomer"))
        for task in tasks:
            await task
        assert order == list(range(11))

    on_seeds(main)


def test_other_keys_are_not_waited_for() -> None:
    async def main(runtime: SimRuntime) -> None:
        locks = KeyedLocks(runtime)
        await locks.acquire([b"a"])
        await locks.acquire([b"b"])
        assert runtime.now_s() == 0
        locks.release([b"a"])
        await locks.acquire([b"a"])
        locks.release([b"a", b"b"])

    on_seeds(main)


def test_a_waiter_that_is_cancelled_keeps_nothing_and_blocks_nobody() -> None:
    async def main(runtime: SimRuntime) -> None:
        locks = KeyedLocks(runtime)
        rng = runtime.random("cancels")
        holders = 0

        async def caller(number: int) -> None:
            nonlocal holders
            if number % 2:
                async with locks.of(b"key"):
                    holders += 1
                    assert holders == 1
                    await runtime.sleep(0.1)
                    holders -= 1
            else:
                await locks.acquire([b"key", b"other"])
                locks.release([b"key", b"other"])

        tasks = [runtime.spawn(caller(number), "caller") for number in range(20)]
        for task in rng.sample(tasks[2::2], 6):
            # At the moment when it is handed on, or between two such.
            await runtime.sleep(rng.choice([0.1, 0.05, 0]))
            task.cancel()
        for task in tasks:
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
        assert not locks._waiting

    on_seeds(main)
