"""Chunk operations by storage messages: every chain of a file is seen, page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from emberfs.errors import Unavailable
from emberfs.messages import Message, RemoveChunks, TruncateChunk
from emberfs.meta import ClientChunkOps, chunks
from emberfs.meta.claims import Claim
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport.memory import MemoryConnection
from emberfs.types import Chunks, chunk_id

from tests.fs.meta_fakes import CHUNK, FakeStorage

LAYOUT = Chunks(chunk_size_bytes=CHUNK, chain_count=5, stripe=3, seed=7)


@pytest.fixture
def portal() -> Iterator[Portal]:
    runtime = AsyncioRuntime("test")
    yield Portal(runtime)
    runtime.stop()


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LIST_CHUNKS", 2)


@pytest.fixture
def storage() -> FakeStorage:
    return FakeStorage()


@pytest.fixture
def ops(storage: FakeStorage) -> ClientChunkOps:
    return over(storage)


def over(storage: FakeStorage) -> ClientChunkOps:
    return ClientChunkOps(dict.fromkeys(range(1, 6), MemoryConnection(storage)))


def test_remove(portal: Portal, storage: FakeStorage, ops: ClientChunkOps) -> None:
    for inode in (16, 17, 18):
        storage.write(inode, 20 * CHUNK, LAYOUT)
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
    storage.write(16, 11 * CHUNK + 5, LAYOUT)
    storage.write(17, 3 * CHUNK, LAYOUT)
    expected = FakeStorage()
    expected.write(16, min(length, 11 * CHUNK + 5), LAYOUT)
    for _ in range(2):
        portal.run(ops.truncate(16, LAYOUT, length))
        assert storage.of(16) == expected.of(16)
        assert len(storage.of(17)) == 3
        assert portal.run(ops.end(16, LAYOUT)) == min(length, 11 * CHUNK + 5)


def test_owners(portal: Portal, storage: FakeStorage, ops: ClientChunkOps) -> None:
    for inode in range(16, 30):
        storage.write(inode, 5 * CHUNK, LAYOUT)

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


class WrittenTo(FakeStorage):
    """A chunk of file 16 is written to just before each of the next `writes` requests to change it arrives."""

    writes = 0
    changes = 0

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if isinstance(request, RemoveChunks | TruncateChunk):
            self.changes += 1
            chunks = request.chunks if isinstance(request, RemoveChunks) else [request.chunk]
            if HOT in chunks and self.writes:
                self.writes -= 1
                (key,) = [key for key in self.lengths if key[1] == HOT]
                self.put(key, CHUNK)
        return await super().handle(request, buffers)


HOT = chunk_id(16, 5)


@pytest.mark.parametrize("length", [0, 3 * CHUNK, 5 * CHUNK + 1])
def test_a_chunk_that_is_written_to_is_looked_at_again(portal: Portal, length: int) -> None:
    storage = WrittenTo()
    ops = over(storage)
    storage.write(16, 11 * CHUNK, LAYOUT)
    storage.writes = chunks.LOOKS_MAX - 1
    portal.run(ops.truncate(16, LAYOUT, length))
    assert (storage.writes, sum(storage.of(16).values())) == (0, length)
    storage.write(16, 11 * CHUNK, LAYOUT)
    storage.writes = 5
    assert portal.run(ops.remove(16, LAYOUT)) == 11, "each is counted once"
    storage.write(16, 11 * CHUNK, LAYOUT)
    storage.writes = 1000
    with pytest.raises(Unavailable):
        portal.run(ops.remove(16, LAYOUT))
    assert 5 in storage.of(16)


def test_without_the_claim_nothing_is_changed(portal: Portal) -> None:
    storage = WrittenTo()
    ops = over(storage)
    storage.write(16, 11 * CHUNK, LAYOUT)
    lost = Claim(AsyncioRuntime("test"), b"", b"", until_s=0.0)
    with pytest.raises(Unavailable):
        portal.run(ops.remove(16, LAYOUT, claim=lost))
    with pytest.raises(Unavailable):
        portal.run(ops.truncate(16, LAYOUT, 7, claim=lost))
    assert storage.changes == 0
