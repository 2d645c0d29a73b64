"""A lock per key, for coroutines of one runtime: waiters get it in their order, and free keys cost no memory.

Made of the runtime's futures, because asyncio's own locks want to be inside a running loop and a service call may be
driven by a caller's thread. Does not know: what is being guarded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager

from .runtime import Runtime


class KeyedLocks:
    """`async with locks.of(key): ...`, or `acquire`/`release` of many keys at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def of(self, key: Hashable) -> AsyncIterator[None]:
        """Hold `key` while inside."""
        await self._take(key)
        try:
            yield
        finally:
            self._pass_on(key)

    async def acquire(self, keys: Sequence[bytes]) -> None:
        """Wait until all of `keys` (distinct) are ours. Taken in sorted order, so no two batches wait in a circle."""
        taken: list[bytes] = []
        try:
            for key in sorted(keys):
                await self._take(key)
                taken.append(key)
        except BaseException:
            self.release(taken)
            raise

    async def drain(self) -> None:
        """Return once all who hold a key now, or wait for one, have let go. Later ones are not waited for."""
        for key in list(self._waiting):
            async with self.of(key):
                pass

    def release(self, keys: Sequence[bytes]) -> None:
        """Hand each key to its next waiter."""
        for key in keys:
            self._pass_on(key)

    async def _take(self, key: Hashable) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = deque()
            return
        turn = self._runtime.future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled in the same step in which the turn came: hand it to the next one.
            if turn.done() and not turn.cancelled():
                self._pass_on(key)
            raise

    def _pass_on(self, key: Hashable) -> None:
        waiting = self._waiting[key]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[key]
