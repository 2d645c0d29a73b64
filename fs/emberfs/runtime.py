"""Time, randomness and concurrency, as the services are handed them.

Three of the five seams (network is `transport`, disk is `disk`). A service holds a `Runtime` and reaches for nothing
else: no clock, no `random`, no thread, no executor, no bare task. `AsyncioRuntime` is production; `testing.sim` has the
other one, a seeded event loop with virtual time, so the very same service code runs under both.

Invariants of `AsyncioRuntime`:
  - One *baton* (a lock) is held by whichever thread is running service code. The loop thread holds it whenever it is
    not asleep in `select`; a caller's thread holds it while it drives a call inline (see `portal`). Between two awaits
    a service therefore never sees another service move.
  - Blocking work goes through `offload`. On the loop thread that is a worker thread; in an inline call the caller's
    own thread does it, without the baton, because a caller that waits anyway need not pay two thread switches.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

OFFLOAD_THREADS_MAX = 4

ROUNDS_UNLOOKED_MAX = 2
"""The loop goes round so often with work at hand before it looks at its sockets, and lets others have the baton: an
answer takes two rounds from its socket to who waits for it, and a look costs more than those."""

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine sleeps: a lease must not outlive a suspend."""


class Runtime(Protocol):
    """What a service may know of the world outside its messages and its disk."""

    def now_s(self) -> float:
        """Monotonic seconds. Only differences mean anything."""

    def wall_ns(self) -> int:
        """Unix time in nanoseconds: for time stamps that people read. Never orders anything."""

    def random_bytes(self, count: int) -> bytes:
        """`count` random bytes: ids and seeds."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Start a background task. The caller owns it: it keeps the task and cancels it when it closes."""

    def future(self) -> asyncio.Future[Any]:
        """A future of this runtime's loop."""

    def timer(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done after at least `seconds`. Cancel it when nobody waits for it any more."""

    async def sleep(self, seconds: float) -> None:
        """Suspend for at least `seconds`."""

    async def offload(self, blocking: Callable[..., T], *args: Any) -> T:
        """Run a blocking function (system calls, no service state) and return its result.

        Cancelled, it ends when the function has, unless that never began.
        """

    async def offload_read(self, blocking: Callable[..., T], *args: Any) -> T:
        """`offload` of reads from a disk. There may be many: nothing else waits behind them."""

    def may_block(self) -> bool:
        """True while an inline caller drives: `block` may be used, since its thread waits anyway."""

    def block(self, blocking: Callable[..., T], *args: Any) -> T:
        """`offload` for where `may_block` is true: no coroutine, in this very thread. Others run meanwhile."""


class _BatonSelector(selectors.DefaultSelector):
    """A selector that gives the baton away exactly while the loop sleeps."""

    def __init__(self, baton: threading.Lock) -> None:
        super().__init__()
        self._baton = baton
        self.was_woken = False
        """Somebody has written to the loop's wake-up pipe since it last looked. Guarded by the baton."""
        self._rounds_unlooked = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout == 0 and self._rounds_unlooked < ROUNDS_UNLOOKED_MAX:
            self._rounds_unlooked += 1
            return []
        self._rounds_unlooked = 0
        self._baton.release()
        try:
            return super().select(timeout)
        finally:
            self._baton.acquire()
            self.was_woken = False


class _BatonLoop(asyncio.SelectorEventLoop):
    """An event loop whose `call_soon` may be used by any thread that holds the baton.

    It wakes the loop once however often it is used, because a write to the wake-up pipe costs more than most calls.
    """

    thread_ident: int = 0

    def __init__(self, selector: _BatonSelector) -> None:
        super().__init__(selector)
        self._baton_selector = selector

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        if threading.get_ident() == self.thread_ident:
            return super().call_soon(callback, *args, context=context)
        if self._baton_selector.was_woken and not self.get_debug():  # in debug mode it refuses other threads
            return super().call_soon(callback, *args, context=context)
        self._baton_selector.was_woken = True
        return self.call_soon_threadsafe(callback, *args, context=context)


class AsyncioRuntime:
    """The production runtime: one daemon thread with an event loop, a few worker threads, the real clock."""

    def __init__(self, name: str = "emberfs") -> None:
        self.baton = threading.Lock()
        self.loop = _BatonLoop(_BatonSelector(self.baton))
        self._inline_ident: int | None = None
        self._inline_blocks = False
        self._executor = ThreadPoolExecutor(OFFLOAD_THREADS_MAX, thread_name_prefix=f"{name}-io")
        self._readers = ThreadPoolExecutor(OFFLOAD_THREADS_MAX, thread_name_prefix=f"{name}-read")
        # asyncio asks for addresses in threads; its own would outlive `stop`. Nothing else waits behind a slow one.
        self._names = ThreadPoolExecutor(OFFLOAD_THREADS_MAX, thread_name_prefix=f"{name}-names")
        self.loop.set_default_executor(self._names)
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-loop", daemon=True)
        self._started = threading.Event()
        self._thread.start()
        self._started.wait()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.thread_ident = threading.get_ident()
        self._started.set()
        self.baton.acquire()
        try:
            self.loop.run_forever()
        finally:
            self.baton.release()

    def stop(self) -> None:
        """Stop the loop and the workers. Call it from outside the loop, after every service was closed."""
        assert threading.get_ident() != self.loop.thread_ident
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._executor.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._names.shutdown(wait=True)
        with self.baton:
            # Closing the loop closes its selector and self-pipe; nothing can be scheduled afterwards.
            self.loop.close()

    def now_s(self) -> float:
        return time.clock_gettime(_CLOCK)

    def wall_ns(self) -> int:
        return time.time_ns()

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self.loop.create_task(work, name=name)

    def future(self) -> asyncio.Future[Any]:
        return self.loop.create_future()

    def timer(self, seconds: float) -> asyncio.Future[None]:
        future = self.loop.create_future()
        # call_later is not thread-safe, and an inline caller is another thread: the loop sets its own timer.
        self.loop.call_soon(self._set_off, seconds, future)
        return future

    def _set_off(self, seconds: float, future: asyncio.Future[None]) -> None:
        if not future.done():
            handle = self.loop.call_later(seconds, _wake, future)
            future.add_done_callback(lambda _: handle.cancel())

    async def sleep(self, seconds: float) -> None:
        await self.timer(seconds)

    def may_block(self) -> bool:
        return self._inline_blocks and self._inline_ident == threading.get_ident()

    async def offload(self, blocking: Callable[..., T], *args: Any) -> T:
        return await self._offload(self._executor, blocking, *args)

    async def offload_read(self, blocking: Callable[..., T], *args: Any) -> T:
        return await self._offload(self._readers, blocking, *args)

    async def _offload(self, executor: ThreadPoolExecutor, blocking: Callable[..., T], *args: Any) -> T:
        if self.may_block():
            return self.block(blocking, *args)
        try:
            work = executor.submit(blocking, *args)
        except RuntimeError:
            # At exit the interpreter stops taking such work before it lets us close; then this thread does it.
            return blocking(*args)
        try:
            return await asyncio.wrap_future(work, loop=self.loop)
        except asyncio.CancelledError:
            await self._until_ended(work)
            raise

    async def _until_ended(self, work: Future[Any]) -> None:
        """Return when no thread is at `work` any more: the memory it was given is its owner's again."""
        ended = self.loop.create_future()
        work.add_done_callback(lambda _: self.loop.call_soon_threadsafe(_wake, ended))
        while not ended.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(ended)

    def block(self, blocking: Callable[..., T], *args: Any) -> T:
        self.leave_inline()
        try:
            return blocking(*args)
        finally:
            self.enter_inline(blocks=True)

    def enter_inline(self, *, blocks: bool) -> None:
        """Take the baton for this thread. `blocks`: `offload` may block this very thread."""
        self.baton.acquire()
        self._inline_ident = threading.get_ident()
        self._inline_blocks = blocks

    def leave_inline(self) -> None:
        """Give the baton back."""
        self._inline_ident = None
        self._inline_blocks = False
        self.baton.release()

    def is_inline(self) -> bool:
        """True if this thread drives a call right now (a finalizer may find itself here)."""
        return self._inline_ident == threading.get_ident()

    async def enter_loop(self) -> None:
        """Go on in the loop's thread: sockets are touched nowhere else."""
        if self.is_inline():
            await asyncio.sleep(0)  # Hands the call over (see `half_run`), and takes no turn of the loop.


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
