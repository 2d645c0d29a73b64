"""The chunk engine against a dict of byte strings: any updates in any order, and restarts between them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Coroutine
from typing import Any

from emberfs.disk import LocalDisk
from emberfs.engine import Action, ChunkEngine, EngineConfig, Request, Update
from emberfs.engine.scrub import check, scrub
from emberfs.errors import StaleChunk
from emberfs.kv.memory import MemoryKV
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.types import chunk_id
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

CHUNKS = [chunk_id(1, number) for number in range(4)]
ONE = st.sampled_from(CHUNKS)
EDGES = [0, 1, 4095, 4096, 4097, 8192, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 131_072]
OFFSETS = st.one_of(st.sampled_from(EDGES), st.integers(0, 140_000))
SIZES = st.one_of(st.sampled_from(EDGES), st.integers(0, 5000))


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runtime = AsyncioRuntime()
        self.portal = Portal(self.runtime)
        self.directory = tempfile.TemporaryDirectory()
        self.index = MemoryKV(self.runtime)
        self.random = random.Random(0)
        self.committed: dict[bytes, bytes] = {}
        self.pending: dict[bytes, bytes | None] = {}
        """None: to be removed."""
        self.versions: dict[bytes, int] = {}
        self.sequence = 0
        self.last: tuple[Update, bool] | None = None
        self.engine = self.open()

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.portal.run(call)

    def open(self) -> ChunkEngine:
        disk = LocalDisk(self.directory.name, self.runtime)
        engine: ChunkEngine = self.run(
            ChunkEngine.open(disk, self.index, self.runtime, config=EngineConfig(reserve_bytes=0))
        )
        return engine

    def teardown(self) -> None:
        self.run(self.engine.close())
        self.runtime.stop()
        self.directory.cleanup()

    def update(self, action: Action, chunk: bytes, offset: int, payload: bytes, publish: bool, granule: int) -> None:
        self.sequence += 1
        request = Request(b"x" * 16, 1, self.sequence)
        update = Update(chunk, action, offset, memoryview(payload), request=request, granule_log2=granule)
        (version,) = self.run(self.engine.prepare([update], publish=publish))
        old = self.committed.get(chunk)
        new = self.expected(action, old, offset, payload)
        if action is Action.TRUNCATE and new is old:
            assert version == self.versions.get(chunk, 0)
            return
        self.last = (update, publish)
        assert version == self.versions.get(chunk, 0) + 1
        self.pending[chunk] = new
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
        content = self.pending.pop(chunk)
        if content is None:
            self.committed.pop(chunk, None)
            self.versions.pop(chunk, None)
        else:
            self.committed[chunk] = content
            self.versions[chunk] = self.versions.get(chunk, 0) + 1

    @rule(chunk=ONE, offset=OFFSETS, size=SIZES, publish=st.booleans(), granule=st.sampled_from([12, 14, 16]))
    def write(self, chunk: bytes, offset: int, size: int, publish: bool, granule: int) -> None:
        self.update(Action.WRITE, chunk, offset, self.random.randbytes(size), publish, granule)

    @rule(chunk=ONE, size=SIZES, publish=st.booleans())
    def append(self, chunk: bytes, size: int, publish: bool) -> None:
        length = len(self.committed.get(chunk, b""))
        self.update(Action.WRITE, chunk, length, self.random.randbytes(size), publish, 14)

    @rule(chunk=ONE, size=SIZES, publish=st.booleans())
    def replace(self, chunk: bytes, size: int, publish: bool) -> None:
        self.update(Action.REPLACE, chunk, 0, self.random.randbytes(size), publish, 14)

    @rule(chunk=ONE, length=OFFSETS, publish=st.booleans())
    def truncate(self, chunk: bytes, length: int, publish: bool) -> None:
        self.update(Action.TRUNCATE, chunk, length, b"", publish, 14)

    @rule(chunk=ONE, publish=st.booleans())
    def remove(self, chunk: bytes, publish: bool) -> None:
        if chunk in self.committed or chunk in self.pending:
            self.update(Action.REMOVE, chunk, 0, b"", publish, 14)
        else:
            assert self.run(self.engine.prepare([Update(chunk, Action.REMOVE)], publish=publish)) == [0]

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        chunks = data.draw(st.lists(st.sampled_from(sorted(self.pending)), unique=True, min_size=1))
        self.run(self.engine.commit(chunks, [self.versions.get(chunk, 0) + 1 for chunk in chunks]))
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
            self.run(self.engine.commit([chunk], [self.versions[chunk] + 2]))
        except StaleChunk:
            return
        raise AssertionError("a version that was never prepared was committed")

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat_the_last_request(self) -> None:
        assert self.last is not None
        update, publish = self.last
        if self.run(self.engine.record(update.chunk)) is not None:
            self.run(self.engine.prepare([update], publish=publish))

    @rule()
    def reopen(self) -> None:
        self.run(self.engine.close())
        self.engine = self.open()

    @rule()
    def trim(self) -> None:
        self.engine.allocator.trim()

    @rule()
    def every_byte_verifies(self) -> None:
        report = self.run(scrub(self.engine, runtime=self.runtime))
        assert report.findings == []
        assert report.chunks == len(self.committed.keys() | self.pending.keys())

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
        buffers = [bytearray(len(self.committed.get(chunk, b"")) + 1) for chunk in CHUNKS]
        counts = self.run(self.engine.read(CHUNKS, [0] * len(CHUNKS), [memoryview(buffer) for buffer in buffers]))
        for chunk, buffer, count in zip(CHUNKS, buffers, counts, strict=True):
            assert bytes(buffer[:count]) == self.committed.get(chunk, b"")


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
