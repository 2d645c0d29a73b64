"""The exchange file: what goes in comes out, by partition and in order, and damage is never taken for rows."""

from __future__ import annotations

import base64
import io
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from emberflow.errors import ExchangeCorrupt, InvalidArgument
from emberflow.exchange import ExchangeIndex, ExchangeReader, ExchangeWriter, Source, read, read_index
from emberflow.exchange.format import HEAD, encode_footer
from emberflow.exchange.reader import RANGE_BYTES_MAX
from emberflow.exchange.writer import BLOCK_BYTES_MAX
from emberflow.plan.nodes import Column
from emberflow.sources import open_url
from emberfs.errors import Corruption
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOCAL = LocalFileSystem()


@pytest.fixture
def memory() -> Iterator[tuple[MemoryFileSystem, str]]:
    """A filesystem that is not local, and a name in it."""
    filesystem = fsspec.filesystem("memory")
    name = f"/{uuid.uuid4().hex}"
    yield filesystem, name
    if filesystem.exists(name):
        filesystem.rm(name)


def columns_of(schema: pa.Schema) -> list[Column]:
    return [Column(field.name, "?") for field in schema]


def written(
    batches: Sequence[pa.RecordBatch],
    partitions: Sequence[Any],
    *,
    schema: pa.Schema | None = None,
    num_partitions: int = 1,
    **options: Any,
) -> tuple[bytes, ExchangeIndex]:
    file = io.BytesIO()
    schema = schema or batches[0].schema
    writer = ExchangeWriter(file, schema=schema, columns=columns_of(schema), num_partitions=num_partitions, **options)
    for batch, numbers in zip(batches, partitions, strict=True):
        writer.write(batch, numbers)
    index = writer.close()
    return file.getvalue(), index


def numbered(count: int, *, start: int = 0) -> pa.RecordBatch:
    numbers = range(start, start + count)
    return pa.record_batch({"n": pa.array(numbers, pa.int64()), "t": pa.array([f"row {n}" for n in numbers])})


