"""A chain of replicas in one process: real engines on simulated disks, a network in memory, chain versions by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from emberfs.engine import Action, ChunkEngine, EngineConfig, Request, Update
from emberfs.errors import Corruption, Unavailable
from emberfs.kv.memory import MemoryKV
from emberfs.messages import Message
from emberfs.routing import Chain, ChainTarget, TargetState
from emberfs.storage import Replica, StorageConfig
from emberfs.storage.lease import Lease
from emberfs.storage.pace import Paces
from emberfs.storage.service import chunks_read
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.types import chunk_id

SERVING, LASTSRV, SYNCING, OFFLINE = (
    TargetState.SERVING,
    TargetState.LASTSRV,
    TargetState.SYNCING,
    TargetState.OFFLINE,
)
CHUNK, OTHER = chunk_id(7, 0), chunk_id(7, 1)
CLIENT = b"c" * 16
Hook = Callable[[str, Message], Awaitable[None]]


class Wire:
    """A network in memory. `before` and `after` a call is served they may wait, or raise what a lost one would."""

    def __init__(self) -> None:
        self.services: dict[str, Any] = {}
        self.before: Hook | None = None
        self.after: Hook | None = None

    def connection(self, address: str) -> Any:
        return _Connection(self, address)


class _Connection:
    def __init__(self, wire: Wire, address: str) -> None:
        self.wire, self.address = wire, address

    async def call(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        if self.wire.before is not None:
            await self.wire.before(self.address, request)
        if self.address not in self.wire.services:
            raise Unavailable(f"nobody is at {self.address}")
        reply: Message = await self.wire.services[self.address](request, buffers)
        if self.wire.after is not None:
            await self.wire.after(self.address, request)
        return reply


class Member:
    """A machine with one target."""

    def __init__(self, name: str, wire: Wire, runtime: SimRuntime) -> None:
        self.name, self.target = name, name.encode() * 16
        self.wire, self.runtime = wire, runtime
        self.disk = SimDisk(runtime)
        self.rows: dict[bytes, bytes] = {}
        self.engine: ChunkEngine
        self.replica: Replica

    async def start(self) -> None:
        self.index = MemoryKV(self.runtime, rows=self.rows, persist=lambda: self.runtime.sleep(1e-3))
        config = EngineConfig(reserve_bytes=0, keeps_tombstones=True, target=self.target)
        self.engine = await ChunkEngine.open(self.disk, self.index, self.runtime, config=config)
        self.lease = Lease(self.runtime)
        self.lease.renew(self.runtime.now_s(), 1e6)
        self.paces = Paces(self.runtime, parallel=2)
        self.replica = Replica(
            self.engine,
            self.runtime,
            self.wire,
            lease=self.lease,
            check_session=lambda client: None,
            paces=self.paces,
            config=StorageConfig(forward_wait_s=5.0),
        )
        self.wire.services[self.name] = self._handle

    async def _handle(self, request: Message, buffers: Sequence[memoryview]) -> Message:
        if type(request).__name__ == "ReadChunks":
            return await read_message(self.replica, request, buffers)
        return await self.replica.handle(request, [memoryview(bytes(buffer)) for buffer in buffers])

    async def stop(self) -> None:
        self.wire.services.pop(self.name, None)
        await self.replica.close()
        await self.engine.close()
        self.rows = self.index.snapshot()

    async def committed(self, chunk: bytes = CHUNK) -> bytes | None:
        content = await self.engine.content(chunk, pending=False)
        return bytes(content.payload) if content is not None else None

    async def is_pending(self, chunk: bytes = CHUNK) -> bool:
        (state,) = await self.engine.states([chunk])
        return state is not None and bool(state.pending_version)


async def read_message(replica: Replica, request: Any, buffers: Sequence[memoryview]) -> Message:
    return chunks_read(
        await replica.read(
            request.chain_versions[0],
            request.chunks,
            request.offsets,
            destinations=buffers,
            local=request.local,
        )
    )


class ReplicaChain:
    """Members a, b, c and so on."""

    def __init__(self, runtime: SimRuntime, names: str) -> None:
        self.runtime, self.wire = runtime, Wire()
        self.members = {name: Member(name, self.wire, runtime) for name in names}
        self.version = 0
        self.chain: Chain
        self._sequence = 0

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def change(self, states: dict[str, TargetState], *, tell: str | None = None, replicas: int | None = None) -> Chain:
        """A new version of the chain; `tell`: who learns of it at once (default: all in it).

        `replicas`: how many the chain wants, if it is not as many as are in it.
        """
        self.version += 1
        targets = tuple(
            ChainTarget(self[name].target, state, self[name].engine.identity.generation)
            for name, state in states.items()
        )
        self.chain = Chain(1, self.version, targets, replicas or len(targets))
        self.tell("".join(states) if tell is None else tell)
        return self.chain

    def tell(self, names: str) -> None:
        addresses = {member.target: member.name for member in self.members.values()}
        for name in names:
            if name in self.wire.services:
                self[name].replica.follow(self.chain, addresses)

    def update(
        self, action: Action, payload: bytes = b"", *, chunk: bytes = CHUNK, offset: int = 0, again: bool = False
    ) -> Update:
        self._sequence += not again
        return Update(chunk, action, offset, memoryview(payload), request=Request(CLIENT, 1, self._sequence))

    async def send(self, head: str, *updates: Update) -> None:
        await self[head].replica.update(self.version, updates)

    async def write(self, head: str, payload: bytes, *, chunk: bytes = CHUNK, offset: int = 0) -> None:
        await self.send(head, self.update(Action.WRITE, payload, chunk=chunk, offset=offset))

    async def read(self, name: str, *, chunk: bytes = CHUNK, local: bool | None = None) -> bytes:
        buffer = bytearray(1 << 17)
        (count,) = await self[name].replica.read(
            self.version, [chunk], [0], destinations=[memoryview(buffer)], local=local
        )
        if isinstance(count, Corruption):
            raise count
        return bytes(buffer[:count])

    async def until(self, is_so: Callable[[], Awaitable[bool]]) -> None:
        """Let virtual time pass until `is_so`. Fails after a minute of it."""
        for _ in range(600):
            if await is_so():
                return
            await self.runtime.sleep(0.1)
        raise AssertionError("it did not come to pass")

    async def equal(self, names: str) -> bool:
        """All of `names` have the same rows, and nothing pending."""
        rows = [await self[name].engine.versions() for name in names]
        return all(each == rows[0] for each in rows) and not any(row.pending for row in rows[0])


def on_chain(work: Callable[[ReplicaChain], Coroutine[Any, Any, None]], *, names: str = "abc", seed: int = 0) -> None:
    """Run `work` on a chain of `names`, all serving."""

    async def main(runtime: SimRuntime) -> None:
        chain = ReplicaChain(runtime, names)
        for member in chain.members.values():
            await member.start()
        chain.change(dict.fromkeys(names, SERVING))
        await work(chain)
        for name in list(chain.wire.services):
            await chain[name].stop()

    run(seed, main)
