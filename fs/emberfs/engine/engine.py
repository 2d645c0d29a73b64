"""The chunk engine: chunks of one target on one disk, each with a committed and at most one pending version.

`prepare` makes a pending version durable, `commit` publishes it; between the two the committed version stays readable
(CRAQ's two steps). The last serving target of a chain may do both in one flush: `prepare(..., publish=True)`.

Invariants:
  - Data is synced before the index transaction that names it is committed; that transaction (records + group bitmaps)
    is the only moment at which anything changes. A crash before it changes nothing.
  - A block is named by at most one chunk. A block that no record names any more is handed out again only when every
    read that began before is over.
  - Every read is verified against the record's cumulative CRC32C before it is returned.
  - A failed write or fsync fails the target: no update is accepted afterwards, reads go on.

The caller (the storage service) holds a lock per chunk during `prepare` and `commit`; a batch names a chunk once.
Does not know: files, chains, other replicas, or the network.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from ..batching import GroupCommit
from ..checksum import crc32c, cumulative_sums
from ..disk import Disk, WriteItem
from ..errors import Corruption, NoSpace, StaleChunk, StoreClosed, StoreFormat, TargetFailed, UpdateUnknown
from ..kv.types import KV, RANGE_ROWS_MAX, TRANSACTION_BYTES_MAX, Transaction
from ..runtime import Runtime
from ..types import describe_chunk
from .allocator import GROUP_BLOCKS, Allocator, position_class
from .reader import BlockReader, ReadRequest
from .record import NO_REQUEST, SUMS_INLINE_BYTES_MAX, Extent, Record, decode_record
from .update import Action, Plan, Update, appended_sums, padded_payload, plan_update

T = TypeVar("T")

ENGINE_FORMAT = 1

_FORMAT_KEY = b"f"
_CHUNK, _GROUP = b"c", b"g"
GROUP_ROW_BYTES = 7 + GROUP_BLOCKS // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one target; may differ between targets."""

    reserve_bytes: int = 64 << 20
    """New blocks are refused (NoSpace) when the disk has less than this left."""

    def __post_init__(self) -> None:
        if self.reserve_bytes < 0:
            raise ValueError(f"reserve_bytes must not be negative: {self.reserve_bytes}")


class TargetIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Who this target is: written once, when its index is made."""

    format: int
    target: bytes
    """16 random bytes."""


class Change:
    """What one update wants of the next flush."""

    __slots__ = ("files", "freed", "named", "rows")

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes | None]] = []
        self.named: list[int] = []
        """Blocks that only this change knows of. Emptied once a record names them, or may name them."""
        self.freed: list[int] = []
        self.files: list[int] = []

    def index_bytes(self) -> int:
        """At most this much goes into the index transaction: the records, and a group row per block."""
        rows = sum(len(key) + (len(row) if row is not None else 0) for key, row in self.rows)
        return rows + GROUP_ROW_BYTES * (len(self.named) + len(self.freed))


class EngineCounters(msgspec.Struct):
    """What the engine did since it was opened; for benchmarks and metrics."""

    flushes: int = 0
    updates: int = 0
    payload_bytes: int = 0
    """Bytes callers asked to write."""
    block_bytes: int = 0
    """Bytes written to block files for it."""


class ChunkEngine:
    """Open it with `ChunkEngine.open`; close it with `close`."""

    def __init__(self, disk: Disk, index: KV, runtime: Runtime, config: EngineConfig, identity: TargetIdentity) -> None:
        self._disk = disk
        self._index = index
        self._runtime = runtime
        self._flushes = GroupCommit(runtime, self._flush, weigh=Change.index_bytes, weight_max=TRANSACTION_BYTES_MAX)
        self._named_files: set[int] = set()
        """Files whose directory entry is durable."""
        self._reads_by_epoch: dict[int, int] = {}
        self._epoch = 0
        self._limbo: deque[tuple[int, list[int]]] = deque()
        """(epoch, freed positions): free once no read of that epoch or an earlier one is left."""
        self._failure: str | None = None
        self._calls = 0
        """Calls in the air that may use the disk."""
        self._closing: asyncio.Future[None] | None = None
        """Set by `close`, which waits for it if there are calls."""
        self.allocator = Allocator(disk, reserve_bytes=config.reserve_bytes)
        self.reader = BlockReader(disk, self.allocator)
        self.identity = identity
        self.counters = EngineCounters()

    @classmethod
    async def open(cls, disk: Disk, index: KV, runtime: Runtime, *, config: EngineConfig | None = None) -> ChunkEngine:
        """Open the target on `disk` and `index`, made when `index` is empty. Raises StoreFormat for a newer one."""

        async def identify(txn: Transaction) -> TargetIdentity:
            row = await txn.get(_FORMAT_KEY)
            if row is not None:
                return msgspec.msgpack.decode(row, type=TargetIdentity)
            identity = TargetIdentity(ENGINE_FORMAT, runtime.random_bytes(16))
            txn.put(_FORMAT_KEY, msgspec.msgpack.encode(identity))
            return identity

        identity = await index.run(identify)
        if identity.format > ENGINE_FORMAT:
            raise StoreFormat(f"target format {identity.format} is newer than {ENGINE_FORMAT}; upgrade emberline")
        engine = cls(disk, index, runtime, config or EngineConfig(), identity)
        async for class_log2, group, bitmap in engine.groups():
            engine.allocator.classes[class_log2].load_group(group, bitmap)
        return engine

    async def close(self) -> None:
        """Refuse new calls (StoreClosed), finish what is in the air and close the files. The index is the caller's."""
        if self._closing is None:
            self._closing = self._runtime.future()
            if not self._calls:
                self._closing.set_result(None)
        await self._closing
        await self._flushes.drain()
        self._disk.close()

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, which uses the disk: `close` waits until it has ended. Raises StoreClosed."""
        if self._closing is not None:
            work.close()
            raise StoreClosed("the target was closed")
        self._calls += 1
        try:
            return await work
        finally:
            # Nothing is called before this: an interrupt is raised at calls, and would leave one counted for ever.
            self._calls -= 1
            self._call_ended()

    def _call_ended(self) -> None:
        if self._closing is not None and not self._calls and not self._closing.done():
            self._closing.set_result(None)

    # --- reads -----------------------------------------------------------------------------------------------------

    async def read(
        self, chunks: Sequence[bytes], offsets: Sequence[int], destinations: Sequence[memoryview]
    ) -> list[int | Corruption]:
        """Read committed bytes from `offsets[i]` of `chunks[i]` into `destinations[i]`.

        Returns per item the count (short at the chunk's end, 0 for an absent chunk) or the Corruption that was found;
        of a corrupt item the destination holds nothing to rely on. Raises StoreClosed.
        """
        if self._closing is not None:
            raise StoreClosed("the target was closed")
        epoch = self._epoch
        self._reads_by_epoch[epoch] = self._reads_by_epoch.get(epoch, 0) + 1
        self._calls += 1  # `during`, without its frames
        try:
            rows = await self._index.begin().get_many([_CHUNK + chunk for chunk in chunks])
            requests = self.reader.requests(chunks, rows, offsets, destinations)
            await self.reader.read(requests)
            results: list[int | Corruption] = []
            for index, request in enumerate(requests):
                if request.error is None:
                    results.append(request.count)
                else:
                    results.append(await self._read_again(request, rows[index], offsets[index], destinations[index]))
            return results
        finally:
            self._calls -= 1  # Before anything is called: see `during`.
            self._end_read(epoch)

    async def _read_again(
        self, failed: ReadRequest, row: bytes | None, offset: int, destination: memoryview
    ) -> int | Corruption:
        """A mismatch is damage only if the record still says the same: an append may have reused a truncated tail."""
        assert failed.error is not None
        while True:
            new_row = (await self._index.begin().get_many([_CHUNK + failed.chunk]))[0]
            if new_row == row:
                return failed.error
            row = new_row
            (failed,) = self.reader.requests([failed.chunk], [row], [offset], [destination])
            await self.reader.read([failed])
            if failed.error is None:
                return failed.count

    def _end_read(self, epoch: int) -> None:
        if self._closing is not None:
            self._call_ended()
        left = self._reads_by_epoch[epoch] - 1
        if left:
            self._reads_by_epoch[epoch] = left
        else:
            del self._reads_by_epoch[epoch]
            if self._limbo:
                self._release_limbo()

    def _release_limbo(self) -> None:
        oldest = min(self._reads_by_epoch, default=self._epoch + 1)
        while self._limbo and self._limbo[0][0] < oldest:
            for position in self._limbo.popleft()[1]:
                self.allocator.release(position)

    async def record(self, chunk: bytes) -> Record | None:
        """The record of a chunk, decoded. Raises Corruption."""
        row = await self._index.begin().get(_CHUNK + chunk)
        return None if row is None else decode_record(chunk, row)

    async def scan(
        self, begin: bytes, end: bytes, *, limit: int = RANGE_ROWS_MAX, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """(chunk, undecoded record) of [begin, end), at most `limit`."""
        rows = await self._index.begin().range(
            _CHUNK + begin, _CHUNK + end, limit=limit, reverse=reverse, snapshot=True
        )
        return [(key[1:], row) for key, row in rows]

    def snapshot(self) -> Transaction:
        """The index as it is now, for `records` and `groups`: they raise Conflict once it is not so any more."""
        return self._index.begin()

    async def records(self, *, at: Transaction | None = None) -> AsyncIterator[tuple[bytes, bytes]]:
        """Every (chunk, undecoded record), in order. Without `at` not one state: a page at a time."""
        async for key, row in self._rows(_CHUNK, _CHUNK + b"\xff", at):
            yield key[1:], row

    async def groups(self, *, at: Transaction | None = None) -> AsyncIterator[tuple[int, int, int]]:
        """Every (class log2, group, bitmap of the blocks that records name)."""
        async for key, row in self._rows(_GROUP, _GROUP + b"\xff", at):
            yield key[1], int.from_bytes(key[2:], "big"), int.from_bytes(row, "little")

    async def _rows(self, begin: bytes, end: bytes, at: Transaction | None) -> AsyncIterator[tuple[bytes, bytes]]:
        while page := await (at or self._index.begin()).range(begin, end, snapshot=True):
            for row in page:
                yield row
            begin = page[-1][0] + b"\x00"

    # --- updates ---------------------------------------------------------------------------------------------------

    async def prepare(self, updates: Sequence[Update], *, publish: bool = False) -> list[int]:
        """Apply `updates` (each of another chunk) as pending versions, durably; returns their versions.

        All of one call share one flush, but each update is atomic by itself: if one raises, none of this call's became
        visible. `publish=True` commits in the same flush. A repeated request (same or lower sequence of the same
        client and channel as the chunk's last) changes nothing and returns the version it had.
        Raises NoSpace, Corruption (a partial write over damaged bytes), StaleChunk, TargetFailed, StoreClosed.
        """
        return await self.during(self._prepare(updates, publish))

    async def _prepare(self, updates: Sequence[Update], publish: bool) -> list[int]:
        self._check_alive()
        assert len({update.chunk for update in updates}) == len(updates), "a batch names a chunk once"
        rows = await self._index.begin().get_many([_CHUNK + update.chunk for update in updates])
        change = Change()
        writes: list[WriteItem] = []
        versions: list[int] = []
        try:
            for update, row in zip(updates, rows, strict=True):
                try:
                    record = decode_record(update.chunk, row) if row is not None else None
                except Corruption:
                    if update.action is not Action.REMOVE or not publish:
                        raise
                    # Which block it named is not known any more: the block is free again once fsck has looked.
                    change.rows.append((_CHUNK + update.chunk, None))
                    versions.append(0)
                    continue
                versions.append(await self._plan(update, record, publish, change, writes))
            if writes:
                await self._write(writes)
            if change.rows:
                change.files = sorted({file for file, _, _ in writes})
                await self._flushes.submit(change)
        except BaseException:
            for position in change.named:
                self.allocator.release(position)
            raise
        self.counters.updates += len(updates)
        return versions

    async def _plan(
        self, update: Update, record: Record | None, publish: bool, change: Change, writes: list[WriteItem]
    ) -> int:
        """Work out one update into `change` and `writes`; returns its version."""
        committed = record.committed if record is not None else None
        pending = record.pending if record is not None else None
        current = committed.version if committed is not None else 0
        if record is not None and update.request.client == record.request.client != bytes(16):
            same_channel = update.request.channel == record.request.channel
            if same_channel and update.request.sequence <= record.request.sequence:
                return current + 1 if record.is_pending else current
        version = update.version if update.version is not None else current + 1
        if version != current + 1:
            raise StaleChunk(
                f"update {version} of chunk {describe_chunk(update.chunk)} does not follow committed version {current}"
            )
        granule_log2 = record.granule_log2 if record is not None else update.granule_log2
        block_bytes = 1 << position_class(committed.position) if committed is not None else 0
        plan = plan_update(update, committed, pending, block_bytes=block_bytes)
        if plan.way == "nothing" or (plan.way == "remove" and record is None):
            return current
        extent = await self._next_extent(update, committed, granule_log2, version, plan, change, writes)
        if pending is not None and (committed is None or pending.position != committed.position):
            change.freed.append(pending.position)
        # An update that nobody repeats (a truncate, say) must not make a repeated write before it look new.
        request = record.request if record is not None and update.request == NO_REQUEST else update.request
        if publish:
            row = None
            if extent is not None:
                row = Record(granule_log2, extent, None, False, request).encode(update.chunk)
            if committed is not None and (extent is None or extent.position != committed.position):
                change.freed.append(committed.position)
        else:
            row = Record(granule_log2, committed, extent, extent is None, request).encode(update.chunk)
        change.rows.append((_CHUNK + update.chunk, row))
        self.counters.payload_bytes += len(update.payload)
        return version

    async def _next_extent(
        self,
        update: Update,
        committed: Extent | None,
        granule_log2: int,
        version: int,
        plan: Plan,
        change: Change,
        writes: list[WriteItem],
    ) -> Extent | None:
        """The extent after `update` (None: removed), with the writes that make it true."""
        granule, way = 1 << granule_log2, plan.way
        if way == "remove":
            return None
        if way == "truncate":
            assert committed is not None
            sums = await self._truncated_sums(update.chunk, committed, granule_log2, update.offset)
            return self._with_sums(committed, update.offset, version, update.chain_version, sums, writes)
        if way == "in place":
            assert committed is not None
            payload = padded_payload(update, begin=committed.length)
            old_sums = await self.reader.sums(update.chunk, committed, granule_log2)
            sums = appended_sums(old_sums, length=committed.length, granule=granule, payload=payload)
            file, block = self.allocator.place(committed.position)
            writes.append((file, payload, block + committed.length))
            length = committed.length + len(payload)
            return self._with_sums(committed, length, version, update.chain_version, sums, writes)
        if way == "copy":
            assert committed is not None
            payload = await self._merged(update, committed, granule_log2, plan.length)
        else:
            payload = padded_payload(update, begin=0)
        position = self._allocate(len(payload))
        change.named.append(position)
        file, block = self.allocator.place(position)
        writes.append((file, payload, block))
        sums = cumulative_sums(payload, granule=granule)
        fresh = Extent(position, 0, version, update.chain_version, b"")
        return self._with_sums(fresh, len(payload), version, update.chain_version, sums, writes)

    def _allocate(self, length: int) -> int:
        try:
            return self.allocator.allocate(length)
        except TargetFailed as error:
            raise self._fail(error.message) from error

    def _with_sums(
        self, extent: Extent, length: int, version: int, chain_version: int, sums: bytes, writes: list[WriteItem]
    ) -> Extent:
        """`extent` at its new length, its sums in the record or in the side slot that is not in use."""
        if len(sums) <= SUMS_INLINE_BYTES_MAX:
            return Extent(extent.position, length, version, chain_version, sums)
        slot = 1 - extent.slot if extent.slot is not None else 0
        file, offset = self.allocator.place_side(extent.position, slot)
        writes.append((file, memoryview(sums), offset))
        return Extent(extent.position, length, version, chain_version, b"", slot, crc32c(sums))

    async def _merged(self, update: Update, committed: Extent, granule_log2: int, length: int) -> memoryview:
        """What a new block gets: the committed bytes, cut or grown to `length`, with the payload over them."""
        merged = memoryview(bytearray(length))
        await self.reader.read_extent(update.chunk, committed, granule_log2, 0, merged[: committed.length])
        merged[update.offset : update.offset + len(update.payload)] = update.payload
        return merged

    async def _truncated_sums(self, chunk: bytes, committed: Extent, granule_log2: int, length: int) -> bytes:
        """Sums of the first `length` bytes. Only the granule that is cut is read."""
        sums = await self.reader.sums(chunk, committed, granule_log2)
        whole = length >> granule_log2
        begin = whole << granule_log2
        tail = memoryview(bytearray(length - begin))
        await self.reader.read_extent(chunk, committed, granule_log2, begin, tail)
        return appended_sums(sums[: 4 * whole], length=begin, granule=1 << granule_log2, payload=tail)

    async def commit(self, chunks: Sequence[bytes], versions: Sequence[int]) -> None:
        """Publish pending versions, durably.

        A version that is committed already is fine, and so is an absent chunk (its removal was published); any other
        version: StaleChunk. Raises TargetFailed, StoreClosed.
        """
        await self.during(self._commit(chunks, versions))

    async def _commit(self, chunks: Sequence[bytes], versions: Sequence[int]) -> None:
        self._check_alive()
        rows = await self._index.begin().get_many([_CHUNK + chunk for chunk in chunks])
        change = Change()
        for chunk, row, version in zip(chunks, rows, versions, strict=True):
            record = decode_record(chunk, row) if row is not None else None
            if record is None:
                continue
            committed, pending = record.committed, record.pending
            current = committed.version if committed is not None else 0
            if version <= current:
                continue
            if not record.is_pending or version != current + 1:
                raise StaleChunk(
                    f"chunk {describe_chunk(chunk)} has no pending version {version}, committed is {current}"
                )
            if committed is not None and (pending is None or pending.position != committed.position):
                change.freed.append(committed.position)
            published = Record(record.granule_log2, pending, None, False, record.request)
            change.rows.append((_CHUNK + chunk, published.encode(chunk) if pending is not None else None))
        if change.rows:
            await self._flushes.submit(change)

    async def free_leaked(self, positions: Sequence[int]) -> None:
        """Free blocks that are marked as taken and that no record names, durably. See `scrub.check`."""
        self._check_alive()
        change = Change()
        change.freed = list(positions)
        await self.during(self._flushes.submit(change))

    def trim(self) -> int:
        """Give the space of wholly free block groups back to the file system; returns the bytes. Raises StoreClosed.

        Call it where services run (see `Portal.run`): nothing else of the engine may run meanwhile.
        """
        if self._closing is not None:
            raise StoreClosed("the target was closed")
        return self.allocator.trim()

    # --- flushing --------------------------------------------------------------------------------------------------

    async def _write(self, writes: list[WriteItem]) -> None:
        self._check_alive()
        try:
            await self._disk.write(writes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    "disk is full: remove files, then run `emberline fs trash empty` and `emberline fs gc --now`"
                ) from error
            raise self._fail(f"a write failed: {error}") from error
        self.counters.block_bytes += sum(len(payload) for _, payload, _ in writes)

    async def _flush(self, changes: list[Change]) -> None:
        """Sync the data of all `changes`, then commit their records and bitmaps in one index transaction."""
        self._check_alive()
        files = sorted({file for change in changes for file in change.files})
        try:
            if files:
                await self._disk.sync(files)
            if new_files := [file for file in files if file not in self._named_files]:
                await self._disk.sync_directory()
                self._named_files.update(new_files)
        except OSError as error:
            raise self._fail(f"fsync failed: {error}") from error
        freed = [position for change in changes for position in change.freed]
        named = [position for change in changes for position in change.named]
        groups = self.allocator.group_rows(named, freed)
        txn = self._index.begin()
        for change in changes:
            for key, row in change.rows:
                if row is None:
                    txn.delete(key)
                else:
                    txn.put(key, row)
        for (class_log2, group), bitmap in groups.items():
            txn.put(_GROUP + bytes([class_log2]) + group.to_bytes(5, "big"), bitmap.to_bytes(32, "little"))
        # More blocks given up than taken is a deletion: it may use the index's reserve on a full disk.
        try:
            await txn.commit(reclaims=len(freed) > len(named))
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, TargetFailed | UpdateUnknown):
                raise
            # It may have happened: which blocks are free is known again after a restart only.
            for change in changes:
                change.named.clear()
            failed = self._fail(f"an index commit failed: {error!r}")
            if isinstance(error, Exception):
                raise failed from error
            raise
        self.allocator.adopt(groups)
        for change in changes:
            change.named.clear()
        self.counters.flushes += 1
        if freed:
            self._limbo.append((self._epoch, freed))
            self._epoch += 1
            self._release_limbo()

    def _fail(self, reason: str) -> TargetFailed:
        self._failure = reason
        return TargetFailed(f"the target stopped taking writes: {reason}")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise TargetFailed(
                f"the target stopped taking writes: {self._failure}; check the disk and reopen the store"
            )


__all__ = ["Action", "ChunkEngine", "EngineConfig", "EngineCounters", "Update"]
