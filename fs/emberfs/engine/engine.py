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
  - The version of a chunk grows by one with each update of our own. Where tombstones are kept it goes on after a
    removal; a chunk without a row begins above the floor.

The caller (the storage service) holds a lock per chunk during `prepare` and `commit`; a batch names a chunk once.
Does not know: files, chains, other replicas (`replica` adds what those ask for), or the network.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import Any, Self, TypeVar

from ..batching import GroupCommit
from ..checksum import crc32c, cumulative_sums
from ..disk import Disk, WriteItem
from ..errors import Corruption, NoSpace, StaleChunk, StoreClosed, StoreFormat, TargetFailed, UpdateUnknown
from ..kv.types import KV, RANGE_ROWS_MAX, TRANSACTION_BYTES_MAX, Transaction, decode_int
from ..runtime import Runtime
from ..types import describe_chunk
from .allocator import Allocator, position_class
from .extents import Extents, Known
from .limbo import Limbo
from .reader import BlockReader, ReadRequest
from .record import (
    SUMS_INLINE_BYTES_MAX,
    Extent,
    Record,
    Stamp,
    decode_record,
    is_clean,
    is_tombstone,
    last_sum,
    row_to_read,
)
from .rows import CHUNK, FLOOR_KEY, GROUP, Change, is_named, only_deletes, request_key
from .target import EngineConfig, EngineCounters, TargetIdentity, TargetSpace, identify
from .update import Action, Plan, Prepared, Update, appended_sums, padded_payload, plan_update

T = TypeVar("T")


