"""What metadata asks of chunk storage: remove a file's chunks, cut them, and tell how far they reach.

`ClientChunkOps` does it with the ordinary storage messages, chain by chain: a file's chunks lie on several chains, and
on each they are neighbours in key order, so one range per chain finds them all without a table of who holds what.

Invariants: every operation may be run again after it failed half way. Does not know: paths, sessions, inode rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Protocol

from ..messages import ChunkList, ListChunks, RemoveChunks, TruncateChunk
from ..striping import chains_of
from ..transport.types import Connection
from ..types import Chunks, chunk_id, split_chunk_id

LIST_CHUNKS = 1000


class ChunkOps(Protocol):
    """The chunk storage, as the metadata service sees it. All calls are durable when they return."""

    async def remove(self, inode: int, layout: Chunks | None) -> int:
        """Remove all chunks of a file and return how many there were. Without a layout every chain is searched."""

    async def truncate(self, inode: int, layout: Chunks, length: int) -> None:
        """Remove the chunks past `length` and cut the one that it ends in. Never extends."""

    async def end(self, inode: int, layout: Chunks) -> int:
        """The largest committed end offset: the file's length as its chunks have it; 0 without chunks."""

    def owners(self, begin_inode: int, end_inode: int) -> AsyncIterator[list[int]]:
        """The inodes in [begin_inode, end_inode) that have chunks, in pages; one may come several times.

        Those of a page may be removed before the next page is asked for.
        """


class ClientChunkOps:
    """`ChunkOps` over storage connections."""

    def __init__(self, connections: Mapping[int, Connection]) -> None:
        self._connections = connections
        """Chain id -> the way to it."""

    async def remove(self, inode: int, layout: Chunks | None) -> int:
        removed = 0
        for chain in self._chains(layout):
            async for page in self._pages(chain, chunk_id(inode, 0), chunk_id(inode + 1, 0)):
                removed += await self._remove(chain, [chunk for chunk, _ in page])
        return removed

    async def truncate(self, inode: int, layout: Chunks, length: int) -> None:
        whole, rest = divmod(length, layout.chunk_size_bytes)
        begin, end = chunk_id(inode, whole), chunk_id(inode + 1, 0)
        for chain in self._chains(layout):
            async for page in self._pages(chain, begin, end):
                gone = [chunk for chunk, _ in page]
                if rest and gone[0] == begin:
                    del gone[0]
                    if page[0][1] > rest:
                        await self._connections[chain].call(TruncateChunk(chain=chain, chunk=begin, length=rest), ())
                await self._remove(chain, gone)

    async def end(self, inode: int, layout: Chunks) -> int:
        end = 0
        for chain in self._chains(layout):
            request = ListChunks(
                chain=chain, begin=chunk_id(inode, 0), end=chunk_id(inode + 1, 0), limit=1, reverse=True
            )
            for chunk, length in await self._list(request):
                end = max(end, split_chunk_id(chunk)[1] * layout.chunk_size_bytes + length)
        return end

    async def owners(self, begin_inode: int, end_inode: int) -> AsyncIterator[list[int]]:
        for chain in self._connections:
            async for page in self._pages(chain, chunk_id(begin_inode, 0), chunk_id(end_inode, 0)):
                yield sorted({split_chunk_id(chunk)[0] for chunk, _ in page})

    def _chains(self, layout: Chunks | None) -> Iterable[int]:
        return self._connections if layout is None else chains_of(layout)

    async def _pages(self, chain: int, begin: bytes, end: bytes) -> AsyncIterator[list[tuple[bytes, int]]]:
        """The chunks of a range; a page may be removed before the next is asked for."""
        while True:
            page = await self._list(ListChunks(chain=chain, begin=begin, end=end, limit=LIST_CHUNKS))
            if page:
                yield page
            if len(page) < LIST_CHUNKS:
                return
            begin = page[-1][0] + b"\x00"

    async def _list(self, request: ListChunks) -> list[tuple[bytes, int]]:
        reply = await self._connections[request.chain].call(request, ())
        assert isinstance(reply, ChunkList)
        return reply.chunks

    async def _remove(self, chain: int, chunks: list[bytes]) -> int:
        if chunks:
            await self._connections[chain].call(RemoveChunks(chains=[chain] * len(chunks), chunks=chunks), ())
        return len(chunks)
