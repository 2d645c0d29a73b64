"""The client's way to the chains: what belongs to an item goes with it, wherever it is sent and however often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from emberfs.client.router import StorageRouter
from emberfs.errors import StaleChunk, Unavailable
from emberfs.messages import Done, Message, RemoveChunks, TruncateChunk
from emberfs.routing import Chain, ChainTarget, Routing, TargetState
from emberfs.testing.sim.loop import SimRuntime, run


class FakeRoutes:
    """Chain n has one target, at the server of that number; chains 1 and 3 have the same server."""

    client = b"c" * 16
    routing = Routing(1)

    def chain(self, chain: int) -> Chain:
        return Chain(chain, 10 * chain, (ChainTarget(b"%d" % (chain % 2), TargetState.SERVING),))

    def address(self, target: bytes) -> str:
        return target.decode()

    async def news(self, seen_version: int, timeout_s: float) -> None:
        pass


class Servers:
    """A network to servers that keep what they are sent, and raise what the test has put for their address."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.errors: dict[str, list[Exception]] = {}

    def connection(self, address: str) -> Any:
        return _Connection(self, address)


class _Connection:
    def __init__(self, servers: Servers, address: str) -> None:
        self.servers, self.address = servers, address

    async def call(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        self.servers.sent.append((self.address, request))
        if self.servers.errors.get(self.address):
            raise self.servers.errors[self.address].pop()
        return Done()


def test_expected_versions_go_with_their_chunks() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        servers.errors["1"] = [Unavailable("not now")]
        chunks = [b"a", b"b", b"c", b"d"]
        await router.call(RemoveChunks([1, 2, 3, 4], chunks, versions=[11, 12, 13, 14]))
        shares = {(address, tuple(share.chunks), tuple(share.versions)) for address, share in servers.sent}
        assert shares == {("1", (b"a", b"c"), (11, 13)), ("0", (b"b", b"d"), (12, 14))}
        assert [share.slots for address, share in servers.sent if address == "1"] == [[0, 2], [0, 2]]
        await router.call(RemoveChunks([1, 2], [b"a", b"b"]))
        assert servers.sent[-1][1].versions == []
        await router.call(TruncateChunk(1, b"a", 5, version=7))
        assert (servers.sent[-1][1].version, servers.sent[-1][1].chain_version) == (7, 10)

    run(0, main)


def test_a_chunk_that_changed_is_said_to_have() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        servers.errors["1"] = [StaleChunk("it changed")]
        with pytest.raises(StaleChunk):
            await router.call(RemoveChunks([1, 2], [b"a", b"b"], versions=[1, 1]))
        assert len(servers.sent) == 2, "and is not sent again"

    run(0, main)
