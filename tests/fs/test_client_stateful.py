"""One file against a bytearray: every way to change it, several handles, and the store closed and opened in between.

Run: pytest tests/fs/test_client_stateful.py
"""

from __future__ import annotations

import shutil
import tempfile

import emberfs
import hypothesis.strategies as st
from emberfs import Client, File
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fs.stores import CHUNK, content

OFFSETS = st.one_of(
    st.integers(0, 5 * CHUNK),
    st.sampled_from([0, 1, 4095, 4096, 4097]),
    st.builds(lambda index, delta: max(index * CHUNK + delta, 0), st.integers(0, 5), st.integers(-3, 3)),
)
SIZES = st.one_of(
    st.integers(0, 300), st.integers(0, 2 * CHUNK + 10), st.sampled_from([1, 4096, 4097, CHUNK, CHUNK + 1])
)


class OneFile(RuleBasedStateMachine):
    """`model` is what the file holds, unwritten buffers of the one open handle included."""

    @initialize(target_count=st.integers(1, 3))
    def make_store(self, target_count: int) -> None:
        self.directory = tempfile.mkdtemp(prefix="ember-fsx-")
        self.target_count = target_count
        self.model = bytearray()
        self.seed = 0
        self.file: File | None = None
        self.connect()
        self.client.put("/file", b"")

    def connect(self) -> None:
        self.client: Client = emberfs.connect(f"ember://{self.directory}", targets=self.target_count)

    def teardown(self) -> None:
        if hasattr(self, "client"):
            self.close_handle()
            assert self.client.get("/file") == self.model
            self.client.collect_garbage(force=True)
            assert self.client.maintenance.fsck().findings == []
            self.client.close()
            shutil.rmtree(self.directory)

    def payload(self, size: int) -> bytes:
        self.seed += 1
        return content(size, self.seed)

    def patch(self, offset: int, data: bytes) -> None:
        if data:
            self.model.extend(bytes(max(offset - len(self.model), 0)))
            self.model[offset : offset + len(data)] = data

    def close_handle(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    @precondition(lambda self: self.file is None)
    @rule(mode=st.sampled_from(["r+b", "w+b", "a+b"]))
    def open_handle(self, mode: str) -> None:
        self.file = self.client.open("/file", mode, chunk_size_bytes=CHUNK)
        if mode == "w+b":
            self.model = bytearray()

    @precondition(lambda self: self.file is not None)
    @rule()
    def close(self) -> None:
        self.close_handle()

    @precondition(lambda self: self.file is not None)
    @rule(offset=OFFSETS, size=SIZES)
    def write(self, offset: int, size: int) -> None:
        assert self.file is not None
        data = self.payload(size)
        self.file.seek(offset)
        assert self.file.write(data) == size
        self.patch(len(self.model) if self.file.mode == "a+b" else offset, data)

    @precondition(lambda self: self.file is not None)
    @rule(size=SIZES)
    def write_on(self, size: int) -> None:
        assert self.file is not None
        data, position = self.payload(size), self.file.tell()
        self.file.write(data)
        self.patch(len(self.model) if self.file.mode == "a+b" else position, data)

    @precondition(lambda self: self.file is not None)
    @rule(length=OFFSETS)
    def truncate(self, length: int) -> None:
        assert self.file is not None
        self.file.truncate(length)
        del self.model[length:]
        self.model.extend(bytes(length - len(self.model)))

    @precondition(lambda self: self.file is not None)
    @rule(sync=st.booleans())
    def flush(self, sync: bool) -> None:
        assert self.file is not None
        self.file.fsync() if sync else self.file.flush()

    @precondition(lambda self: self.file is not None)
    @rule(offset=OFFSETS, size=SIZES)
    def read(self, offset: int, size: int) -> None:
        assert self.file is not None
        self.file.seek(offset)
        assert self.file.read(size) == self.model[offset : offset + size]
        assert self.file.tell() == offset + len(self.model[offset : offset + size])

    @precondition(lambda self: self.file is None)
    @rule(offset=OFFSETS, size=SIZES, twice=st.booleans())
    def batch_write(self, offset: int, size: int, twice: bool) -> None:
        first, second = self.payload(size), self.payload(size // 2)
        items = [("/file", offset, first)] + [("/file", offset + size // 3, second)] * twice
        self.client.batch_write(items)
        self.patch(offset, first)
        if twice:
            self.patch(offset + size // 3, second)

    @precondition(lambda self: self.file is None)
    @rule(size=SIZES)
    def put(self, size: int) -> None:
        self.model = bytearray(self.payload(size))
        self.client.put("/file", self.model, chunk_size_bytes=CHUNK)

    @precondition(lambda self: self.file is None)
    @rule(length=OFFSETS)
    def truncate_by_name(self, length: int) -> None:
        self.client.truncate("/file", length)
        del self.model[length:]
        self.model.extend(bytes(length - len(self.model)))

    @precondition(lambda self: self.file is None)
    @rule()
    def reopen_the_store(self) -> None:
        self.client.close()
        self.connect()

    @precondition(lambda self: self.file is None)
    @rule(offset=OFFSETS, size=SIZES)
    def get(self, offset: int, size: int) -> None:
        assert self.client.get("/file", offset, size) == self.model[offset : offset + size]
        buffer = bytearray(size)
        (count,) = self.client.batch_read([("/file", offset, size)], into=buffer)
        assert buffer[:count] == self.model[offset : offset + size]

    @invariant()
    def the_length_is_right(self) -> None:
        if hasattr(self, "model"):
            length = self.file.size if self.file is not None else self.client.stat("/file").length
            assert length == len(self.model)


OneFile.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestOneFile = OneFile.TestCase
