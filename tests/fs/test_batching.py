"""Group commit, under many schedules: who shares a flush, who leads, who hears of an error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from emberfs.batching import GroupCommit
from emberfs.errors import UpdateUnknown
from emberfs.testing.sim.loop import SimRuntime, run

SEEDS = range(20)


class Interrupt(BaseException):
    """What asyncio's tasks hand on, unlike KeyboardInterrupt, which ends their loop."""


class Flushes:
    """Takes its time, keeps what it was given, fails for lists that hold "bad", is interrupted at "interrupt"."""

    def __init__(
        self,
        runtime: SimRuntime,
        *,
        weigh: Callable[[str], int] = len,
        weight_max: int = 1000,
        waits_anyway: bool = False,
    ) -> None:
        """`waits_anyway`: those who submit are threads that drive their own calls."""
        self.runtime = runtime
        if waits_anyway:
            runtime.may_block = lambda: True  # type: ignore[method-assign]
        self.lists: list[list[str]] = []
        self.tasks: list[str] = []
        """The task that each flush ran in."""
        self.is_flushing = False
        self.commits: GroupCommit[str] = GroupCommit(runtime, self.flush, weigh=weigh, weight_max=weight_max)

    async def flush(self, items: list[str]) -> None:
        assert not self.is_flushing, "two flushes at once"
        self.is_flushing = True
        self.lists.append(items)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task.get_name())
        await self.runtime.sleep(1.0)
        self.is_flushing = False
        if "bad" in items:
            raise OSError("no flush")
        if "interrupt" in items:
            raise Interrupt

    def submit(self, *items: str) -> list[asyncio.Task[None]]:
        return [self.runtime.spawn(self.commits.submit(item), f"submits {item}") for item in items]


def on_seeds(work: Callable[[SimRuntime], Awaitable[Any]]) -> None:
    for seed in SEEDS:
        run(seed, work)


def test_a_lone_caller_flushes_itself() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime)
        await flushes.commits.submit("a")
        await flushes.commits.submit("b")
        assert flushes.lists == [["a"], ["b"]]
        task = asyncio.current_task()
        assert task is not None and flushes.tasks == [task.get_name()] * 2

    on_seeds(main)


def test_everyone_who_comes_during_a_flush_shares_the_next() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime)
        tasks = flushes.submit("first")
        await runtime.sleep(0.5)
        tasks += flushes.submit(*"abcdefgh")
        for task in tasks:
            await task
        assert [sorted(items) for items in flushes.lists] == [["first"], list("abcdefgh")]
        assert runtime.now_s() == 2.0

    on_seeds(main)


def test_nobody_returns_before_a_flush_with_his_item_has_ended() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime)
        rng = runtime.random("arrivals")

        async def caller(item: str) -> None:
            await runtime.sleep(rng.random() * 5)
            came_s = runtime.now_s()
            await flushes.commits.submit(item)
            (number,) = [number for number, items in enumerate(flushes.lists) if item in items]
            assert runtime.now_s() >= came_s + 1.0 and not (flushes.is_flushing and number == len(flushes.lists) - 1)

        for task in [runtime.spawn(caller(str(number)), "caller") for number in range(40)]:
            await task
        await flushes.commits.drain()
        assert sorted(sum(flushes.lists, []), key=int) == [str(number) for number in range(40)]  # noqa: RUF017
        assert len(flushes.lists) < 10

    on_seeds(main)


@pytest.mark.parametrize(("waits_anyway", "end_s", "led"), [(False, 1.0, 1), (True, 2.0, 2)])
def test_a_leader_leaves_while_others_are_waiting(waits_anyway: bool, end_s: float, led: int) -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime, waits_anyway=waits_anyway)
        (leader,) = flushes.submit("leader")
        ended_s: list[float] = []
        leader.add_done_callback(lambda _: ended_s.append(runtime.now_s()))
        tasks = []
        for step in range(4):
            await runtime.sleep(0.5 if step == 0 else 1.0)
            tasks += flushes.submit(str(step))
        for task in tasks:
            await task
        assert ended_s == [end_s]
        assert [name.startswith("submits leader") for name in flushes.tasks] == [True] * led + [False] * (5 - led)

    on_seeds(main)


def test_an_error_goes_to_everyone_in_the_list_and_to_nobody_else() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime)
        good = flushes.submit("first")
        await runtime.sleep(0.5)
        bad = flushes.submit("bad", "beside")
        await runtime.sleep(1.0)
        good += flushes.submit("later")
        for task in bad:
            with pytest.raises(OSError, match="no flush"):
                await task
        for task in good:
            await task

    on_seeds(main)


def test_a_list_is_cut_where_it_would_weigh_too_much() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime, weight_max=10)
        tasks = flushes.submit("first")
        await runtime.sleep(0.5)
        for item in ("aaaa", "bbbbbb", "c", "d" * 50, "eeeee", "fffff"):
            tasks += flushes.submit(item)
            await runtime.sleep(0)
        for task in tasks:
            await task
        assert flushes.lists == [["first"], ["aaaa", "bbbbbb"], ["c"], ["d" * 50], ["eeeee", "fffff"]]

    on_seeds(main)


def test_drain_waits_for_what_is_queued() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime, weight_max=1)
        await flushes.commits.drain()
        tasks = flushes.submit(*"abcde")
        await runtime.sleep(0.5)
        drains = [runtime.spawn(flushes.commits.drain(), "drain") for _ in range(2)]
        for drain in drains:
            await drain
        assert len(flushes.lists) == 5 and not flushes.is_flushing
        for task in tasks:
            await task

    on_seeds(main)


def test_an_interrupted_flush_leaves_nobody_waiting_for_ever() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime, waits_anyway=True)
        (leader,) = flushes.submit("first")
        await runtime.sleep(0.5)
        beside = flushes.submit("interrupt", "beside")
        await runtime.sleep(1.0)
        queued = flushes.submit("queued")
        with pytest.raises(Interrupt):
            await leader
        for task in beside:
            with pytest.raises(UpdateUnknown, match="interrupted"):
                await task
        for task in queued:
            await task
        await flushes.commits.drain()
        await flushes.commits.submit("later")

    on_seeds(main)


def test_an_interrupt_with_an_empty_queue_ends_the_flushing() -> None:
    async def main(runtime: SimRuntime) -> None:
        flushes = Flushes(runtime)
        with pytest.raises(Interrupt):
            await flushes.commits.submit("interrupt")
        await flushes.commits.drain()
        await flushes.commits.submit("later")

    on_seeds(main)
