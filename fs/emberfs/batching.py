"""Group commit: many callers, one flush in the air, everyone who came meanwhile shares the next.

The first caller to find no flush running becomes the leader and flushes in its own call (no thread or task switch for
a lone writer). What is queued then goes to a task, so that no caller works for others for ever; a thread that waits
anyway serves one batch of others before that. In a server's loop it would only keep the leader's own caller waiting:
all that one client has in the air would end at once, and the disk be idle until more comes.

Relies on callers that are not cancelled while they wait (see `portal`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from .errors import UpdateUnknown
from .runtime import Runtime
from .stopwatch import current

Item = TypeVar("Item")


class GroupCommit(Generic[Item]):
    """Hands lists of submitted items to `flush`, one at a time. An error of `flush` goes to everyone in the list.

    What is no `Exception` (an interrupt) goes on to whoever led the flush; the others in the list get UpdateUnknown.

    The items of a list weigh at most `weight_max` together, unless one alone does.
    """

    def __init__(
        self,
        runtime: Runtime,
        flush: Callable[[list[Item]], Awaitable[None]],
        *,
        weigh: Callable[[Item], int],
        weight_max: int,
    ) -> None:
        self._runtime = runtime
        self._flush = flush
        self._weigh = weigh
        self._weight_max = weight_max
        self._queue: list[tuple[Item, asyncio.Future[None]]] = []
        self._flushing = False
        self._drained: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> None:
        """Return once a flush that contains `item` has succeeded. On the stopwatch it is time of the disk."""
        future = self._runtime.future()
        self._queue.append((item, future))
        watch = current.get()
        if watch is not None:
            watch.begin_disk()
        try:
            if not self._flushing:
                self._flushing = True
                await self._lead(rounds=2 if self._runtime.may_block() else 1)
            await future
        finally:
            if watch is not None:
                watch.end_disk()

    async def _lead(self, *, rounds: int | None) -> None:
        """Flush until the queue is empty; after `rounds` lists leave the rest to a task."""
        try:
            while self._queue and rounds != 0:
                await self._flush_batch(self._take())
                rounds = None if rounds is None else rounds - 1
        finally:
            if self._queue:
                self._task = self._runtime.spawn(self._lead(rounds=None), "group-commit")
            else:
                self._flushing = False
                for drained in self._drained:
                    drained.set_result(None)
                self._drained.clear()

    def _take(self) -> list[tuple[Item, asyncio.Future[None]]]:
        """The head of the queue: what one flush may carry."""
        count, weight = 1, self._weigh(self._queue[0][0])
        while count < len(self._queue) and (weight := weight + self._weigh(self._queue[count][0])) <= self._weight_max:
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    async def _flush_batch(self, batch: list[tuple[Item, asyncio.Future[None]]]) -> None:
        try:
            await self._flush([item for item, _ in batch])
        except Exception as error:
            _fail_all(batch, error)
        except BaseException:
            _fail_all(batch, UpdateUnknown("a flush was interrupted: it may or may not have happened"))
            raise
        else:
            for _, future in batch:
                future.set_result(None)

    async def drain(self) -> None:
        """Wait until nothing is queued or in the air."""
        while self._flushing:
            drained = self._runtime.future()
            self._drained.append(drained)
            await drained


def _fail_all(batch: list[tuple[Item, asyncio.Future[None]]], error: Exception) -> None:
    for _, future in batch:
        future.set_exception(error)
        future.exception()  # Marks it as seen, for a waiter that is gone.
