"""Footers of Parquet files: rows of row groups, the least and greatest values that these say they hold, and types.

Each is read once, as long as its file is as it was: what a query asks for changes, what a footer says does not. Values
stay the text that DuckDB makes of them.

Invariant: what is not known of a file keeps it. Of more files than `FOOTERS_MAX` nothing is looked up; of a read with
more statistics than `_STATISTICS_MAX`, columns times row groups, only the rows are kept.

Does not know: what is asked of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from ..engine import arrow_reader
from ..query import literal
from .filescans import File, ResolvedScan

T = TypeVar("T")

FOOTERS_MAX = 2_000
_STATISTICS_MAX = 100_000
_KEPT_MAX = 10_000
"""Files of which footers are kept."""
_BATCH_ROWS = 16_384
_STATISTICS = pa.schema(
    {
        "file": pa.string(),
        "row_group": pa.int64(),
        "column_path": pa.string(),
        "row_count": pa.int64(),
        "null_count": pa.int64(),
        "least": pa.string(),
        "greatest": pa.string(),
    }
)
# Schema.empty_table() imports pandas: a sixth of a second.
_NOTHING = pa.Table.from_batches([], _STATISTICS)


@dataclass(frozen=True, slots=True)
class _Footer:
    groups: tuple[int, ...]
    statistics: pa.Table


class Footers:
    """What is known of files, by url and version. Of a file without a version nothing is kept."""

    def __init__(self) -> None:
        self._footers: dict[tuple[str, str], _Footer] = {}
        self._types: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def looked_up(self, scan: ResolvedScan, connection: Any) -> ResolvedScan:
        """The scan with the row groups of its files, unless there are too many of them."""
        if not _has_footers(scan):
            return scan
        known = self._of(scan.files, connection)
        return replace(scan, files=tuple(replace(file, groups=known[file.url].groups) for file in scan.files))

    def statistics(self, scan: ResolvedScan, connection: Any) -> pa.Table:
        """A row for each column of each row group, as far as it is known."""
        if not _has_footers(scan):
            return _NOTHING
        return pa.concat_tables([footer.statistics for footer in self._of(scan.files, connection).values()])

    def types(self, files: Sequence[File], connection: Any) -> dict[str, list[tuple[str, str]]]:
        """By url: (name in lower case, type) of the columns, not of their members."""
        return _kept(self._types, files, lambda missing: _read_types(missing, connection))

    def _of(self, files: Sequence[File], connection: Any) -> dict[str, _Footer]:
        return _kept(self._footers, files, lambda missing: _read(missing, connection))


def _key(file: File) -> tuple[str, str]:
    return file.url, file.version


def _kept(
    known: dict[tuple[str, str], T], files: Sequence[File], read: Callable[[Sequence[File]], dict[str, T]]
) -> dict[str, T]:
    """By url what is known of files, and what `read` finds of the others, which is known from then on."""
    found = {file.url: known[_key(file)] for file in files if _key(file) in known}
    missing = [file for file in files if file.url not in found]
    if missing:
        fresh = read(missing)
        found |= fresh
        known.update({_key(file): fresh[file.url] for file in missing if file.version})
        for oldest in list(known)[:-_KEPT_MAX]:
            known.pop(oldest, None)
    return found


def _has_footers(scan: ResolvedScan) -> bool:
    return scan.scan.function == "read_parquet" and 0 < len(scan.files) <= FOOTERS_MAX


def _names(files: Sequence[File]) -> str:
    return ", ".join(literal(file.url) for file in files)


def _read(files: Sequence[File], connection: Any) -> dict[str, _Footer]:
    # Of INT96 the order is not defined.
    least, greatest = (f"CASE WHEN type <> 'INT96' THEN stats_{which}_value END" for which in ("min", "max"))
    text = (
        "SELECT file_name AS file, row_group_id AS row_group, path_in_schema AS column_path, "
        f"row_group_num_rows AS row_count, stats_null_count AS null_count, {least} AS least, {greatest} AS greatest "
        f"FROM parquet_metadata([{_names(files)}])"
    )
    groups: dict[str, dict[int, int]] = {}
    kept: dict[str, list[pa.Table]] = {}
    count = 0
    for batch in arrow_reader(connection, text, None, _BATCH_ROWS):
        table = pa.Table.from_batches([batch.cast(_STATISTICS)])
        # Not by Table.group_by, which imports pandas as well.
        urls, *counted = (table[name].to_pylist() for name in ("file", "row_group", "row_count"))
        for url, group, rows in zip(urls, *counted, strict=True):
            groups.setdefault(url, {})[group] = rows
        count += batch.num_rows
        if count > _STATISTICS_MAX:
            kept.clear()
            continue
        for begin, end, url in _runs(urls):
            kept.setdefault(url, []).append(table.slice(begin, end - begin))
    return {
        file.url: _Footer(
            tuple(rows for _, rows in sorted(groups.get(file.url, {}).items())),
            pa.concat_tables(kept[file.url]).combine_chunks() if file.url in kept else _NOTHING,
        )
        for file in files
    }


def _runs(urls: Sequence[str]) -> list[tuple[int, int, str]]:
    """(begin, end, url) of rows of one file that follow each other."""
    runs: list[tuple[int, int, str]] = []
    for index, url in enumerate(urls):
        if runs and runs[-1][2] == url:
            runs[-1] = (runs[-1][0], index + 1, url)
        else:
            runs.append((index, index + 1, url))
    return runs


def _read_types(files: Sequence[File], connection: Any) -> dict[str, list[tuple[str, str]]]:
    rows = connection.execute(
        f"SELECT file_name, name, duckdb_type, coalesce(num_children, 0) FROM parquet_schema([{_names(files)}])"
    ).fetchall()
    types: dict[str, list[tuple[str, str]]] = {file.url: [] for file in files}
    open_groups: dict[str, list[int]] = {}
    for url, name, type_, children in rows:
        # From the root down, each before its members.
        groups = open_groups.setdefault(url, [])
        if len(groups) == 1:
            types[url].append((name.lower(), type_))
        groups.append(children)
        while groups and groups[-1] == 0:
            groups.pop()
            if groups:
                groups[-1] -= 1
    return types
