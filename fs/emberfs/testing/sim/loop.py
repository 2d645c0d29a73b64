"""A seeded event loop with virtual time, and the `Runtime` that services get on top of it.

    result = run(seed, main)        # main(runtime) is a coroutine function

One seed is one schedule: which of the tasks that are ready goes next, how long an offloaded call takes and whether it
suspends at all, what `random_bytes` gives. The same seed gives the same run, which `trace_hash` proves.

Invariants:
  - Time stands still while anything is ready, and jumps to the next timer when nothing is. A step takes no time.
  - Tasks that are ready together run in any order. Plain callbacks keep the order in which they were scheduled among
    themselves, as asyncio promises (messages posted with `call_soon` do not overtake each other).
  - Nothing depends on `id()`, `hash()`, set order, the real clock or the garbage collector.
  - A step that a process began (see `process`) runs only if the process may run: PROCESS in its context names it.
  - A failure carries the seed as a note. Failures are also: a deadlock, a livelock, an exception that nobody looked at,
    and a task still alive when `main` returns.

Does not know: disks, messages or services. Has no I/O and no threads; what asyncio offers for those is not there.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, ContextVar, copy_context
from hashlib import blake2b
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec

T = TypeVar("T")

STEPS_MAX = 2_000_000
"""A run of more steps than this is a livelock (about ten seconds of real time)."""
EVENTS_MAX = 10_000
"""So many events of the trace are hashed together."""
CANCEL_STEPS_MAX = 10_000
"""How long `close` lets cancelled tasks clean up."""
EPOCH_NS = 1_700_000_000 * 10**9
"""The wall clock at virtual time 0."""


class Process(Protocol):
    """What the loop asks of the process that a step belongs to."""

    is_stopped: bool
    """It is killed or paused."""

    def may_run(self, step: Ready) -> bool:
        """May this step run now? If not, the process has kept it or it is dropped."""


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)
"""The process whose code this is; None: the test's own."""


class Deadlock(AssertionError):
    """Nothing is ready, no timer is set, and what is waited for is not done."""


class Livelock(AssertionError):
    """More than STEPS_MAX steps."""


class Unhandled(AssertionError):
    """A callback raised, or an exception of a task was never looked at. The cause is that exception."""


