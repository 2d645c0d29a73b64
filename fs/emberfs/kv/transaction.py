"""The optimistic layer that engines share: what a transaction reads, when it conflicts, how commits are grouped.

An engine gives synchronous primitives over the newest applied state; this layer makes them the transactions of
`types`. It keeps no engine snapshot. A value is read from the newest state and handed out only if the history says
that nobody wrote it since the transaction began, so whatever a transaction saw was true at its `read version`.

Group commit. A commit that finds nobody at it becomes the leader and applies everything queued in one engine
transaction, a *flight*; those who come meanwhile queue for the next one. What a flight writes becomes visible when it
has landed, as one new version. While it is in the air the engine may already show it, so the rows it replaces are
kept (`_before`) and readers get those: a reader never waits for an fsync of somebody else.

Invariants:
  - A transaction is checked against applied versions, the flight, and the queue, so the queue can always be applied
    in order; `add` and `max` meet their row only then.
  - A flight is driven by a caller only if it cannot suspend there (`_may_lead`), for FLIGHTS_LED_MAX flights at most;
    otherwise by a task of the KV. No cancelled caller leaves others without an answer.
  - Everything here runs between two awaits of one runtime, so there are no locks.

Does not know: files, or how an engine stores a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import Conflict, LimitExceeded, NoSpace, StoreClosed, TargetFailed, UpdateUnknown
from ..runtime import Runtime
from ..stopwatch import current
from .batch import Batch, Row, Scan, looked_at, overlay
from .history import History, Interval, WriteSet
from .limits import check_interval, check_key, check_limit, refuse_key
from .types import KEY_BYTES_MAX, RANGE_ROWS_MAX, RUN_ATTEMPTS_MAX, TRANSACTION_BYTES_MAX, TRANSACTION_TIME_MAX_S
from .writing import Writing

T = TypeVar("T")

FLIGHTS_LED_MAX = 2
"""A caller applies its own commit and at most one more group: it must not serve others for ever."""
FLIGHT_BYTES_MAX = 2 * TRANSACTION_BYTES_MAX
"""A longer queue is applied in several flights."""


class OptimisticKV:
    """Base of the engines. A subclass has the primitives `_get`, `_scan`, `_apply_group`, `_may_lead`, `_release`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._version = 0  # of the newest applied flight; -1 once closed, so that no reader takes the short way
        self._history = History()
        self._flight: WriteSet | None = None
        self._before: dict[bytes, bytes | None] = {}
        self._queue: list[Batch] = []
        self._queued = WriteSet()
        self._leader: asyncio.Task[None] | None = None
        self._led = False
        self._landings: list[asyncio.Future[None]] = []
        self._closed: str | None = None
        self._failed: Exception | None = None

    @property
    def failure(self) -> Exception | None:
        """Why no commit is taken any more until the store is opened again; None: they are."""
        return self._failed

    # The primitives of an engine.

    def _get(self, key: bytes) -> bytes | None:
        """The row in the newest applied state, as bytes of its own."""
        raise NotImplementedError

    def _get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`_get` of several keys."""
        return [self._get(key) for key in keys]

    def _scan(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[Row]:
        """Up to `limit` rows of [begin, end) in the newest applied state."""
        raise NotImplementedError

    async def _apply_group(self, group: Sequence[Batch]) -> None:
        """Make all batches durable, in order, at once. NoSpace, LimitExceeded: nothing happened. Others: not known."""
        raise NotImplementedError

    def _may_lead(self) -> bool:
        """True if `_apply_group` would not suspend here, so that the caller cannot be cancelled inside it."""
        raise NotImplementedError

    def _release(self) -> None:
        """Let go of the files."""

    # The interface of `types.KV`.

    def begin(self) -> OptimisticTransaction:
        if self._closed is not None:
            raise StoreClosed(self._closed)
        return OptimisticTransaction(self, self._version)

    def stamp(self) -> int | None:
        return self._version

    def unchanged(self, keys: Sequence[bytes], stamp: int) -> bool:
        return not any(self._changed(key, stamp) for key in keys)

    def begin_at(self, version: int) -> OptimisticTransaction:
        """A transaction that goes on from a `stamp` of before; it conflicts if history does not reach back there."""
        if self._closed is not None:
            raise StoreClosed(self._closed)
        return OptimisticTransaction(self, version)

    async def commit_batch(
        self, batch: Batch, version: int, keys: set[bytes] | None, intervals: list[Interval] | None
    ) -> None:
        """Commit what a transaction wrote that read `keys` and `intervals` at `version`. Raises what `commit` does."""
        self._check_writable()
        if keys or intervals:
            self._validate(keys or set(), intervals or [], version)
        await self._submit(batch)

    async def run(self, work: Callable[[OptimisticTransaction], Awaitable[T]], *, reclaims: bool = False) -> T:
        attempts = 0
        while True:
            attempts += 1
            transaction = self.begin()
            try:
                result = await work(transaction)
                await transaction.commit(reclaims=reclaims)
            except Conflict:
                if attempts == RUN_ATTEMPTS_MAX:
                    raise
                # The winner may still be in the queue: before it has landed every attempt would lose again.
                await self.landed()
            else:
                return result

    async def close(self) -> None:
        if self._closed is not None:
            return
        self._closed = "the key-value store was closed"
        while self._led:
            await self._landing()
        self._version = -1
        self._release()

    # Reading and checking, for transactions.

    def _changed(self, key: bytes, version: int) -> bool:
        """True if an applied version above `version` wrote `key`. Asked only when `version` is not the newest."""
        if self._version < 0:
            raise StoreClosed(self._closed or "")
        return version < self._history.forgotten_version or self._history.touches_key(key, version)

    def _read(self, key: bytes, version: int) -> bytes | None:
        if version != self._version and self._changed(key, version):
            raise Conflict("a row changed since the transaction began")
        if self._flight is not None:
            if key in self._before:
                return self._before[key]
            if self._flight.clears and self._flight.clears_key(key):
                raise Conflict("a row is being deleted")
        return self._get(key)

    def _read_interval(self, begin: bytes, end: bytes, limit: int, reverse: bool, version: int) -> list[Row]:
        if self._version < 0:
            raise StoreClosed(self._closed or "")
        if self._flight is None:
            rows = self._scan(begin, end, limit, reverse)
        else:
            rows = overlay(self._scan, self._before, (), begin, end, limit, reverse)
        begin, end = looked_at(rows, begin, end, limit, reverse)
        if version != self._version and (
            version < self._history.forgotten_version or self._history.touches_interval(begin, end, version)
        ):
            raise Conflict("a row of the range changed since the transaction began")
        if self._flight is not None and self._flight.clears_interval(begin, end):
            raise Conflict("a row of the range is being deleted")
        return rows

    def _validate(self, keys: set[bytes], intervals: list[Interval], version: int) -> None:
        """Raise Conflict unless everything read at `version` is still so after all that is applied or queued."""
        history = self._history
        if version != self._version and (
            version < history.forgotten_version
            or any(history.touches_key(key, version) for key in keys)
            or any(history.touches_interval(begin, end, version) for begin, end in intervals)
        ):
            raise Conflict("a row that the transaction read has changed")
        if self._queued.touches_any(keys, intervals) or (
            self._flight is not None and self._flight.touches_any(keys, intervals)
        ):
            raise Conflict("a row that the transaction read is being changed")

    # Committing.

    def _check_writable(self) -> None:
        if self._closed is not None:
            raise StoreClosed(self._closed)
        if self._failed is not None:
            raise TargetFailed("the key-value store takes no more commits: open it again") from self._failed

    async def _submit(self, batch: Batch) -> None:
        """Queue `batch` and return when it is durable. On the stopwatch it is time of the disk."""
        self._queue.append(batch)
        self._queued.extend(batch.writes, batch.clears)
        watch = current.get()
        if watch is not None:
            watch.begin_disk()
        try:
            if not self._led and self._may_lead():
                self._led = True
                await self._lead(FLIGHTS_LED_MAX)
            else:
                batch.waiter = self._runtime.future()
                if not self._led:
                    self._led = True
                    self._leader = self._runtime.spawn(self._lead(None), "kv-commits")
                await batch.waiter
        finally:
            if watch is not None:
                watch.end_disk()
        if batch.error is not None:
            raise batch.error

    async def _lead(self, flights_max: int | None) -> None:
        """Fly until the queue is empty; after `flights_max` flights let a task of the KV go on."""
        flights = 0
        try:
            while self._queue and flights != flights_max:
                await self._fly()
                flights += 1
        finally:
            self._led = bool(self._queue)
            if self._queue:
                self._leader = self._runtime.spawn(self._lead(None), "kv-commits")

    async def _fly(self) -> None:
        """Apply one group, and answer everybody in it."""
        group, written = self._take_group()
        try:
            self._before = dict(zip(written.keys, self._get_many(list(written.keys)), strict=True))
            self._flight = written
            await self._apply_all(group)
        except Exception as error:
            self._failed = error
            _answer(group, TargetFailed, f"a commit failed and may or may not have happened: {error}")
        except BaseException:
            # Interrupted between two steps of the engine: all of the group is there or nothing, and either is fine.
            _answer(group, UpdateUnknown, "a commit was interrupted and may or may not have happened")
            raise
        finally:
            self._land(group, written)

    def _take_group(self) -> tuple[list[Batch], WriteSet]:
        count = size_bytes = 0
        for batch in self._queue:
            size_bytes += batch.size_bytes
            if count and size_bytes > FLIGHT_BYTES_MAX:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        written, self._queued = WriteSet(), WriteSet()
        for batch in group:
            written.extend(batch.writes, batch.clears)
        for batch in self._queue:
            self._queued.extend(batch.writes, batch.clears)
        return group, written

    async def _apply_all(self, group: list[Batch]) -> None:
        """Apply the group as one; if that is refused, one by one, so that only those fail that really do not fit."""
        if self._failed is not None:
            raise self._failed
        try:
            await self._apply_group(group)
        except (NoSpace, LimitExceeded) as error:
            if len(group) == 1:
                group[0].error = error
                return
            for batch in group:
                try:
                    await self._apply_group([batch])
                except (NoSpace, LimitExceeded) as batch_error:
                    batch.error = batch_error

    def _land(self, group: list[Batch], written: WriteSet) -> None:
        self._flight = None
        self._before = {}
        self._version += 1
        now_s = self._runtime.now_s()
        self._history.record(self._version, now_s, written)
        self._history.forget(now_s - TRANSACTION_TIME_MAX_S)
        waiters = [batch.waiter for batch in group if batch.waiter is not None]
        for waiter in waiters + self._landings:
            if not waiter.done():
                waiter.set_result(None)
        self._landings = []

    async def _landing(self) -> None:
        """Wait until the present flight has landed."""
        future = self._runtime.future()
        self._landings.append(future)
        await future

    async def landed(self) -> None:
        """Wait until everything queued by now has landed."""
        flights = (self._flight is not None) + bool(self._queue)
        while flights and self._led:
            await self._landing()
            flights -= 1


def _answer(group: list[Batch], error: type[TargetFailed | UpdateUnknown], message: str) -> None:
    for batch in group:
        if batch.error is None:
            batch.error = error(message)


class OptimisticTransaction(Writing):
    """The `types.Transaction` of every engine here."""

    __slots__ = ("_intervals", "_keys", "_kv", "_version")

    def __init__(self, kv: OptimisticKV, version: int) -> None:
        super().__init__()
        self._kv = kv
        self._version = version
        self._keys: set[bytes] | None = None
        self._intervals: list[Interval] | None = None

    @property
    def version(self) -> int:
        """The read version: the `stamp` at which it began."""
        return self._version

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        if self._batch is not None:
            return self._get_overlaid(key, snapshot)
        if not 0 < len(key) <= KEY_BYTES_MAX:
            refuse_key(key)
        kv = self._kv
        value = kv._get(key) if kv._version == self._version and kv._flight is None else kv._read(key, self._version)
        if not snapshot:
            if self._keys is None:
                self._keys = {key}
            else:
                self._keys.add(key)
        return value

    def _get_overlaid(self, key: bytes, snapshot: bool) -> bytes | None:
        check_key(key)
        assert self._batch is not None
        needs_base, value = self._batch.own(key)
        if not needs_base:
            return value
        base = self._kv._read(key, self._version)
        if not snapshot:
            self._keys = self._keys or set()
            self._keys.add(key)
        return self._batch.resolve(key, base)

    async def get_many(self, keys: Sequence[bytes], *, snapshot: bool = False) -> list[bytes | None]:
        kv = self._kv
        if self._batch is not None or kv._version != self._version or kv._flight is not None:
            return [await self.get(key, snapshot=snapshot) for key in keys]
        for key in keys:
            check_key(key)
        values = kv._get_many(keys)
        if not snapshot:
            self._keys = self._keys or set()
            self._keys.update(keys)
        return values

    async def range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = RANGE_ROWS_MAX,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        check_interval(begin, end)
        check_limit(limit)
        if begin >= end:
            return []
        scan: Scan = self._scan_at_version
        if self._batch is None:
            rows = scan(begin, end, limit, reverse)
        else:
            rows = overlay(scan, self._batch.writes, self._batch.clears, begin, end, limit, reverse)
        if not snapshot:
            self._intervals = self._intervals or []
            self._intervals.append(looked_at(rows, begin, end, limit, reverse))
        return rows

    def _scan_at_version(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[Row]:
        return self._kv._read_interval(begin, end, limit, reverse, self._version)

    async def commit(self, *, reclaims: bool = False) -> None:
        assert not self._done, "a transaction was committed twice"
        self._done = True
        kv, batch = self._kv, self._batch
        if batch is None:
            # Every read was checked against the read version when it was made: that is where this one stands.
            if kv._closed is not None:
                raise StoreClosed(kv._closed)
            return
        batch.reclaims = reclaims
        await kv.commit_batch(batch, self._version, self._keys, self._intervals)
