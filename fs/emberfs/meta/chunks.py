"""What metadata asks of chunk storage: remove a file's chunks, cut them, and tell how far they reach.

`ClientChunkOps` does it with the ordinary storage messages, chain by chain: a file's chunks lie on several chains, and
on each they are neighbours in key order, so one range per chain finds them all without a table of who holds what.

Invariants:
  - Every operation may be run again after it failed half way.
  - In a cluster a chunk goes, or is cut, only as the version that was listed: a request of ours that arrives after
    another server has done our work, and let a writer in, changes nothing.

Does not know: paths, sessions, inode rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from ..errors import StaleChunk, Unavailable
from ..messages import ChunkList, ListChunks, RemoveChunks, TruncateChunk
from ..striping import chains_of
from ..transport.types import Connection
from ..types import Chunks, chunk_id, split_chunk_id
from .claims import Claim

LIST_CHUNKS = 1000
LOOKS_MAX = 100
"""So often chunks that somebody writes to are listed again before they are left for later."""


class ChunkOps(Protocol):
    """The chunk storage, as the metadata service sees it. All calls are durable when they return.

    A change under a `claim` is one that another server does in our place if we do not, and after which somebody may
    write there again. Unavailable: the claim is lost, or the chunks are written to all the time.
    """

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        """Remove all chunks of a file and return how many there were. Without a layout every chain is searched."""

    async def truncate(self, inode: int, layout: Chunks, length: int, *, claim: Claim | None = None) -> None:
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

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        removed = 0
        for chain in self._chains(layout):
            request = ListChunks(chain=chain, begin=chunk_id(inode, 0), end=chunk_id(inode + 1, 0), limit=LIST_CHUNKS)
            removed += await self._change(request, self._remove, claim)
        return removed

    async def truncate(self, inode: int, layout: Chunks, length: int, *, claim: Claim | None = None) -> None:
        whole, rest = divmod(length, layout.chunk_size_bytes)
        begin, end = chunk_id(inode, whole), chunk_id(inode + 1, 0)

        async def cut(chain: int, page: ChunkList) -> None:
            if rest and page.chunks[0][0] == begin:
                if page.chunks[0][1] > rest:
                    version = page.versions[0] if page.versions else 0
                    request = TruncateChunk(chain=chain, chunk=begin, length=rest, version=version)
                    await self._connections[chain].call(request, ())
                page = ChunkList(page.chunks[1:], page.versions[1:])
            await self._remove(chain, page)

        for chain in self._chains(layout):
            await self._change(ListChunks(chain=chain, begin=begin, end=end, limit=LIST_CHUNKS), cut, claim)

    async def end(self, inode: int, layout: Chunks) -> int:
        end = 0
        for chain in self._chains(layout):
            request = ListChunks(
                chain=chain, begin=chunk_id(inode, 0), end=chunk_id(inode + 1, 0), limit=1, reverse=True
            )
            for chunk, length in (await self._list(request)).chunks:
                end = max(end, split_chunk_id(chunk)[1] * layout.chunk_size_bytes + length)
        return end

    async def owners(self, begin_inode: int, end_inode: int) -> AsyncIterator[list[int]]:
        async for _, page in self.listed(begin_inode, end_inode):
            yield sorted({split_chunk_id(chunk)[0] for chunk, _ in page})

    async def listed(self, begin_inode: int, end_inode: int) -> AsyncIterator[tuple[int, list[tuple[bytes, int]]]]:
        """(chain, its chunks of inodes in [begin_inode, end_inode) with their lengths), in pages."""
        for chain in self._connections:
            async for page in self._pages(chain, chunk_id(begin_inode, 0), chunk_id(end_inode, 0)):
                yield chain, page

    def _chains(self, layout: Chunks | None) -> Iterable[int]:
        return self._connections if layout is None else chains_of(layout)

    async def _pages(self, chain: int, begin: bytes, end: bytes) -> AsyncIterator[list[tuple[bytes, int]]]:
        """The chunks of a range; a page may be removed before the next is asked for."""
        while True:
            page = (await self._list(ListChunks(chain=chain, begin=begin, end=end, limit=LIST_CHUNKS))).chunks
            if page:
                yield page
            if len(page) < LIST_CHUNKS:
                return
            begin = page[-1][0] + b"\x00"

    async def _change(
        self, request: ListChunks, change: Callable[[int, ChunkList], Awaitable[None]], claim: Claim | None
    ) -> int:
        """Run `change` on each page of a range, as it is when it is changed. Returns how many chunks there were."""
        count = looks = 0
        seen: set[bytes] = set()
        while True:
            page = await self._list(request)
            if claim is not None:
                # After the look: nobody else was let in before it.
                claim.check()
            try:
                if page.chunks:
                    await change(request.chain, page)
            except StaleChunk as error:
                looks += 1
                if looks == LOOKS_MAX:
                    raise Unavailable("the chunks are written to all the time: try again") from error
                seen.update(chunk for chunk, _ in page.chunks)
                continue
            count += len(seen.union(chunk for chunk, _ in page.chunks))
            if len(page.chunks) < LIST_CHUNKS:
                return count
            request = msgspec.structs.replace(request, begin=page.chunks[-1][0] + b"\x00")
            looks = 0
            seen.clear()

    async def _list(self, request: ListChunks) -> ChunkList:
        reply = await self._connections[request.chain].call(request, ())
        assert isinstance(reply, ChunkList)
        return reply

    async def _remove(self, chain: int, page: ChunkList) -> None:
        if page.chunks:
            chunks = [chunk for chunk, _ in page.chunks]
            request = RemoveChunks(chains=[chain] * len(chunks), chunks=chunks, versions=page.versions)
            await self._connections[chain].call(request, ())
