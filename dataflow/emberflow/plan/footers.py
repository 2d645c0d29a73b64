"""Footers of Parquet files: rows of row groups, and the least and greatest values that these say they hold.

Values stay the text that DuckDB makes of them. Statistics are kept up to a number of them; of more, only
the rows.

Does not know: what is asked of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ..engine import arrow_reader
from ..query import literal
from .filescans import File, ResolvedScan

FOOTERS_MAX = 2_000
"""Of more files than these the footers are not read."""

_STATISTICS_MAX = 100_000
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


def with_footers(scan: ResolvedScan, connection: Any) -> ResolvedScan:
    """The scan with what its files' footers tell, unless there are too many of them."""
    if scan.scan.function != "read_parquet" or not scan.files or len(scan.files) > FOOTERS_MAX:
        return scan
    groups: dict[str, dict[int, int]] = {}
    kept: list[pa.RecordBatch] = []
    count = 0
    for batch in arrow_reader(connection, _query(scan.files), None, _BATCH_ROWS):
        table = pa.Table.from_batches([batch])
        for row in table.group_by(["file", "row_group", "row_count"]).aggregate([]).to_pylist():
            groups.setdefault(row["file"], {})[row["row_group"]] = row["row_count"]
        count += batch.num_rows
        kept = [*kept, batch] if count <= _STATISTICS_MAX else []
    files = tuple(_with_groups(file, groups.get(file.url, {})) for file in scan.files)
    statistics = pa.Table.from_batches([batch.cast(_STATISTICS) for batch in kept], _STATISTICS)
    return replace(scan, files=files, statistics=statistics)


def _with_groups(file: File, groups: dict[int, int]) -> File:
    return replace(file, groups=tuple(groups[group] for group in sorted(groups)))


def _query(files: Sequence[File]) -> str:
    names = ", ".join(literal(file.url) for file in files)
    # Of INT96 the order is not defined.
    least, greatest = (f"CASE WHEN type <> 'INT96' THEN stats_{which}_value END" for which in ("min", "max"))
    return (
        "SELECT file_name AS file, row_group_id AS row_group, path_in_schema AS column_path, "
        f"row_group_num_rows AS row_count, stats_null_count AS null_count, {least} AS least, {greatest} AS greatest "
        f"FROM parquet_metadata([{names}])"
    )
