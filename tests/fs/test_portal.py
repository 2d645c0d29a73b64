"""The door into the services: where a call runs, and that nobody leaves while it still does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def portal(runtime: AsyncioRuntime) -> Portal:
    return Portal(runtime)


async def thread_here() -> int:
    return threading.get_ident()


def main_thread_waits() -> bool:
    """True once the main thread stands in `Event.wait`."""
    ident = threading.main_thread().ident
    assert ident is not None
    return sys._current_frames()[ident].f_code.co_name == "wait"


async def until(runtime: AsyncioRuntime, is_so: Callable[[], bool]) -> None:
    while not is_so():
        await runtime.sleep(1e-3)


# ---- where a call runs


def test_a_call_that_does_not_suspend_runs_in_the_callers_thread(portal: Portal) -> None:
    assert portal.run(thread_here()) == threading.get_ident()


def test_a_call_that_suspends_goes_on_in_the_loop_thread(portal: Portal, runtime: AsyncioRuntime) -> None:
    async def call() -> list[int]:
        before = await thread_here()
        await runtime.sleep(0)
        return [before, await thread_here()]

    assert portal.run(call()) == [threading.get_ident(), runtime.loop.thread_ident]


def test_blocking_work_of_an_inline_call_stays_in_its_thread_and_else_goes_to_a_worker(
    portal: Portal, runtime: AsyncioRuntime
) -> None:
    async def call() -> list[int]:
        inline = await runtime.offload(threading.get_ident)
        await runtime.sleep(0)
        return [inline, await runtime.offload(threading.get_ident)]

    inline, late = portal.run(call())
    assert inline == threading.get_ident()
    assert late not in (inline, runtime.loop.thread_ident)


def test_other_threads_are_served_while_an_inline_call_blocks(portal: Portal, runtime: AsyncioRuntime) -> None:
    entered, served = threading.Event(), threading.Event()

    async def call() -> None:
        await runtime.offload(lambda: (entered.set(), served.wait()))

    blocked = threading.Thread(target=lambda: portal.run(call()))
    blocked.start()
    entered.wait()
    assert portal.run(thread_here()) == threading.get_ident()
    served.set()
    blocked.join()


@pytest.mark.parametrize("suspends", [False, True])
def test_an_error_reaches_the_caller(portal: Portal, runtime: AsyncioRuntime, suspends: bool) -> None:
    async def call() -> None:
        if suspends:
            await runtime.sleep(0)
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        portal.run(call())
    with pytest.raises(KeyError, match="ours"):
        asyncio.run(portal.run_async(call()))
    assert portal.run(thread_here()) == threading.get_ident(), "the baton was given back"


def test_what_a_call_awaits_may_raise_into_it(portal: Portal, runtime: AsyncioRuntime) -> None:
    async def call() -> str:
        future = runtime.future()
        runtime.loop.call_soon(future.set_exception, OSError("disk"))
        try:
            await future
        except OSError as error:
            return f"caught {error}"
        raise AssertionError

    assert portal.run(call()) == "caught disk"


def test_it_works_inside_a_running_loop(portal: Portal, runtime: AsyncioRuntime) -> None:
    async def call() -> str:
        await runtime.sleep(0)
        return "done"

    async def notebook() -> list[Any]:
        return [
            portal.run(call()),
            portal.run(thread_here()),
            *await asyncio.gather(*(portal.run_async(call()) for _ in range(5))),
        ]

    assert asyncio.run(notebook()) == ["done", threading.get_ident(), *["done"] * 5]


def test_an_async_call_does_not_block_its_own_loop(portal: Portal, runtime: AsyncioRuntime) -> None:
    async def main() -> str:
        release = threading.Event()

        async def call() -> str:
            await runtime.offload(release.wait)
            return "done"

        waiting = asyncio.ensure_future(portal.run_async(call()))
        await asyncio.sleep(0)
        assert not waiting.done()
        release.set()
        return await waiting

    assert asyncio.run(main()) == "done"


def test_services_see_no_other_thread_between_two_awaits(portal: Portal, runtime: AsyncioRuntime) -> None:
    count = 0

    async def call(number: int) -> None:
        nonlocal count
        seen = count
        for _ in range(50):  # Long enough for other threads to come in, if the baton let them.
            seen = seen + 1
        count = seen
        if number % 10 == 0:
            await runtime.sleep(0)
            count += 1

    def calls() -> None:
        for number in range(200):
            portal.run(call(number))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=calls) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert count == 8 * (200 * 50 + 20)


def test_a_service_must_not_call_the_blocking_api_of_its_own_store(portal: Portal) -> None:
    async def call() -> None:
        again = thread_here()
        try:
            portal.run(again)
        finally:
            again.close()

    with pytest.raises(AssertionError, match="blocking API"):
        portal.run(call())


def test_a_posted_call_runs_on_the_loop(portal: Portal, runtime: AsyncioRuntime) -> None:
    done = threading.Event()
    idents: list[int] = []

    async def posted() -> None:
        idents.append(await thread_here())
        done.set()
        raise ValueError("nobody is told")

    async def call() -> None:
        portal.post(posted())

    portal.run(call())
    done.wait()
    assert idents == [runtime.loop.thread_ident]


# ---- leaving early


def test_an_interrupt_of_an_update_is_delivered_when_it_has_ended(portal: Portal) -> None:
    steps = []

    async def update() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        steps.extend(number for number in range(1000))

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        portal.run(update())
    assert len(steps) == 1000
    assert signal.getsignal(signal.SIGINT) is before
    assert portal.run(thread_here()) == threading.get_ident(), "the baton was given back"


def test_an_interrupt_before_an_update_suspends_waits_for_its_end_too(portal: Portal, runtime: AsyncioRuntime) -> None:
    steps = []

    async def update() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for number in range(3):
            await runtime.sleep(1e-3)
            steps.append(number)

    with pytest.raises(KeyboardInterrupt):
        portal.run(update())
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("mutates", [False, True])
def test_an_interrupt_while_the_caller_waits_is_delivered_when_the_call_has_ended(
    portal: Portal, runtime: AsyncioRuntime, mutates: bool
) -> None:
    steps = []

    async def call() -> None:
        await until(runtime, main_thread_waits)
        os.kill(os.getpid(), signal.SIGINT)
        for number in range(3):
            await runtime.sleep(1e-3)
            steps.append(number)

    with pytest.raises(KeyboardInterrupt):
        portal.run(call())
    assert steps == [0, 1, 2]


def test_an_update_may_be_called_from_any_thread(portal: Portal) -> None:
    """Only the main thread may touch signal handlers, and only it gets SIGINT."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(portal.run(thread_here())))
    thread.start()
    thread.join()
    assert results == [thread.ident]


