"""Which files, and row groups, hold nothing that a query asks for, and so are not read.

Told by the values in the files' paths, and by what footers say of row groups. DuckDB compares them, as it compares the
rows. Whatever is not certain keeps the file: a path or a statistic that is written in a way of its own, a file whose
column has another type than the scan's, floats (statistics may leave NaN out), types whose statistics are not in their
order. DuckDB skips row groups by itself; left out here, nothing opens the files, and shares are of what is read.

Does not know: SQL beyond conditions, tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ..query import literal
from .conditions import Check, Condition, checks_of
from .filescans import ResolvedScan, path_values
from .footers import Footers
from .nodes import Column, Expr, Filter, Fixed, Input, Join, Node, Project, Scan, SetOperation, Shared

# Values in paths that mean what is written; "%20" and names of NULL do not.
_PLAIN_VALUE = re.compile(r"(?!null$|__hive_default_partition__$)[a-z0-9_.:-]+", re.IGNORECASE)
_ORDERED = re.compile(r"U?(TINYINT|SMALLINT|INTEGER|BIGINT)|DATE|TIMESTAMP( WITH TIME ZONE)?|BOOLEAN|VARCHAR|DECIMAL.*")


def with_conditions(node: Node, scan: Callable[[Scan, tuple[Expr, ...]], Scan]) -> Node:
    """The plan with what `scan` makes of each scan in it and of the conditions that all of its rows have to meet."""
    return _with_conditions(node, scan, ())


def _with_conditions(node: Node, scan: Callable[[Scan, tuple[Expr, ...]], Scan], above: tuple[Expr, ...]) -> Node:
    if isinstance(node, Scan):
        return scan(node, above)
    if isinstance(node, Filter):
        return replace(node, child=_with_conditions(node.child, scan, (*above, *node.conditions)))
    if isinstance(node, Project):
        where = {i: expr.position for i, expr in enumerate(node.exprs) if expr.position is not None}
        below = tuple(expr.moved(where) for expr in above if expr.columns <= where.keys())
        return replace(node, child=_with_conditions(node.child, scan, below))
    if isinstance(node, Join):
        return replace(node, left=with_conditions(node.left, scan), right=with_conditions(node.right, scan))
    if isinstance(node, SetOperation):
        return replace(node, children=tuple(with_conditions(child, scan) for child in node.children))
    if isinstance(node, Shared):
        return replace(node, definition=with_conditions(node.definition, scan), body=with_conditions(node.body, scan))
    if isinstance(node, Fixed | Input):
        return node
    return replace(node, child=with_conditions(node.child, scan))


def narrowed(scan: ResolvedScan, conditions: Sequence[Condition], footers: Footers, connection: Any) -> ResolvedScan:
    """The scan of the files that may hold rows which meet all of the conditions; with the row groups that they do."""
    kept = footers.looked_up(_by_paths(scan, conditions, connection), connection)
    kept = _by_statistics(kept, conditions, footers, connection)
    if kept.size_bytes == scan.size_bytes and len(kept.files) == len(scan.files):
        return kept
    return replace(kept, all_files=len(scan.files), all_bytes=scan.size_bytes)


# ---- paths


def _by_paths(scan: ResolvedScan, conditions: Sequence[Condition], connection: Any) -> ResolvedScan:
    keys = {i for i, column in enumerate(scan.columns) if column.name.lower() in scan.keys}
    told = [condition for condition in conditions if keys.issuperset(_positions(condition))]
    if not told:
        return scan
    used = sorted({position for condition in told for position in _positions(condition)})
    values = [_values(file.url) for file in scan.files]
    table = pa.table(
        {
            "file": pa.array(range(len(scan.files)), pa.int64()),
            **{f"value{i}": pa.array([v.get(scan.columns[i].name.lower()) for v in values], pa.string()) for i in used},
        }
    )

    def cast(check: Check) -> str:
        value = f"TRY_CAST(value{check.column} AS {scan.columns[check.column].type})"
        return f"TRY_CAST({value} AS {check.cast})" if check.cast else value

    unknown = " OR ".join(f"{cast(check)} IS NULL" for condition in told for check in checks_of(condition))
    met = " AND ".join(_sql(condition, lambda check: _exact(check, cast(check))) for condition in told)
    positions = _rows(connection, table, f"SELECT file FROM emberflow_told WHERE {unknown} OR ({met})")
    kept = {position for (position,) in positions}
    return replace(scan, files=tuple(file for i, file in enumerate(scan.files) if i in kept))


def _values(url: str) -> dict[str, str]:
    """The values in a file's path by their columns; of one that is there twice, or in no plain form, none."""
    found: dict[str, str] = {}
    twice = set()
    for name, value in path_values(url):
        twice |= {name.lower()} & found.keys()
        found[name.lower()] = value
    return {
        name: value for name, value in found.items() if name not in twice and _PLAIN_VALUE.fullmatch(value) is not None
    }


