"""What replicas of a chain ask of a chunk engine beside reading and updating: states, copies, and lists of its rows.

Lists come in pages, `after` a key (exclusive), in key order, at most `limit`; a page is one state, a list is not.

Invariants: a full replacement (`install`) is published at exactly its version, whatever was there; a tombstone or a
chunk that is forgotten leaves its version in the floor.

The caller holds the lock of each chunk that it names. Does not know: chains, clients' sessions, or the clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

from ..disk import WriteItem
from ..errors import Corruption
from ..kv.types import RANGE_ROWS_MAX, Transaction, decode_int
from ..messages import ChunkVersion
from .engine import CoreEngine
from .record import NO_REQUEST, Extent, Record, Request, Stamp, decode_record, last_sum
from .rows import CHUNK, PENDING, REQUEST, TOMBSTONE, Change, decode_request_key, request_key
from .update import Prepared

T = TypeVar("T")


class ChunkState(NamedTuple):
    """What a chunk's row says, without its bytes."""

    version: int = 0
    """Committed, or the tombstone's; 0: only a pending version is there."""
    chain_version: int = 0
    length: int = 0
    removed: bool = False
    """A tombstone."""
    pending_version: int = 0
    """0: nothing is pending."""
    pending_chain_version: int = 0
    pending_length: int = 0
    pending_removes: bool = False
    request: Request = NO_REQUEST
    """Of the pending update."""
    granule_log2: int = 0
    damaged: bool = False
    """The row cannot be read; the other fields say nothing."""


class Content(NamedTuple):
    """The whole of one version of a chunk, verified."""

    payload: memoryview
    length: int
    crc: int
    """CRC32C of the payload."""


class InstallItem(NamedTuple):
    """What a chunk shall be."""

    chunk: bytes
    version: int
    chain_version: int
    payload: memoryview | None
    """None: removed."""
    request: Request = NO_REQUEST
    """Of the update that made this version, if it should be known when it comes again."""
    granule_log2: int = 14


