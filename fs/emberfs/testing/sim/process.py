"""A simulated process: the `Runtime` of one server or client, with a clock of its own, that can be killed or paused.

    process = SimProcess(runtime, "storage-1", drift=0.01)
    process.spawn(server.run(), "server")
    process.kill()

Invariants:
  - Every step of a task or callback that the process began is the process's: the loop knows it by its context.
  - A killed process runs no more code, not even `finally`; its tasks are buried and closed when the simulation is over.
  - A paused process runs nothing until `resume`; timers that expired meanwhile fire then.
  - The clock runs (1 + drift) times as fast as the world's, from an origin of its own; sleeping goes by that clock.

Does not know: the network or the disks; who watches for the death of a process asks with `on_death`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any, TypeVar

from .loop import PROCESS, Ready, SimRuntime

T = TypeVar("T")


class SimProcess:
    """`emberfs.runtime.Runtime` for the code of one process."""

    def __init__(self, world: SimRuntime, name: str, *, drift: float = 0.0, origin_s: float = 0.0) -> None:
        """`drift`: 0.02 gains a second in 50. `origin_s`: what its clock shows at the world's time 0."""
        self.name = name
        self.world = world
        self.is_alive = True
        self.is_paused = False
        self.is_stopped = False
        """Dead or paused."""
        self.offload_slowdown_s = 0.0
        """So much longer takes each call on a disk."""
        self._rate = 1.0 + drift
        self._origin_s = origin_s
        self._ids = world.random(f"ids of {name}")
        self._held: list[Ready] = []
        self._on_death: list[Callable[[], None]] = []
        self.context = Context()
        self.context.run(PROCESS.set, self)

    # ---- what a test orders

    def kill(self) -> None:
        """kill -9: nothing of it runs again."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.is_stopped = True
        self._held.clear()
        self.world.loop.bury(self)
        for watcher in self._on_death:
            watcher()

    def pause(self) -> None:
        """SIGSTOP."""
        self.is_paused = self.is_stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.is_paused = False
        self.is_stopped = not self.is_alive
        held, self._held = self._held, []
        for step in held:
            self.world.loop.ready(step)

    def on_death(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` when the process is killed."""
        self._on_death.append(watcher)

    # ---- what the loop asks

    def may_run(self, step: Ready) -> bool:
        """May this step run now? If not, it is dropped, or kept until `resume`."""
        if not self.is_alive:
            return False
        if self.is_paused:
            self._held.append(step)
            return False
        return True

    # ---- emberfs.runtime.Runtime

    def now_s(self) -> float:
        return self._origin_s + self.world.loop.time() * self._rate

    def wall_ns(self) -> int:
        return self.world.wall_ns()

    def random_bytes(self, count: int) -> bytes:
        return self._ids.randbytes(count)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        if not self.is_alive:
            work.close()
            raise ProcessDied(self.name)
        return self.world.loop.create_task(work, name=f"{self.name}.{name}", context=self.context.copy())

    def future(self) -> asyncio.Future[Any]:
        return self.world.loop.create_future()

    def timer(self, seconds: float) -> asyncio.Future[None]:
        return self.world.loop.timer(seconds / self._rate)

    async def sleep(self, seconds: float) -> None:
        await self.timer(seconds)

    async def offload(self, blocking: Callable[..., T], *args: Any) -> T:
        return await self.world.offload(blocking, *args)

    async def offload_read(self, blocking: Callable[..., T], *args: Any) -> T:
        return await self.world.offload(blocking, *args)

    async def offload_steps(self, steps: Sequence[Callable[[], T]]) -> list[T]:
        """See `SimRuntime`: what the process's disks use."""
        if self.offload_slowdown_s:
            await self.world.sleep(self.offload_slowdown_s)
        return await self.world.offload_steps(steps)

    def may_block(self) -> bool:
        return False

    def block(self, blocking: Callable[..., T], *args: Any) -> T:
        raise AssertionError("nobody may block here")

    def note(self, event: str) -> None:
        """Let `event` count in the trace."""
        self.world.note(event)


class ProcessDied(Exception):
    """Code of a killed process asked for something: only as its remains are closed, when the simulation is over."""
