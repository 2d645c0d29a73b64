"""Repair of a damaged chunk from another replica of its chain.

Only a committed version with nothing pending is repaired, by exactly that version: its length and CRC are compared.
What nobody could help with is remembered, for the operator, until it is repaired or found to be well (`note_well`).

Does not know: how damage is found.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..checksum import crc32c
from ..engine import ChunkState, InstallItem
from ..engine.scrub import ChunkScrubber
from ..errors import Corruption, EmberError
from ..messages import ChunksRead, ChunkVersion, ChunkVersions, ListVersions, ReadChunks
from ..routing import ChainTarget
from ..runtime import Runtime
from ..types import chunk_id
from .service import granule_log2_of
from .view import View

if TYPE_CHECKING:
    from .replica import Replica

UNMENDED_MAX = 10_000
"""So many chunks are remembered: a disk with more of them is to be replaced anyway."""


class Repairer:
    """Repairs chunks of one target."""

    def __init__(self, replica: Replica, runtime: Runtime) -> None:
        self._replica = replica
        self._runtime = runtime
        self._ordered: dict[bytes, asyncio.Task[None]] = {}
        self.repaired = 0
        """Chunks so far."""
        self.failed = 0
        """Attempts without a replica that had the bytes."""
        self.unmended: dict[bytes, None] = {}
        """Damaged chunks that could not be repaired. Forgotten by a restart: the next look finds them again."""

    async def close(self) -> None:
        """Return once nothing runs."""
        for task in list(self._ordered.values()):
            await task

    @staticmethod
    def named(error: Corruption) -> bytes | None:
        """The chunk that `error` is about."""
        if error.chunk is None:
            return None
        inode, _, index = error.chunk.partition(".")
        return chunk_id(int(inode, 16), int(index, 16))

    def order(self, view: View, chunk: bytes) -> None:
        """Look at `chunk`, and repair it, in the background, once at a time.

        A reader found damage, in memory that may be its own: if it wrote there meanwhile, the chunk is well.
        """
        if chunk not in self._ordered:
            self._ordered[chunk] = self._runtime.spawn(self._repair_soon(view, chunk), "repair")

    async def _repair_soon(self, view: View, chunk: bytes) -> None:
        try:
            async with self._replica.locks.of(chunk):
                if view is not self._replica.view:
                    return
                if await self._is_well(chunk):
                    self.note_well(chunk)
                elif not view.others_serving:
                    self._note_unmended(chunk)
                else:
                    await self.repair(view, chunk)
        except EmberError:
            self.failed += 1
        finally:
            del self._ordered[chunk]

    async def _is_well(self, chunk: bytes) -> bool:
        engine = self._replica.engine
        rows = await engine.scan(chunk, chunk + b"\x00", limit=1)
        return not rows or not await ChunkScrubber(engine).scrub(chunk, rows[0][1])

    async def repair(self, view: View, chunk: bytes) -> bool:
        """Make `chunk`, whose lock is held, what another replica has committed. False: nobody could help."""
        (state,) = await self._replica.engine.states([chunk])
        if state is None:
            self.note_well(chunk)
        if state is None or (state.pending_version and not state.damaged):
            return False
        for other in view.others_serving:
            try:
                item = await self._fetch(view, other, chunk, state)
            except EmberError:
                continue
            if item is not None and view is self._replica.view:
                await self._replica.engine.install([item])
                self.repaired += 1
                self.note_well(chunk)
                return True
        self.failed += 1
        self._note_unmended(chunk)
        return False

    def note_well(self, chunk: bytes) -> None:
        """Somebody has looked: nothing is wrong with `chunk` any more."""
        self.unmended.pop(chunk, None)

    def _note_unmended(self, chunk: bytes) -> None:
        if len(self.unmended) < UNMENDED_MAX:
            self.unmended[chunk] = None

    async def _fetch(self, view: View, other: ChainTarget, chunk: bytes, state: ChunkState) -> InstallItem | None:
        row = await self._row(view, other, chunk)
        if row is None or row.damaged or not row.version or (row.pending and state.damaged):
            return None  # If our row is damaged and theirs is not settled, the version that we had is not known.
        if not state.damaged and row.version != state.version:
            return None
        if row.removed:
            return InstallItem(chunk, row.version, row.chain_version, None)
        payload = memoryview(bytearray(row.length))
        request = ReadChunks([view.chain.id], [chunk], [0], [view.version], relaxed=True)
        reply = await view.connection(other.target).call(request, [payload])
        assert isinstance(reply, ChunksRead)
        if reply.errors or reply.counts[0] != row.length or crc32c(payload) != row.crc:
            return None
        granule_log2 = state.granule_log2 or granule_log2_of(row.length)
        return InstallItem(chunk, row.version, row.chain_version, payload, granule_log2=granule_log2)

    async def _row(self, view: View, other: ChainTarget, chunk: bytes) -> ChunkVersion | None:
        before = (int.from_bytes(chunk, "big") - 1).to_bytes(len(chunk), "big")
        request = ListVersions(view.chain.id, view.version, before, 1)
        reply = await view.connection(other.target).call(request)
        assert isinstance(reply, ChunkVersions)
        return next((row for row in reply.chunks if row.chunk == chunk), None)
