"""Waiting for work that something else may cut short, with the runtime's futures and tasks only.

Does not know: what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from .errors import UpdateUnknown
from .half_run import HalfRun
from .messages import Message
from .runtime import Runtime
from .transport.types import Connection

T = TypeVar("T")


def finish(future: asyncio.Future[None]) -> None:
    """Let those who wait for `future` go on; twice is fine."""
    if not future.done():
        future.set_result(None)


def look(ended: asyncio.Task[Any]) -> None:
    """Its error is nobody's."""
    if not ended.cancelled():
        ended.exception()


def unwatched(task: asyncio.Task[Any]) -> None:
    """Whoever waits for `task` may go away: then its error is nobody's."""
    task.add_done_callback(look)


def drop(task: asyncio.Task[Any]) -> None:
    """Stop `task`: nobody waits for it any more."""
    if task.done():
        look(task)
    else:
        unwatched(task)
        task.cancel()


async def first_of(runtime: Runtime, *futures: asyncio.Future[Any]) -> None:
    """Return once one of `futures` is done, however it ended."""
    one = runtime.future()

    def wake(_: asyncio.Future[Any]) -> None:
        finish(one)

    for future in futures:
        future.add_done_callback(wake)
    try:
        await one
    finally:
        for future in futures:
            future.remove_done_callback(wake)


async def all_of(runtime: Runtime, works: Iterable[Coroutine[Any, Any, T]], name: str) -> list[T | Exception]:
    """Run `works` side by side: the result of each, or the error it raised.

    Cancelled, it ends when all of them have: what they were given is its owner's again.
    """
    pending: list[Coroutine[Any, Any, T] | asyncio.Task[T]] = list(works)
    tasks = [runtime.spawn(work, name) for work in pending[1:]]  # type: ignore[arg-type]
    pending[1:] = tasks
    try:
        return [await _outcome(work) for work in pending]
    except BaseException:
        await stop(runtime, *tasks)
        raise


async def all_begun(runtime: Runtime, works: Iterable[Coroutine[Any, Any, T]], name: str) -> list[T | Exception]:
    """`all_of` for works that seldom wait: each goes as far as it can before the next one begins, and only those that
    wait then cost a task."""
    begun: list[asyncio.Task[T] | T | Exception] = []
    try:
        for work in works:
            try:
                begun.append(runtime.spawn(HalfRun(work, work.send(None)), name))
            except StopIteration as end:
                begun.append(end.value)
            except Exception as error:
                begun.append(error)
        return [await _outcome(one) if isinstance(one, asyncio.Task) else one for one in begun]
    except BaseException:
        await stop(runtime, *(one for one in begun if isinstance(one, asyncio.Task)))
        raise


async def stop(runtime: Runtime, *tasks: asyncio.Task[Any]) -> None:
    """Stop `tasks`, and return when they have ended, however often we are cancelled meanwhile."""
    cancelled = None
    for task in tasks:
        drop(task)
    for task in tasks:
        while not task.done():
            try:
                await first_of(runtime, task)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


async def _outcome(work: Awaitable[T]) -> T | Exception:
    """The result, or the error, which knows none of the frames of those who keep it."""
    try:
        return await work
    except Exception as error:
        return error
    finally:
        del work


async def until(runtime: Runtime, work: Coroutine[Any, Any, T], stop: asyncio.Future[None], *, name: str) -> T:
    """The result of `work`; once `stop` is done before it, `work` is cancelled. Raises UpdateUnknown then."""
    task: asyncio.Task[T] = runtime.spawn(work, name)
    try:
        await first_of(runtime, task, stop)
        if not task.done():
            raise UpdateUnknown("the chain changed while an update was on its way")
        return task.result()
    finally:
        drop(task)
        # An error of the task knows this frame: in a circle they would keep what was sent until garbage is looked for.
        del task


async def pause(runtime: Runtime, seconds: float, *stops: asyncio.Future[None]) -> None:
    """Sleep, but not longer than until one of `stops` is done."""
    timer = runtime.timer(seconds)

    def end(_: asyncio.Future[None]) -> None:
        finish(timer)

    for stop in stops:
        stop.add_done_callback(end)
    try:
        await timer
    finally:
        for stop in stops:
            stop.remove_done_callback(end)
        timer.cancel()


async def call(connection: Connection, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
    """A call as `Runtime.spawn` takes it: nothing of it exists before it runs."""
    return await connection.call(request, buffers)
