"""The files of a dataset: rows in, Parquet, CSV or JSON lines out, cut at a size or by the values of columns.

Used wherever a dataset is written, by a session's own process or by a task of a job. Files are written where they are
told to be; that they become the dataset, all or none, is `writer.py`'s.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from .sources import StorageOptions, open_url, url_of
from .text import CsvWriter, JsonWriter, TextWriter, compressed

Format = Literal["parquet", "csv", "json"]

FILE_SIZE_BYTES = 256 * 1024 * 1024
"""Default target size of a file: large enough that listing is cheap, small enough to be a task's share."""

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
}

# A row group is cut at whichever comes first: long texts must not pile up in memory.
_ROW_GROUP_ROWS_MAX = 122_880
_ROW_GROUP_BYTES_MAX = 64 * 1024 * 1024
_PARTITIONS_MAX = 65_536
# What is held of a partition for its next row group; a thousand files may be open at once.
_PARTITION_GROUP_BYTES = 1024 * 1024
# Texts that are all different gain nothing from a dictionary, and cost a hash each.
_DICTIONARY_SAMPLE_ROWS = 4_096
_DICTIONARY_DISTINCT_MAX = 0.5


class FileOutput(msgspec.Struct, array_like=True):
    """One file of a dataset: its path within the dataset, and where it lies until that is published."""

    path: str
    staged_url: str
    rows: int
    size_bytes: int
    partition: int | None = None
    """Which one its rows are, of a dataset that is partitioned by our hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSink:
    """Where files go and what they are like."""

    url: str
    """The directory they are written to."""
    format: Format
    file_size_bytes: int = FILE_SIZE_BYTES
    """A file that has rows and has reached this is closed and another begun."""
    partition_by: tuple[str, ...] = ()
    """Columns whose values name the directories, as Hive does; Parquet only."""
    compression: str = "zstd"
    """Of Parquet: zstd, snappy, lz4, gzip, brotli or none."""
    one_file: str | None = None
    """The name of the only file, if there is to be one."""

    def write(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        *,
        stem: str,
        options: StorageOptions,
        use_threads: bool = True,
    ) -> list[FileOutput]:
        """Writes all the rows; no rows make one empty file, or none under `partition_by`. `stem` begins the names.
        `use_threads`: this process has all of the machine's cores for it."""
        filesystem, directory = open_url(self.url, options)
        filesystem.makedirs(directory, exist_ok=True)
        if self.format != "parquet":
            writer = JsonWriter if self.format == "json" else CsvWriter
            return list(self._texts(filesystem, directory, batches, schema, stem, writer))
        groups = row_groups(batches, schema)
        if self.partition_by:
            return self._partitions(filesystem, directory, groups, schema, stem, use_threads)
        return list(self._parquet(filesystem, directory, groups, schema, stem))

    def _name(self, stem: str, index: int) -> str:
        return self.one_file or f"{stem}-{index:03d}{SUFFIXES[self.format][0]}"

    def _goes_on(self, file: Any) -> bool:
        return self.one_file is not None or file.tell() < self.file_size_bytes

    def _done(self, filesystem: Any, path: str, name: str, rows: int) -> FileOutput:
        return FileOutput(name, url_of(filesystem, path), rows, int(filesystem.info(path)["size"]))

    def _parquet(
        self, filesystem: Any, directory: str, groups: Iterator[pa.RecordBatch], schema: pa.Schema, stem: str
    ) -> Iterator[FileOutput]:
        group = next(groups, None)
        dictionary: Any = True if group is None else columns_that_repeat(group)
        statistics = columns_of_ordered(schema)
        for index in itertools.count():
            name = self._name(stem, index)
            path = posixpath.join(directory, name)
            rows = 0
            with (
                filesystem.open(path, "wb") as file,
                pq.ParquetWriter(
                    file,
                    schema,
                    compression=self.compression,
                    use_dictionary=dictionary,
                    write_statistics=statistics,
                ) as writer,
            ):
                while group is not None and (not rows or self._goes_on(file)):
                    writer.write_batch(group)
                    rows += group.num_rows
                    group = next(groups, None)
            yield self._done(filesystem, path, name, rows)
            if group is None:
                return

    def _texts(
        self,
        filesystem: Any,
        directory: str,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        stem: str,
        writer_of: Callable[[Any, pa.Schema], TextWriter],
    ) -> Iterator[FileOutput]:
        batch = next(batches, None)
        for index in itertools.count():
            name = self._name(stem, index)
            path = posixpath.join(directory, name)
            rows = 0
            with filesystem.open(path, "wb") as file:
                sink = compressed(file, path)
                writer = writer_of(sink, schema)
                while batch is not None and (not rows or self._goes_on(file)):
                    writer.write_batch(batch)
                    rows += batch.num_rows
                    batch = next(batches, None)
                writer.close()
                if sink is not file:
                    sink.close()
            yield self._done(filesystem, path, name, rows)
            if batch is None:
                return

    def _partitions(
        self,
        filesystem: Any,
        directory: str,
        groups: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        stem: str,
        use_threads: bool,
    ) -> list[FileOutput]:
        """Writes the rows of each value to `column=value/`."""
        # Costs a third of a second to import.
        import pyarrow.dataset as ds

        written: list[FileOutput] = []
        first = next(groups, None)
        known = () if first is None else (first,)
        rows_min = 1 if first is None else first.num_rows * _PARTITION_GROUP_BYTES // max(1, first.nbytes)
        # Without it the rows come as they please, also with one thread; pyarrow 20 has no such thing.
        ordered = {"preserve_order": True} if int(pa.__version__.partition(".")[0]) > 20 else {}

        def note(file: Any) -> None:
            name = posixpath.relpath(file.path, directory) if file.path.startswith("/") else file.path
            name = name.removeprefix(directory.lstrip("/")).lstrip("/")
            written.append(FileOutput(name, "", file.metadata.num_rows, int(file.size or 0)))

        ds.write_dataset(
            pa.RecordBatchReader.from_batches(schema, itertools.chain(known, groups)),
            directory,
            filesystem=filesystem,
            format="parquet",
            file_options=ds.ParquetFileFormat().make_write_options(
                compression=self.compression,
                use_dictionary=True if first is None else columns_that_repeat(first),
                write_statistics=columns_of_ordered(schema),
            ),
            partitioning=ds.partitioning(pa.schema([schema.field(name) for name in self.partition_by]), flavor="hive"),
            basename_template=f"{stem}-{{i}}.parquet",
            existing_data_behavior="overwrite_or_ignore",
            max_partitions=_PARTITIONS_MAX,
            use_threads=use_threads,
            min_rows_per_group=min(max(1, rows_min), _ROW_GROUP_ROWS_MAX),
            file_visitor=note,
            **ordered,
        )
        for file in written:
            file.staged_url = url_of(filesystem, posixpath.join(directory, file.path))
        return written


