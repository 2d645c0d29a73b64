"""Every transport passes the same suite: `memory` within a process, `tcp` in plain, over TLS and on a unix socket.

And with large buffers by UCX, where its library is installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from emberfs.messages import Done, Message, Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Connect, ConnectionConformance, NetworkConformance, Run
from emberfs.transport import Connection, LoadConfig, MemoryConnection, Network, Service, TcpConfig, TcpNetwork
from emberfs.transport.certificates import issue, make_authority
from emberfs.transport.connection import TcpConnection
from emberfs.transport.region import allocate

needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="UCX is not installed: pip install 'emberline[ucx]'"
)
CALM = LoadConfig(wait_s_max=600.0)
"""However slow the machine is, nothing is refused."""


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
    return TcpConfig(cluster="c1", role="storage", tls=files, shares_memory=False, load=CALM)


class TestMemory(ConnectionConformance):
    @pytest.fixture
    def connect(self) -> Connect:
        async def connect(service: Service) -> Connection:
            return MemoryConnection(service)

        return connect


class TestPlain(NetworkConformance):
    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, TcpConfig(shares_memory=False, load=CALM))

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


class TestShared(TestPlain):
    """Through the server's door, with memory in place of payloads."""

    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, TcpConfig(load=CALM))


class TestSharedUnix(TestShared, TestUnix):
    pass


class TestSharedTls(TestPlain):
    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime, tls_config: TcpConfig) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, replace(tls_config, shares_memory=True))


class TestRegions(TestShared):
    """The caller's own memory lies in regions."""

    @pytest.fixture
    def connect(self, server: Network, client: Network, address: str) -> Connect:
        async def connect(service: Service) -> Connection:
            return Copying(client.connection((await server.serve(address, service)).address))

        return connect


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@needs_ucx
class TestUcx(TestPlain):
    """Large buffers by UCX, over each kind of device that every machine has."""

    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime, kind: str) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, TcpConfig(shares_memory=False, ucx=kind))

    @pytest.fixture
    def connect(self, server: Network, client: Network, address: str) -> Connect:
        async def connect(service: Service) -> Connection:
            warming = Warming(service)
            connection = client.connection((await server.serve(address, warming)).address)
            assert isinstance(connection, TcpConnection)
            while not connection.has_rail:
                assert await connection.call(Usage()) == Done()
            warming.is_warm = True
            return connection

        return connect


@needs_ucx
class TestUcxTls(TestUcx):
    @pytest.fixture
    def make_network(self, runtime: AsyncioRuntime, kind: str, tls_config: TcpConfig) -> Callable[[], TcpNetwork]:
        return lambda: TcpNetwork(runtime, replace(tls_config, ucx=kind))


class Warming:
    """A service that answers for another one until it is told that the rail is up."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.is_warm = False

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        return await self.service.handle(request, buffers) if self.is_warm else Done()


class Copying:
    """A connection whose buffers are all in one region, between neighbours that must stay as they are."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def call(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        memory = allocate(sum(map(len, buffers)) + len(buffers) + 1)
        inside, begin = [], 1
        for buffer in buffers:
            inside.append(memory[begin : begin + len(buffer)])
            inside[-1][:] = buffer
            begin += len(buffer) + 1
        try:
            return await self._connection.call(request, inside)
        finally:
            for buffer, view in zip(buffers, inside, strict=True):
                if not buffer.readonly:
                    buffer[:] = view
                view[:] = bytes(len(view))
            assert bytes(memory) == bytes(len(memory)), "bytes beside a buffer changed"