class ChunkEngine(CoreEngine):
    """A target: `CoreEngine` and what its chain asks of it."""

    # --- looking ---------------------------------------------------------------------------------------------------

    async def states(self, chunks: Sequence[bytes]) -> list[ChunkState | None]:
        """What the rows of `chunks` say; None: no row. Does not raise for a damaged one."""
        rows = await self._index.begin().get_many([CHUNK + chunk for chunk in chunks])
        return [_state(chunk, row) if row is not None else None for chunk, row in zip(chunks, rows, strict=True)]

    async def summaries(self, chunks: Sequence[bytes], *, pending: bool = False) -> list[Prepared]:
        """Version, length and CRC of the committed versions, or of the pending ones (where there are some).

        As `prepare` returned them. Raises Corruption.
        """

        async def look() -> list[Prepared]:
            rows = await self._index.begin().get_many([CHUNK + chunk for chunk in chunks])
            found = []
            for chunk, row in zip(chunks, rows, strict=True):
                record = decode_record(chunk, row) if row is not None else None
                is_pending = pending and record is not None and record.is_pending
                found.append(await self._summary(chunk, record, pending=is_pending))
            return found

        return await self._as_read(look)

    async def content(self, chunk: bytes, *, pending: bool = True) -> Content | None:
        """All bytes of the pending version (if `pending` and there is one) or else of the committed one; None: absent.

        Raises Corruption.
        """

        async def read(record: Record | None) -> Content | None:
            if record is None or (pending and record.removal is not None):
                return None
            extent = record.pending if pending and record.pending is not None else record.committed
            if extent is None:
                return None
            payload = memoryview(bytearray(extent.length))
            await self.reader.read_extent(chunk, extent, record.granule_log2, 0, payload)
            return Content(payload, extent.length, await self._crc(chunk, extent, record.granule_log2))

        return await self._as_read(lambda: self._settled(chunk, read))

    async def pending(self, after: bytes = b"", limit: int = RANGE_ROWS_MAX) -> list[bytes]:
        """Chunks with a pending version."""
        return [key[1:] for key, _ in await self._page(PENDING, after, limit)]

    async def tombstones(self, after: bytes = b"", limit: int = RANGE_ROWS_MAX) -> list[tuple[bytes, int]]:
        """(chunk, version) of removed chunks."""
        return [(key[1:], decode_int(row)) for key, row in await self._page(TOMBSTONE, after, limit)]

    async def versions(self, after: bytes = b"", limit: int = RANGE_ROWS_MAX) -> list[ChunkVersion]:
        """The committed version of every chunk, tombstones too. Says `damaged` of rows and checksums that are.

        Of a chunk of which nothing is committed yet the version is 0. Data is not read.
        """

        async def look() -> list[ChunkVersion]:
            return [await self._version(key[1:], row) for key, row in await self._page(CHUNK, after, limit)]

        return await self._as_read(look)

    async def listed(self, prefix: bytes, *, at: Transaction) -> AsyncIterator[bytes]:
        """The chunks of a list (PENDING or TOMBSTONE), in order. Raises as `records` does."""
        async for key, _ in self._rows(prefix, prefix + b"\xff", at):
            yield key[1:]

    async def _version(self, chunk: bytes, row: bytes) -> ChunkVersion:
        async def describe(record: Record | None) -> ChunkVersion:
            if record is None:
                return ChunkVersion(chunk, 0, 0, 0, 0)
            if record.committed is None:
                version, chain_version = record.tombstone or (0, 0)
                is_removed = record.tombstone is not None
                return ChunkVersion(chunk, version, chain_version, 0, 0, record.is_pending, is_removed)
            extent = record.committed
            crc = await self._crc(chunk, extent, record.granule_log2)
            return ChunkVersion(chunk, extent.version, extent.chain_version, extent.length, crc, record.is_pending)

        try:
            record = decode_record(chunk, row)
            if record.committed is None or record.committed.slot is None:
                return await describe(record)
            return await self._settled(chunk, describe)
        except Corruption:
            return ChunkVersion(chunk, 0, 0, 0, 0, damaged=True)

    async def _crc(self, chunk: bytes, extent: Extent, granule_log2: int) -> int:
        return last_sum(await self.reader.sums(chunk, extent, granule_log2))

    async def _settled(self, chunk: bytes, look: Callable[[Record | None], Awaitable[T]]) -> T:
        """`look` at the record. What does not verify is damage only if the record still says the same afterwards."""
        row = await self._index.begin().get(CHUNK + chunk)
        while True:
            try:
                return await look(decode_record(chunk, row) if row is not None else None)
            except Corruption:
                newer = await self._index.begin().get(CHUNK + chunk)
                if newer == row:
                    raise
                row = newer

    async def _page(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        begin, end = prefix + after + b"\x00", prefix[:-1] + bytes([prefix[-1] + 1])
        return await self._index.begin().range(begin, end, limit=min(limit, RANGE_ROWS_MAX), snapshot=True)

    # --- replacing -------------------------------------------------------------------------------------------------

    async def install(self, items: Sequence[InstallItem]) -> list[Prepared]:
        """Make each chunk exactly that, published at once and durably, over anything: older, newer, pending, damaged.

        What a damaged row named is free once fsck has looked. Raises NoSpace, TargetFailed, StoreClosed.
        """
        return await self.during(self._install(items))

    async def _install(self, items: Sequence[InstallItem]) -> list[Prepared]:
        self._check_alive()
        assert len({item.chunk for item in items}) == len(items), "a batch names a chunk once"
        olds = await self._records([item.chunk for item in items])
        change = Change()
        writes: list[WriteItem] = []
        installed = []
        try:
            for item, old in zip(items, olds, strict=True):
                stamp = Stamp(item.version, item.chain_version)
                if item.payload is None:
                    new = Record(item.granule_log2, None, tombstone=stamp) if self._keeps_tombstones else None
                    installed.append(Prepared(item.version, 0, 0))
                else:
                    extent = self._fresh_extent(item.payload, item.granule_log2, stamp, change, writes)
                    new = Record(item.granule_log2, extent)
                    installed.append(Prepared(item.version, extent.length, last_sum(extent.sums)))
                self._replace(change, item.chunk, old, new)
                change.note_request(item.request)
            await self._submit(change, writes)
        except BaseException:
            self._release_named(change)
            raise
        return installed

    async def discard(self, chunks: Sequence[bytes], versions: Sequence[int]) -> None:
        """Drop the pending version of each chunk if it is `versions[i]`, durably; what is committed stays.

        Raises Corruption, TargetFailed, StoreClosed.
        """
        await self.during(self._discard(chunks, versions))

    async def _discard(self, chunks: Sequence[bytes], versions: Sequence[int]) -> None:
        self._check_alive()
        change = Change()
        for chunk, version, old in zip(chunks, versions, await self._records(chunks), strict=True):
            if isinstance(old, Corruption):
                raise old
            if old is not None and old.is_pending and old.pending_version == version:
                kept = Record(old.granule_log2, old.committed, tombstone=old.tombstone)
                change.put_record(chunk, old, kept if old.version else None)
        await self._submit(change, [])

    async def forget(self, chunks: Sequence[bytes]) -> None:
        """Delete the rows of `chunks`, tombstones, pending versions and damaged rows too, durably.

        The floor rises to their versions. Raises TargetFailed, StoreClosed.
        """
        await self.during(self._forget(chunks))

    async def _forget(self, chunks: Sequence[bytes]) -> None:
        self._check_alive()
        change = Change()
        for chunk, old in zip(chunks, await self._records(chunks), strict=True):
            if old is not None:
                self._replace(change, chunk, old, None)
                if isinstance(old, Record):
                    change.raise_floor(max(old.version, old.pending_version))
        await self._submit(change, [])

    async def purge(self, chunks: Sequence[bytes]) -> None:
        """Delete those of `chunks` that are tombstones with nothing pending, durably.

        The floor rises to their versions. Raises TargetFailed, StoreClosed.
        """
        await self.during(self._purge(chunks))

    async def _purge(self, chunks: Sequence[bytes]) -> None:
        self._check_alive()
        change = Change()
        for chunk, old in zip(chunks, await self._records(chunks), strict=True):
            if isinstance(old, Record) and old.tombstone is not None and not old.is_pending:
                change.put_record(chunk, old, None)
                change.raise_floor(old.version)
        await self._submit(change, [])

    async def _records(self, chunks: Sequence[bytes]) -> list[Record | Corruption | None]:
        rows = await self._index.begin().get_many([CHUNK + chunk for chunk in chunks])
        records: list[Record | Corruption | None] = []
        for chunk, row in zip(chunks, rows, strict=True):
            try:
                records.append(decode_record(chunk, row) if row is not None else None)
            except Corruption as error:
                records.append(error)
        return records

    @staticmethod
    def _replace(change: Change, chunk: bytes, old: Record | Corruption | None, new: Record | None) -> None:
        if isinstance(old, Corruption):
            change.delete_damaged(chunk)
            old = None
        change.put_record(chunk, old, new)

    # --- requests --------------------------------------------------------------------------------------------------

    async def last_sequences(self, requests: Sequence[Request]) -> list[int | None]:
        """The last published sequence of the client and channel of each of `requests`; None: none is known."""
        keys = [request_key(request.client, request.channel) for request in requests]
        rows = await self._index.begin().get_many(keys)
        return [decode_int(row) if row is not None else None for row in rows]

    async def request_rows(self, after: tuple[bytes, int, int] | None = None, limit: int = 1000) -> list[Request]:
        """The last published request of each client and channel. `after`: the last row of the page before."""
        key = request_key(after[0], after[1])[1:] if after is not None else b""
        return [
            Request(*decode_request_key(key), decode_int(row)) for key, row in await self._page(REQUEST, key, limit)
        ]

    async def install_requests(self, rows: Sequence[tuple[bytes, int, int]], floor: int) -> None:
        """Take over request rows (client, channel, sequence) and the floor, durably; of each the larger number wins."""
        self._check_alive()
        change = Change()
        for row in rows:
            change.note_request(Request(*row))
        change.raise_floor(floor)
        await self.during(self._submit(change, []))

    async def drop_requests(self, clients: Collection[bytes]) -> None:
        """Delete the request rows of `clients`, durably."""

        async def drop(txn: Transaction) -> None:
            for client in clients:
                txn.delete_range(REQUEST + client, REQUEST + client + b"\xff" * 5)

        if clients:
            await self.during(self._index.run(drop, reclaims=True))

    async def drop_requests_except(self, live: Collection[bytes]) -> None:
        """Delete the request rows of all clients but `live`, durably."""
        dead: list[bytes] = []
        after = b""
        while rows := await self._page(REQUEST, after, 1):
            client, _ = decode_request_key(rows[0][0])
            if client not in live:
                dead.append(client)
            after = client + b"\xff" * 5
        await self.drop_requests(dead)

    # --- reading safely --------------------------------------------------------------------------------------------

    async def _as_read(self, look: Callable[[], Awaitable[T]]) -> T:
        """Run `look` as a read: blocks that are freed meanwhile are not given away before it has ended."""

        async def held() -> T:
            epoch = self._limbo.begin_read()
            try:
                return await look()
            finally:
                self._limbo.end_read(epoch)

        return await self.during(held())


def _state(chunk: bytes, row: bytes) -> ChunkState:
    try:
        record = decode_record(chunk, row)
    except Corruption:
        return ChunkState(damaged=True)
    current = record.committed or record.tombstone
    pending = record.pending or record.removal
    return ChunkState(
        current.version if current is not None else 0,
        current.chain_version if current is not None else 0,
        record.committed.length if record.committed is not None else 0,
        record.tombstone is not None,
        pending.version if pending is not None else 0,
        pending.chain_version if pending is not None else 0,
        record.pending.length if record.pending is not None else 0,
        record.removal is not None,
        record.request if pending is not None else NO_REQUEST,
        record.granule_log2,
    )