def row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The same rows in batches the size of a row group."""
    held: list[pa.RecordBatch] = []
    rows = size_bytes = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        size_bytes += batch.nbytes
        if rows >= _ROW_GROUP_ROWS_MAX or size_bytes >= _ROW_GROUP_BYTES_MAX:
            yield from _combined(held, schema)
            held, rows, size_bytes = [], 0, 0
    if held:
        yield from _combined(held, schema)


def _combined(held: list[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if len(held) == 1:
        yield held[0]
        return
    yield from pa.Table.from_batches(held, schema=schema).combine_chunks().to_batches()


def columns_of_ordered(schema: pa.Schema) -> list[str] | bool:
    """The columns whose statistics may be kept: all but floats, of which pyarrow leaves NaN out, so that DuckDB would
    skip rows that are greater than anything."""
    if not any(_has_floats(field.type) for field in schema):
        return True
    return [field.name for field in schema if not _has_floats(field.type)]


def _has_floats(type_: pa.DataType) -> bool:
    if pa.types.is_floating(type_):
        return True
    return any(_has_floats(type_.field(i).type) for i in range(type_.num_fields))


def columns_that_repeat(batch: pa.RecordBatch) -> list[str] | bool:
    """The columns for which a dictionary pays, by the first rows; names that are not unique: all of them."""
    head = batch.slice(0, _DICTIONARY_SAMPLE_ROWS)
    names = batch.schema.names
    if len(set(names)) != len(names) or not head.num_rows:
        return True
    repeating = []
    for name, values in zip(names, head.columns, strict=True):
        if pa.types.is_nested(values.type):
            return True
        if isinstance(values.type, pa.ExtensionType):
            values = values.storage
        distinct = len(values.unique()) if not pa.types.is_dictionary(values.type) else 0
        if distinct <= head.num_rows * _DICTIONARY_DISTINCT_MAX:
            repeating.append(name)
    return repeating
