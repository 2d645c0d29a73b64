"""The door between a caller's thread and the services: how a call on a local store costs no thread switch.

`Portal.run` drives the coroutine of a call in the caller's own thread, under the runtime's baton. Most calls on a
local store never suspend (the page cache is warm, the KV is mapped memory) and end right there. One that does suspend
is handed over, half run, to the loop thread, and the caller waits (`run`) or awaits (`run_async`).

Invariants:
  - Works inside any running event loop and from any thread: it never touches the caller's loop.
  - An interrupt (Ctrl-C) never lands in service code or while the baton changes hands: the main thread holds SIGINT
    back until the call has ended (1 us), and delivers it on the way out.
  - A call that began is never cancelled half-way: an interrupted or cancelled caller leaves once it ended, so that
    nothing writes to the caller's buffers afterwards and no commit is left in doubt. Calls on a local store are short.
  - Once `drain` was called no call begins, and it returns when every call that had begun has ended.
  - While it is paused no call begins either: those that come wait, and begin at `resume`. What they call may be
    exchanged meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .errors import StoreClosed, Unavailable
from .half_run import HalfRun
from .ledger import Ledger
from .runtime import AsyncioRuntime
from .stopwatch import Stopwatch, current

T = TypeVar("T")


class Portal:
    """Runs coroutines of one `AsyncioRuntime` from outside its loop."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self.ledger = Ledger(runtime.now_s)
        """Of the calls that have ended."""
        self._now_s = runtime.now_s
        self._runtime = runtime
        self._outcomes = _Outcomes()
        self._started = _Started(runtime, self._start_all)
        self._running = 0
        """Calls that have begun and not ended. This and all below are guarded by the baton."""
        self._is_barred = False
        """No call begins: closed, or paused."""
        self._is_closed = False
        self._resumed: asyncio.Future[None] | None = None
        """Done at the end of a pause."""
        self._on_quiet: Callable[[], object] | None = None
        """Called when the last call has ended."""

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run `call` to its end and return its result. Blocks the calling thread only. Raises StoreClosed."""
        held = hold_interrupts()
        ledger = self.ledger
        began_s, watch = self._now_s(), ledger.watch() if ledger.is_close else None
        try:
            if watch is not None:
                current.set(watch)
            done, value = self._drive(call, blocks=True, hand_over=_Wait)
            return value if done else value.result()  # type: ignore[no-any-return]
        except BaseException:
            ledger.note_failure(call.cr_code)  # type: ignore[attr-defined]
            raise
        finally:
            ledger.note(call.cr_code, self._now_s() - began_s)  # type: ignore[attr-defined]
            if watch is not None:
                ledger.note_waits(call.cr_code, watch)  # type: ignore[attr-defined]
                current.set(None)
            if held is not None:
                release_interrupts(held)

    def drain(self) -> None:
        """Take no more calls but `run_last`, and wait for those that have begun. Those held back are refused."""
        drained = threading.Event()
        self._runtime.enter_inline(blocks=False)
        self._is_barred = self._is_closed = True
        self.resume()
        if self._running:
            self._on_quiet = drained.set
        else:
            drained.set()
        self._runtime.leave_inline()
        drained.wait()

    async def pause(self, *, timeout_s: float) -> None:
        """Hold new calls back until `resume`, and return when those that have begun have ended. In the store's loop.

        Raises Unavailable, and nothing is paused any more, if one goes on for `timeout_s`.
        """
        self._is_barred = True
        self._resumed = self._runtime.future()
        if not self._running:
            return
        quiet = self._runtime.future()
        self._on_quiet = functools.partial(_set_done, quiet)
        await asyncio.wait([quiet], timeout=timeout_s)
        if self._running:
            self.resume()
            raise Unavailable(f"a call of it goes on for more than {timeout_s:g} s")

    def resume(self) -> None:
        """End a pause, if there is one."""
        resumed, self._resumed = self._resumed, None
        self._is_barred = self._is_closed
        if not self._is_closed:
            self._on_quiet = None
        if resumed is not None:
            resumed.set_result(None)

    def run_last(self, call: Coroutine[Any, Any, T]) -> T:
        """`run` for whoever closes the services, after `drain`."""
        done, value = self._drive(call, blocks=True, hand_over=_Wait, is_last=True)
        return value if done else value.result()  # type: ignore[no-any-return]

    async def run_async(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        """Run `call` and return its result, blocking neither the caller's event loop nor its thread for I/O.

        A read is driven inline as far as it goes. A mutation waits for a disk anyway: it goes to the store's loop
        with all others that the caller's loop starts in the same round, so that they share one wake-up and one commit.
        """
        ledger = self.ledger
        began_s, watch = self._now_s(), ledger.watch() if ledger.is_close else None
        try:
            return await self._run_async(call, watch, mutates=mutates)
        except BaseException:
            ledger.note_failure(call.cr_code)  # type: ignore[attr-defined]
            raise
        finally:
            ledger.note(call.cr_code, self._now_s() - began_s)  # type: ignore[attr-defined]
            if watch is not None:
                ledger.note_waits(call.cr_code, watch)  # type: ignore[attr-defined]

    async def _run_async(self, call: Coroutine[Any, Any, T], watch: Stopwatch | None, *, mutates: bool) -> T:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        if watch is not None:
            call = _watched(call, watch)
        if mutates:
            self._started.add(loop, (call, waiter))
        else:
            deliver = functools.partial(self._outcomes.deliver, loop, waiter)
            held = hold_interrupts()
            try:
                done, value = self._drive(call, blocks=False, hand_over=lambda task: task.add_done_callback(deliver))
            finally:
                if watch is not None:
                    current.set(None)
                if held is not None:
                    release_interrupts(held)
            if done:
                return value  # type: ignore[no-any-return]
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            while not waiter.done():
                with contextlib.suppress(asyncio.CancelledError):  # It may be cancelled more than once.
                    await asyncio.wait([waiter])
            raise

    def begin(self, call: Coroutine[Any, Any, T], done: Callable[[T | None, Exception | None], None]) -> None:
        """Run `call` as far as it goes and return. `done` is told its result or error, here or in the loop's thread.

        From anywhere, the loop's thread included.
        """
        told = functools.partial(_tell, done)
        if threading.get_ident() == self._runtime.loop.thread_ident:
            self._start(call, "begun").add_done_callback(told)
            return
        held = hold_interrupts()
        outcome: tuple[Any, Exception | None] | None = None
        try:
            try:
                has_ended, value = self._drive(call, blocks=False, hand_over=lambda task: task.add_done_callback(told))
                outcome = (value, None) if has_ended else None
            except Exception as error:
                outcome = (None, error)
            if outcome is not None:
                done(*outcome)
        finally:
            if held is not None:
                release_interrupts(held)

    def _start_all(self, loop: asyncio.AbstractEventLoop, calls: list[Any]) -> None:
        """Start calls of the caller's `loop`. Called in the store's thread."""
        for call, waiter in calls:
            task = self._start(call, "mutation")
            task.add_done_callback(functools.partial(self._outcomes.deliver, loop, waiter))

    def post(self, call: Coroutine[Any, Any, Any]) -> None:
        """Start `call` on the loop and return at once. For finalizers, which may run inside an inline call."""
        self._runtime.loop.call_soon_threadsafe(self._start_posted, call)

    def _start_posted(self, call: Coroutine[Any, Any, Any]) -> None:
        task = self._start(call, "posted")
        # Nobody waits for it: its error is logged by the call itself, not by asyncio at exit.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _start(self, call: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a call in the loop, as soon as calls may begin."""
        if self._is_barred:
            return self._runtime.spawn(self._held_back(call), name)
        self._running += 1
        task = self._runtime.spawn(call, name)
        task.add_done_callback(self._ended)
        return task

    async def _held_back(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call that came while none may begin."""
        while self._resumed is not None:
            await self._resumed
        if self._is_closed:
            call.close()
            raise StoreClosed("the store is closed")
        self._running += 1
        try:
            return await call
        finally:
            self._ended()

    def _ended(self, _: object = None) -> None:
        self._running -= 1
        if not self._running and self._on_quiet is not None:
            self._on_quiet()

    def _drive(
        self,
        call: Coroutine[Any, Any, Any],
        *,
        blocks: bool,
        hand_over: Callable[[asyncio.Task[Any]], Any],
        is_last: bool = False,
    ) -> tuple[bool, Any]:
        """Run `call` until it ends or suspends: (True, its result), or (False, what `hand_over` made of its task).

        The task cannot run before we have given the baton back.
        """
        runtime = self._runtime
        assert not runtime.is_inline(), "a service called the blocking API of its own store"
        runtime.enter_inline(blocks=blocks)
        self._running += 1
        has_ended = True
        try:
            if self._is_barred and not is_last:
                if self._is_closed:
                    call.close()
                    raise StoreClosed("the store is closed")
                return False, hand_over(runtime.spawn(self._held_back(call), "held-back"))
            task = runtime.spawn(HalfRun(call, call.send(None)), "handed-over")
            task.add_done_callback(self._ended)
            has_ended = False
            return False, hand_over(task)
        except StopIteration as stop:
            return True, stop.value
        finally:
            if has_ended:
                self._ended()
            runtime.leave_inline()


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Wait:
    """A thread's wait for a task that goes on in the loop."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._ended = threading.Event()
        task.add_done_callback(lambda _: self._ended.set())

    def result(self) -> Any:
        """The task's result, once it has ended; an interrupted caller leaves no sooner, however often interrupted."""
        interrupt: BaseException | None = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
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
        calls = self._calls.pop(loop)
        try:
            self._runtime.loop.call_soon_threadsafe(self._start_all, loop, calls)
        except RuntimeError:  # The store was closed before we came.
            for call, waiter in calls:
                call.close()
                waiter.set_exception(StoreClosed("the store is closed"))


async def _watched(call: Coroutine[Any, Any, T], watch: Stopwatch) -> T:
    """Run `call` with its stopwatch, in whichever task."""
    current.set(watch)
    return await call


def _tell(done: Callable[[T | None, Exception | None], None], task: asyncio.Task[T]) -> None:
    error = Unavailable("the call was cancelled") if task.cancelled() else task.exception()
    if error is None:
        done(task.result(), None)
    else:
        assert isinstance(error, Exception)
        done(None, error)


def _copy_outcome(task: asyncio.Task[T], waiter: asyncio.Future[T]) -> None:
    if waiter.done():
        return
    if task.cancelled():
        waiter.cancel()
    elif error := task.exception():
        waiter.set_exception(error)
    else:
        waiter.set_result(task.result())


# What is under `signal.signal` and `signal.getsignal`: half a microsecond a call, where those convert enums for four.
_raw_signal = importlib.import_module("_signal")
_set_handler, _get_handler = _raw_signal.signal, _raw_signal.getsignal
_SIGINT = int(signal.SIGINT)


class _HeldInterrupts:
    """What to do about SIGINT once the main thread may be interrupted again."""

    __slots__ = ("came", "previous")

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.came = False

    def __call__(self, number: int, frame: Any) -> None:
        self.came = True


def hold_interrupts() -> _HeldInterrupts | None:
    """Hold SIGINT back from now on. None where it cannot come (another thread) or is not Python's to handle."""
    if threading.get_ident() != threading.main_thread().ident:
        return None
    previous = _get_handler(_SIGINT)
    if previous is None:
        return None
    held = _HeldInterrupts(previous)
    _set_handler(_SIGINT, held)
    return held


def release_interrupts(held: _HeldInterrupts) -> None:
    """What came meanwhile is raised now."""
    _set_handler(_SIGINT, held.previous)
    if held.came:
        signal.raise_signal(signal.SIGINT)
