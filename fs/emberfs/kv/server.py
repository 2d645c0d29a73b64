"""The kv role: serves an engine of this process to `RemoteKV`s of others.

A client names the version that it reads at; the server answers it as a local transaction would that began then, and
validates a commit exactly like a local one. It keeps nothing for an open transaction.

Invariants:
  - Version numbers never repeat: the number of this start (durable) is their upper half. What a client read before a
    restart conflicts after it.
  - A commit goes on when its sender is gone, and a copy of it gets the same answer (see `commits`).
  - A Conflict is answered only when what it lost against has landed: the next attempt is not lost for the same reason.

Does not know: what the rows mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ..errors import Conflict, EmberError, LimitExceeded, ProtocolError, StoreClosed, Unavailable, UpdateUnknown
from ..messages import Done, KvCommit, KvForget, KvGet, KvRows, KvScan, KvValues, Message
from ..runtime import Runtime
from ..waiting import look
from .batch import Batch, Row
from .commits import EPOCH_KEY, OWN_BEGIN, OWN_END, Channel, Commits, outside
from .limits import check_interval, check_key, check_limit, check_value, refuse_transaction
from .transaction import OptimisticKV, OptimisticTransaction
from .types import TRANSACTION_BYTES_MAX, decode_int, encode_int

VERSION_BITS = 40
"""Of a version number, those that count commits since the start."""
REPLY_BYTES_MAX = 4 << 20
PAGE_ROWS = 64
"""Read at once, before the size of a reply is looked at."""


class KvServer:
    """Serves `kv`, which stays the caller's. `start` before the first request, `close` after the last."""

    def __init__(self, kv: OptimisticKV, runtime: Runtime) -> None:
        self._kv = kv
        self._runtime = runtime
        self._commits = Commits(kv, runtime)
        self._epoch = 0
        """0: not serving."""
        self._flights: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin a new range of version numbers and read what is known of clients. Raises what a commit does."""

        async def next_epoch(transaction: OptimisticTransaction) -> int:
            epoch = decode_int(await transaction.get(EPOCH_KEY)) + 1
            transaction.put(EPOCH_KEY, encode_int(epoch))
            return epoch

        await self._commits.load()
        self._epoch = await self._kv.run(next_epoch, reclaims=True)

    async def close(self) -> None:
        """Take no more requests and wait for commits in flight."""
        self._epoch = 0
        for flight in list(self._flights):
            await _ended(flight)

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        """Serve one request. Raises Unavailable before `start` and after `close`."""
        if not self._epoch:
            raise Unavailable("the key-value server is not up")
        handler = HANDLERS.get(type(request))
        if handler is None:
            raise ProtocolError(f"a key-value server does not serve {type(request).__name__}")
        try:
            return await handler(self, request)
        except Conflict:
            await self._kv.landed()
            raise
        except StoreClosed as error:
            raise Unavailable("the key-value server is going down") from error

    # Reading.

    async def _get(self, request: KvGet) -> KvValues:
        transaction = self._begin(request.version)
        values: list[bytes | None] = []
        size_bytes = 0
        for index in range(0, len(request.keys), PAGE_ROWS):
            keys = request.keys[index : index + PAGE_ROWS]
            for key in keys:
                _check_key(key)
            page = await transaction.get_many(keys, snapshot=True)
            values += page
            size_bytes += sum(len(value) for value in page if value is not None)
            if size_bytes > REPLY_BYTES_MAX:
                break
        return KvValues(self._version_of(transaction), values)

    async def _scan(self, request: KvScan) -> KvRows:
        check_interval(request.begin, request.end)
        check_limit(request.limit)
        transaction = self._begin(request.version)
        rows: list[Row] = []
        size_bytes = 0
        parts = outside(request.begin, request.end)
        for begin, end in reversed(parts) if request.reverse else parts:
            while begin < end and len(rows) < request.limit:
                if size_bytes > REPLY_BYTES_MAX:
                    return KvRows(self._version_of(transaction), rows, more=True)
                limit = min(PAGE_ROWS, request.limit - len(rows))
                page = await transaction.range(begin, end, limit=limit, reverse=request.reverse, snapshot=True)
                rows += page
                size_bytes += sum(len(key) + len(value) for key, value in page)
                if len(page) < limit:
                    break
                if request.reverse:
                    end = page[-1][0]
                else:
                    begin = page[-1][0] + b"\x00"
        return KvRows(self._version_of(transaction), rows)

    def _begin(self, version: int | None) -> OptimisticTransaction:
        return self._kv.begin() if version is None else self._kv.begin_at(self._local(version))

    def _local(self, version: int) -> int:
        """The engine's number of a version. Raises Conflict if it is of another start."""
        if version >> VERSION_BITS != self._epoch:
            raise Conflict("the key-value server was restarted since the transaction began")
        return version & ((1 << VERSION_BITS) - 1)

    def _version_of(self, transaction: OptimisticTransaction) -> int:
        return self._epoch << VERSION_BITS | transaction.version

    # Committing.

    async def _commit(self, request: KvCommit) -> Done:
        channel = self._commits.channel(request.client, request.channel)
        while request.number > channel.seen and channel.flight is not None:
            # Its client has given that one up and gone on.
            await _ended(channel.flight)
        if request.number < channel.seen:
            raise UpdateUnknown("a late copy of a commit whose sender has gone on")
        if request.number == channel.applied:
            return Done()
        if channel.flight is None:
            channel.seen = request.number
            channel.flight = self._runtime.spawn(self._apply(channel, request), "kv-commit")
            self._flights.add(channel.flight)
            channel.flight.add_done_callback(self._landed)
        # A sender that is gone must not stop it: a copy may be waiting for the outcome, too.
        await asyncio.shield(channel.flight)
        return Done()

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        look(flight)

    async def _apply(self, channel: Channel, request: KvCommit) -> None:
        try:
            batch = _batch_of(request)
            self._commits.sweep(batch)
            self._commits.note(channel, request.number, batch)
            version, keys, intervals = 0, set(request.keys), request.intervals
            if keys or intervals:
                version = self._local(request.version or 0)
                intervals = [part for interval in intervals for part in outside(*interval)]
            await self._kv.commit_batch(batch, version, keys, intervals)
            channel.applied = request.number
        finally:
            channel.flight = None

    async def _forget(self, request: KvForget) -> Done:
        batch = Batch()
        batch.reclaims = True
        self._commits.forget(request.client, batch)
        await self._kv.commit_batch(batch, 0, None, None)
        return Done()


