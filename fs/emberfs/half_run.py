"""A coroutine that has run up to its first suspension outside any task, as a task takes it.

Most calls end without a suspension, and then cost no task and no turn of the event loop: `call.send(None)` raises
StopIteration with the result. What it returns otherwise is what the call waits for, and goes here:

    task = runtime.spawn(HalfRun(call, call.send(None)), name)

Invariants:
  - A task that is cancelled before its first step cancels the call, which has begun.
  - A call that only wanted to let others run (it waits for nothing) goes on in the task's first step.

Does not know: whose call it is.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class HalfRun(Coroutine[Any, Any, T]):
    """`call`, which waits for `awaited`."""

    __slots__ = ("_awaited", "_call")

    def __init__(self, call: Coroutine[Any, Any, T], awaited: Any) -> None:
        self._call = call
        self._awaited = awaited
        if awaited is not None:
            # A future is marked while it is on its way to the task that will wait for it. Ours does not begin at once,
            # and others may want to wait for the same one meanwhile.
            awaited._asyncio_future_blocking = False

    def send(self, value: Any) -> Any:
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return self._call.send(value)
        awaited._asyncio_future_blocking = True
        return awaited

    def throw(self, *error: Any) -> Any:
        self._awaited = None
        return self._call.throw(*error)

    def close(self) -> None:
        self._call.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise NotImplementedError("it is a task's")