class CoreEngine:
    """Open it with `open`; close it with `close`."""

    def __init__(self, disk: Disk, index: KV, runtime: Runtime, config: EngineConfig, identity: TargetIdentity) -> None:
        self._disk = disk
        self._index = index
        self._runtime = runtime
        self._flushes = GroupCommit(runtime, self._flush, weigh=Change.index_bytes, weight_max=TRANSACTION_BYTES_MAX)
        self._named_files: set[int] = set()
        """Files whose directory entry is durable."""
        self._failure: str | None = None
        self._calls = 0
        """Calls in the air that may use the disk."""
        self._closing: asyncio.Future[None] | None = None
        """Set by `close`, which waits for it if there are calls."""
        self._keeps_tombstones = config.keeps_tombstones
        self.floor = 0
        """Chunks without a row begin above this version."""
        self.allocator = Allocator(disk, reserve_bytes=config.reserve_bytes)
        self._limbo = Limbo(self.allocator.release)
        self.reader = BlockReader(disk, self.allocator)
        self.extents = Extents(config.extents_bytes_max, self.allocator.place)
        self.identity = identity
        self.counters = EngineCounters()

    @classmethod
    async def open(cls, disk: Disk, index: KV, runtime: Runtime, *, config: EngineConfig | None = None) -> Self:
        """Open the target on `disk` and `index`, made when `index` is empty.

        Raises StoreFormat for a newer format, or another target than the configured one.
        """
        config = config or EngineConfig()
        identity = await index.run(partial(identify, runtime=runtime, target=config.target))
        if config.target is not None and config.target != identity.target:
            raise StoreFormat(f"the disk holds target {identity.target.hex()}, not {config.target.hex()}")
        engine = cls(disk, index, runtime, config, identity)
        engine.floor = decode_int(await index.begin().get(FLOOR_KEY))
        async for class_log2, group, bitmap in engine.groups():
            engine.allocator.load_group(class_log2, group, bitmap)
        return engine

    @property
    def failure(self) -> str | None:
        """Why the target takes no updates any more; None: it does."""
        return self._failure

    async def close(self) -> None:
        """Refuse new calls (StoreClosed), finish what is in the air and close the files. The index is the caller's."""
        if self._closing is None:
            self._closing = self._runtime.future()
            if not self._calls:
                self._closing.set_result(None)
        await self._closing
        await self._flushes.drain()
        self.extents.stop()
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
        self,
        chunks: Sequence[bytes],
        offsets: Sequence[int],
        destinations: Sequence[memoryview],
        *,
        pending: Sequence[bool] | None = None,
    ) -> list[int | Corruption]:
        """Read committed bytes from `offsets[i]` of `chunks[i]` into `destinations[i]`.

        If `pending[i]`, the pending version is read instead, where there is one (a removal reads as absent).
        Returns per item the count (short at the chunk's end, 0 for an absent chunk) or the Corruption that was found;
        of a corrupt item the destination holds nothing to rely on. Raises StoreClosed.
        """
        if self._closing is not None:
            raise StoreClosed("the target was closed")
        epoch = self._limbo.begin_read()
        self._calls += 1  # `during`, without its frames
        try:
            changes = self.extents.changes
            known = list(map(self.extents.get, chunks)) if pending is None else [None]
            if None not in known:
                rows: list[bytes | None] = [each.row for each in known if each is not None]
                requests = self.reader.known_requests(chunks, known, offsets, destinations)
            else:
                rows = await self._index.begin().get_many([CHUNK + chunk for chunk in chunks])
                if pending is not None:
                    rows = list(map(row_to_read, chunks, rows, pending))
                requests = self.reader.requests(chunks, rows, offsets, destinations)
            await self.reader.read(requests)
            if pending is None and None in known:
                self._note(requests, rows, changes)
            results: list[int | Corruption] = []
            for index, request in enumerate(requests):
                if request.error is None:
                    results.append(request.count)
                    continue
                is_pending = pending is not None and pending[index]
                again = self._read_again(request, rows[index], offsets[index], destinations[index], is_pending)
                results.append(await again)
            return results
        finally:
            self._calls -= 1  # Before anything is called: see `during`.
            self._end_read(epoch)

    def _note(self, requests: Sequence[ReadRequest], rows: Sequence[bytes | None], changes: int) -> None:
        """Remember where what was read lies."""
        for request, row in zip(requests, rows, strict=True):
            if request.extent is not None and row is not None and request.error is None:
                known = Known(row, request.extent, request.granule_log2, request.sums, is_clean(row))
                self.extents.note(request.chunk, known, changes=changes)

    async def _read_again(
        self, failed: ReadRequest, row: bytes | None, offset: int, destination: memoryview, is_pending: bool
    ) -> int | Corruption:
        """A mismatch is damage only if the record still says the same: an append may have reused a truncated tail."""
        assert failed.error is not None
        while True:
            new_row = await self._index.begin().get(CHUNK + failed.chunk)
            new_row = row_to_read(failed.chunk, new_row, is_pending)
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
        self._limbo.end_read(epoch)

    async def record(self, chunk: bytes) -> Record | None:
        """The record of a chunk, decoded. Raises Corruption."""
        row = await self._index.begin().get(CHUNK + chunk)
        return None if row is None else decode_record(chunk, row)

    async def scan(
        self, begin: bytes, end: bytes, *, limit: int = RANGE_ROWS_MAX, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """(chunk, undecoded record) of [begin, end), at most `limit` and RANGE_ROWS_MAX. Tombstones are left out."""
        low, high = CHUNK + begin, CHUNK + end
        limit = min(limit, RANGE_ROWS_MAX)
        found: list[tuple[bytes, bytes]] = []
        while len(found) < limit:
            page = await self._index.begin().range(low, high, limit=limit, reverse=reverse, snapshot=True)
            found += [(key[1:], row) for key, row in page if not is_tombstone(row)]
            if len(page) < limit:
                break
            if reverse:
                high = page[-1][0]
            else:
                low = page[-1][0] + b"\x00"
        return found[:limit]

    def snapshot(self) -> Transaction:
        """The index as it is now, for `records` and `groups`: they raise Conflict once it is not so any more."""
        return self._index.begin()

    async def records(self, *, at: Transaction | None = None) -> AsyncIterator[tuple[bytes, bytes]]:
        """Every (chunk, undecoded record), tombstones too, in order. Without `at` not one state: a page at a time."""
        async for key, row in self._rows(CHUNK, CHUNK + b"\xff", at):
            yield key[1:], row

    async def groups(self, *, at: Transaction | None = None) -> AsyncIterator[tuple[int, int, int]]:
        """Every (class log2, group, bitmap of the blocks that records name)."""
        async for key, row in self._rows(GROUP, GROUP + b"\xff", at):
            yield key[1], int.from_bytes(key[2:], "big"), int.from_bytes(row, "little")

    async def _rows(self, begin: bytes, end: bytes, at: Transaction | None) -> AsyncIterator[tuple[bytes, bytes]]:
        while page := await (at or self._index.begin()).range(begin, end, snapshot=True):
            for row in page:
                yield row
            begin = page[-1][0] + b"\x00"

    # --- updates ---------------------------------------------------------------------------------------------------

    async def prepare(
        self, updates: Sequence[Update], *, publish: bool = False, checks_requests: bool = True
    ) -> list[Prepared]:
        """Apply `updates` (each of another chunk) as pending versions, durably; returns what they made of their chunks.

        All of one call share one flush, but each update is atomic by itself: if one raises, none of this call's became
        visible. `publish=True` commits in the same flush. A pending version of the chunk is replaced.

        A request that was published before, or is the pending one's, changes nothing and gets the present answer; one
        older than its channel's last raises StaleChunk. `checks_requests=False`: it is applied all the same, as a
        replica does that a predecessor tells to.

        An explicit version must be the committed one + 1. For a chunk that is not there (or a tombstone), and for a
        REPLACE or REMOVE, any higher one will do; else StaleChunk.
        Raises NoSpace, Corruption (a partial write over damaged bytes), StaleChunk, TargetFailed, StoreClosed.
        """
        return await self.during(self._prepare(updates, publish, checks_requests))

    async def _prepare(self, updates: Sequence[Update], publish: bool, checks_requests: bool) -> list[Prepared]:
        self._check_alive()
        assert len({update.chunk for update in updates}) == len(updates), "a batch names a chunk once"
        keys = [CHUNK + update.chunk for update in updates]
        checked = [update for update in updates if checks_requests and is_named(update.request)]
        keys += [request_key(update.request.client, update.request.channel) for update in checked]
        rows = await self._index.begin().get_many(keys)
        last = dict(zip([update.chunk for update in checked], rows[len(updates) :], strict=True)) if checked else {}
        change = Change()
        writes: list[WriteItem] = []
        prepared: list[Prepared] = []
        try:
            for update, row in zip(updates, rows, strict=not last):
                try:
                    record = decode_record(update.chunk, row) if row is not None else None
                except Corruption:
                    if update.action is not Action.REMOVE or not publish or self._keeps_tombstones:
                        raise
                    change.delete_damaged(update.chunk)
                    prepared.append(Prepared(0, 0, 0))
                    continue
                if update.chunk in last:
                    present = await self._present_answer(update, record, last[update.chunk], publish)
                    if present is not None:
                        prepared.append(present)
                        continue
                prepared.append(await self._plan(update, record, publish, change, writes))
            await self._submit(change, writes)
        except BaseException:
            self._release_named(change)
            raise
        self.counters.updates += len(updates)
        return prepared

    async def _present_answer(
        self, update: Update, record: Record | None, last_row: bytes | None, publish: bool
    ) -> Prepared | None:
        """The answer to a request that came before; None: it is new. Raises StaleChunk for a late copy."""
        request = update.request
        last = decode_int(last_row) if last_row is not None else -1
        pending = record.request if record is not None and record.is_pending else None
        if pending is not None and pending[:2] != request[:2]:
            pending = None
        newest = max(last, pending.sequence if pending is not None else -1)
        if request.sequence < newest:
            raise StaleChunk(
                f"late copy of request {request.sequence} for chunk {describe_chunk(update.chunk)}: "
                f"{newest} was the last"
            )
        if request.sequence == last:
            return await self._summary(update.chunk, record, pending=False)
        if pending == request and not publish:
            return await self._summary(update.chunk, record, pending=True)
        return None

    async def _summary(self, chunk: bytes, record: Record | None, *, pending: bool) -> Prepared:
        """What the committed (or the pending) version of a chunk is. Raises Corruption."""
        if record is None:
            return Prepared(0, 0, 0)
        extent = record.pending if pending else record.committed
        if extent is None:
            return Prepared(record.pending_version if pending else record.version, 0, 0)
        sums = await self.reader.sums(chunk, extent, record.granule_log2)
        return Prepared(extent.version, extent.length, last_sum(sums))

    async def _plan(
        self, update: Update, record: Record | None, publish: bool, change: Change, writes: list[WriteItem]
    ) -> Prepared:
        """Work out one update into `change` and `writes`; returns what it makes of the chunk."""
        committed = record.committed if record is not None else None
        pending = record.pending if record is not None else None
        version = self._next_version(update, record)
        granule_log2 = record.granule_log2 if record is not None else update.granule_log2
        block_bytes = 1 << position_class(committed.position) if committed is not None else 0
        plan = plan_update(update, committed, pending, block_bytes=block_bytes)
        is_absent = record is None or (committed is None and not record.is_pending)
        makes_tombstone = self._keeps_tombstones and update.version is not None
        if plan.way == "nothing" or (plan.way == "remove" and is_absent and not makes_tombstone):
            return await self._summary(update.chunk, record, pending=False)
        extent = await self._next_extent(update, committed, granule_log2, version, plan, change, writes)
        removal = Stamp(version, update.chain_version) if extent is None else None
        if publish:
            new = self._published(granule_log2, extent, removal)
            change.note_request(update.request)
        else:
            tombstone = record.tombstone if record is not None else None
            new = Record(granule_log2, committed, extent, tombstone, removal, update.request)
        change.put_record(update.chunk, record, new)
        self.counters.payload_bytes += len(update.payload)
        if extent is None:
            return Prepared(version, 0, 0)
        return Prepared(version, extent.length, last_sum(extent.sums))

    def _next_version(self, update: Update, record: Record | None) -> int:
        current = record.version if record is not None else 0
        following = (current or self.floor) + 1
        if update.version is None or update.version == following:
            return following
        is_whole = record is None or record.committed is None or update.action in (Action.REPLACE, Action.REMOVE)
        # The floor binds our own numbers only: a head may have purged less than we have.
        if is_whole and update.version > current:
            return update.version
        raise StaleChunk(
            f"update {update.version} of chunk {describe_chunk(update.chunk)} does not follow committed version "
            f"{current}"
        )

    def _published(self, granule_log2: int, pending: Extent | None, removal: Stamp | None) -> Record | None:
        """The record once a pending version is committed; None: no row is left."""
        if pending is not None:
            return Record(granule_log2, pending)
        return Record(granule_log2, None, None, removal) if self._keeps_tombstones else None

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
            sums = await self._truncated_sums(update.chunk, committed, granule_log2, plan.length)
            return self._with_sums(committed, plan.length, version, update.chain_version, sums, writes)
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
        stamp = Stamp(version, update.chain_version)
        return self._fresh_extent(payload, granule_log2, stamp, change, writes, update.room_bytes)

    def _fresh_extent(
        self, payload: memoryview, granule_log2: int, versions: Stamp, change: Change, writes: list[WriteItem],
        room_bytes: int = 0,
    ) -> Extent:  # fmt: skip
        """The extent of `payload` in a new block."""
        position = self._allocate(max(len(payload), room_bytes))
        change.named.append(position)
        file, block = self.allocator.place(position)
        writes.append((file, payload, block))
        sums = cumulative_sums(payload, granule=1 << granule_log2)
        return self._with_sums(Extent(position, 0, *versions, b""), len(payload), *versions, sums, writes)

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
        return Extent(extent.position, length, version, chain_version, sums, slot, crc32c(sums))

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
        rows = await self._index.begin().get_many([CHUNK + chunk for chunk in chunks])
        change = Change()
        for chunk, row, version in zip(chunks, rows, versions, strict=True):
            record = decode_record(chunk, row) if row is not None else None
            if record is None or version <= record.version:
                continue
            if version != record.pending_version:
                raise StaleChunk(
                    f"chunk {describe_chunk(chunk)} has no pending version {version}, committed is {record.version}"
                )
            published = self._published(record.granule_log2, record.pending, record.removal)
            change.put_record(chunk, record, published)
            change.note_request(record.request)
        await self._submit(change, [])

    async def free_leaked(self, positions: Sequence[int]) -> None:
        """Free blocks that are marked as taken and that no record names, durably. See `scrub.check`."""
        self._check_alive()
        change = Change()
        change.freed = list(positions)
        await self.during(self._submit(change, []))

    def space(self) -> TargetSpace:
        """What the target takes, and what new data may."""
        try:
            return TargetSpace(self.allocator.used_bytes, self.allocator.free_bytes(), self.allocator.idle_bytes())
        except OSError:
            return TargetSpace(self.allocator.used_bytes, 0, 0)

    def trim(self, bytes_max: int) -> int:
        """Give the space of free blocks back to the file system: so many bytes, or a block; returns how many.

        Call it where services run: nothing else of the engine may run meanwhile. Raises StoreClosed, TargetFailed.
        """
        if self._closing is not None:
            raise StoreClosed("the target was closed")
        return self.allocator.trim(bytes_max)

    # --- flushing --------------------------------------------------------------------------------------------------

    async def _submit(self, change: Change, writes: list[WriteItem]) -> None:
        """Write the data, then return once a flush has made `change` durable."""
        if writes:
            await self._write(writes)
            change.files = sorted({file for file, _, _ in writes})
        if change.rows or change.maxima or change.freed:
            await self._flushes.submit(change)

    def _release_named(self, change: Change) -> None:
        """After a failure: the blocks that nobody got to know of are free again."""
        for position in change.named:
            self.allocator.release(position)

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
            for key, value in change.maxima:
                txn.max(key, value)
        for (class_log2, group), bitmap in groups.items():
            txn.put(GROUP + bytes([class_log2]) + group.to_bytes(5, "big"), bitmap.to_bytes(32, "little"))
        # More blocks given up than taken is a deletion, as are rows without blocks: it may use the index's reserve.
        reclaims = len(freed) > len(named) or (not named and only_deletes(changes))
        self.extents.begin_change(key[1:] for change in changes for key, _ in change.rows if key[:1] == CHUNK)
        try:
            await txn.commit(reclaims=reclaims)
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
        finally:
            self.extents.end_change()
        self.allocator.adopt(groups)
        for change in changes:
            change.named.clear()
            for key, value in change.maxima:
                if key == FLOOR_KEY:
                    self.floor = max(self.floor, value)
        self.counters.flushes += 1
        if freed:
            self._limbo.add(freed)
        self.extents.note_published(changes)

    def _fail(self, reason: str) -> TargetFailed:
        self._failure = reason
        self.extents.stop()
        return TargetFailed(f"the target stopped taking writes: {reason}")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise TargetFailed(
                f"the target stopped taking writes: {self._failure}; check the disk and reopen the store"
            )
