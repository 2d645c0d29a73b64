"""Chunk operations by storage messages: every chain of a file is seen, page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from emberfs.messages import ChunkList, Done, ListChunks, Message, RemoveChunks, TruncateChunk
from emberfs.meta import ClientChunkOps, chunks
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.striping import chains_of
from emberfs.transport.memory import MemoryConnection
from emberfs.types import Chunks, chunk_id, split_chunk_id

CHUNK = 64 << 10
LAYOUT = Chunks(chunk_size_bytes=CHUNK, chain_count=5, stripe=3, seed=7)


class FakeStorage:
    """Chunks of all chains: (chain, chunk) -> length."""

    def __init__(self) -> None:
        self.lengths: dict[tuple[int, bytes], int] = {}

    def write(self, inode: int, length: int, layout: Chunks = LAYOUT) -> None:
        chains = chains_of(layout)
        for index in range(-(-length // CHUNK)):
            self.lengths[chains[index % len(chains)], chunk_id(inode, index)] = min(CHUNK, length - index * CHUNK)

    def of(self, inode: int) -> dict[int, int]:
        found = {split_chunk_id(chunk): length for (_, chunk), length in self.lengths.items()}
        return {index: length for (owner, index), length in sorted(found.items()) if owner == inode}

    async def handle(self, request: Message, buffers: Sequence[memoryview]) -> Message:
        match request:
            case ListChunks(chain, begin, end, limit, reverse):
                here = sorted((chunk, length) for (where, chunk), length in self.lengths.items() if where == chain)
                rows = [row for row in here if begin <= row[0] < end]
                return ChunkList((rows[::-1] if reverse else rows)[:limit])
            case RemoveChunks(chains, names):
                for key in zip(chains, names, strict=True):
                    del self.lengths[key]
            case TruncateChunk(chain, chunk, length):
                assert self.lengths[chain, chunk] > length
                self.lengths[chain, chunk] = length
        return Done()


@pytest.fixture
def portal() -> Iterator[Portal]:
    runtime = AsyncioRuntime("test")
    yield Portal(runtime)
    runtime.stop()


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> FakeStorage:
    monkeypatch.setattr(chunks, "LIST_CHUNKS", 2)
    return FakeStorage()


@pytest.fixture
def ops(storage: FakeStorage) -> ClientChunkOps:
    return ClientChunkOps(dict.fromkeys(range(1, 6), MemoryConnection(storage)))


def test_remove(portal: Portal, storage: FakeStorage, ops: ClientChunkOps) -> None:
    for inode in (16, 17, 18):
        storage.write(inode, 20 * CHUNK)
    assert portal.run(ops.remove(17, LAYOUT)) == 20
    assert portal.run(ops.remove(17, LAYOUT)) == 0
    assert (len(storage.of(16)), len(storage.of(18))) == (20, 20)


def test_remove_without_a_layout_looks_everywhere(portal: Portal, storage: FakeStorage, ops: ClientChunkOps) -> None:
    for seed in range(4):
        storage.write(16, 9 * CHUNK, Chunks(chunk_size_bytes=CHUNK, chain_count=5, stripe=3, seed=seed))
    count = len(storage.lengths)
    assert count > 9
    assert portal.run(ops.remove(16, None)) == count


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK, 7 * CHUNK + 9, 99 * CHUNK])
def test_truncate(portal: Portal, storage: FakeStorage, ops: ClientChunkOps, length: int) -> None:
    storage.write(16, 11 * CHUNK + 5)
    storage.write(17, 3 * CHUNK)
    expected = FakeStorage()
    expected.write(16, min(length, 11 * CHUNK + 5))
    for _ in range(2):
        portal.run(ops.truncate(16, LAYOUT, length))
        assert storage.of(16) == expected.of(16)
        assert len(storage.of(17)) == 3
        assert portal.run(ops.end(16, LAYOUT)) == min(length, 11 * CHUNK + 5)


def test_owners(portal: Portal, storage: FakeStorage, ops: ClientChunkOps) -> None:
    for inode in range(16, 30):
        storage.write(inode, 5 * CHUNK)

    async def owners() -> set[int]:
        found: set[int] = set()
        async for page in ops.owners(18, 28):
            found.update(page)
            for inode in page:
                await ops.remove(inode, None)
        return found

    assert portal.run(owners()) == set(range(18, 28))
    assert not storage.of(20)
    assert storage.of(28)
