"""A storage node with two targets, and the manager that it talks to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from emberfs.engine import ChunkEngine, EngineConfig
from emberfs.errors import (
    StaleRouting,
    Unavailable,
)
from emberfs.kv.memory import MemoryKV
from emberfs.messages import (
    ChunksRead,
    Done,
    GetRouting,
    Heartbeat,
    HeartbeatReply,
    Message,
    ReadChunks,
    RoutingReply,
    WriteChunks,
)
from emberfs.routing import Chain, ChainTarget, LocalState, Node, Role, Routing, Target, TargetState
from emberfs.settings import Config
from emberfs.storage import StorageNode
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.waiting import finish, pause

from tests.fs.chain_fakes import CHUNK, CLIENT, OTHER, Wire

TARGET, SECOND = b"t" * 16, b"u" * 16
SERVER = Node("s1", Role.STORAGE, "s1", b"incarnation")


class FakeManager:
    """Answers every heartbeat with what the test has put here, and holds questions for a newer routing."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.news: asyncio.Future[None] = runtime.future()
        self.routing = Routing(1, (SERVER,), (Target(TARGET, "s1", 1), Target(SECOND, "s1", 2)))
        self.sessions: list[bytes] = []
        self.heartbeats: list[Heartbeat] = []
        self.error: Exception | None = None
        self.nonsense = 0
        """So many questions for a newer routing have an answer that is none."""
        self.is_deaf = False
        """Heartbeats are refused."""
        self.lease_s = 2.5
        self.config_version = 1
        self.settings: dict[str, float] = {"tombstone_s": 10.0}

    def put(self, *chains: Chain, targets: Sequence[Target] | None = None, node: Node = SERVER) -> None:
        kept = self.routing.targets if targets is None else tuple(targets)
        self.routing = Routing(self.routing.version + 1, (node,), kept, chains)
        finish(self.news)
        self.news = self.runtime.future()

    async def handle(self, request: Message, _: Sequence[memoryview]) -> Message:
        if self.error is not None:
            raise self.error
        if isinstance(request, GetRouting):
            if request.version >= self.routing.version:
                await pause(self.runtime, request.wait_s, self.news)
            if request.wait_s and self.nonsense:
                self.nonsense -= 1
                return Done()
            return RoutingReply(self.routing if request.version < self.routing.version else None)
        assert isinstance(request, Heartbeat)
        if self.is_deaf:
            raise Unavailable("what?")
        self.heartbeats.append(request)
        config = Config(self.config_version, self.settings)
        return HeartbeatReply(self.routing, len(self.sessions), list(self.sessions), self.lease_s, config)


class Host:
    """A node with two targets, one for each of the chains 1 and 2."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime, self.wire, self.manager = runtime, Wire(), FakeManager(runtime)
        self.indexes: dict[bytes, MemoryKV] = {}
        self.disks: dict[bytes, SimDisk] = {}
        self.dropped: list[bytes] = []
        self.wire.services["m1"] = self.refuse
        self.wire.services["m2"] = self.manager.handle
        self.node = StorageNode(
            SERVER,
            runtime,
            self.wire,
            ["m1", "m2"],
            self.open_target,
            drop_target=self.drop_target,
        )

    async def refuse(self, request: Message, _: Sequence[memoryview]) -> Message:
        raise StaleRouting("the primary is m2")

    async def open_target(self, target: bytes) -> ChunkEngine:
        self.disks.setdefault(target, SimDisk(self.runtime))
        self.indexes.setdefault(target, MemoryKV(self.runtime))
        config = EngineConfig(reserve_bytes=0, keeps_tombstones=True, target=target)
        return await ChunkEngine.open(self.disks[target], self.indexes[target], self.runtime, config=config)

    async def drop_target(self, target: bytes) -> None:
        self.dropped.append(target)

    def chain(self, number: int, target: bytes, *, version: int = 1) -> Chain:
        generation = self.node.replicas[number].engine.identity.generation
        return Chain(number, version, (ChainTarget(target, TargetState.SERVING, generation),))

    async def serve(self) -> None:
        """Both chains serve, and the client has a session."""
        await self.beats()
        self.manager.put(self.chain(1, TARGET), self.chain(2, SECOND))
        self.manager.sessions.append(CLIENT)
        await self.beats()

    async def beats(self, seconds: float = 2.0) -> None:
        await self.runtime.sleep(seconds)

    async def write(self, payload: bytes, *, sequence: int = 1, client: bytes = CLIENT) -> None:
        request = WriteChunks(
            client, 0, sequence, [1, 2], [CHUNK, OTHER], [0, 0], 1 << 20, chain_versions=[1, 1], slots=[0, 1]
        )
        await self.node.handle(request, [memoryview(payload), memoryview(payload[::-1])])

    async def read(self) -> list[bytes]:
        buffers = [memoryview(bytearray(100)) for _ in range(2)]
        reply = await self.node.handle(ReadChunks([1, 2], [CHUNK, OTHER], [0, 0], [1, 1]), buffers)
        assert isinstance(reply, ChunksRead)
        return [bytes(buffer[:count]) for buffer, count in zip(buffers, reply.counts, strict=True)]

    def states(self) -> list[LocalState]:
        return [report.state for report in self.manager.heartbeats[-1].reports]


def on_host(work: Callable[[Host], Awaitable[None]]) -> None:
    async def main(runtime: SimRuntime) -> None:
        host = Host(runtime)
        await host.node.start()
        await work(host)
        await host.node.close()
        for index in host.indexes.values():
            await index.close()

    run(0, main)