class Handle:
    """A plain callback that waits for its turn. Does of `asyncio.TimerHandle` what is wanted here, much faster."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback: Any, args: tuple[Any, ...], context: Context) -> None:
        self.callback = callback
        self.args = args
        self.context = context

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    done = cancelled
    """As of a future: there is nothing to wait for."""


TaskStep = tuple[Any, tuple[Any, ...], Context, asyncio.Task[Any]]
"""Callback, arguments, context and task of what runs a task on. No handle: asyncio never takes one back."""
Ready = TaskStep | Handle


class SimLoop(asyncio.AbstractEventLoop):
    """Just enough of an event loop for asyncio's tasks, futures, locks and timeouts."""

    def __init__(self, seed: int) -> None:
        self.steps = 0
        self._draw = random.Random(f"schedule {seed}").random
        self._time_s = 0.0
        self._callbacks: deque[Handle] = deque()
        self._task_steps: list[TaskStep] = []
        self._timers: list[tuple[float, int, Handle | asyncio.Future[None]]] = []
        self._timer_count = 0
        self._tasks: dict[asyncio.Task[Any], Process | None] = {}
        """Those that are not done, or were not long ago, and whose they are; oldest first."""
        self._task_count = 0
        self._buried: list[asyncio.Task[Any]] = []
        self._trace = blake2b(digest_size=16)
        self._events: list[str | float] = []
        """Of the trace, and not yet hashed: what happened, and the times."""
        self._unhandled: list[dict[str, Any]] = []
        self._closing = False
        self._closed = False

    # ---- what asyncio calls

    def time(self) -> float:
        return self._time_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        # asyncio numbers its tasks through the whole process; a replay needs names that start again.
        self._task_count += 1
        name = f"{name or coro.__qualname__}/{self._task_count}"
        context = copy_context() if context is None else context
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        if self._task_count % 64 == 0:
            self._tasks = {each: owner for each, owner in self._tasks.items() if not each.done() or each._log_traceback}
        self._tasks[task] = context.get(PROCESS)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Handle | None:
        if self._closed:
            self._refuse()
        context = copy_context() if context is None else context
        owner = getattr(callback, "__self__", None)
        if owner.__class__ is asyncio.Task:
            self._task_steps.append((callback, args, context, owner))
            return None
        handle = Handle(callback, args, context)
        self._callbacks.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Handle:
        return self.set_off(self._time_s + delay, callback, args, copy_context() if context is None else context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Handle:
        return self.set_off(when, callback, args, copy_context() if context is None else context)

    def set_off(self, when: float, callback: Any, args: tuple[Any, ...], context: Context) -> Handle:
        """`call_at` for those who call it often."""
        if self._closed:
            self._refuse()
        handle = Handle(callback, args, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def timer(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done once so much time has passed: what waits for it needs no callback to wake it."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._timer_count += 1
        heapq.heappush(self._timers, (self._time_s + seconds, self._timer_count, future))
        return future

    def fail(self, error: BaseException) -> None:
        """The run fails with this error."""
        self.call_exception_handler({"message": "what must not be raised was", "exception": error})

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closing:
            self._unhandled.append(context)

    def run_until_complete(self, future: Any) -> Any:
        main = asyncio.ensure_future(future, loop=self)
        self._drive(main.done)
        return main.result()

    def close(self) -> None:
        """Cancel what is left, let it clean up, and take no more work. What fails meanwhile is dropped."""
        self._closing = True
        self._unhandled.clear()
        for task in self.tasks():
            task.cancel()
        self.steps = 0
        try:
            self._drive(lambda: self.steps >= CANCEL_STEPS_MAX or not self.tasks())
        except (Deadlock, Livelock):
            pass  # The run is over, and it is on its way to say why.
        self.failures()
        # A paused process did not even run its cancellations.
        for task in [*self._buried, *self.tasks()]:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            try:
                task.get_coro().close()
            except Exception:
                pass  # Its clean-up wanted something of a world that is over.
        self._buried.clear()
        self._closed = True

    # ---- what a test asks

    def bury(self, process: Process) -> None:
        """It was killed: its tasks are never run again, and nobody wants to know how they ended."""
        for task in [each for each, owner in self._tasks.items() if owner is process]:
            del self._tasks[task]
            task._log_traceback = False
            if not task.done():
                self._buried.append(task)

    def ready(self, step: Ready) -> None:
        """Let a step that a process has kept be one of those that may run next."""
        if isinstance(step, Handle):
            self._callbacks.append(step)
        else:
            self._task_steps.append(step)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks that are not done, oldest first."""
        return [task for task in self._tasks if not task.done()]

    def pending(self) -> list[str]:
        """Where each task that is not done waits: one line each."""
        return [f"{task.get_name()} at {_where(task.get_coro())}" for task in self.tasks()]

    def failures(self) -> list[BaseException]:
        """The exceptions of ended tasks that nobody has looked at. Now somebody has."""
        failed = [task for task in self._tasks if task.done() and task._log_traceback]
        return [error for task in failed if (error := task.exception())]

    def settle(self) -> None:
        """Run until nothing is ready. Time stands still."""
        self._drive(lambda: not self._task_steps and not self._callbacks)

    def note(self, event: str) -> None:
        """Let `event` count in the trace: a test's own witness that two runs are the same."""
        self._events.append(event)
        if len(self._events) > EVENTS_MAX:
            self._hash_events()

    def trace_hash(self) -> str:
        """A hash of the name and time of every step so far."""
        self._hash_events()
        return self._trace.hexdigest()

    def _hash_events(self) -> None:
        events, self._events = self._events, []
        if events:
            self._trace.update(msgspec.msgpack.encode(events))

    # ---- the schedule

    def _refuse(self) -> NoReturn:
        raise RuntimeError("the simulation is over")

    def _drive(self, is_over: Callable[[], bool]) -> None:
        """Run one callback after the other: a ready task, or the oldest plain callback. One loop, since it is the
        hottest one."""
        assert asyncio._get_running_loop() is None, "a simulation inside an event loop"
        asyncio._set_running_loop(self)
        tasks, callbacks, draw = self._task_steps, self._callbacks, self._draw
        try:
            while not is_over():
                count = len(tasks)
                choices = count + 1 if callbacks else count
                if not choices:
                    self._jump()
                    continue
                choice = int(draw() * choices) if choices > 1 else 0
                step: Ready
                if choice < count:
                    step, tasks[choice] = tasks[choice], tasks[-1]
                    tasks.pop()
                    callback, args, context, task = step
                    name = task.get_name()
                else:
                    step = callbacks.popleft()
                    callback, args, context = step.callback, step.args, step.context
                    if callback is None:
                        continue
                    name = _name(callback)
                process = context.get(PROCESS)
                if process is not None and process.is_stopped and not process.may_run(step):
                    continue
                self.steps += 1
                self._events.append(name)
                try:
                    context.run(callback, *args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"{name} raised", "exception": error})
                if self._unhandled:
                    raise Unhandled(self._unhandled[0]["message"]) from self._unhandled[0].get("exception")
                if self.steps >= STEPS_MAX:
                    raise Livelock("\n  ".join([f"no end after {STEPS_MAX} steps:", *self.pending()]))
        finally:
            asyncio._set_running_loop(None)

    def _jump(self) -> None:
        """Nothing is ready: move time to the next timer, and make ready all that are due then."""
        timers = self._timers
        while timers and timers[0][2].done():
            heapq.heappop(timers)
        if not timers:
            raise Deadlock("\n  ".join(["every task waits for another:", *self.pending()]))
        if timers[0][0] > self._time_s:
            self._time_s = timers[0][0]
            self._events.append(self._time_s)  # Steps have no time of their own in the trace.
            if len(self._events) > EVENTS_MAX:
                self._hash_events()
        while timers and timers[0][0] <= self._time_s:
            due = heapq.heappop(timers)[2]
            if isinstance(due, Handle):
                self._callbacks.append(due)
            elif not due.done():
                due.set_result(None)


class SimRuntime:
    """`emberfs.runtime.Runtime` on a `SimLoop`."""

    def __init__(self, seed: int, *, inline_probability: float = 0.25) -> None:
        """`inline_probability`: how often `offload` returns without suspending, as it does in an inline call."""
        self.seed = seed
        self.loop = SimLoop(seed)  # type: ignore[abstract]
        self._inline_probability = inline_probability
        self._delays = self.random("delays")
        self._ids = self.random("ids")

    def run(self, main: Callable[[SimRuntime], Coroutine[Any, Any, T]]) -> T:
        """Run `main(self)` to its end and return its result. Once per runtime."""
        loop = self.loop
        try:
            result: T = loop.run_until_complete(main(self))
            loop.settle()
            for failure in loop.failures():
                raise Unhandled("a task failed and nobody looked") from failure
            assert not loop.tasks(), "\n  ".join(["main returned and left tasks alive:", *loop.pending()])
            return result
        except BaseException as error:
            for failure in loop.failures():
                error.add_note(f"before that a task failed and nobody looked: {failure!r}")
            error.add_note(
                f"seed {self.seed}, step {loop.steps}, virtual time {loop.time()} s: pytest --seed={self.seed}"
            )
            raise
        finally:
            loop.close()

    def random(self, purpose: str) -> random.Random:
        """A seeded generator of its own for each purpose, so that one more draw here moves nothing there."""
        return random.Random(f"{purpose} {self.seed}")

    def note(self, event: str) -> None:
        """Let `event` count in the trace."""
        self.loop.note(event)

    def trace_hash(self) -> str:
        """Equal for two runs of the same code with the same seed."""
        return self.loop.trace_hash()

    async def cancel_others(self) -> None:
        """Cancel every task but the caller's and wait until they ended: the process is killed."""
        caller = asyncio.current_task()
        others = [task for task in self.loop.tasks() if task is not caller]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # ---- emberfs.runtime.Runtime

    def now_s(self) -> float:
        return self.loop.time()

    def wall_ns(self) -> int:
        return EPOCH_NS + int(self.loop.time() * 1e9)

    def random_bytes(self, count: int) -> bytes:
        return self._ids.randbytes(count)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self.loop.create_task(work, name=name)

    def future(self) -> asyncio.Future[Any]:
        return self.loop.create_future()

    def timer(self, seconds: float) -> asyncio.Future[None]:
        return self.loop.timer(seconds)

    async def sleep(self, seconds: float) -> None:
        await self.loop.timer(seconds)

    async def offload(self, blocking: Callable[..., T], *args: Any) -> T:
        return (await self.offload_steps([lambda: blocking(*args)]))[0]

    async def offload_read(self, blocking: Callable[..., T], *args: Any) -> T:
        return await self.offload(blocking, *args)

    async def offload_steps(self, steps: Sequence[Callable[[], T]]) -> list[T]:
        """`offload` of several calls in a row by one worker: other things happen between them.

        A worker is not stopped by the cancellation of who waits for it: what has begun goes on to its end.
        """
        if not steps or self._delays.random() < self._inline_probability:
            return [step() for step in steps]
        future: asyncio.Future[list[T]] = self.loop.create_future()
        self.loop.call_later(self._delay_s(), self._work, list(steps), [], future)
        return await future

    def may_block(self) -> bool:
        return False

    def block(self, blocking: Callable[..., T], *args: Any) -> T:
        raise AssertionError("nobody may block here")

    def _work(self, steps: list[Callable[[], T]], results: list[T], future: asyncio.Future[list[T]]) -> None:
        if not results and future.cancelled() and self._delays.random() < 0.5:
            return  # Cancelled while it still stood in the queue of the workers.
        try:
            results.append(steps[len(results)]())
        except Exception as error:
            self.loop.call_later(self._delay_s(), _fail, future, error)
        else:
            if len(results) < len(steps):
                self.loop.call_later(self._delay_s(), self._work, steps, results, future)
            else:
                self.loop.call_later(self._delay_s(), _succeed, future, results)

    def _delay_s(self) -> float:
        """From 5 us to 5 ms, each order of magnitude as likely: the long ones let everything else overtake."""
        return float(5e-6 * 1000 ** self._delays.random())


def run(seed: int, main: Callable[[SimRuntime], Coroutine[Any, Any, T]]) -> T:
    """Run `main(runtime)` under the schedule of `seed` and return its result."""
    return SimRuntime(seed).run(main)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _name(callback: Any) -> str:
    """What a callback is called, without any address in memory."""
    try:
        return callback.__qualname__  # type: ignore[no-any-return]
    except AttributeError:
        pass
    callback = getattr(callback, "func", callback)  # functools.partial
    return str(getattr(callback, "__qualname__", type(callback).__qualname__))


def _where(coroutine: Any) -> str:
    """The innermost line at which a suspended coroutine waits."""
    place = "its start"
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        place = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        coroutine = coroutine.cr_await
    return place
