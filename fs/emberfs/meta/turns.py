"""Turns: at most one holder per key, the others wait in order. For work that goes on across awaits outside the KV.

Made of the runtime's futures, because asyncio's own locks want to be inside a running loop and a service call may be
driven by a caller's thread. Does not know: what is being guarded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from ..runtime import Runtime


class Turns:
    """`async with turns.of(key): ...`"""

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
