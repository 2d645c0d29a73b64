"""Reads chosen partitions of exchange files, ahead of whoever takes the rows.

Adjacent blocks are fetched as one range and several ranges by one call to their filesystem; what was fetched and not
yet taken never exceeds `ahead_bytes`, or one call. Every block is checked before its rows are given out. Order: file
by file as they were given, and within a file as it was written, so the rows of one partition keep their order.

Damage, truncation and a missing file are all `ExchangeCorrupt`: the file has to be made again, whatever the reason.
What the store raises besides (no connection, no rights) comes through as it is. DuckDB turns an exception below it
into text, so the last one is kept in `ExchangeReader.failure`.

Does not know: DuckDB's types (`types.py`), or which partitions a task should read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
from emberfs.checksum import crc32c
from fsspec.implementations.local import LocalFileSystem

from ..errors import ExchangeCorrupt
from .format import HEAD, TAIL_BYTES, Block, ExchangeIndex, decode_footer, footer_length

AHEAD_BYTES = 32 * 1024 * 1024
RANGE_BYTES_MAX = 8 * 1024 * 1024
"""Adjacent blocks are fetched together up to this size. One block may be larger."""
FETCHERS = 2
"""Threads that fetch: one call waits for the store while the other's bytes arrive."""

Content: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Source:
    """One exchange file: where it is, and its index."""

    filesystem: Any
    path: str
    index: ExchangeIndex


def read_index(filesystem: Any, path: str) -> ExchangeIndex:
    """The index in a file's footer, for a file whose index did not travel otherwise."""
    try:
        size_bytes = filesystem.info(path)["size"]
    except FileNotFoundError as error:
        raise ExchangeCorrupt(f"{path} is gone", path) from error
    tail_at = size_bytes - TAIL_BYTES
    if tail_at < len(HEAD):
        raise ExchangeCorrupt(f"{path} has {size_bytes} bytes, less than any exchange file", path)
    head, tail = _fetch(filesystem, [(path, 0, len(HEAD)), (path, tail_at, size_bytes)])
    footer_at = tail_at - footer_length(bytes(tail), path)
    if footer_at < len(HEAD):
        raise ExchangeCorrupt(f"the footer of {path} does not fit into it", path)
    (end,) = _fetch(filesystem, [(path, footer_at, size_bytes)])
    return decode_footer(bytes(head), bytes(end), path)


def read(filesystem: Any, path: str, index: ExchangeIndex, partitions: Iterable[int]) -> Iterator[pa.RecordBatch]:
    """The rows of some partitions of one file."""
    yield from ExchangeReader([Source(filesystem, path, index)], partitions)


class ExchangeReader:
    """The rows of some partitions of several files that one stage made. Each iteration reads them anew.

    DuckDB takes it as it is: `connection.register(name, reader)`. As a stream of the Arrow C interface, that is, and
    not as a `pa.RecordBatchReader`, into which DuckDB pushes filters that pyarrow has no comparison for. DuckDB 1.4
    takes the stream when it is registered, so there each scan needs a registration of its own.
    """

    def __init__(self, sources: Sequence[Source], partitions: Iterable[int], *, ahead_bytes: int = AHEAD_BYTES) -> None:
        assert sources, "without a file nobody knows the columns"
        assert all(source.index.schema == sources[0].index.schema for source in sources)
        self.schema = sources[0].index.arrow_schema
        self.failure: Exception | None = None
        """What the last reading that failed raised."""
        self._ahead_bytes = ahead_bytes
        self._ranges = _ranges(sources, list(partitions))

    def to_reader(self) -> pa.RecordBatchReader:
        """The rows as a stream for pyarrow."""
        return pa.RecordBatchReader.from_batches(self.schema, iter(self))

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_reader().__arrow_c_stream__(requested_schema)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for range_, content in _fetched(self._ranges, self._ahead_bytes):
                yield from range_.batches(content, self.schema)
        except Exception as error:
            self.failure = error
            raise


