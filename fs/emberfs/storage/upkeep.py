"""What a target does now and then: purge old tombstones, and drop request rows of clients that are gone.

Does not know: how often.
"""

from __future__ import annotations

from ..engine import ChunkEngine
from ..locks import KeyedLocks
from ..routing import TargetState
from .replica import Replica
from .sessions import Departed, Sessions

PAGE_ROWS = 1000


class Upkeep:
    """Of one replica. Call `purge` every `tombstone_s`: what one call has seen the next one purges."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._seen: dict[bytes, int] = {}
        self._departed = Departed()

    async def purge(self) -> None:
        """Purge the tombstones that the last call saw, if every replica has them."""
        engine, locks = self._replica.engine, self._replica.locks
        if not self._is_all_serving():
            self._seen.clear()
            return
        seen: dict[bytes, int] = {}
        after = b""
        while rows := await engine.tombstones(after, PAGE_ROWS):
            after = rows[-1][0]
            for chunk, version in rows:
                if self._seen.get(chunk) == version:
                    await self._purge_one(engine, locks, chunk)
                else:
                    seen[chunk] = version
        self._seen = seen

    async def _purge_one(self, engine: ChunkEngine, locks: KeyedLocks, chunk: bytes) -> None:
        async with locks.of(chunk):
            if self._is_all_serving():
                await engine.purge([chunk])

    def _is_all_serving(self) -> bool:
        view = self._replica.view
        return (
            view is not None
            and len(view.chain.targets) >= view.chain.replicas
            and all(each.state == TargetState.SERVING for each in view.chain.targets)
        )

    async def drop_requests(self, sessions: Sessions) -> None:
        """Drop the rows of clients that had no session at the last call either, as the manager has said since."""
        engine = self._replica.engine
        clients: dict[bytes, None] = {}
        after = None
        while rows := await engine.request_rows(after, PAGE_ROWS):
            after = rows[-1]
            clients.update((row.client, None) for row in rows)
        await engine.drop_requests(self._departed.look(clients, sessions))
