"""What files a scan's paths are, and how any of them are read as all of them are together.

Does not know: plans, or which of the files a query needs (`skipping.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import duckdb

from ..errors import DatasetNotFound
from ..partitioned import read_manifest
from ..query import literal
from ..sources import STAGING_PREFIX, StorageOptions, open_url, url_of
from .filescans import File, ResolvedScan, path_values
from .footers import Footers
from .nodes import Column
from .scantext import GLOB, FileScan

# What filesystems call what changes with a file. A time of creation alone tells nothing of later writes.
_CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "md5", "version")
_VERSIONS = (*_CHANGES, "created", "ino")
_SNIFFED_MAX = 100
_SAMPLED_MAX = 8
# Arguments that add columns of a reader's own, or say how these look.
_ADDING = {"filename", "hive_partitioning", "hive_types", "hive_types_autocast", "union_by_name"}
# What sniff_csv tells of a file, by the names of read_csv's arguments.
_DIALECT = {
    "delim": "Delimiter",
    "quote": "Quote",
    "escape": '"Escape"',
    "comment": "Comment",
    "header": "HasHeader",
    "skip": "SkipRows",
    "dateformat": "DateFormat",
    "timestampformat": "TimestampFormat",
}
_SYNONYMS = {"delim": ("sep", "delimiter"), "dateformat": ("date_format",), "timestampformat": ("timestamp_format",)}


def listed(scan: FileScan, options: StorageOptions) -> list[File]:
    """The scan's files. Raises `DatasetNotFound`, or what the filesystem raises."""
    files = list(_files(scan.paths, options))
    if not files:
        raise DatasetNotFound(f"No files found that match {', '.join(scan.paths)}")
    return files


def resolve(scan: FileScan, files: Sequence[File], footers: Footers, connection: Any) -> ResolvedScan:
    """Asks DuckDB for the scan's columns, and what footers tell; of partitioned files those of a few, since a query may
    leave most of them out."""
    columns = _described(scan.call(scan.paths), connection)
    arguments = _pinned(scan, files, columns, connection)
    parts = frozenset(column.name.lower() for column in columns) & _keys(files)
    keys = parts if len(files) > 1 and arguments is not None else frozenset()
    resolved = ResolvedScan(scan, columns, tuple(files), arguments, arguments is None, keys)
    if not keys or len(files) <= _SAMPLED_MAX:
        return footers.looked_up(resolved, connection)
    some = replace(resolved, files=tuple(files[len(files) * i // _SAMPLED_MAX] for i in range(_SAMPLED_MAX)))
    known = {file.url: file for file in footers.looked_up(some, connection).files}
    return replace(resolved, files=tuple(known.get(file.url, file) for file in files))


def with_partitions(scan: ResolvedScan, options: StorageOptions) -> ResolvedScan:
    """The scan, and how its files are partitioned, if they say so and it is so for those who read them by this scan."""
    if scan.scan.function != "read_parquet" or scan.is_whole or not scan.files or not scan.scan.is_by_name:
        return scan
    opened = [open_url(file.url, options) for file in scan.files]
    manifest = read_manifest(opened[0][0], [path for _, path in opened])
    if manifest is None:
        return scan
    keys = manifest.keys
    types = {column.name: column.type for column in scan.columns if column.name.lower() not in _keys(scan.files)}
    named = {(file.name, file.size_bytes): file.partition for file in manifest.files}
    parts = [named.get((file.url.rpartition("/")[2], file.size_bytes), -1) for file in scan.files]
    is_so = all(types.get(name) == type_ for name, type_ in zip(keys.columns, keys.types, strict=True))
    if not is_so or not all(0 <= part < keys.count for part in parts):
        return scan
    files = tuple(replace(file, partition=part) for file, part in zip(scan.files, parts, strict=True))
    return replace(scan, files=files, partitioned=keys)


def _keys(files: Sequence[File]) -> frozenset[str]:
    """The columns that are in the files' paths, in lower case."""
    return frozenset(name.lower() for file in files for name, _ in path_values(file.url))


def _described(call: str, connection: Any) -> tuple[Column, ...]:
    rows = connection.execute(f"DESCRIBE SELECT * FROM {call}").fetchall()
    return tuple(Column(str(row[0]), str(row[1])) for row in rows)


def _pinned(scan: FileScan, files: Sequence[File], columns: Sequence[Column], connection: Any) -> dict[str, str] | None:
    """Arguments with which any of the files are read as all of them are together; None if there are none such."""
    given = scan.arguments()
    if len(files) < 2:
        return given
    union = given.get("union_by_name", "= false")
    if re.search(r"=\s*'?(false|0)", union, re.IGNORECASE) is None:
        return None
    keys = _keys(files)
    own = tuple(columns)
    if keys or "filename" in given:
        bare = {name: argument for name, argument in given.items() if name not in _ADDING}
        own = _described(scan.call(scan.paths, {**bare, "hive_partitioning": "hive_partitioning = false"}), connection)
        if any(column.name.lower() in keys for column in own):
            return None
        parts = [column for column in columns if column.name.lower() in keys]
        given["hive_partitioning"] = f"hive_partitioning = {'true' if parts else 'false'}"
        if parts:
            given.pop("hive_types_autocast", None)
            given["hive_types"] = f"hive_types = {_types(parts)}"
    if scan.function == "read_csv":
        return _pinned_csv(scan, files, given, own, connection)
    if scan.function != "read_parquet" and "columns" not in given:
        # Of rows that are no objects, the one column has a name of DuckDB's.
        return None if [column.name for column in own] == ["json"] else {**given, "columns": f"columns = {_types(own)}"}
    return given


def _types(columns: Sequence[Column]) -> str:
    return f"{{{', '.join(f'{literal(column.name)}: {literal(column.type)}' for column in columns)}}}"


def _pinned_csv(
    scan: FileScan, files: Sequence[File], given: dict[str, str], own: Sequence[Column], connection: Any
) -> dict[str, str] | None:
    """`given` with the dialect and the types of the files, if they all have one."""
    bare = [argument for name, argument in scan.arguments().items() if name not in _ADDING]
    found: dict[str, set[Any]] = {name: set() for name in _DIALECT}
    for file in files[:_SNIFFED_MAX]:
        call = f"sniff_csv({', '.join([literal(file.url), *bare])})"
        try:
            row = connection.execute(f"SELECT Columns, {', '.join(_DIALECT.values())} FROM {call}").fetchone()
        except duckdb.Error:
            return None
        if not {column.name for column in own} <= {column["name"] for column in row[0]}:
            return None
        for values, value in zip(found.values(), row[1:], strict=True):
            values.add(value)
    for name, values in found.items():
        # A file without quotes, or without dates, does not say how it would write them.
        values -= {None, "(empty)"}
        if len(values) > 1:
            return None
        if values and not given.keys() & {name, *_SYNONYMS.get(name, ())}:
            (value,) = values
            given[name] = f"{name} = {literal(value) if isinstance(value, str) else value}"
    if not given.keys() & {"columns", "types", "dtypes", "column_types", "all_varchar"}:
        given["types"] = f"types = {_types(own)}"
    return given


def _files(paths: Iterable[str], options: StorageOptions) -> Iterator[File]:
    for path in paths:
        filesystem, inner = open_url(path, options)
        found = filesystem.glob(inner, detail=True) if GLOB.search(inner) else {inner: filesystem.info(inner)}
        for name in sorted(found):
            info = found[name]
            if info.get("type") == "directory" or f"/{STAGING_PREFIX}" in name:
                continue
            version = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
            yield File(url_of(filesystem, name), int(info["size"] or 0), ",".join(version))
