"""A URL leads to the right engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emberfs.errors import InvalidPath
from emberfs.kv import KvServer, LmdbKV, MemoryKV, RemoteKV, open_kv
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.kv import Run, get, put_rows
from emberfs.transport import Connection, MemoryConnection


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


class OneServer:
    """A network with one address."""

    def __init__(self, server: KvServer) -> None:
        self._server = server

    def connection(self, address: str) -> Connection:
        assert address == "node:7000"
        return MemoryConnection(self._server)


def test_a_directory(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = run(open_kv(str(tmp_path / "new"), runtime))
    assert isinstance(kv, LmdbKV)
    run(kv.close())


def test_a_server(runtime: AsyncioRuntime, run: Run) -> None:
    server = KvServer(MemoryKV(runtime), runtime)
    run(server.start())
    kv = run(open_kv("kv://node:7000", runtime, network=OneServer(server)))  # type: ignore[arg-type]
    assert isinstance(kv, RemoteKV)
    run(put_rows(kv, {b"a": b"1"}))
    assert run(get(kv, b"a")) == b"1"
    run(kv.close())


@pytest.mark.parametrize("url", ["kv://node:7000", "redis://node", "postgresql:///name?host=a,b&port=1,2,3"])
def test_what_cannot_be_opened(runtime: AsyncioRuntime, run: Run, url: str) -> None:
    with pytest.raises(InvalidPath):
        run(open_kv(url, runtime))
