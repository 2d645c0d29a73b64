"""A metadata service to test against: the real KV and runtime, chunks in a dict, a clock that tests may move."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

from emberfs.errors import StaleChunk
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import KV
from emberfs.messages import (
    Abandon,
    ChunkList,
    CollectGarbage,
    CommitPut,
    Done,
    List,
    ListChunks,
    Message,
    Mkdir,
    Once,
    Open,
    Opened,
    Remove,
    RemoveChunks,
    ReportLength,
    Reserve,
    Stat,
    TruncateChunk,
)
from emberfs.meta import MetaConfig, MetaService
from emberfs.meta.check import Finding
from emberfs.meta.claims import Claim
from emberfs.meta.keys import get_ids
from emberfs.meta.recovery import end_clients
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime, Runtime
from emberfs.striping import chains_of
from emberfs.transport.codec import encode_message
from emberfs.types import CHUNK_SIZE_BYTES_MIN, Chunks, Inode, chunk_id, split_chunk_id

CHUNK = CHUNK_SIZE_BYTES_MIN


class FakeChunks:
    """Chunk storage: (inode, chunk index) -> length."""

    def __init__(self) -> None:
        self.lengths: dict[tuple[int, int], int] = {}

    def write(self, inode: int, length: int) -> None:
        """As if a client had written `length` bytes from the start, in chunks of CHUNK."""
        for index in range(-(-length // CHUNK)):
            self.lengths[inode, index] = min(CHUNK, length - index * CHUNK)

    def of(self, inode: int) -> dict[int, int]:
        return {index: length for (owner, index), length in self.lengths.items() if owner == inode}

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        return len([self.lengths.pop((inode, index)) for index in self.of(inode)])

    async def truncate(self, inode: int, layout: Chunks, length: int, *, claim: Claim | None = None) -> None:
        for index, old in self.of(inode).items():
            new = min(old, length - index * layout.chunk_size_bytes)
            if new > 0:
                self.lengths[inode, index] = new
            else:
                del self.lengths[inode, index]

    async def end(self, inode: int, layout: Chunks) -> int:
        return max((index * layout.chunk_size_bytes + length for index, length in self.of(inode).items()), default=0)

    async def owners(self, begin_inode: int, end_inode: int) -> AsyncIterator[list[int]]:
        yield sorted({inode for inode, _ in self.lengths if begin_inode <= inode < end_inode})


class FakeStorage:
    """Chunks of all chains, by messages: (chain, chunk) -> length, and the committed version."""

    def __init__(self) -> None:
        self.lengths: dict[tuple[int, bytes], int] = {}
        self.versions: dict[tuple[int, bytes], int] = {}
        """Of removed chunks too."""

    def write(self, inode: int, length: int, layout: Chunks) -> None:
        """As if a client had written `length` bytes from the start, in chunks of CHUNK."""
        chains = chains_of(layout)
        for index in range(-(-length // CHUNK)):
            key = chains[index % len(chains)], chunk_id(inode, index)
            self.put(key, min(CHUNK, length - index * CHUNK))

    def of(self, inode: int) -> dict[int, int]:
        found = {split_chunk_id(chunk): length for (_, chunk), length in self.lengths.items()}
        return {index: length for (owner, index), length in sorted(found.items()) if owner == inode}

    def put(self, key: tuple[int, bytes], length: int) -> None:
        self.lengths[key] = length
        self.versions[key] = self.versions.get(key, 0) + 1

    def _is_stale(self, key: tuple[int, bytes], version: int) -> bool:
        return key in self.lengths and version not in (0, self.versions[key])

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        stale: list[tuple[int, bytes]] = []
        match request:
            case ListChunks(chain, begin, end, limit, reverse):
                here = sorted((chunk, length) for (where, chunk), length in self.lengths.items() if where == chain)
                rows = [row for row in here if begin <= row[0] < end]
                rows = (rows[::-1] if reverse else rows)[:limit]
                return ChunkList(rows, [self.versions[chain, chunk] for chunk, _ in rows])
            case RemoveChunks(chains, names):
                versions = request.versions or [0] * len(names)
                for key, version in zip(zip(chains, names, strict=True), versions, strict=True):
                    if self._is_stale(key, version):
                        stale.append(key)
                    elif key in self.lengths:
                        self.put(key, 0)
                        del self.lengths[key]
            case TruncateChunk(chain, chunk, length):
                if self._is_stale((chain, chunk), request.version):
                    stale.append((chain, chunk))
                elif (chain, chunk) in self.lengths:
                    assert self.lengths[chain, chunk] > length
                    self.put((chain, chunk), length)
        if stale:
            raise StaleChunk(f"{len(stale)} chunks changed since they were looked at")
        return Done()


class ClockRuntime(AsyncioRuntime):
    """The production runtime with a wall clock that a test moves."""

    def __init__(self) -> None:
        super().__init__("test")
        self.ahead_ns = 0

    def wall_ns(self) -> int:
        return super().wall_ns() + self.ahead_ns

    def advance(self, seconds: float) -> None:
        self.ahead_ns += int(seconds * 1e9)


class Meta:
    """A started service with short ways to call it. `restart` is a crash: nothing is closed."""

    def __init__(
        self,
        kv: KV | None = None,
        *,
        runtime: ClockRuntime | None = None,
        config: MetaConfig | None = None,
        chunks: Any = None,
    ) -> None:
        self.runtime = runtime or ClockRuntime()
        self.portal = Portal(self.runtime)
        self.kv = kv or MemoryKV(self.runtime)
        self.chunks = chunks or FakeChunks()
        self.config = config or MetaConfig()
        self.start()

    def start(self) -> None:
        self.service = MetaService(self.kv, self.runtime, self.chunks, config=self.config)
        self.run(self.service.start())

    def crash_and_restart(self) -> None:
        """What the service had in memory is gone; the KV and the chunks stay."""
        abandoned = self.service
        self.start()
        self.run(_stop_tasks(abandoned))

    def close(self) -> None:
        self.run(self.service.close())
        self.run(self.kv.close())
        self.runtime.stop()

    def settle(self) -> None:
        """Wait until a service that was just started has swept what the one before left."""
        while self.run(_unswept(self.kv)):
            self.run(self.runtime.sleep(0.001))

    def run(self, work: Any) -> Any:
        return self.portal.run(work)

    def __call__(self, request: Message) -> Any:
        return self.run(self.service.handle(request))

    def stat(self, path: str, *, follow: bool = True) -> Inode:
        return self(Stat(path=path, follow=follow)).inode  # type: ignore[no-any-return]

    def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False) -> Inode:
        return self(Mkdir(path=path, mode=0o755, parents=parents, exist_ok=exist_ok)).inode  # type: ignore[no-any-return]

    def put(self, path: str, data: bytes = b"", *, overwrite: bool = True) -> Inode:
        """A file of inline bytes."""
        request = CommitPut(
            path=path, inode=0, layout=None, data=data, length=len(data), mode=0o644, overwrite=overwrite
        )
        return self(request).inode  # type: ignore[no-any-return]

    def put_chunks(self, path: str, length: int) -> Inode:
        """A file of chunks."""
        reserved = self(Reserve(chunk_size_bytes=CHUNK))
        self.chunks.write(reserved.inode, length)
        request = CommitPut(
            path=path,
            inode=reserved.inode,
            layout=reserved.layout,
            data=b"",
            length=length,
            mode=0o644,
            overwrite=True,
        )
        return self(request).inode  # type: ignore[no-any-return]

    def open(
        self, path: str, *, create: bool = True, exclusive: bool = False, truncate: bool = False, append: bool = False
    ) -> Opened:
        return self(Open(path, create, exclusive, truncate, 0o644, CHUNK, append=append))  # type: ignore[no-any-return]

    def names(self, path: str) -> list[str]:
        return [name for name, _ in self(List(path=path, after="", limit=1000)).entries]

    def remove(self, path: str, *, recursive: bool = False, trash: bool = False, want: str = "any") -> str:
        return self(Remove(path=path, recursive=recursive, trash=trash, want=want)).trash_id  # type: ignore[no-any-return]


async def _unswept(kv: KV) -> bool:
    ids = await get_ids(kv.begin())
    return ids.swept < ids.next


async def _stop_tasks(service: MetaService) -> None:
    """End a crashed service's tasks without letting it say goodbye to the KV."""
    service._state.reserved.add(0)
    await service.close()


