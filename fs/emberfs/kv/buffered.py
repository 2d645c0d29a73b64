"""The client half of an engine that is elsewhere: a transaction reads there, and buffers its writes here.

An engine gives three primitives: rows at a version, a range at a version, and "apply this batch if nothing of that was
written since". Such a transaction stands at the moment of its first read, which brings its read version along: until
then it has no relation to the engine, and one that only writes never reads at all.

Whoever serves the engine may be restarted or replaced. That is a stall and not an error: everything is tried again for
`retry_s`, after which a read or a commit that never left raises Unavailable, and a commit in doubt UpdateUnknown.

Does not know: how an engine is reached, or what it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from ..errors import Conflict, DeadlineExceeded, StoreClosed, Unavailable, UpdateUnknown
from ..runtime import Runtime
from .batch import Batch, Row, looked_at, merge
from .history import Interval
from .limits import check_interval, check_key, check_limit
from .types import RANGE_ROWS_MAX, RUN_ATTEMPTS_MAX
from .writing import Writing

T = TypeVar("T")

RETRY_PAUSE_MIN_S = 0.02
RETRY_PAUSE_MAX_S = 0.5


class Reads(NamedTuple):
    """What a commit depends on."""

    version: int | None
    """None: on nothing."""
    keys: list[bytes]
    intervals: list[Interval]


class BufferedKV:
    """Base of the engines elsewhere. A subclass has `_fetch`, `_scan`, `_commit` and `_release`."""

    def __init__(self, runtime: Runtime, *, retry_s: float) -> None:
        self._runtime = runtime
        self._retry_s = retry_s
        self._committing = 0
        self._drained: asyncio.Future[None] | None = None
        """Set while `close` waits for commits in flight."""
        self._closed = False

    # The primitives of an engine.

    async def _fetch(self, keys: Sequence[bytes], version: int | None) -> tuple[int, list[bytes | None]]:
        """(version, values) at `version`, or at the newest one. Raises Conflict."""
        raise NotImplementedError

    async def _scan(
        self, begin: bytes, end: bytes, limit: int, reverse: bool, version: int | None
    ) -> tuple[int, list[Row]]:
        """(version, up to `limit` rows of [begin, end)) at `version`, or at the newest one. Raises Conflict."""
        raise NotImplementedError

    async def _commit(self, reads: Reads, batch: Batch) -> None:
        """Apply `batch` if nothing of `reads` was written since. Raises what `types.Transaction.commit` does."""
        raise NotImplementedError

    async def _release(self) -> None:
        """Let go of connections."""

    # The interface of `types.KV`.

    def begin(self) -> BufferedTransaction:
        self.check_open()
        return BufferedTransaction(self)

    def stamp(self) -> int | None:
        return None

    def unchanged(self, keys: Sequence[bytes], stamp: int) -> bool:
        return False

    async def run(self, work: Callable[[BufferedTransaction], Awaitable[T]], *, reclaims: bool = False) -> T:
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
            else:
                return result

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._committing:
            self._drained = self._runtime.future()
            await self._drained
        await self._release()

    # For transactions and engines.

    def check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the key-value store was closed")

    async def commit_batch(self, reads: Reads, batch: Batch) -> None:
        """Commit what a transaction wrote."""
        self.check_open()
        self._committing += 1
        try:
            await self._commit(reads, batch)
        finally:
            self._committing -= 1
            if not self._committing and self._drained is not None:
                self._drained.set_result(None)

    async def _persist(self, attempt: Callable[[], Awaitable[T]], *, changes: bool) -> T:
        """Do `attempt` until somebody answered, for up to `retry_s`. `changes`: in doubt, raise UpdateUnknown."""
        give_up_s = self._runtime.now_s() + self._retry_s
        pause_s = RETRY_PAUSE_MIN_S
        in_doubt = False
        while True:
            try:
                return await attempt()
            except (Unavailable, UpdateUnknown, DeadlineExceeded) as error:
                in_doubt = in_doubt or (changes and not isinstance(error, Unavailable))
                if self._runtime.now_s() + pause_s > give_up_s:
                    if in_doubt:
                        raise UpdateUnknown(f"a commit may or may not have happened: {error}") from error
                    raise Unavailable(f"no answer from the key-value store for {self._retry_s:g} s: {error}") from error
            await self._runtime.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_PAUSE_MAX_S)


class BufferedTransaction(Writing):
    """The `types.Transaction` of an engine elsewhere."""

    __slots__ = ("_intervals", "_keys", "_kv", "_version")

    def __init__(self, kv: BufferedKV) -> None:
        super().__init__()
        self._kv = kv
        self._version: int | None = None
        self._keys: set[bytes] = set()
        self._intervals: list[Interval] = []

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        (value,) = await self.get_many((key,), snapshot=snapshot)
        return value

    async def get_many(self, keys: Sequence[bytes], *, snapshot: bool = False) -> list[bytes | None]:
        self._kv.check_open()
        for key in keys:
            check_key(key)
        batch = self._batch
        asked = [bytes(key) for key in dict.fromkeys(keys) if batch is None or batch.own(key)[0]]
        below = dict(zip(asked, await self._fetch(asked), strict=True)) if asked else {}
        if not snapshot:
            self._keys.update(asked)
        if batch is None:
            return [below[key] for key in keys]
        return [batch.resolve(key, below[key]) if key in below else batch.own(key)[1] for key in keys]

    async def _fetch(self, keys: list[bytes]) -> list[bytes | None]:
        while True:
            version, values = await self._kv._fetch(keys, self._version)
            if self._stands_at(version):
                return values

    def _stands_at(self, version: int) -> bool:
        """False if another first read of this transaction was quicker, at another version: then read again at that."""
        if self._version is None:
            self._version = version
        return self._version == version

    async def range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = RANGE_ROWS_MAX,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        self._kv.check_open()
        check_interval(begin, end)
        check_limit(limit)
        rows: list[Row] = []
        left_begin, left_end = begin, end
        while left_begin < left_end and len(rows) < limit:
            version, page = await self._kv._scan(left_begin, left_end, limit, reverse, self._version)
            if not self._stands_at(version):
                continue
            page_begin, page_end = looked_at(page, left_begin, left_end, limit, reverse)
            batch = self._batch
            rows += page if batch is None else merge(page, batch.writes, batch.clears, page_begin, page_end, reverse)
            left_begin, left_end = (left_begin, page_begin) if reverse else (page_end, left_end)
        rows = rows[:limit]
        if begin < end and not snapshot:
            self._intervals.append(looked_at(rows, begin, end, limit, reverse))
        return rows

    async def commit(self, *, reclaims: bool = False) -> None:
        assert not self._done, "a transaction was committed twice"
        self._done = True
        if self._batch is None:
            # Every read was as of the read version: that is where this one stands.
            self._kv.check_open()
            return
        self._batch.reclaims = reclaims
        version = self._version if self._keys or self._intervals else None
        await self._kv.commit_batch(Reads(version, list(self._keys), self._intervals), self._batch)
