"""Coroutines that took their first step outside a task."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from emberfs.half_run import HalfRun
from emberfs.runtime import AsyncioRuntime
from emberfs.waiting import all_begun


def begin(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task for what is left of `call` after its first step."""
    return asyncio.get_running_loop().create_task(HalfRun(call, call.send(None)))


def test_several_may_wait_for_one_future() -> None:
    async def main() -> list[str]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def wait() -> str:
            return await future

        tasks = [begin(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks.append(begin(wait()))
        asyncio.get_running_loop().call_soon(future.set_result, "done")
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["done"] * 4


def test_a_future_may_be_done_before_the_task_begins() -> None:
    async def main() -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def wait() -> str:
            return await future

        task = begin(wait())
        future.set_result("at once")
        return str(await task)

    assert asyncio.run(main()) == "at once"


def test_one_that_only_gives_way_goes_on() -> None:
    async def main() -> str:
        async def give_way() -> str:
            await asyncio.sleep(0)
            return "went on"

        return str(await begin(give_way()))

    assert asyncio.run(main()) == "went on"


def test_it_can_be_cancelled_before_and_after_the_task_begins() -> None:
    async def main() -> None:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        ended: list[str] = []

        async def wait() -> None:
            try:
                await future
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        early, late = begin(wait()), begin(wait())
        early.cancel()
        await asyncio.sleep(0)
        late.cancel()
        for task in (early, late):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ended == ["cancelled"] * 2

    asyncio.run(main())


def test_many_begin_at_once_and_only_those_that_wait_are_tasks() -> None:
    spawned: list[str] = []

    class Counting(AsyncioRuntime):
        def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
            spawned.append(name)
            return asyncio.get_running_loop().create_task(work)

    async def main() -> list[Any]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        begun: list[int] = []

        async def work(number: int) -> object:
            begun.append(number)
            if number == 1:
                raise KeyError(number)
            if number == 2:
                # All have begun before any is waited for.
                asyncio.get_running_loop().call_soon(lambda: future.set_result(str(begun)))
                return await future
            if number == 3:
                await asyncio.sleep(0)
                raise ValueError(number)
            return number

        return await all_begun(Counting(), [work(number) for number in range(5)], "many")

    first, failed, waited, failed_later, last = asyncio.run(main())
    assert (first, waited, last) == (0, "[0, 1, 2, 3, 4]", 4)
    assert isinstance(failed, KeyError) and isinstance(failed_later, ValueError)
    assert spawned == ["many", "many"]
