"""The chunk engine against dicts of byte strings and versions: any updates, copies and removals in any order, and
restarts between them."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Coroutine
from typing import Any, NamedTuple

from emberfs.checksum import crc32c, cumulative_sums
from emberfs.disk import LocalDisk
from emberfs.engine import Action, ChunkEngine, EngineConfig, InstallItem, Request, Update
from emberfs.engine.extents import Known
from emberfs.engine.scrub import check, scrub
from emberfs.errors import StaleChunk
from emberfs.kv.memory import MemoryKV
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.types import chunk_id
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

CHUNKS = [chunk_id(1, number) for number in range(4)]
CLIENT = b"x" * 16
ONE = st.sampled_from(CHUNKS)
EDGES = [0, 1, 4095, 4096, 4097, 8192, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 131_072]
OFFSETS = st.one_of(st.sampled_from(EDGES), st.integers(0, 140_000))
SIZES = st.one_of(st.sampled_from(EDGES), st.integers(0, 5000))


class Pending(NamedTuple):
    """What the model knows of a pending version. Content None: to be removed."""

    version: int
    content: bytes | None
    sequence: int


class Mirrored:
    """A mirror (`engine.extents`) that only remembers."""

    def __init__(self) -> None:
        self.places: dict[bytes, tuple[int, int, Known]] = {}

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        self.places[chunk] = (file, block, known)

    def drop(self, chunk: bytes) -> None:
        del self.places[chunk]

    def clear(self) -> None:
        self.places.clear()


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirrored()
        self.runtime = AsyncioRuntime()
        self.portal = Portal(self.runtime)
        self.directory = tempfile.TemporaryDirectory()
        self.index = MemoryKV(self.runtime)
        self.random = random.Random(0)
        self.keeps_tombstones = False
        self.committed: dict[bytes, bytes] = {}
        self.pending: dict[bytes, Pending] = {}
        self.versions: dict[bytes, int] = {}
        """Committed, or of tombstones."""
        self.floor = 0
        self.sequence = 0
        self.published: int | None = None
        """The highest sequence of a published request."""
        self.last: tuple[Update, bool] | None = None

    @initialize(keeps_tombstones=st.booleans())
    def begin(self, keeps_tombstones: bool) -> None:
        self.keeps_tombstones = keeps_tombstones
        self.engine = self.open()

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.portal.run(call)

    def open(self) -> ChunkEngine:
        disk = LocalDisk(self.directory.name, self.runtime)
        config = EngineConfig(reserve_bytes=0, keeps_tombstones=self.keeps_tombstones)
        engine: ChunkEngine = self.run(ChunkEngine.open(disk, self.index, self.runtime, config=config))
        engine.extents.mirror = self.mirror
        return engine

    def teardown(self) -> None:
        self.run(self.engine.close())
        self.runtime.stop()
        self.directory.cleanup()

    def update(
        self,
        action: Action,
        chunk: bytes,
        offset: int,
        payload: bytes,
        publish: bool,
        granule: int,
        version: int | None = None,
    ) -> None:
        self.sequence += 1
        request = Request(CLIENT, 1, self.sequence)
        update = Update(
            chunk, action, offset, memoryview(payload), version=version, request=request, granule_log2=granule,
            room_bytes=(0, 0, 100_000)[self.sequence % 3],
        )  # fmt: skip
        (prepared,) = self.run(self.engine.prepare([update], publish=publish))
        old = self.committed.get(chunk)
        new = self.expected(action, old, offset, payload)
        if action is Action.TRUNCATE and new is old:
            assert prepared.version == self.versions.get(chunk, 0)
            return
        self.last = (update, publish)
        if version is None:
            version = (self.versions.get(chunk) or self.floor) + 1
        assert prepared == (version, len(new or b""), crc32c(new or b""))
        self.pending[chunk] = Pending(version, new, self.sequence)
        if publish:
            self.publish(chunk)

    @staticmethod
    def expected(action: Action, old: bytes | None, offset: int, payload: bytes) -> bytes | None:
        """The content afterwards; `old` itself if a truncate does nothing."""
        if action is Action.REPLACE:
            return payload
        if action is Action.REMOVE:
            return None
        if action is Action.TRUNCATE:
            return old if old is None or offset >= len(old) else old[:offset]
        before = (old or b"")[:offset].ljust(offset, b"\0")
        return b"".join([before, payload, (old or b"")[offset + len(payload) :]])

    def publish(self, chunk: bytes) -> None:
        version, content, sequence = self.pending.pop(chunk)
        self.published = max(self.published or 0, sequence)
        self.put(chunk, version, content)

    def put(self, chunk: bytes, version: int, content: bytes | None) -> None:
        if content is None:
            self.committed.pop(chunk, None)
        else:
            self.committed[chunk] = content
        if content is None and not self.keeps_tombstones:
            self.versions.pop(chunk, None)
        else:
            self.versions[chunk] = version

    def tombstones(self) -> dict[bytes, int]:
        return {chunk: version for chunk, version in self.versions.items() if chunk not in self.committed}

    @rule(chunk=ONE, offset=OFFSETS, size=SIZES, publish=st.booleans(), granule=st.sampled_from([12, 14, 16]))
    def write(self, chunk: bytes, offset: int, size: int, publish: bool, granule: int) -> None:
        self.update(Action.WRITE, chunk, offset, self.random.randbytes(size), publish, granule)

    @rule(chunk=ONE, size=SIZES, publish=st.booleans())
    def append(self, chunk: bytes, size: int, publish: bool) -> None:
        length = len(self.committed.get(chunk, b""))
        self.update(Action.WRITE, chunk, length, self.random.randbytes(size), publish, 14)

    @rule(chunk=ONE, size=SIZES, publish=st.booleans(), skips=st.none() | st.integers(1, 5))
    def replace(self, chunk: bytes, size: int, publish: bool, skips: int | None) -> None:
        version = self.versions.get(chunk, 0) + skips if skips is not None else None
        self.update(Action.REPLACE, chunk, 0, self.random.randbytes(size), publish, 14, version)

    @rule(chunk=ONE, length=OFFSETS, publish=st.booleans())
    def truncate(self, chunk: bytes, length: int, publish: bool) -> None:
        self.update(Action.TRUNCATE, chunk, length, b"", publish, 14)

    @rule(chunk=ONE, publish=st.booleans(), skips=st.none() | st.integers(1, 5))
    def remove(self, chunk: bytes, publish: bool, skips: int | None) -> None:
        version = self.versions.get(chunk, 0)
        if chunk in self.committed or chunk in self.pending or (self.keeps_tombstones and skips is not None):
            explicit = version + skips if skips is not None else None
            self.update(Action.REMOVE, chunk, 0, b"", publish, 14, explicit)
        else:
            assert self.run(self.engine.prepare([Update(chunk, Action.REMOVE)], publish=publish)) == [(version, 0, 0)]

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        chunks = data.draw(st.lists(st.sampled_from(sorted(self.pending)), unique=True, min_size=1))
        self.run(self.engine.commit(chunks, [self.pending[chunk].version for chunk in chunks]))
        for chunk in chunks:
            self.publish(chunk)

    @rule(chunk=ONE)
    def commit_again(self, chunk: bytes) -> None:
        self.run(self.engine.commit([chunk], [self.versions.get(chunk, 0)]))

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def commit_what_is_not_prepared(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.committed)))
        try:
            self.run(self.engine.commit([chunk], [self.versions[chunk] + 1000]))
        except StaleChunk:
            return
        raise AssertionError("a version that was never prepared was committed")

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat_the_last_request(self) -> None:
        assert self.last is not None
        update, publish = self.last
        self.run(self.engine.prepare([update], publish=publish))

    @rule(chunk=ONE, size=st.none() | SIZES, version=st.integers(1, 20), granule=st.sampled_from([12, 14]))
    def install(self, chunk: bytes, size: int | None, version: int, granule: int) -> None:
        content = self.random.randbytes(size) if size is not None else None
        payload = memoryview(content) if content is not None else None
        self.sequence += 1
        item = InstallItem(chunk, version, 2, payload, Request(CLIENT, 1, self.sequence), granule)
        expected = (version, len(content or b""), crc32c(content or b""))
        assert self.run(self.engine.install([item])) == [expected]
        self.last = None
        self.pending[chunk] = Pending(version, content, self.sequence)
        self.publish(chunk)

    @rule(chunk=ONE)
    def discard(self, chunk: bytes) -> None:
        pending = self.pending.pop(chunk, None)
        self.run(self.engine.discard([chunk], [pending.version if pending is not None else 1]))
        self.last = None

    @rule(chunk=ONE)
    def forget(self, chunk: bytes) -> None:
        self.run(self.engine.forget([chunk]))
        pending = self.pending.pop(chunk, None)
        self.floor = max(self.floor, self.versions.pop(chunk, 0), pending.version if pending is not None else 0)
        self.committed.pop(chunk, None)
        self.last = None

    @rule()
    def purge(self) -> None:
        self.run(self.engine.purge(CHUNKS))
        for chunk, version in self.tombstones().items():
            if chunk not in self.pending:
                self.floor = max(self.floor, version)
                del self.versions[chunk]

    @rule()
    def reopen(self) -> None:
        self.run(self.engine.close())
        assert not self.mirror.places, "the files were about to be closed"
        self.engine = self.open()

    @rule(blocks=st.integers(1, 1 << 10))
    def trim(self, blocks: int) -> None:
        self.engine.allocator.trim(blocks << 16)

    @rule()
    def every_byte_verifies(self) -> None:
        report = self.run(scrub(self.engine, runtime=self.runtime))
        assert report.findings == []
        assert report.chunks == len(self.committed.keys() | self.pending.keys())
        assert {each.chunk: each.version for each in self.run(self.engine.versions())} == {
            **dict.fromkeys(self.pending, 0),
            **self.versions,
        }

    @rule(chunk=ONE, offset=OFFSETS, size=SIZES)
    def read(self, chunk: bytes, offset: int, size: int) -> None:
        buffer = bytearray(size)
        (count,) = self.run(self.engine.read([chunk], [offset], [memoryview(buffer)]))
        assert bytes(buffer[:count]) == self.committed.get(chunk, b"")[offset : offset + size]

    @invariant()
    def every_block_has_one_owner(self) -> None:
        assert self.run(check(self.engine)).findings == []

    @invariant()
    def all_content_is_right(self) -> None:
        newest = {chunk: self.committed.get(chunk) for chunk in CHUNKS}
        newest |= {chunk: pending.content for chunk, pending in self.pending.items()}
        for contents, flags in ((self.committed, None), (newest, [True] * len(CHUNKS))):
            buffers = [bytearray(len(contents.get(chunk) or b"") + 1) for chunk in CHUNKS]
            views = [memoryview(buffer) for buffer in buffers]
            counts = self.run(self.engine.read(CHUNKS, [0] * len(CHUNKS), views, pending=flags))
            for chunk, buffer, count in zip(CHUNKS, buffers, counts, strict=True):
                assert bytes(buffer[:count]) == (contents.get(chunk) or b"")

    @invariant()
    def the_mirror_knows_what_is_committed_and_clean(self) -> None:
        """Whoever reads by it reads what the engine would, whatever was done before."""
        clean = {chunk for chunk, content in self.committed.items() if chunk not in self.pending and content}
        assert self.mirror.places.keys() <= clean
        for chunk, (file, block, known) in self.mirror.places.items():
            content = self.committed[chunk]
            assert os.pread(file, known.extent.length, block) == content
            assert known.sums == cumulative_sums(memoryview(content), granule=1 << known.granule_log2)
        self.all_content_is_right()
        assert self.mirror.places.keys() == clean, "every chunk was read since it changed"

    @invariant()
    def lists_and_requests_are_right(self) -> None:
        assert self.run(self.engine.pending()) == sorted(self.pending)
        assert self.run(self.engine.tombstones()) == sorted(self.tombstones().items())
        assert self.run(self.engine.last_sequences([Request(CLIENT, 1, 0)])) == [self.published]
        assert self.engine.floor == self.floor


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
