"""Two-phase output: a dataset is written under a hidden directory beside its target, then moved into place.

Invariants: until every new file is complete the target is untouched; on failure what was written is removed; a
process killed while writing leaves only a `.emberflow-<id>/` directory, which holds nothing a reader needs, or,
killed between the two renames of an overwrite, the old files too. Where the filesystem renames directories in one
step (a local disk, an ember store) so does the last step; elsewhere the files are copied one after the other.

Everything is written from DuckDB's stream and nothing by its COPY: on DuckDB 2.0 a COPY whose query fails can hang
for ever (about one failure in fifteen), which a corrupt source must never do to its reader.
"""

from __future__ import annotations

import itertools
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from emberfs.filesystem import EmberFileSystem

from .errors import DatasetExists, InvalidArgument
from .progress import row_progress
from .sources import STAGING_PREFIX, open_url
from .text import CsvWriter, JsonWriter, TextWriter, compressed, csv_query, json_query

if TYPE_CHECKING:
    from .dataframe import DataFrame

Mode = Literal["error", "overwrite", "append"]
Format = Literal["parquet", "csv", "json"]

FILE_SIZE_BYTES = 256 * 1024 * 1024
"""Default target size of a file: large enough that listing is cheap, small enough to be a task's share."""

# A row group is cut at whichever comes first: long texts must not pile up in memory.
_ROW_GROUP_ROWS_MAX = 122_880
_ROW_GROUP_BYTES_MAX = 64 * 1024 * 1024
_PARTITIONS_MAX = 65_536

_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteReport:
    """What a write has put in place."""

    url: str
    num_rows: int
    num_files: int
    size_bytes: int


