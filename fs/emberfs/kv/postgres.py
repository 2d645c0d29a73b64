"""The ordered KV in a PostgreSQL database, for metadata that several servers share and that outlives each of them.

Why not one database transaction per transaction, at SERIALIZABLE? It would hold a connection for as long as its owner
thinks, count a snapshot read as a read, abort blind writes that meet, and order transactions in some serial order, not
in the one in which they ended: a manager that lost its lease could still commit after its successor had begun. So the
optimistic scheme of `transaction` is kept, with the history in the database: every row carries the version that wrote
it, a read is handed out only if it is not newer than the read version, and a commit is one call of a function there.
That function takes the lock on the head row first, validates, and applies. Commits are thus serial, in the order of
their versions, without a serialization failure ever; and as no client holds that lock, none that stalls holds it long.

What keeps that fast: all commits that meet in one server go as one *flight*, one call and one fsync.

Invariants:
  - A statement sees exactly the versions up to the head's of its own snapshot.
  - One flight of a client is in the air, under a number. One that was lost is sent again under the same number and gets
    the answer of the first; so UpdateUnknown is raised only if no server could be reached for `retry_s`.
  - The driver runs in tasks of the runtime's loop, never in a caller's thread.

A database that replicates without waiting (`synchronous_standby_names` empty) may lose commits when it fails over:
that is the operator's choice. With a transaction pooler in between, use its session mode.

Does not know: what the rows mean. Reserves no disk space for deletions.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg

from ..errors import (
    AccessDenied,
    Conflict,
    EmberError,
    InvalidPath,
    NoSpace,
    NotFound,
    StoreFormat,
    TargetFailed,
    Unavailable,
    UpdateUnknown,
)
from ..runtime import Runtime
from . import postgres_schema as schema
from .batch import Batch, Row
from .buffered import BufferedKV, Reads
from .postgres_hosts import CONNECTION_LOST, NOT_SERVING, Hosts
from .transaction import FLIGHT_BYTES_MAX

T = TypeVar("T")

FLIGHT_BATCHES_MAX = 128
CLIENT_ID_BYTES = 16
FAREWELL = asyncpg.Connection.close.__qualname__


@dataclass(frozen=True, kw_only=True, slots=True)
class PostgresKVConfig:
    """How a database is used."""

    connections_max: int = 8
    """Of this process. A transaction holds one only while a statement runs."""
    connect_timeout_s: float = 5.0
    """For one attempt to connect to one host; and how long `open` looks for a server that answers anything at all."""
    answer_timeout_s: float = 10.0
    """A statement without an answer for so long counts as lost."""
    retry_s: float = 30.0
    """For how long a read or commit is tried while no writable server is there: longer than a failover takes."""

    def __post_init__(self) -> None:
        if self.connections_max < 1:
            raise ValueError(f"connections_max is at least 1, not {self.connections_max}")
        for name in ("connect_timeout_s", "answer_timeout_s", "retry_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is more than 0, not {getattr(self, name)}")


@dataclass(slots=True)
class _Passenger:
    """A commit that waits for its flight."""

    reads: Reads
    batch: Batch
    landed: asyncio.Future[None]


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """Nothing that we send leaves anything behind in a session: no round trip to clean it up."""

    def get_reset_query(self) -> str:
        return ""


class PostgresKV(BufferedKV):
    """An ordered transactional KV in one database, or in one schema of it (`?search_path=NAME` in the URL)."""

    @classmethod
    async def open(cls, url: str, runtime: Runtime, *, config: PostgresKVConfig | None = None) -> PostgresKV:
        """Connect to `postgresql://user@host,host/database` and make the tables if there are none.

        Of several hosts the one that takes writes is used, again after each failover. Raises Unavailable, AccessDenied,
        NotFound (no such database), InvalidPath, StoreFormat (made by a newer emberline).
        """
        config = config or PostgresKVConfig()
        kv = cls(url, runtime, config)
        try:
            await kv._persist(kv._reach, changes=False)
            kv._retry_s = config.retry_s
            await kv._persist(lambda: kv._on_loop(kv._set_up()), changes=False)
        except BaseException:
            await kv.close()
            raise
        return kv

    def __init__(self, url: str, runtime: Runtime, config: PostgresKVConfig) -> None:
        # Only a server that has been there is waited for as long as a failover takes: another may be a wrong address.
        super().__init__(runtime, retry_s=min(config.connect_timeout_s, config.retry_s))
        self._hosts = Hosts(url, connect_timeout_s=config.connect_timeout_s)
        self._config = config
        self._pool: Any = None
        self._client = runtime.random_bytes(CLIENT_ID_BYTES)
        self._flights = 0
        self._queue: list[_Passenger] = []
        self._flying: asyncio.Task[None] | None = None

    # Reading.

    async def _fetch(self, keys: Sequence[bytes], version: int | None) -> tuple[int, list[bytes | None]]:
        found_version, rows = await self._read(version, schema.GET, list(keys), version)
        values = dict(rows)
        return found_version, [values.get(key) for key in keys]

    async def _scan(
        self, begin: bytes, end: bytes, limit: int, reverse: bool, version: int | None
    ) -> tuple[int, list[Row]]:
        statement = schema.SCAN_BACKWARDS if reverse else schema.SCAN
        return await self._read(version, statement, begin, end, limit, version)

    async def _read(self, version: int | None, statement: str, *arguments: Any) -> tuple[int, list[Row]]:
        records = await self._execute(statement, *arguments)
        newest_version, is_stale = records[0][0], records[0][1]
        rows = [record for record in records if record[2] is not None]
        if is_stale or (version is not None and any(record[4] > version for record in rows)):
            raise Conflict("a row changed since the transaction began")
        return newest_version if version is None else version, [(record[2], record[3]) for record in rows]

    # Committing.

    async def _commit(self, reads: Reads, batch: Batch) -> None:
        passenger = _Passenger(reads, batch, self._runtime.future())
        self._queue.append(passenger)
        if self._flying is None:
            self._flying = self._runtime.spawn(self._fly(), "kv-commits")
        await passenger.landed

    async def _fly(self) -> None:
        """Fly until the queue is empty."""
        try:
            while self._queue:
                group = self._take_group()
                try:
                    await self._apply_all(group)
                except Exception as error:
                    if not isinstance(error, EmberError):
                        error = TargetFailed(f"a commit failed and may or may not have happened: {error}")
                    for passenger in group:
                        _answer(passenger, copy.copy(error))
        finally:
            self._flying = None

    def _take_group(self) -> list[_Passenger]:
        count = size_bytes = 0
        for passenger in self._queue[:FLIGHT_BATCHES_MAX]:
            size_bytes += passenger.batch.size_bytes
            if count and size_bytes > FLIGHT_BYTES_MAX:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    async def _apply_all(self, group: list[_Passenger]) -> None:
        """Apply the group as one; if the database refuses it, one by one, so that only the culprit fails."""
        try:
            await self._apply_group(group)
        except (NoSpace, TargetFailed):
            if len(group) == 1:
                raise
            for passenger in group:
                try:
                    await self._apply_group([passenger])
                except (NoSpace, TargetFailed) as error:
                    _answer(passenger, error)

    async def _apply_group(self, group: list[_Passenger]) -> None:
        self._flights += 1
        arguments = _columns([passenger.reads for passenger in group], [passenger.batch for passenger in group])
        records = await self._execute(schema.COMMIT, self._client, self._flights, *arguments, changes=True)
        refused = set(records[0][0])
        for number, passenger in enumerate(group, start=1):
            lost = number in refused
            _answer(passenger, Conflict("a row that the transaction read has changed") if lost else None)

    # The database.

    async def _execute(self, statement: str, *arguments: Any, changes: bool = False) -> list[Any]:
        """Run one statement, again after a lost connection. Raises what `_translate` makes of errors."""
        work = (statement, arguments)
        return await self._persist(lambda: self._on_loop(self._execute_once(*work)), changes=changes)

    async def _on_loop(self, work: Any) -> Any:
        return await self._runtime.spawn(work, "kv-postgres")

    async def _reach(self) -> None:
        """Raises Unavailable if no server answers, not even that it does not serve now."""
        try:
            await self._on_loop(self._execute_once("SELECT", ()))
        except Unavailable:
            if not self._hosts.was_reached:
                raise

    async def _execute_once(self, statement: str, arguments: tuple[Any, ...]) -> list[Any]:
        was_sent = False
        try:
            pool = await self._connected()
            async with pool.acquire(timeout=self._acquire_timeout_s) as connection:
                was_sent = True
                try:
                    return await connection.fetch(statement, *arguments)  # type: ignore[no-any-return]
                except TimeoutError:
                    connection.terminate()  # Or the pool waits for a farewell.
                    raise
        except EmberError:
            raise
        except (asyncpg.PostgresError, *CONNECTION_LOST) as error:
            if isinstance(error, (asyncpg.ReadOnlySQLTransactionError, TimeoutError)):
                # The server became a standby under us, or its machine is gone: no connection to it is of use.
                await self._pool.expire_connections()
            raise _translate(error, was_sent) from error

    @property
    def _acquire_timeout_s(self) -> float:
        """Until a connection is free, and renewed by asking every host."""
        return self._config.answer_timeout_s + self._config.connect_timeout_s * len(self._hosts)

    async def _connected(self) -> Any:
        if self._pool is None:
            self._pool = asyncpg.create_pool(
                connect=self._connect,
                min_size=0,
                max_size=self._config.connections_max,
                command_timeout=self._config.answer_timeout_s,
                server_settings=schema.SETTINGS,
                connection_class=_Connection,
            )
        return await self._pool

    async def _connect(self, url: None, **options: Any) -> Any:
        """What the pool calls: it has no URL, the hosts do."""
        return await self._hosts.connect(**options)

    async def _set_up(self) -> None:
        """Find the tables or make them."""
        try:
            async with (await self._connected()).acquire() as connection, connection.transaction():
                await connection.execute(f"SELECT pg_advisory_xact_lock({schema.SETUP_LOCK})")
                if await connection.fetchval("SELECT to_regclass('emberfs_head')") is None:
                    await connection.execute(schema.TABLES + schema.INTEGERS + schema.COMMIT_FUNCTION)
                found = await connection.fetchval("SELECT format FROM emberfs_head")
        except EmberError:
            raise
        except (asyncpg.PostgresError, *CONNECTION_LOST) as error:
            raise _translate(error, was_sent=False) from error
        if found != schema.FORMAT:
            raise StoreFormat(f"the tables have format {found}, this emberline knows {schema.FORMAT}: upgrade it")

    async def _release(self) -> None:
        if self._flying is not None:  # Of callers that were cancelled.
            await self._flying
        if self._pool is not None:
            await self._on_loop(self._disconnect())

    async def _disconnect(self) -> None:
        try:
            if self._flights:
                await self._execute_once(schema.FORGET, (self._client,))
        except EmberError:
            pass  # The database forgets a silent client by itself.
        self._pool.terminate()
        # The pool says farewell to connections that expired in tasks of which it keeps no track.
        farewells = [each for each in asyncio.all_tasks() if getattr(each.get_coro(), "__qualname__", "") == FAREWELL]
        for task in farewells:
            task.cancel()
        if farewells:
            await asyncio.wait(farewells)


def _answer(passenger: _Passenger, error: EmberError | None) -> None:
    if passenger.landed.done():
        return
    if error is None:
        passenger.landed.set_result(None)
    else:
        passenger.landed.set_exception(error)


def _columns(reads: list[Reads], batches: list[Batch]) -> Iterable[Any]:
    """The arguments of `COMMIT` after the first two."""
    yield [each.version for each in reads]
    yield from _ragged([[(key,) for key in each.keys] for each in reads], 1)
    yield from _ragged([each.intervals for each in reads], 2)
    yield from _ragged([each.clears for each in batches], 2)
    writes = [each.writes.items() for each in batches]
    yield from _ragged([[(key,) for key, write in each if write is None] for each in writes], 1)
    yield from _ragged([[(key, write) for key, write in each if isinstance(write, bytes)] for each in writes], 2)
    steps = [[(key, step) for key, write in each if isinstance(write, tuple) for step in write] for each in writes]
    yield from _ragged([[(key, kind == "max", number) for key, (kind, number) in each] for each in steps], 3)


def _ragged(groups: Sequence[Sequence[tuple[Any, ...]]], width: int) -> Iterable[list[Any]]:
    """Where each group ends (from 0), then `width` columns of all groups."""
    yield [0, *itertools.accumulate(len(group) for group in groups)]
    for column in range(width):
        yield [item[column] for group in groups for item in group]


def _translate(error: Exception, was_sent: bool) -> EmberError:
    """What an error of the driver or the database means to the caller."""
    if isinstance(error, asyncpg.ClientConfigurationError):
        return InvalidPath(f"the database URL cannot be right: {error}")
    if isinstance(error, (*CONNECTION_LOST, *NOT_SERVING)):
        reason = str(error) or type(error).__name__
        if was_sent:
            return UpdateUnknown(f"the connection to the database was lost: {reason}")
        return Unavailable(f"the database cannot be reached: {reason}")
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return Unavailable(f"the database takes no writes: {error}")
    if isinstance(error, asyncpg.TransactionRollbackError):
        return Conflict(f"the database rolled a commit back: {error}")
    if isinstance(error, (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InsufficientPrivilegeError)):
        return AccessDenied(f"the database refuses us: {error}")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return NotFound(f"no such database: {error}")
    if isinstance(error, asyncpg.DiskFullError):
        return NoSpace(f"the database is out of disk space: {error}")
    return TargetFailed(f"the database refused a statement: {error}")
