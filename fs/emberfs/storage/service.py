"""The storage service: takes chunk messages and runs them on the engines of its targets.

Embedded, every chain has one replica, which is head and last serving target at once: an update is prepared and
published in one flush. Calls within a process are not sent again, so the engine is told the names of requests only if
others send some (`checks_requests`).

Invariants: one update of a chunk at a time (a lock per chunk, held until it is durable); items of a batch that name
the same chunk are applied in their order.

Does not know: files, paths, or where else a chunk may be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ..engine import Action, ChunkEngine, Update
from ..engine.record import NO_REQUEST, Request, decode_record
from ..errors import Corruption, LimitExceeded
from ..locks import KeyedLocks
from ..messages import (
    ChunkList,
    ChunksRead,
    Done,
    ListChunks,
    Message,
    ReadChunks,
    RemoveChunks,
    TruncateChunk,
    WriteChunks,
)
from ..runtime import Runtime
from ..types import BATCH_ITEMS_MAX

GRANULES = ((1 << 20, 12), (4 << 20, 14))
"""(chunks of up to so many bytes, log2 of their granules): 256 sums at most, which fit beside the rest of a record."""
GRANULE_LOG2_LARGE = 16


class StorageService:
    """Serves the chains of `engines` ({chain id: engine}; several chains may share one engine)."""

    def __init__(self, engines: Mapping[int, ChunkEngine], runtime: Runtime, *, checks_requests: bool = False) -> None:
        """`checks_requests`: an update that comes again is not applied again, by its client, channel and sequence."""
        self._engines = engines
        self._checks_requests = checks_requests
        self._runtime = runtime
        self._locks = KeyedLocks(runtime)
        self._only = next(iter(engines.values())) if len(set(engines.values())) == 1 else None
        self._handlers: dict[type[Message], Callable[[Any, Sequence[memoryview]], Awaitable[Message]]] = {
            ReadChunks: self._read,
            WriteChunks: self._write,
            TruncateChunk: self._truncate,
            RemoveChunks: self._remove,
            ListChunks: self._list,
        }

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request. Not a coroutine function itself, so that a call costs no frame more than its handler."""
        return self._handlers[type(request)](request, buffers)

    def _by_engine(self, chains: Sequence[int]) -> list[tuple[ChunkEngine, list[int]]]:
        """(engine, indices of its items) for a batch."""
        if self._only is not None:
            return [(self._only, list(range(len(chains))))]
        groups: dict[ChunkEngine, list[int]] = {}
        for index, chain in enumerate(chains):
            groups.setdefault(self._engines[chain], []).append(index)
        return list(groups.items())

    async def _read(self, request: ReadChunks, buffers: Sequence[memoryview]) -> Message:
        check_batch(len(request.chunks))
        if self._only is not None:
            return chunks_read(await self._only.read(request.chunks, request.offsets, buffers))
        results: list[int | Corruption] = [0] * len(buffers)

        async def read_of(engine: ChunkEngine, indices: list[int]) -> None:
            chunks = [request.chunks[index] for index in indices]
            offsets = [request.offsets[index] for index in indices]
            part = await engine.read(chunks, offsets, [buffers[index] for index in indices])
            for index, result in zip(indices, part, strict=True):
                results[index] = result

        await self._all(read_of(engine, indices) for engine, indices in self._by_engine(request.chains))
        return chunks_read(results)

    async def _write(self, request: WriteChunks, buffers: Sequence[memoryview]) -> Message:
        check_batch(len(request.chunks))
        granule_log2 = granule_log2_of(request.chunk_size_bytes)
        action = Action.REPLACE if request.replace else Action.WRITE
        updates: list[Update] = []
        for chunk, offset, payload in zip(request.chunks, request.offsets, buffers, strict=True):
            if offset + len(payload) > request.chunk_size_bytes:
                raise LimitExceeded(f"a write ends at {offset + len(payload)} of a {request.chunk_size_bytes} B chunk")
            name = self._name(request, len(updates)) if self._checks_requests else NO_REQUEST
            updates.append(
                Update(
                    chunk, action, offset, payload, request=name, granule_log2=granule_log2, room_bytes=room_of(request)
                )
            )
        await self._update(request.chains, updates)
        return Done()

    def _name(self, request: WriteChunks | TruncateChunk, slot: int) -> Request:
        return Request(request.client, request.channel * BATCH_ITEMS_MAX + slot, request.sequence)

    async def _truncate(self, request: TruncateChunk, _: Sequence[memoryview]) -> Message:
        name = self._name(request, 0) if self._checks_requests else NO_REQUEST
        await self._update([request.chain], [Update(request.chunk, Action.TRUNCATE, request.length, request=name)])
        return Done()

    async def _remove(self, request: RemoveChunks, _: Sequence[memoryview]) -> Message:
        await self._update(request.chains, [Update(chunk, Action.REMOVE) for chunk in dict.fromkeys(request.chunks)])
        return Done()

    async def _update(self, chains: Sequence[int], updates: Sequence[Update]) -> None:
        """Apply `updates` under their chunks' locks: each engine's share in as few flushes as its order allows."""
        chunks = list({update.chunk: None for update in updates})
        await self._locks.acquire(chunks)
        try:
            await self._all(
                _apply_in_rounds(engine, [updates[index] for index in indices])
                for engine, indices in self._by_engine(chains)
            )
        finally:
            self._locks.release(chunks)

    async def _list(self, request: ListChunks, _: Sequence[memoryview]) -> Message:
        engine = self._engines[request.chain]
        rows = await engine.scan(request.begin, request.end, limit=request.limit, reverse=request.reverse)
        found = []
        for chunk, row in rows:
            try:
                committed = decode_record(chunk, row).committed
            except Corruption:
                committed = None  # It must not hide the others; whoever reads it is told.
            found.append((chunk, committed.length if committed is not None else 0))
        return ChunkList(found)

    async def _all(self, works: Any) -> None:
        """Run coroutines side by side; one alone runs right here. Raises the first error once all have ended."""
        first, *others = list(works)
        tasks = [self._runtime.spawn(work, "storage-part") for work in others]
        errors = []
        # Not asyncio.gather: it wants to be inside a running loop, and a caller's thread may drive this.
        for part in (first, *tasks):
            try:
                await part
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