def _exact(check: Check, value: str) -> str:
    constants = ", ".join(check.constants)
    return f"{value} {check.operator} {f'({constants})' if check.operator == 'IN' else constants}"


# ---- statistics


def _by_statistics(
    scan: ResolvedScan, conditions: Sequence[Condition], footers: Footers, connection: Any
) -> ResolvedScan:
    if not conditions or not scan.scan.is_by_name:
        return scan
    statistics = footers.statistics(scan, connection)
    if not statistics:
        return scan
    in_paths = {name.lower() for file in scan.files for name, _ in path_values(file.url)}
    used = {
        position: scan.columns[position]
        for condition in conditions
        for position in _positions(condition)
        # The names of a column's members are joined like this.
        if scan.columns[position].name.lower() not in in_paths and ", " not in scan.columns[position].name
    }
    excluded = [f"NOT {_sql(condition, lambda check: _possible(check, used))}" for condition in conditions]
    summed = ", ".join(part for position, column in sorted(used.items()) for part in _told(position, column))
    if not summed:
        return scan
    found = _rows(
        connection,
        statistics,
        f"SELECT file, row_group FROM (SELECT file, row_group, any_value(row_count) AS row_count, {summed} "
        f"FROM emberflow_told GROUP BY file, row_group) WHERE {' OR '.join(excluded)}",
    )
    skipped: dict[str, set[int]] = {}
    for file, group in found:
        skipped.setdefault(file, set()).add(group)
    for url in _of_other_types(skipped, scan, used.values(), footers, connection):
        del skipped[url]
    files = [replace(file, skipped=frozenset(skipped.get(file.url, ()))) for file in scan.files]
    return replace(scan, files=tuple(file for file in files if file.kept or not file.groups))


def _told(position: int, column: Column) -> list[str]:
    """What is known of a row group's column: its least and greatest value, and the number of NULLs."""
    is_one = f"lower(column_path) = {literal(column.name.lower())}"
    counted = f"max(null_count) FILTER ({is_one}) AS nulls{position}"
    if _ORDERED.fullmatch(column.type) is None:
        return [counted]
    ends = []
    for end in ("least", "greatest"):
        # Bytes that are no text come with backslashes.
        plain = f"CASE WHEN NOT contains({end}, '\\') THEN {end} END"
        ends.append(f"TRY_CAST(max({plain}) FILTER ({is_one}) AS {column.type}) AS {end}{position}")
    return [counted, *ends]


def _possible(check: Check, used: Mapping[int, Column]) -> str:
    """Whether a row group may have a row that meets the check; never NULL."""
    if check.column not in used or check.cast:
        return "true"
    nulls = f"nulls{check.column}"
    if check.operator == "IS NULL":
        return f"coalesce({nulls} > 0, true)"
    has_values = f"coalesce({nulls} < row_count, true)"
    if check.operator in ("IS NOT NULL", "<>") or _ORDERED.fullmatch(used[check.column].type) is None:
        return has_values
    least, greatest = f"least{check.column}", f"greatest{check.column}"
    if check.operator in ("=", "IN"):
        possible = " OR ".join(f"{constant} BETWEEN {least} AND {greatest}" for constant in check.constants)
    else:
        possible = f"{least if '<' in check.operator else greatest} {check.operator} {check.constants[0]}"
    return f"({has_values} AND coalesce({possible}, true))"


def _of_other_types(
    urls: Iterable[str], scan: ResolvedScan, columns: Iterable[Column], footers: Footers, connection: Any
) -> list[str]:
    """Those of the files in which one of the columns is of another type, or not to be told from another."""
    doubtful = set(urls)
    types = footers.types([file for file in scan.files if file.url in doubtful], connection)
    wanted = {column.name.lower(): column.type for column in columns}
    return [url for url, told in types.items() if sorted(t for t in told if t[0] in wanted) != sorted(wanted.items())]


# ---- SQL


def _positions(condition: Condition) -> set[int]:
    return {check.column for check in checks_of(condition)}


def _sql(condition: Condition, of_check: Callable[[Check], str]) -> str:
    if isinstance(condition, Check):
        return f"({of_check(condition)})"
    return f"({f' {condition.operator} '.join(_sql(part, of_check) for part in condition.parts)})"


def _rows(connection: Any, table: pa.Table, text: str) -> list[Any]:
    """The rows of a query over the table `emberflow_told`."""
    connection.register("emberflow_told", table)
    try:
        return list(connection.execute(text).fetchall())
    finally:
        connection.unregister("emberflow_told")
