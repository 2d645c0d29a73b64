"""Two metadata servers on one KV under the simulator, each a process that can be killed, and their clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from emberfs.errors import (
    EmberError,
    Unavailable,
)
from emberfs.kv.memory import MemoryKV
from emberfs.messages import (
    CommitPut,
    Message,
    Once,
    Open,
    Reserve,
    Reserved,
    Stat,
)
from emberfs.meta import MetaConfig, MetaService
from emberfs.meta.claims import Claim
from emberfs.meta.keys import rows_of
from emberfs.testing.sim import SimRuntime, run
from emberfs.testing.sim.process import SimProcess
from emberfs.transport.codec import encode_message
from emberfs.types import Chunks, Inode

from tests.fs.meta_fakes import CHUNK, FakeChunks


class SlowKV(MemoryKV):
    """A commit takes a moment on its way there and back, so that transactions overlap."""

    is_away = False
    """Nobody answers."""

    async def commit_batch(self, *arguments: Any) -> None:
        if self.is_away:
            raise Unavailable("away")
        await self._runtime.sleep(0.001)
        await super().commit_batch(*arguments)
        await self._runtime.sleep(0.001)


class SlowChunks(FakeChunks):
    """Every call takes a moment."""

    def __init__(self, runtime: SimRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        await self.runtime.sleep(0.002)
        return await super().remove(inode, layout, claim=claim)

    async def truncate(self, inode: int, layout: Chunks, length: int, *, claim: Claim | None = None) -> None:
        await self.runtime.sleep(0.002)
        await super().truncate(inode, layout, length, claim=claim)


class Client:
    """Asks a server of its choice, each time under a new number."""

    def __init__(self, cluster: Cluster, client: bytes) -> None:
        self.cluster = cluster
        self.id = client
        self.number = 0
        self.in_the_air = 0

    def once(self, request: Message) -> Once:
        self.number += 1
        return Once(self.id, self.number, 1 if self.in_the_air else self.number, encode_message(request))

    async def __call__(self, server: int, request: Message) -> Any:
        if not request.changes_nothing:
            request = self.once(request)
        self.in_the_air += 1
        try:
            return await self.cluster.servers[server].handle(request)
        finally:
            self.in_the_air -= 1

    async def stat(self, server: int, path: str) -> Inode:
        return (await self(server, Stat(path))).inode  # type: ignore[no-any-return]

    async def put(self, server: int, path: str, length: int) -> Inode:
        """A file in chunks, committed at the other server than the one that gave the id."""
        reserved = await self(server, Reserve(CHUNK))
        self.cluster.chunks.write(reserved.inode, length)
        return (await self(1 - server, commit(reserved, path, length))).inode  # type: ignore[no-any-return]


class Cluster:
    """Two servers, each a process that can be killed."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.kv = SlowKV(runtime)
        self.chunks = SlowChunks(runtime)
        self.processes = [SimProcess(runtime, f"meta-{number}") for number in range(2)]
        config = MetaConfig(shared=True, has_settings=True, chain_count=4, stripe=2, gc_delay_s=0)
        self.asked = 0
        """How often a server wanted to know who lives."""
        self.servers = [
            MetaService(self.kv, process, self.chunks, config=config, ask_sessions=self._ask)
            for process in self.processes
        ]
        self.live: set[bytes] = set()

    def _ask(self) -> None:
        self.asked += 1

    async def start(self) -> None:
        for server in self.servers:
            await server.start()

    async def close(self) -> None:
        for process, server in zip(self.processes, self.servers, strict=True):
            if process.is_alive:
                await server.close()

    async def client(self) -> Client:
        client = Client(self, self.runtime.random_bytes(16))
        await self.tell(self.live | {client.id})
        return client

    async def tell(self, live: set[bytes]) -> None:
        self.live = live
        for server in self.servers:
            await server.sessions_changed(live)

    async def both(self, *works: Coroutine[Any, Any, Any]) -> list[Any]:
        """The answers, or errors, of calls that run side by side."""
        tasks = [self.runtime.spawn(work, "call") for work in works]
        answers: list[Any] = []
        for task in tasks:
            try:
                answers.append(await task)
            except EmberError as error:
                answers.append(error)
        return answers


def commit(reserved: Reserved, path: str, length: int) -> CommitPut:
    return CommitPut(path, reserved.inode, reserved.layout, b"", length, 0o644, True)


def open_file(path: str, *, truncate: bool = False, append: bool = False) -> Open:
    return Open(path, True, False, truncate, 0o644, CHUNK, append=append)


def simulate(main: Callable[[Cluster], Awaitable[None]], seed: int = 0) -> None:
    async def whole(runtime: SimRuntime) -> None:
        cluster = Cluster(runtime)
        await cluster.start()
        await main(cluster)
        await cluster.close()
        rows = await cluster.kv.begin().range(*rows_of(b"W"))
        assert not rows or not all(process.is_alive for process in cluster.processes), "a claim was left"

    run(seed, whole)
