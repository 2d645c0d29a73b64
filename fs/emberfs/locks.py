"""A lock per key, for coroutines of one runtime: FIFO, and free keys cost no memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from .runtime import Runtime


class KeyedLocks:
    """Locks many keys at once, in sorted order, so that two batches never wait for each other in a circle."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._held: dict[bytes, deque[asyncio.Future[None]]] = {}

    async def acquire(self, keys: Sequence[bytes]) -> None:
        """Wait until all of `keys` (distinct) are ours."""
        for key in sorted(keys):
            waiters = self._held.get(key)
            if waiters is None:
                self._held[key] = deque()
            else:
                turn = self._runtime.future()
                waiters.append(turn)
                await turn

    def release(self, keys: Sequence[bytes]) -> None:
        """Hand each key to its next waiter."""
        for key in keys:
            waiters = self._held[key]
            if waiters:
                waiters.popleft().set_result(None)
            else:
                del self._held[key]
