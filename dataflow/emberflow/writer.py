"""Two-phase output: a dataset is written under a hidden directory beside its target, then moved into place.

Invariants: until every new file is complete the target is untouched; on failure what was written is removed; a
process killed while writing leaves only a `.emberflow-<id>/` directory, which holds nothing a reader needs, or,
killed between the two renames of an overwrite, the old files too, or, killed while it appended, some of the new files
in the target and the list of them in that directory. Where the filesystem renames directories in one
step (a local disk, an ember store) so does the last step; elsewhere the files are copied one after the other.

Everything is written from DuckDB's stream and nothing by its COPY: on DuckDB 2.0 a COPY whose query fails can hang
for ever (about one failure in fifteen), which a corrupt source must never do to its reader.
"""

from __future__ import annotations

import hashlib
import posixpath
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from .appending import append, take_back
from .errors import DatasetExists, InvalidArgument
from .files import FILE_SIZE_BYTES, SUFFIXES, FileOutput, FileSink, Format
from .partitioned import PartitionFile, PartitionKeys, file_name, write_manifest
from .progress import row_progress
from .sources import STAGING_PREFIX, StorageOptions, open_url, protocol_of, url_of
from .text import written

if TYPE_CHECKING:
    from .dataframe import DataFrame

Mode = Literal["error", "overwrite", "append"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteReport:
    """What a write has put in place."""

    url: str
    num_rows: int
    num_files: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """How a dataset is to be written."""

    format: Format
    mode: Mode = "error"
    file_size_bytes: int = FILE_SIZE_BYTES
    partition_by: tuple[str, ...] = ()
    compression: str = "zstd"
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InvalidArgument(f"mode is one of {', '.join(get_args(Mode))}, not {self.mode!r}")
        if self.file_size_bytes < 1:
            raise InvalidArgument(f"file_size_bytes is at least 1, not {self.file_size_bytes}")
        if not pa.Codec.is_available(self.compression) and self.compression != "none":
            raise InvalidArgument(
                f"Parquet is compressed by zstd, snappy, lz4, gzip, brotli or none, not {self.compression!r}"
            )


def write(frame: DataFrame, url: str, options: WriteOptions) -> WriteReport:
    """Runs the frame's query into files at `url`. Raises `DatasetExists`, or what the query or the store raises."""
    if missing := [column for column in options.partition_by if column not in frame.schema]:
        raise InvalidArgument(f"cannot partition by {', '.join(missing)}: the columns are {', '.join(frame.columns)}")
    is_job = frame.session.needs_job(frame.frame, to_files=True)
    target = Target(url, options, frame.session.config.storage_options, id=_kept_id(frame, url) if is_job else None)
    target.check()
    try:
        files = _write_by_job(frame, target) if is_job else _write_here(frame, target)
        target.discard()
    except BaseException:  # Ctrl-C while it was discarded, too.
        if not (is_job and frame.session.config.job_id):
            target.discard()
        raise
    return report(url, files)


def _kept_id(frame: DataFrame, url: str) -> str | None:
    """A job that has a name finds what an earlier one of that name has written of the same dataset."""
    job_id = frame.session.config.job_id
    return hashlib.sha256(f"{job_id} {url}".encode()).hexdigest()[:12] if job_id else None


def _write_by_job(frame: DataFrame, target: Target) -> list[FileOutput]:
    return frame.session.jobs.write(
        frame.frame,
        target.sink(attempts=True),
        target=target.whole_url,
        publish=target.publish,
        progress=target.options.progress,
    )


def _write_here(frame: DataFrame, target: Target) -> list[FileOutput]:
    with row_progress(f"writing {target.name}", show=target.options.progress) as advance:
        reader = frame.batches_of(written(frame.query, frame.schema, target.options.format))
        files = target.sink().write(
            _counted(reader, advance),
            reader.schema,
            stem=f"part-{target.id}",
            options=target.storage_options,
            use_threads=frame.session.config.threads != 1,
        )
    target.publish(files)
    return files


def worth_keeping(files: Sequence[FileOutput]) -> Sequence[FileOutput]:
    """The files with rows, or one for its columns: an empty one says nothing that another does not."""
    return [file for file in files if file.rows] or files[:1]


def report(url: str, files: Sequence[FileOutput]) -> WriteReport:
    """What was written, in sum."""
    files = worth_keeping(files)
    rows = sum(file.rows for file in files)
    return WriteReport(url=url, num_rows=rows, num_files=len(files), size_bytes=sum(file.size_bytes for file in files))


def _counted(reader: pa.RecordBatchReader, advance: Any) -> Iterator[pa.RecordBatch]:
    """The batches of `reader`, shown as they pass."""
    for batch in reader:
        advance(batch.num_rows)
        yield batch


class Target:
    """Where a dataset goes, and the hidden directory beside it where it is made."""

    def __init__(
        self, url: str, options: WriteOptions, storage_options: StorageOptions, *, id: str | None = None
    ) -> None:
        self.url = url
        self.options = options
        self.storage_options = storage_options
        # In the names of files too, so that appended files never meet older ones.
        self.id = id or uuid.uuid4().hex[:12]
        self._suffixes = SUFFIXES[options.format]
        self.one_file = not options.partition_by and url.endswith(self._suffixes)
        self._fs: Any
        self._fs, path = open_url(url, storage_options)
        self._path = path.rstrip("/")
        parent, self.name = posixpath.split(self._path)
        if not self.name:
            raise InvalidArgument(f"cannot replace the root of a store: {url!r}")
        self._stage = posixpath.join(parent, f"{STAGING_PREFIX}{self.id}")
        self._new = posixpath.join(self._stage, "new")

    def sink(self, *, attempts: bool = False) -> FileSink:
        """What writes the files that `publish` puts in place; with `attempts`, some of them may never be named."""
        return FileSink(
            url=url_of(self._fs, posixpath.join(self._stage, "attempts") if attempts else self._new),
            format=self.options.format,
            file_size_bytes=self.options.file_size_bytes,
            partition_by=self.options.partition_by,
            compression=self.options.compression,
            one_file=self.name if self.one_file else None,
        )

    @property
    def whole_url(self) -> str:
        """Where the dataset goes, for others: whatever their working directory is."""
        return url_of(self._fs, self._path)

    def check(self) -> None:
        """Refuses a target that the mode may not touch."""
        mode = self.options.mode
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

    def publish(self, files: Sequence[FileOutput], keys: PartitionKeys | None = None) -> None:
        """Puts the complete files in place. The old ones are kept aside until the new ones are there. `keys`: by what
        the files are partitioned."""
        # An earlier driver may have ended while it appended: all it had moved was made again.
        take_back(self._fs, self._stage, self._path)
        files = worth_keeping(files)
        if self.one_file:
            assert len(files) == 1
            self._fs.mv(self._inside(files[0].staged_url), self._path)
            return
        self._arrange(files, keys)
        if self.options.mode == "overwrite" and self._fs.exists(self._path):
            old = posixpath.join(self._stage, "old")
            self._fs.mv(self._path, old, recursive=True)
            try:
                self._fs.mv(self._new, self._path, recursive=True)
            except BaseException:
                self._fs.mv(old, self._path, recursive=True)
                raise
        elif self._fs.exists(self._path):
            # Somebody may have been quicker since the job began.
            self.check()
            append(self._fs, self._stage, self._path)
        else:
            self._fs.mv(self._new, self._path, recursive=True)

    def _arrange(self, files: Sequence[FileOutput], keys: PartitionKeys | None) -> None:
        """Gives the files of attempts the names they will have, in a directory of nothing else but what says how they
        are partitioned."""
        if all(self._inside(file.staged_url).startswith(f"{self._new}/") for file in files):
            self._fs.makedirs(self._new, exist_ok=True)
            return
        if self._fs.exists(self._new):
            # An earlier driver ended while it did this: what it had moved was made again.
            self._fs.rm(self._new, recursive=True, **self._for_good())
        self._fs.makedirs(self._new, exist_ok=True)
        # Appended files must never meet older ones.
        unique = uuid.uuid4().hex[:12]
        # Files that are added to others are not all there is.
        is_partitioned = keys is not None and self.options.mode != "append" and not self.options.partition_by
        parts: list[PartitionFile] = []
        for number, file in enumerate(files):
            folder, name = posixpath.split(file.path)
            named = f"part-{unique}-{number:05d}{name[name.index('.') :]}"
            if is_partitioned and file.partition is not None:
                named = file_name(unique, file.partition, number)
                parts.append(PartitionFile(named, file.partition, file.rows, file.size_bytes))
            path = posixpath.join(self._new, folder, named)
            self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
            self._fs.mv(self._inside(file.staged_url), path)
        if is_partitioned:
            assert keys is not None
            write_manifest(self._fs, self._new, keys, parts)

    def _inside(self, url: str) -> str:
        return open_url(url, self.storage_options)[1]

    def discard(self) -> None:
        """Removes the hidden directory and whatever is left in it."""
        if not self._fs.exists(self._stage):
            return
        self._fs.rm(self._stage, recursive=True, **self._for_good())

    def _for_good(self) -> dict[str, bool]:
        """Not into a store's trash: nobody wants half a dataset back."""
        return {"trash": False} if protocol_of(self._fs) == "ember" else {}