@dataclass(frozen=True, slots=True)
class _Range:
    """Adjacent blocks of one file."""

    source: Source
    blocks: Sequence[Block]

    @property
    def start(self) -> int:
        return self.blocks[0].offset

    @property
    def end(self) -> int:
        return self.blocks[-1].end

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    def batches(self, content: Content, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows in `content`, which is this range of the file."""
        path = self.source.path
        if len(content) != self.size_bytes:
            raise ExchangeCorrupt(f"{path} is cut short: it ends before byte {self.end}", path)
        buffer = pa.py_buffer(content)
        for block in self.blocks:
            message = buffer.slice(block.offset - self.start, block.length)
            if crc32c(message) != block.crc:
                raise ExchangeCorrupt(f"the block at byte {block.offset} of {path} does not match its checksum", path)
            batch = pa.ipc.read_record_batch(message, schema)
            assert batch.num_rows == block.rows
            yield batch


def _ranges(sources: Sequence[Source], partitions: Sequence[int]) -> list[_Range]:
    found = []
    for source in sources:
        together: list[Block] = []
        for block in source.index.blocks_of(partitions):
            if together and (block.offset != together[-1].end or block.end - together[0].offset > RANGE_BYTES_MAX):
                found.append(_Range(source, together))
                together = []
            together.append(block)
        if together:
            found.append(_Range(source, together))
    return found


def _calls(ranges: Iterable[_Range]) -> Iterator[list[_Range]]:
    """The ranges in the runs that are fetched by one call each: of one filesystem, and together no longer than one
    range may be."""
    call: list[_Range] = []
    size_bytes = 0
    for range_ in ranges:
        is_other = call and range_.source.filesystem is not call[0].source.filesystem
        if is_other or (call and size_bytes + range_.size_bytes > RANGE_BYTES_MAX):
            yield call
            call, size_bytes = [], 0
        call.append(range_)
        size_bytes += range_.size_bytes
    if call:
        yield call


def _fetched(ranges: Sequence[_Range], ahead_bytes: int) -> Iterator[tuple[_Range, Content]]:
    """Each range with its bytes, in order. Later ones are on their way, up to `ahead_bytes`."""
    calls = deque((call, sum(range_.size_bytes for range_ in call)) for call in _calls(ranges))
    is_alone = len(calls) == 1
    pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="exchange")
    under_way: deque[tuple[list[_Range], int, Callable[[], list[Content]]]] = deque()
    under_way_bytes = 0
    contents_of: Callable[[], list[Content]]
    try:
        while calls or under_way:
            while calls and (not under_way or under_way_bytes + calls[0][1] <= ahead_bytes):
                call, size_bytes = calls.popleft()
                if is_alone or isinstance(call[0].source.filesystem, LocalFileSystem):
                    contents_of = partial(list, _fetch_call(call))
                else:
                    contents_of = pool.submit(_fetch_call, call).result
                under_way.append((call, size_bytes, contents_of))
                under_way_bytes += size_bytes
            call, size_bytes, contents_of = under_way.popleft()
            # Reversed and popped, so that bytes are dropped once their rows were taken.
            contents = contents_of()[::-1]
            del contents_of
            for range_ in call:
                yield range_, contents.pop()
            under_way_bytes -= size_bytes
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_call(call: Sequence[_Range]) -> list[Content]:
    return _fetch(call[0].source.filesystem, [(range_.source.path, range_.start, range_.end) for range_ in call])


def _fetch(filesystem: Any, ranges: Sequence[tuple[str, int, int]]) -> list[Content]:
    """The bytes of each (path, start, end), fewer where the file ends. Damage raises `ExchangeCorrupt`."""
    contents: list[Any]
    if isinstance(filesystem, LocalFileSystem):
        contents = [_mapped(*range_) for range_ in ranges]
    else:
        paths, starts, ends = (list(part) for part in zip(*ranges, strict=True))
        contents = filesystem.cat_ranges(paths, starts, ends, on_error="return")
    for (path, _, _), content in zip(ranges, contents, strict=True):
        if isinstance(content, FileNotFoundError):
            raise ExchangeCorrupt(f"{path} is gone", path) from content
        # What a disk says of a bad sector, and a store (as `emberfs.Corruption`) of a chunk with a wrong checksum.
        if isinstance(content, OSError) and content.errno == errno.EIO:
            raise ExchangeCorrupt(f"{path} cannot be read: {content}", path) from content
        if isinstance(content, Exception):
            raise content
    return contents


def _mapped(path: str, start: int, end: int) -> Content | OSError:
    """A range of a local file, on its way into memory."""
    try:
        with open(path, "rb", buffering=0) as file:
            end = min(end, os.fstat(file.fileno()).st_size)
            if start >= end:
                return b""
            skipped = start % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(file.fileno(), end - start + skipped, access=mmap.ACCESS_READ, offset=start - skipped)
            mapped.madvise(mmap.MADV_WILLNEED)
            return memoryview(mapped)[skipped:]
    except OSError as error:
        return error
