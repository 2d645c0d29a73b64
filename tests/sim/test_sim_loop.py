"""The simulated loop: one seed is one schedule, time is virtual, and what hangs or fails in secret is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from emberfs.runtime import Runtime
from emberfs.testing.sim import loop as loop_module
from emberfs.testing.sim.loop import Deadlock, Livelock, SimRuntime, Unhandled, run

ROOT = Path(__file__).resolve().parents[2]


async def workload(runtime: SimRuntime) -> str:
    """Four tasks that sleep, offload and take turns at a lock. Returns the order in which they did."""
    order: list[str] = []
    lock = asyncio.Lock()

    async def worker(name: str) -> None:
        for _ in range(3):
            await runtime.sleep(0.001)
            async with lock:
                order.append(name)
                await runtime.offload(order.append, name.upper())

    tasks = [runtime.spawn(worker(name), name) for name in "abcd"]
    await asyncio.gather(*tasks)
    return "".join(order) + runtime.random_bytes(4).hex()


def traced(seed: int, main: Callable[[SimRuntime], Awaitable[str]] = workload) -> tuple[str, str]:
    runtime = SimRuntime(seed)
    return runtime.run(main), runtime.trace_hash()


def test_a_seed_replays_exactly(seeds: Sequence[int]) -> None:
    for seed in seeds:
        assert traced(seed) == traced(seed)


def test_seeds_give_different_interleavings() -> None:
    runs = [traced(seed) for seed in range(20)]
    assert len(set(runs)) == 20
    assert len({order for order, _ in runs}) == 20


def test_the_hash_secret_of_the_process_does_not_matter() -> None:
    code = "from tests.sim.test_sim_loop import traced; print(traced(1))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "fs")))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": secret, "PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for secret in ("1", "2")
    }
    assert outputs == {str(traced(1))}


def test_tasks_that_are_ready_together_run_in_every_order() -> None:
    async def main(runtime: SimRuntime) -> str:
        order: list[str] = []

        async def append(name: str) -> None:
            order.append(name)

        await asyncio.gather(*(append(name) for name in "abc"))
        return "".join(order)

    assert {run(seed, main) for seed in range(100)} == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_plain_callbacks_keep_their_order(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> list[int]:
        order: list[int] = []
        for number in range(10):
            runtime.loop.call_soon(order.append, number)
        await runtime.sleep(1)
        return order

    for seed in seeds:
        assert run(seed, main) == list(range(10))


def test_time_is_virtual() -> None:
    async def main(runtime: SimRuntime) -> None:
        clock: Runtime = runtime
        before = clock.wall_ns()
        await clock.sleep(3600.0)
        assert clock.now_s() == 3600.0
        assert clock.wall_ns() - before == 3600 * 10**9
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(clock.future(), 60.0)
        assert clock.now_s() == 3660.0

    run(0, main)


def test_a_deadlock_says_who_waits_where() -> None:
    async def wait_for_ever(runtime: SimRuntime) -> None:
        await runtime.future()

    async def main(runtime: SimRuntime) -> None:
        await runtime.spawn(wait_for_ever(runtime), "stuck")

    with pytest.raises(Deadlock, match=r"stuck/2 at .*wait_for_ever \(.*test_sim_loop.py:\d+\)") as caught:
        run(7, main)
    assert any("--seed=7" in note for note in caught.value.__notes__)


def test_a_livelock_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "STEPS_MAX", 1000)

    async def spin(runtime: SimRuntime) -> None:
        while True:
            await runtime.sleep(0)

    with pytest.raises(Livelock, match="spin"):
        run(0, spin)


def test_a_task_left_alive_is_a_failure() -> None:
    async def main(runtime: SimRuntime) -> None:
        runtime.spawn(runtime.sleep(1e9), "forgotten")

    with pytest.raises(AssertionError, match="forgotten"):
        run(0, main)


def test_an_exception_that_nobody_looks_at_is_a_failure() -> None:
    async def fail() -> None:
        raise KeyError("in secret")

    async def main(runtime: SimRuntime) -> None:
        runtime.spawn(fail(), "fails")
        await runtime.sleep(1)

    async def main_with_callback(runtime: SimRuntime) -> None:
        runtime.loop.call_soon(lambda: {}["in secret"])
        await runtime.sleep(1)

    for each in (main, main_with_callback):
        with pytest.raises(Unhandled) as caught:
            run(0, each)
        assert isinstance(caught.value.__cause__, KeyError)


def test_offload_suspends_or_not_and_raises_what_the_function_raises(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> bool:
        assert await runtime.offload(max, 1, 2) == 2
        suspended = runtime.now_s() > 0
        with pytest.raises(ZeroDivisionError):
            await runtime.offload(divmod, 1, 0)
        return suspended

    for seed in seeds:
        run(seed, main)
    assert {run(seed, main) for seed in range(20)} == {True, False}


def test_a_cancelled_offload_may_run_all_the_same() -> None:
    async def main(runtime: SimRuntime) -> tuple[int, bool]:
        done: list[int] = []
        task = runtime.spawn(runtime.offload_steps([lambda n=n: done.append(n) for n in range(3)]), "batch")
        await runtime.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        await runtime.sleep(1)
        return len(done), task.cancelled()

    outcomes = {run(seed, main) for seed in range(100)}
    assert outcomes == {(0, True), (3, True), (3, False)}


def test_cancel_others_ends_every_task_of_a_process() -> None:
    async def main(runtime: SimRuntime) -> list[str]:
        ended: list[str] = []

        async def serve(name: str) -> None:
            try:
                await runtime.future()
            finally:
                ended.append(name)

        for name in "ab":
            runtime.spawn(serve(name), name)
        await runtime.sleep(1)
        await runtime.cancel_others()
        return sorted(ended)

    assert run(0, main) == ["a", "b"]