@pytest.mark.parametrize("cancels", [1, 3])
def test_a_cancelled_caller_leaves_once_the_call_has_ended(
    portal: Portal, runtime: AsyncioRuntime, cancels: int
) -> None:
    async def main() -> None:
        release = threading.Event()
        steps = []

        async def call() -> None:
            await runtime.offload(release.wait)
            steps.append("ended")

        task = asyncio.ensure_future(portal.run_async(call()))
        for _ in range(cancels):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        left_early = task.done()
        release.set()
        assert not left_early
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["ended"]

    asyncio.run(main())


# ---- the runtime


def test_a_timer_ends_in_time_and_a_cancelled_one_leaves_nothing(portal: Portal, runtime: AsyncioRuntime) -> None:
    async def nap() -> float:
        began_s = runtime.now_s()
        forgotten = runtime.timer(3600.0)  # Set by the caller's thread, as what follows is by the loop's.
        await runtime.timer(0.01)
        forgotten.cancel()
        runtime.timer(3600.0).cancel()
        await runtime.timer(0.0)
        return runtime.now_s() - began_s

    assert portal.run(nap()) >= 0.01
    with runtime.baton:
        assert all(handle.cancelled() for handle in runtime.loop._scheduled)  # type: ignore[attr-defined]


def test_a_stopped_runtime_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    runtime = AsyncioRuntime("stopping")

    async def call() -> None:
        await runtime.sleep(0)
        await asyncio.gather(*(runtime.offload(os.getpid) for _ in range(10)))
        threads.append(await runtime.loop.run_in_executor(None, threading.current_thread))  # As asyncio itself does.

    threads: list[threading.Thread] = []
    Portal(runtime).run(call())
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"stopping-loop", "stopping-io_0"}
    assert threads[0].name.startswith("stopping-names")
    runtime.stop()
    assert set(threading.enumerate()) <= before
    assert runtime.loop.is_closed()


def test_time_and_randomness(runtime: AsyncioRuntime, portal: Portal) -> None:
    async def nap() -> float:
        began_s = runtime.now_s()
        await runtime.sleep(0.01)
        return runtime.now_s() - began_s

    assert portal.run(nap()) >= 0.01
    assert runtime.wall_ns() > 1_700_000_000 * 10**9
    assert len(runtime.random_bytes(16)) == 16 and runtime.random_bytes(16) != runtime.random_bytes(16)