def write(
    frame: DataFrame,
    url: str,
    *,
    format: Format,
    mode: Mode,
    progress: bool | None,
    file_size_bytes: int = FILE_SIZE_BYTES,
    partition_by: list[str] | None = None,
) -> WriteReport:
    """Runs the frame's query into files at `url`. Raises `DatasetExists`, or what the query or the store raises."""
    if mode not in get_args(Mode):
        raise InvalidArgument(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if missing := [column for column in partition_by or [] if column not in frame.schema]:
        raise InvalidArgument(f"cannot partition by {', '.join(missing)}: the columns are {', '.join(frame.columns)}")
    target = _Target(frame, url, format=format, one_file=not partition_by and url.endswith(_SUFFIXES[format]))
    target.check(mode)
    try:
        target.prepare()
        if format == "parquet":
            num_rows = _write_parquet(frame, target, partition_by or [], file_size_bytes, progress)
        else:
            num_rows = _write_text(frame, target, format, file_size_bytes, progress)
        sizes = [info["size"] for info in target.staged_files().values()]
        target.publish(mode)
    finally:
        target.discard()
    return WriteReport(url=url, num_rows=num_rows, num_files=len(sizes), size_bytes=sum(sizes))


def _write_text(frame: DataFrame, target: _Target, format: Format, file_size_bytes: int, progress: bool | None) -> int:
    """Writes CSV or JSON lines from the stream of the query. Returns the number of rows."""
    exportable = frame.exportable()
    query = json_query(exportable) if format == "json" else csv_query(exportable, frame.schema)
    writer = JsonWriter if format == "json" else CsvWriter
    with _counted(frame.batches_of(query), target, progress) as (batches, schema, counter):
        target.write_texts(batches, schema, writer, file_size_bytes)
    return counter.rows


@dataclass(slots=True)
class _Counter:
    rows: int = 0


@contextmanager
def _counted(
    reader: pa.RecordBatchReader, target: _Target, progress: bool | None
) -> Iterator[tuple[Iterator[pa.RecordBatch], pa.Schema, _Counter]]:
    """The batches of `reader`, counted and shown as they pass."""
    counter = _Counter()
    with row_progress(f"writing {target.name}", show=progress) as advance:

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in reader:
                counter.rows += batch.num_rows
                advance(batch.num_rows)
                yield batch

        yield batches(), reader.schema, counter


def _write_parquet(
    frame: DataFrame, target: _Target, partition_by: list[str], file_size_bytes: int, progress: bool | None
) -> int:
    """Writes Parquet files from the stream of the query. Returns the number of rows."""
    with _counted(frame.to_batches(), target, progress) as (batches, schema, counter):
        groups = _row_groups(batches, schema)
        if partition_by:
            target.write_partitions(groups, schema, partition_by)
        else:
            target.write_files(groups, schema, file_size_bytes)
    return counter.rows


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The same rows in batches the size of a row group."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        rows = sum(part.num_rows for part in held)
        if rows >= _ROW_GROUP_ROWS_MAX or sum(part.nbytes for part in held) >= _ROW_GROUP_BYTES_MAX:
            yield from pa.Table.from_batches(held, schema=schema).combine_chunks().to_batches()
            held = []
    if held:
        yield from pa.Table.from_batches(held, schema=schema).combine_chunks().to_batches()


class _Target:
    """Where a dataset goes, and the hidden directory beside it where it is made."""

    def __init__(self, frame: DataFrame, url: str, *, format: Format, one_file: bool) -> None:
        self.url = url
        self.one_file = one_file
        # In the names of files too, so that appended files never meet older ones.
        self.id = uuid.uuid4().hex[:12]
        self._suffixes = _SUFFIXES[format]
        self._fs: Any
        self._fs, path = open_url(url, frame.session.config.storage_options)
        self._path = path.rstrip("/")
        parent, self.name = posixpath.split(self._path)
        if not self.name:
            raise InvalidArgument(f"cannot replace the root of a store: {url!r}")
        self._stage = posixpath.join(parent, f"{STAGING_PREFIX}{self.id}")
        self._new = posixpath.join(self._stage, self.name if one_file else "new")

    def check(self, mode: Mode) -> None:
        """Refuses a target that `mode` may not touch."""
        if self._fs.isfile(self._path):
            if mode == "error":
                raise DatasetExists(f'{self.url} exists; pass mode="overwrite" to replace it')
            if not self.one_file or mode == "append":
                raise InvalidArgument(f"{self.url} is a file: only a directory can take {mode} here")
            return
        files = self._fs.find(self._path)
        if not files:
            return
        if self.one_file:
            raise InvalidArgument(f"{self.url} is a directory with files in it, and one file was to be written")
        if mode == "error":
            raise DatasetExists(f'{self.url} has {len(files)} files; pass mode="overwrite" or mode="append"')
        foreign = [file for file in files if not self._belongs(file)]
        if mode == "overwrite" and foreign:
            raise InvalidArgument(f"will not overwrite {self.url}: {foreign[0]!r} in it is not part of a dataset")

    def _belongs(self, file: str) -> bool:
        return file.endswith(self._suffixes) or posixpath.basename(file).startswith(("_", "."))

    def prepare(self) -> None:
        self._fs.makedirs(self._stage if self.one_file else self._new, exist_ok=True)

    def write_files(self, groups: Iterable[pa.RecordBatch], schema: pa.Schema, file_size_bytes: int) -> None:
        """Writes the rows to one file, or to files that are closed once they reach `file_size_bytes`."""
        remaining = iter(groups)
        group = next(remaining, None)
        for index in itertools.count():
            path = self._new if self.one_file else f"{self._new}/part-{self.id}-{index}.parquet"
            self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
            with self._fs.open(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
                while group is not None and (self.one_file or file.tell() < file_size_bytes):
                    writer.write_batch(group)
                    group = next(remaining, None)
            if group is None:
                return

    def write_texts(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        writer_of: Callable[[Any, pa.Schema], TextWriter],
        file_size_bytes: int,
    ) -> None:
        """Writes the rows to one file, or to files that are closed once they reach `file_size_bytes`."""
        batch = next(batches, None)
        for index in itertools.count():
            path = self._new if self.one_file else f"{self._new}/part-{self.id}-{index}{self._suffixes[0]}"
            self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
            with self._fs.open(path, "wb") as file:
                sink = compressed(file, path)
                writer = writer_of(sink, schema)
                while batch is not None and (self.one_file or file.tell() < file_size_bytes):
                    writer.write_batch(batch)
                    batch = next(batches, None)
                writer.close()
                if sink is not file:
                    sink.close()
            if batch is None:
                return

    def write_partitions(self, groups: Iterable[pa.RecordBatch], schema: pa.Schema, partition_by: list[str]) -> None:
        """Writes the rows of each value to `column=value/`."""
        ds.write_dataset(
            pa.RecordBatchReader.from_batches(schema, groups),
            self._new,
            filesystem=self._fs,
            format="parquet",
            file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
            partitioning=ds.partitioning(pa.schema([schema.field(name) for name in partition_by]), flavor="hive"),
            basename_template=f"part-{self.id}-{{i}}.parquet",
            max_partitions=_PARTITIONS_MAX,
        )

    def staged_files(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self._fs.find(self._stage, detail=True)
        return found

    def publish(self, mode: Mode) -> None:
        """Puts the complete files in place. The old ones are kept aside until the new ones are there."""
        if self.one_file:
            self._fs.mv(self._new, self._path)
            return
        if mode == "overwrite" and self._fs.exists(self._path):
            old = posixpath.join(self._stage, "old")
            self._fs.mv(self._path, old, recursive=True)
            try:
                self._fs.mv(self._new, self._path, recursive=True)
            except BaseException:
                self._fs.mv(old, self._path, recursive=True)
                raise
        elif self._fs.exists(self._path):
            for file in self._fs.find(self._new):
                destination = self._path + file[len(self._new) :]
                self._fs.makedirs(posixpath.dirname(destination), exist_ok=True)
                self._fs.mv(file, destination)
        else:
            self._fs.mv(self._new, self._path, recursive=True)

    def discard(self) -> None:
        """Removes the hidden directory and whatever is left in it."""
        if not self._fs.exists(self._stage):
            return
        # Not into a store's trash: nobody wants half a dataset back.
        options = {"trash": False} if isinstance(self._fs, EmberFileSystem) else {}
        self._fs.rm(self._stage, recursive=True, **options)