HANDLERS: dict[type[Message], Callable[[KvServer, Any], Coroutine[Any, Any, Message]]] = {
    KvGet: KvServer._get,
    KvScan: KvServer._scan,
    KvCommit: KvServer._commit,
    KvForget: KvServer._forget,
}


def _batch_of(request: KvCommit) -> Batch:
    """The writes of a request, checked again: a peer may be another program."""
    batch = Batch()
    for begin, end in request.clears:
        check_interval(begin, end)
        batch.clears += outside(begin, end)
        batch.size_bytes += len(begin) + len(end)
    for key, value in request.rows:
        _check_key(key)
        check_value(value or b"")
        batch.writes[key] = value
        batch.size_bytes += len(key) + len(value or b"")
    for key, steps in request.steps:
        _check_key(key)
        batch.writes[key] = tuple(steps)
        batch.size_bytes += len(key) + 8 * len(steps)
    if batch.size_bytes > TRANSACTION_BYTES_MAX:
        refuse_transaction()
    batch.reclaims = request.reclaims
    return batch


def _check_key(key: bytes) -> None:
    check_key(key)
    if OWN_BEGIN <= key < OWN_END:
        raise LimitExceeded("keys of this prefix are the key-value server's own")


async def _ended(flight: asyncio.Task[None]) -> None:
    try:
        await asyncio.shield(flight)
    except EmberError:
        pass  # Its own sender is told.
