"""Every transport passes the same suite: `memory` within a process, `tcp` in plain, over TLS and on a unix socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Connect, ConnectionConformance, NetworkConformance, Run
from emberfs.transport import Connection, MemoryConnection, Service, TcpConfig, TcpNetwork
from emberfs.transport.certificates import issue, make_authority


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture(scope="module")
def tls_config(tmp_path_factory: pytest.TempPathFactory) -> TcpConfig:
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder / "authority", cluster="c1", now_s=time.time())
    files = issue(folder / "authority", ["127.0.0.1"], role="storage", into=folder / "own", now_s=time.time())
    return TcpConfig(cluster="c1", role="storage", tls=files)


class TestMemory(ConnectionConformance):
    @pytest.fixture
    def connect(self) -> Connect:
        async def connect(service: Service) -> Connection:
            return MemoryConnection(service)

        return connect


class TestPlain(NetworkConformance):
    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime)

    @pytest.fixture
    def address(self) -> str:
        return "127.0.0.1:0"


class TestUnix(TestPlain):
    @pytest.fixture
    def address(self, tmp_path: Path) -> str:
        return f"unix:{tmp_path}/socket"


class TestTls(TestPlain):
    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime, tls_config: TcpConfig) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, tls_config)
