"""The door between a caller's thread and the services: how a call on a local store costs no thread switch.

`Portal.run` drives the coroutine of a call in the caller's own thread, under the runtime's baton. Most calls on a
local store never suspend (the page cache is warm, the KV is mapped memory) and end right there. One that does suspend
is handed over, half run, to the loop thread, and the caller waits (`run`) or awaits (`run_async`).

Invariants:
  - Works inside any running event loop and from any thread: it never touches the caller's loop.
  - An interrupt (Ctrl-C) never lands in the middle of a service's update: `run(..., mutates=True)` on the main thread
    holds SIGINT back until the call ended. Reads are not guarded (the swap costs as much as a stat), so read
    paths keep their own state right with `finally`.
  - A call that began is never cancelled half-way: an interrupted or cancelled caller leaves once it ended, so that
    nothing writes to the caller's buffers afterwards and no commit is left in doubt. Calls on a local store are short.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from .runtime import AsyncioRuntime

T = TypeVar("T")


class Portal:
    """Runs coroutines of one `AsyncioRuntime` from outside its loop."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self._runtime = runtime
        self._outcomes = _Outcomes()
        self._started = _Started(runtime, self._start_all)

    def run(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        """Run `call` to its end and return its result. Blocks the calling thread only."""
        if mutates and threading.current_thread() is threading.main_thread():
            with _InterruptsHeld():
                return self._run(call)
        return self._run(call)

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        done, value = self._drive(call, blocks=True, hand_over=_Wait)
        return value if done else value.result()  # type: ignore[no-any-return]

    async def run_async(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        """Run `call` and return its result, blocking neither the caller's event loop nor its thread for I/O.

        A read is driven inline as far as it goes. A mutation waits for a disk anyway: it goes to the store's loop
        with all others that the caller's loop starts in the same round, so that they share one wake-up and one commit.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        if mutates:
            self._started.add(loop, (call, waiter))
        else:
            deliver = functools.partial(self._outcomes.deliver, loop, waiter)
            done, value = self._drive(call, blocks=False, hand_over=lambda task: task.add_done_callback(deliver))
            if done:
                return value  # type: ignore[no-any-return]
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            while not waiter.done():
                with contextlib.suppress(asyncio.CancelledError):  # It may be cancelled more than once.
                    await asyncio.wait([waiter])
            raise

    def _start_all(self, loop: asyncio.AbstractEventLoop, calls: list[Any]) -> None:
        """Start calls of the caller's `loop`. Called in the store's thread."""
        for call, waiter in calls:
            task = self._runtime.spawn(call, "mutation")
            task.add_done_callback(functools.partial(self._outcomes.deliver, loop, waiter))

    def post(self, call: Coroutine[Any, Any, Any]) -> None:
        """Start `call` on the loop and return at once. For finalizers, which may run inside an inline call."""
        self._runtime.loop.call_soon_threadsafe(lambda: _consume(self._runtime.spawn(call, "posted")))

    def _drive(
        self, call: Coroutine[Any, Any, Any], *, blocks: bool, hand_over: Callable[[asyncio.Task[Any]], Any]
    ) -> tuple[bool, Any]:
        """Run `call` until it ends or suspends: (True, its result), or (False, what `hand_over` made of its task).

        The task cannot run before we have given the baton back.
        """
        runtime = self._runtime
        assert not runtime.is_inline(), "a service called the blocking API of its own store"
        runtime.enter_inline(blocks=blocks)
        try:
            awaited = call.send(None)
            return False, hand_over(runtime.spawn(_go_on(call, awaited), "handed-over"))
        except StopIteration as stop:
            return True, stop.value
        finally:
            runtime.leave_inline()


class _Wait:
    """A thread's wait for a task that goes on in the loop."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._ended = threading.Event()
        task.add_done_callback(lambda _: self._ended.set())

    def result(self) -> Any:
        """The task's result, once it has ended; an interrupted caller leaves no sooner."""
        try:
            self._ended.wait()
        except BaseException:
            self._ended.wait()
            raise
        return self._task.result()


class _Outcomes:
    """Takes outcomes to the callers' event loops: what ends together (a group commit) wakes a loop once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], asyncio.Task[Any]]]] = {}

    def deliver(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[Any], task: asyncio.Task[Any]) -> None:
        """Called in the store's thread."""
        with self._lock:
            due = self._due.setdefault(loop, [])
            due.append((waiter, task))
            if len(due) > 1:
                return
        try:
            loop.call_soon_threadsafe(self._hand_out, loop)
        except RuntimeError:  # The loop was closed: nobody waits there any more.
            with self._lock:
                del self._due[loop]

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            due = self._due.pop(loop)
        for waiter, task in due:
            _copy_outcome(task, waiter)


class _Started:
    """Calls that callers' loops start in one round of theirs, on their way to the store's loop."""

    def __init__(self, runtime: AsyncioRuntime, start_all: Callable[[asyncio.AbstractEventLoop, list[Any]], None]):
        self._runtime = runtime
        self._start_all = start_all
        self._calls: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        """Each list is touched by its own loop's thread only."""

    def add(self, loop: asyncio.AbstractEventLoop, call: Any) -> None:
        """Called in the caller's thread."""
        calls = self._calls.setdefault(loop, [])
        calls.append(call)
        if len(calls) == 1:
            loop.call_soon(self._hand_over, loop)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._runtime.loop.call_soon_threadsafe(self._start_all, loop, self._calls.pop(loop))


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