SHARED = MetaConfig(shared=True, has_settings=True, client_grace_s=0.0)
REPEATABLE = (Reserve, Abandon, ReportLength, CollectGarbage)
"""Changing requests whose second attempt may get another answer."""


class Servers:
    """Two servers on one KV, as one client sees them that cannot decide which to ask, and asks some things twice."""

    def __init__(self, kv: KV, runtime: Runtime, chunks: Any, config: MetaConfig, *, seed: int = 0) -> None:
        self.client = runtime.random_bytes(16)
        self.all = [MetaService(kv, runtime, chunks, config=config) for _ in range(2)]
        self._random = random.Random(seed)
        self._number = 0

    async def start(self) -> None:
        for server in self.all:
            await server.start()
        await self.sessions_changed({self.client})

    async def close(self) -> None:
        for server in self.all:
            await server.close()

    async def check(self, *, repair: bool = False) -> list[Finding]:
        return await self.all[0].check(repair=repair)

    async def sessions_changed(self, live: set[bytes]) -> None:
        for server in self.all:
            await server.sessions_changed(live)

    async def handle(self, request: Message) -> Message:
        first = self._random.randrange(2)
        if request.changes_nothing:
            return await self.all[first].handle(request)
        self._number += 1
        once = Once(self.client, self._number, self._number, encode_message(request))
        reply = await self.all[first].handle(once)
        if not isinstance(request, REPEATABLE) and self._random.random() < 0.3:
            assert await self.all[1 - first].handle(once) == reply
        return reply


class SharedMeta(Meta):
    """The same for servers that share the KV. `restart` is the death of all of them and of their client."""

    service: Servers  # type: ignore[assignment]

    def __init__(self, kv: KV | None = None, *, config: MetaConfig = SHARED, **options: Any) -> None:
        super().__init__(kv, config=config, **options)

    def start(self) -> None:
        servers = Servers(self.kv, self.runtime, self.chunks, self.config)
        self.run(servers.start())
        self.service = servers

    def crash_and_restart(self) -> None:
        gone = self.service
        self.run(gone.close())
        self.start()
        comes = self.service.client
        self.run(self.service.sessions_changed({comes, gone.client}))
        self.run(self.service.sessions_changed({comes}))
        self.run(end_clients(self.service.all[0]._state))

    def settle(self) -> None:
        """Nothing is swept because of a start."""
