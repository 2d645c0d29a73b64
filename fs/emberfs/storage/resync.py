"""Resync: the last serving target brings its syncing successor what it missed.

Both list their rows in chunk order; what differs is sent, under the chunk's lock, no faster than the node's `pace`.
Writes go on meanwhile: they reach the successor as replacements. If the chain changes, a new view begins again and
finds most of it done.

Does not know: who decides that a target is to be synced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ..engine import NO_REQUEST
from ..errors import EmberError, UpdateUnknown
from ..messages import (
    ChunkVersion,
    ChunkVersions,
    Drop,
    Install,
    InstallRequests,
    ListVersions,
    Message,
    SyncDone,
)
from ..runtime import Runtime
from ..waiting import first_of, pause
from .config import StorageConfig
from .forward import Link
from .pace import Paces
from .view import View

if TYPE_CHECKING:
    from .replica import Replica

PAGE_ROWS = 1000
AGAIN_S = 5.0
"""A successor that has everything and is still not serving after this forgot it in a restart: it is told again."""


class ResyncProgress(msgspec.Struct):
    """How far the resync of a chain is; for status."""

    chain: int
    successor: bytes
    is_migration: bool = False
    """The chain has all that it wants: see `pace`."""
    compared: int = 0
    """Chunks, in the present pass."""
    sent: int = 0
    """Chunks installed or dropped, in all passes."""
    sent_bytes: int = 0
    is_done: bool = False
    problem: str = ""
    """Why the last pass ended early."""


class Resync:
    """Drives the resync of one chain, while its target is the tail and the chain has a syncing one."""

    def __init__(self, replica: Replica, runtime: Runtime, *, paces: Paces, config: StorageConfig) -> None:
        self.progress: ResyncProgress | None = None
        self._replica = replica
        self._runtime = runtime
        self._paces = paces
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, view: View) -> None:
        """The chain has changed to `view`."""
        self.progress = None
        self._tasks = [task for task in self._tasks if not task.done()]
        if view.is_tail and view.successor is not None and view.link is not None:
            is_migration = not view.chain.is_short
            progress = self.progress = ResyncProgress(view.chain.id, view.successor.target, is_migration=is_migration)
            self._tasks.append(self._runtime.spawn(self._drive(view, view.link, progress), "resync"))

    async def close(self) -> None:
        """Return once nothing runs. The view's `changed` is done already."""
        for task in self._tasks:
            await task

    async def _drive(self, view: View, link: Link, progress: ResyncProgress) -> None:
        await first_of(self._runtime, view.settled, view.changed)
        # An update that began when we were alone is published without being sent: it must be there to be compared.
        await self._replica.locks.drain()
        pace = self._paces.of(view.chain)
        while not view.changed.done():
            if not await pace.begin(view.changed):
                return
            try:
                progress.compared = 0
                while not await self._compare(view, link, progress):
                    await pause(self._runtime, self._config.retry_s, view.changed)
                await self._finish(view, link)
                progress.is_done, progress.problem = True, ""
            except EmberError as error:
                progress.is_done, progress.problem = False, str(error)
            finally:
                pace.end()
            again_s = AGAIN_S if progress.is_done else self._config.retry_s
            await pause(self._runtime, again_s, view.changed)

    async def _compare(self, view: View, link: Link, progress: ResyncProgress) -> bool:
        """One pass over all rows of both. False: a chunk was in the middle of an update, look again."""
        chain, version, engine = view.chain.id, view.version, self._replica.engine
        after, is_complete = b"", True
        while True:
            reply = await link.ask(ListVersions(chain, version, after, PAGE_ROWS))
            assert isinstance(reply, ChunkVersions)
            own_rows = await engine.versions(after, PAGE_ROWS)
            ends = [rows[-1].chunk for rows in (reply.chunks, own_rows) if len(rows) == PAGE_ROWS]
            end = min(ends, default=None)
            theirs = {row.chunk: row for row in reply.chunks if end is None or row.chunk <= end}
            ours = {row.chunk: row for row in own_rows if end is None or row.chunk <= end}
            for chunk in sorted(theirs.keys() | ours.keys()):
                progress.compared += 1
                if not _is_same(ours.get(chunk), theirs.get(chunk)):
                    is_complete = await self._bring(view, link, chunk, progress) and is_complete
            if end is None:
                return is_complete
            after = end

    async def _bring(self, view: View, link: Link, chunk: bytes, progress: ResyncProgress) -> bool:
        """Make the successor's chunk what ours is. False: ours is not committed yet."""
        chain, version, engine = view.chain.id, view.version, self._replica.engine
        (state,) = await engine.states([chunk])
        await self._paces.of(view.chain).take(state.length if state is not None else 0, view.changed)
        async with self._replica.locks.of(chunk):
            if view is not self._replica.view:
                raise UpdateUnknown("the chain has changed")
            (state,) = await engine.states([chunk])
            if state is not None and state.damaged and await self._replica.repairer.repair(view, chunk):
                (state,) = await engine.states([chunk])
            if state is not None and state.pending_version:
                return False
            if state is None:
                await link.call(lambda number, oldest: Drop(chain, version, number, oldest, [chunk]))
                progress.sent += 1
                return True
            content = await engine.content(chunk, pending=False)  # Raises Corruption for a damaged row, too.
            length, crc = (content.length, content.crc) if content is not None else (0, 0)
            payload = content.payload if content is not None else memoryview(b"")
            row = ChunkVersion(chunk, state.version, state.chain_version, length, crc, removed=state.removed)

            def build(number: int, oldest: int) -> Message:
                names = [(*NO_REQUEST,)]
                return Install(chain, version, number, oldest, [row], names, [state.granule_log2])

            await link.call(build, [payload])
        progress.sent += 1
        progress.sent_bytes += length
        return True

    async def _finish(self, view: View, link: Link) -> None:
        chain, version, engine = view.chain.id, view.version, self._replica.engine
        after = None
        while True:
            rows = await engine.request_rows(after, PAGE_ROWS)
            await self._install_requests(view, link, [(*row,) for row in rows])
            if len(rows) < PAGE_ROWS:
                break
            after = rows[-1]
        await link.call(lambda number, oldest: SyncDone(chain, version, number, oldest))

    async def _install_requests(self, view: View, link: Link, rows: Sequence[tuple[bytes, int, int]]) -> None:
        chain, version, floor = view.chain.id, view.version, self._replica.engine.floor
        await link.call(lambda number, oldest: InstallRequests(chain, version, number, oldest, list(rows), floor))


def _is_same(ours: ChunkVersion | None, theirs: ChunkVersion | None) -> bool:
    return ours == theirs and ours is not None and not (ours.pending or ours.damaged)
