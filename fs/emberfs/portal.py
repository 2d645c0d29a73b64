"""The door between a caller's thread and the services: how a call on a local store costs no thread switch.

`Portal.run` drives the coroutine of a call in the caller's own thread, under the runtime's baton. Most calls on a
local store never suspend (the page cache is warm, the KV is mapped memory) and end right there. One that does suspend
is handed over, half run, to the loop thread, and the caller waits (`run`) or awaits (`run_async`).

Invariants:
  - Works inside any running event loop and from any thread: it never touches the caller's loop.
  - An interrupt (Ctrl-C) never lands in the middle of a service's update: `run(..., mutates=True)` on the main thread
    holds SIGINT back until the inline part ended. Reads are not guarded (the swap costs as much as a stat), so read
    paths keep their own state right with `finally`.
  - A call that began is never cancelled half-way: an interrupted or cancelled caller leaves once it ended, so that
    nothing writes to the caller's buffers afterwards and no commit is left in doubt. Calls on a local store are short.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from .runtime import AsyncioRuntime

T = TypeVar("T")


class Portal:
    """Runs coroutines of one `AsyncioRuntime` from outside its loop."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self._runtime = runtime

    def run(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        """Run `call` to its end and return its result. Blocks the calling thread only."""
        if mutates and threading.current_thread() is threading.main_thread():
            with _InterruptsHeld():
                done, value = self._drive(call, blocks=True)
        else:
            done, value = self._drive(call, blocks=True)
        return value if done else self._wait(value)  # type: ignore[no-any-return]

    async def run_async(self, call: Coroutine[Any, Any, T]) -> T:
        """Run `call` and return its result, blocking neither the caller's event loop nor its thread for I/O."""
        done, value = self._drive(call, blocks=False)
        if done:
            return value  # type: ignore[no-any-return]
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task: asyncio.Task[T] = value
        self._when_done(task, lambda: waiter.get_loop().call_soon_threadsafe(_copy_outcome, task, waiter))
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            await asyncio.wait([waiter])
            raise

    def post(self, call: Coroutine[Any, Any, Any]) -> None:
        """Start `call` on the loop and return at once. For finalizers, which may run inside an inline call."""
        self._runtime.loop.call_soon_threadsafe(lambda: _consume(self._runtime.spawn(call, "posted")))

    def _drive(self, call: Coroutine[Any, Any, Any], *, blocks: bool) -> tuple[bool, Any]:
        """Run `call` until it ends or suspends: (True, its result) or (False, the task that goes on with it)."""
        runtime = self._runtime
        assert not runtime.is_inline(), "a service called the blocking API of its own store"
        runtime.enter_inline(blocks=blocks)
        try:
            awaited = call.send(None)
            return False, runtime.spawn(_go_on(call, awaited), "handed-over")
        except StopIteration as stop:
            return True, stop.value
        finally:
            runtime.leave_inline()

    def _wait(self, task: asyncio.Task[T]) -> T:
        done = threading.Event()
        self._when_done(task, done.set)
        try:
            done.wait()
        except BaseException:
            done.wait()
            raise
        return task.result()

    def _when_done(self, task: asyncio.Task[Any], callback: Any) -> None:
        self._runtime.loop.call_soon_threadsafe(task.add_done_callback, lambda _: callback())


async def _go_on(call: Coroutine[Any, Any, T], awaited: Any) -> T:
    return await _resume(call, awaited)


@types.coroutine
def _resume(call: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """Drive a coroutine that already ran up to `awaited`."""
    try:
        while True:
            try:
                value = yield awaited
            except BaseException as error:
                awaited = call.throw(error)
            else:
                awaited = call.send(value)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _copy_outcome(task: asyncio.Task[T], waiter: asyncio.Future[T]) -> None:
    if waiter.done():
        return
    if task.cancelled():
        waiter.cancel()
    elif error := task.exception():
        waiter.set_exception(error)
    else:
        waiter.set_result(task.result())


def _consume(task: asyncio.Task[Any]) -> None:
    """A posted call has nobody to tell; its error is logged by the call itself, not by asyncio at exit."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


class _InterruptsHeld:
    """Holds SIGINT back on the main thread while inside, and delivers it on the way out."""

    def __enter__(self) -> None:
        self._pending: list[tuple[int, Any]] = []
        self._previous = signal.signal(signal.SIGINT, lambda number, frame: self._pending.append((number, frame)))

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        if self._pending and callable(self._previous):
            self._previous(*self._pending[-1])