async def _apply_in_rounds(engine: ChunkEngine, updates: Sequence[Update]) -> None:
    for batch in rounds(updates):
        await engine.prepare(batch, publish=True)


def rounds(updates: Sequence[Update]) -> list[list[Update]]:
    """The engine takes a chunk once per batch: the n-th update of each chunk goes in round n."""
    batches: list[list[Update]] = []
    seen: dict[bytes, int] = {}
    for update in updates:
        number = seen.get(update.chunk, 0)
        seen[update.chunk] = number + 1
        if number == len(batches):
            batches.append([])
        batches[number].append(update)
    return batches


def room_of(request: WriteChunks) -> int:
    """What a new block for a chunk of it has room for, at least."""
    return request.chunk_size_bytes if request.whole_chunks else 0


def granule_log2_of(chunk_size_bytes: int) -> int:
    """How finely a chunk that may grow to this size is checksummed."""
    return next((log2 for limit, log2 in GRANULES if chunk_size_bytes <= limit), GRANULE_LOG2_LARGE)


def chunks_read(results: list[int | Corruption]) -> ChunksRead:
    """The reply to a read."""
    errors = {}
    for index, result in enumerate(results):
        if type(result) is not int:
            assert isinstance(result, Corruption)
            errors[index] = ("corrupt", result.message, result.offset or 0)
    if not errors:
        return ChunksRead(results)  # type: ignore[arg-type]
    return ChunksRead([result if isinstance(result, int) else 0 for result in results], errors)


def check_batch(count: int) -> None:
    """Raises LimitExceeded."""
    if count > BATCH_ITEMS_MAX:
        raise LimitExceeded(f"a batch of {count} items is over the limit of {BATCH_ITEMS_MAX}")