def small_file() -> tuple[bytes, ExchangeIndex]:
    batch = numbered(7)
    return written([batch], [np.array([2, 0, 2, 0, 2, 2, 0])], num_partitions=3)


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def table_of(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(list(batches), schema)


# ---- round trips

TYPES = st.sampled_from(
    [
        pa.int8(),
        pa.int64(),
        pa.float64(),
        pa.string(),
        pa.large_string(),
        pa.binary(3),
        pa.bool_(),
        pa.list_(pa.int16()),
        pa.struct([("a", pa.string()), ("b", pa.int32())]),
        pa.decimal128(20, 3),
        pa.map_(pa.string(), pa.int8()),
        pa.null(),
    ]
)


def values_of(type_: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_integer(type_):
        return st.integers(-100, 100)
    if pa.types.is_floating(type_):
        return st.floats(allow_nan=False)
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return st.text(max_size=12)
    if pa.types.is_fixed_size_binary(type_) and not pa.types.is_decimal(type_):
        return st.binary(min_size=3, max_size=3)
    if pa.types.is_boolean(type_):
        return st.booleans()
    if pa.types.is_list(type_):
        return st.lists(st.none() | st.integers(-9, 9), max_size=4)
    if pa.types.is_struct(type_):
        return st.fixed_dictionaries({"a": st.none() | st.text(max_size=5), "b": st.none() | st.integers(-9, 9)})
    if pa.types.is_decimal(type_):
        return st.decimals(-1000, 1000, places=3)
    if pa.types.is_map(type_):
        return st.dictionaries(st.text(max_size=3), st.none() | st.integers(-9, 9), max_size=3).map(
            lambda entries: list(entries.items())
        )
    return st.none()


@st.composite
def batches(draw: st.DrawFn) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    schema = pa.schema([(f"c{i}", type_) for i, type_ in enumerate(draw(st.lists(TYPES, min_size=1, max_size=4)))])
    made = []
    for _ in range(draw(st.integers(0, 3))):
        count = draw(st.integers(0, 20))
        arrays = [
            pa.array(draw(st.lists(st.none() | values_of(field.type), min_size=count, max_size=count)), field.type)
            for field in schema
        ]
        start = draw(st.integers(0, count))
        made.append(pa.record_batch(arrays, schema=schema).slice(start))
    return schema, made


@given(
    batches(),
    st.integers(1, 5),
    st.sampled_from([None, "lz4"]),
    st.sampled_from([1, 100, 64 * 1024]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_come_back_by_partition_and_in_order(
    made: tuple[pa.Schema, list[pa.RecordBatch]], num_partitions: int, compression: Any, buffer_bytes: int, seed: int
) -> None:
    schema, parts = made
    random = np.random.default_rng(seed)
    numbers = [random.integers(0, num_partitions, part.num_rows) for part in parts]
    content, index = written(
        parts,
        numbers,
        schema=schema,
        num_partitions=num_partitions,
        compression=compression,
        buffer_bytes=buffer_bytes,
    )
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/round-trip", content)
    assert read_index(filesystem, "/round-trip") == index
    assert index.num_rows == sum(part.num_rows for part in parts)
    whole = pa.Table.from_batches(parts, schema)
    number_of = np.concatenate([np.empty(0, np.int64), *numbers])
    for partition in range(num_partitions):
        got = table_of(read(filesystem, "/round-trip", index, [partition]), schema)
        got.validate(full=True)
        assert got.equals(whole.take(pa.array(np.flatnonzero(number_of == partition))))
        assert index.partition_rows[partition] == got.num_rows


def test_the_partitions_may_come_as_arrow_numbers() -> None:
    _, index = written([numbered(4)], [pa.array([1, 0, 1, 1], pa.uint64())], num_partitions=300)
    assert index.partition_rows[:3].tolist() == [1, 3, 0]
    assert index.partition_bytes[2:].sum() == 0


def test_no_rows_keep_their_schema(tmp_path: Path) -> None:
    schema = numbered(1).schema
    content, index = written([], [], schema=schema, num_partitions=1000)
    path = put(tmp_path / "empty", content)
    reader = ExchangeReader([Source(LOCAL, path, read_index(LOCAL, path))], range(1000))
    assert reader.to_reader().read_all().equals(schema.empty_table())
    assert len(index.packed_blocks) == 0


def test_the_index_travels_in_a_manifest() -> None:
    _, index = small_file()

    class Manifest(msgspec.Struct):
        outputs: list[ExchangeIndex]

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Manifest([index])), type=Manifest).outputs == [index]
    assert index.columns == (Column("n", "?"), Column("t", "?"))
    assert index.arrow_schema == numbered(1).schema


def test_a_number_beyond_the_partitions_is_refused() -> None:
    for wrong in (-1, 3):
        with pytest.raises(InvalidArgument, match="from 0 to 2"):
            written([numbered(2)], [np.array([0, wrong])], num_partitions=3)
    with pytest.raises(InvalidArgument, match="1 to 65536 partitions"):
        written([numbered(2)], [None], num_partitions=65_537)


# ---- blocks and memory


def test_blocks_are_large_and_have_a_limit() -> None:
    batch = pa.record_batch({"x": np.arange(1_000_000)})
    _, index = written([batch] * 5, [None] * 5)
    lengths = index.blocks["length"]
    assert len(lengths) == 3
    assert lengths.max() <= BLOCK_BYTES_MAX + 4096
    spread = np.arange(1_000_000) % 32
    _, index = written([batch] * 10, [spread] * 10, num_partitions=32)
    assert len(index.blocks) == 3 * 32, "of more partitions more is held, so that their blocks are not small"


class CountingFile(io.BytesIO):
    """Knows how much was in memory when it was written to."""

    held_bytes_max = 0

    def write(self, data: Any) -> int:
        self.held_bytes_max = max(self.held_bytes_max, pa.total_allocated_bytes())
        return len(memoryview(data))


def test_memory_is_bounded_by_the_buffer() -> None:
    file = CountingFile()
    before = pa.total_allocated_bytes()
    schema = pa.schema([("x", pa.int64())])
    writer = ExchangeWriter(file, schema=schema, columns=columns_of(schema), num_partitions=8, buffer_bytes=1024 * 1024)
    for start in range(0, 2_000_000, 10_000):
        numbers = np.arange(start, start + 10_000)
        writer.write(pa.record_batch([pa.array(numbers.copy())], schema=schema), numbers % 8)
    writer.close()
    assert file.held_bytes_max - before < 4 * 1024 * 1024


def test_a_batch_beyond_the_buffer_is_cut_before_it_is_sorted(tmp_path: Path) -> None:
    # As text with more bytes than 32-bit offsets can count is: each piece is far from overflowing.
    texts = ["x" * (i % 50) for i in range(5_000)]
    batch = pa.record_batch({"t": texts, "n": pa.array(range(5_000), pa.int32())})
    content, index = written([batch], [np.arange(5_000) % 2], num_partitions=2, buffer_bytes=10_000)
    assert len(index.packed_blocks) > 2 * batch.nbytes // 10_000
    path = put(tmp_path / "cut", content)
    for partition in (0, 1):
        got = table_of(read(LOCAL, path, index, [partition]), batch.schema)
        assert got["n"].to_pylist() == list(range(partition, 5_000, 2))
        assert got["t"].to_pylist() == texts[partition::2]


def test_more_text_than_32_bits_count(tmp_path: Path) -> None:
    # 2.2 GB of NULs, which the kernel keeps as one page of memory until somebody writes to them.
    count, length = 100, 22_000_000
    texts = pa.LargeStringArray.from_buffers(
        count,
        pa.py_buffer(np.arange(count + 1, dtype=np.int64) * length),
        pa.py_buffer(np.zeros(count * length, np.uint8)),
    )
    batch = pa.record_batch({"t": texts, "n": pa.array(range(count), pa.int8())})
    assert batch.nbytes > 2**31
    path = str(tmp_path / "long")
    with open(path, "wb") as file:
        writer = ExchangeWriter(
            file, schema=batch.schema, columns=columns_of(batch.schema), num_partitions=2, compression="lz4"
        )
        writer.write(batch, np.arange(count) % 2)
        index = writer.close()
    numbers = []
    for rows in read(LOCAL, path, index, [1]):
        numbers += rows["n"].to_pylist()
        assert pc.binary_length(rows["t"]).to_pylist() == [length] * rows.num_rows
    assert numbers == list(range(1, count, 2))


# ---- reading


@pytest.mark.parametrize("ahead_bytes", [1, 10**9])
def test_a_reader_joins_files_in_their_order(
    ahead_bytes: int, tmp_path: Path, memory: tuple[MemoryFileSystem, str]
) -> None:
    filesystem, name = memory
    sources = []
    expected: list[int] = []
    for i in range(6):
        count = 300_000
        batch = pa.record_batch({"n": np.arange(i * count, (i + 1) * count)})
        numbers = np.arange(count) % 4
        content, index = written([batch], [numbers], num_partitions=4, buffer_bytes=512 * 1024)
        expected += batch["n"].to_numpy()[(numbers == 1) | (numbers == 3)].tolist()
        if i % 2:
            sources.append(Source(LOCAL, put(tmp_path / f"{i}", content), index))
        else:
            filesystem.pipe_file(f"{name}/{i}", content)
            sources.append(Source(filesystem, f"{name}/{i}", index))
    reader = ExchangeReader(sources, [1, 3], ahead_bytes=ahead_bytes)
    got = reader.to_reader().read_all()["n"].to_pylist()
    # Within a flush the rows are in order of their partition.
    assert sorted(got) == expected
    assert [n for n in got if n % 4 == 1] == [n for n in expected if n % 4 == 1]
    assert [n // 300_000 for n in got] == sorted(n // 300_000 for n in got)
    filesystem.rm(name, recursive=True)


def test_an_ember_store_holds_exchange_files(tmp_path: Path) -> None:
    filesystem, path = open_url(f"ember://{tmp_path}/store/!/exchange", {})
    content, index = small_file()
    filesystem.pipe_file(path, content)
    assert read_index(filesystem, path) == index
    rows = ExchangeReader([Source(filesystem, path, index)] * 3, [0]).to_reader().read_all()
    assert rows["n"].to_pylist() == [1, 3, 6] * 3


class WatchedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Knows what it was asked for, and may answer with an exception."""

    cachable = False

    def __init__(self, answer: Exception | None = None) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.answer = answer

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, **kwargs: Any) -> Any:
        self.lengths += [end - start for start, end in zip(starts, ends, strict=True)]
        return [self.answer] * len(paths) if self.answer else super().cat_ranges(paths, starts, ends, **kwargs)


def test_adjacent_blocks_are_one_range(memory: tuple[MemoryFileSystem, str]) -> None:
    _, name = memory
    content, index = written([numbered(100)], [np.arange(100) % 10], num_partitions=10)
    filesystem = WatchedFileSystem()
    filesystem.pipe_file(name, content)
    list(read(filesystem, name, index, [2, 3, 4, 8]))
    assert len(filesystem.lengths) == 2


def test_what_is_fetched_ahead_is_bounded(memory: tuple[MemoryFileSystem, str]) -> None:
    _, name = memory
    batch = pa.record_batch({"x": np.arange(1_000_000)})
    content, index = written([batch] * 2, [None] * 2, buffer_bytes=512 * 1024)
    filesystem = WatchedFileSystem()
    filesystem.pipe_file(name, content)
    reader = ExchangeReader([Source(filesystem, name, index)] * 4, [0], ahead_bytes=RANGE_BYTES_MAX * 2)
    rows = 0
    for number, taken in enumerate(reader, 1):
        assert sum(filesystem.lengths) <= number * 1024 * 1024 + RANGE_BYTES_MAX * 3
        rows += taken.num_rows
    assert rows == 8_000_000
    assert sum(filesystem.lengths) == 4 * index.size_bytes


def test_a_reading_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    content, index = written([numbered(100_000)], [np.arange(100_000) % 50], num_partitions=50)
    path = put(tmp_path / "file", content)
    iterator = iter(ExchangeReader([Source(LOCAL, path, index)] * 100, [7], ahead_bytes=10_000))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    LOCAL.rm(path)


# ---- damage


def test_every_flipped_byte_is_found(memory: tuple[MemoryFileSystem, str]) -> None:
    filesystem, name = memory
    content, index = small_file()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        filesystem.pipe_file(name, bytes(damaged))
        in_a_block = len(HEAD) <= position < len(HEAD) + index.size_bytes
        with pytest.raises(ExchangeCorrupt) as caught:
            list(read(filesystem, name, index if in_a_block else read_index(filesystem, name), range(3)))
        assert caught.value.path == name


@pytest.mark.parametrize("local", [True, False])
def test_every_truncation_is_found(local: bool, tmp_path: Path, memory: tuple[MemoryFileSystem, str]) -> None:
    content, index = small_file()
    filesystem, name = (LOCAL, str(tmp_path / "cut")) if local else memory
    for length in range(0, len(content), 5):
        filesystem.pipe_file(name, content[:length])
        with pytest.raises(ExchangeCorrupt):
            read_index(filesystem, name)
        if length < len(HEAD) + index.size_bytes:
            with pytest.raises(ExchangeCorrupt, match=r"cut short|checksum"):
                list(read(filesystem, name, index, range(3)))


@pytest.mark.parametrize("local", [True, False])
def test_a_missing_file_is_corrupt(local: bool, tmp_path: Path, memory: tuple[MemoryFileSystem, str]) -> None:
    _, index = small_file()
    filesystem, name = (LOCAL, str(tmp_path / "gone")) if local else memory
    with pytest.raises(ExchangeCorrupt, match="gone") as caught:
        list(read(filesystem, name, index, [0]))
    assert caught.value.path == name
    with pytest.raises(ExchangeCorrupt, match="gone"):
        read_index(filesystem, name)


def test_damage_that_the_store_finds_is_corrupt_and_nothing_else_is(memory: tuple[MemoryFileSystem, str]) -> None:
    _, name = memory
    _, index = small_file()
    with pytest.raises(ExchangeCorrupt, match="wrong checksum in chunk 7"):
        list(read(WatchedFileSystem(Corruption("wrong checksum in chunk 7", name)), name, index, [0]))
    with pytest.raises(PermissionError):
        list(read(WatchedFileSystem(PermissionError("no rights")), name, index, [0]))


def test_the_failure_below_duckdb_is_kept(tmp_path: Path) -> None:
    content, index = small_file()
    damaged = bytearray(content)
    damaged[100] ^= 1
    path = put(tmp_path / "damaged", bytes(damaged))
    reader = ExchangeReader([Source(LOCAL, path, index)], range(3))
    with duckdb.connect() as connection:
        connection.register("arrived", reader)
        with pytest.raises(duckdb.Error, match="checksum"):
            connection.execute("SELECT sum(n) FROM arrived").fetchall()
    assert isinstance(reader.failure, ExchangeCorrupt)
    assert reader.failure.path == path


@pytest.mark.skipif(duckdb.__version__ < "2", reason="DuckDB 1.4 takes the stream when it is registered")
def test_duckdb_reads_a_reader_as_often_as_it_likes(tmp_path: Path) -> None:
    content, index = small_file()
    reader = ExchangeReader([Source(LOCAL, put(tmp_path / "file", content), index)], [2])
    with duckdb.connect() as connection:
        connection.register("arrived", reader)
        for _ in range(2):
            query = "SELECT a.n FROM arrived a JOIN arrived b USING (n) ORDER BY n"
            assert connection.execute(query).fetchall() == [(0,), (2,), (4,), (5,)]
    assert reader.failure is None


# ---- versions

GOLDEN_1 = (
    "c-nLIb#jex_Hbt)6Z{8)8$enF%I9H_U|?flW#9m^ct8ToEDSP0ssKq34^Tvafd#In0*GaxW-ubDV*x`3plP^)7L+!C(h^YG14=7G=>jZznb7"
    "QGK;ko^na85!E0N&PBn)IKF#%<T7}*&nU@?;sRXvc~zy{(Apo((=nPNc20SpuZV#B|K$na+(5dIQqv=WqdKyw$2uK}eqptL+%_%oq}8x!I1W"
    "W*Al+(4!(BbER~i$6giQy8dBn3;p2fdfe$2dX+Cw;?|-wWR3qs$#t1Kb7&w22dQVfV+tc7^aXI-~xMq1suj4U>jJVB*dRCQ1%s|exO1T0cbq"
    "1z{8(`p(M4U1UW7QfU(2@G@l)8ssPkZMkaK<pg_t4+sgyQ>@fc^g5qUT(~`Wz+|-46OG+vWQkOY-x_kPCK*W}S>;nrg4|5E1_HYbhK4Jkg4;"
    "H5l&`8ndJ#+vThX)u@<w6)A-}*K`#8C#wcZHTQ0OjCR-v"
)


def test_a_file_of_version_1_is_read_for_ever(tmp_path: Path) -> None:
    content = zlib.decompress(base64.b85decode(GOLDEN_1))
    path = put(tmp_path / "golden", content)
    index = read_index(LOCAL, path)
    assert index.columns == (Column("n", "BIGINT"), Column("text", "VARCHAR"))
    got = {p: table_of(read(LOCAL, path, index, [p]), index.arrow_schema).to_pylist() for p in range(3)}
    assert got == {
        0: [{"n": 2, "text": None}],
        1: [],
        2: [{"n": 1, "text": "one"}, {"n": None, "text": "três"}],
    }


def test_a_newer_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    _, index = small_file()
    content = HEAD + encode_footer(msgspec.structs.replace(index, format=2, packed_blocks=b"", columns=()))
    path = put(tmp_path / "newer", content)
    with pytest.raises(InvalidArgument, match="format 2, written by a newer emberflow"):
        read_index(LOCAL, path)
