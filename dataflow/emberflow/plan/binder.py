"""SQL text to a plan: DuckDB parses, binds and optimises it over empty tables, and we read its answer.

The tables are shadows: the names and types of the real ones, and no rows or only NULLs. DuckDB's optimizers that would
look at the data, or that make operators for DuckDB's own use, are off. What is left on pushes filters
down, finds the join order and takes subqueries apart.

Invariants: a plan's text binds again, to the names and types the query has; anything else is `NotPlannable`.
Does not know: files, stages, how a plan is run.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb

from ..query import quoted
from .expressions import ExpressionReader
from .fields import Json, NotPlannable
from .nodes import Bound, Column, Input, Node, Scan
from .reader import Reader
from .render import select
from .typetext import TypeText

__all__ = ["NotPlannable", "bind"]

# Of the optimizers that DuckDB lists, the only ones left on; one that a new version brings is off.
_OPTIMIZERS = frozenset(
    (
        "expression_rewriter",
        "filter_pullup",
        "filter_pushdown",
        "regex_range",
        "join_order",
        "deliminator",
        "unnest_rewriter",
        "unused_columns",
        "cte_inlining",
    )
)
# The largest table's rows in its shadow, if sizes are known.
_HINT_ROWS_MAX = 20_000
_MOMENT = "getvariable('emberflow_now')"
_TODAY = f"CAST({_MOMENT} AT TIME ZONE 'UTC' AS DATE)"
# Macros that hide DuckDB's own functions, which read the clock.
_CLOCKS = {
    **dict.fromkeys(("now", "get_current_timestamp", "transaction_timestamp", "current_timestamp"), f"() AS {_MOMENT}"),
    **dict.fromkeys(("current_date", "today"), f"() AS {_TODAY}"),
    "get_current_time": f"() AS CAST({_MOMENT} AS TIMETZ)",
    "current_localtime": f"() AS CAST({_MOMENT} AT TIME ZONE 'UTC' AS TIME)",
    "current_localtimestamp": f"() AS {_MOMENT} AT TIME ZONE 'UTC'",
    "age": f"(x) AS system.main.age(CAST({_TODAY} AS TIMESTAMP), x), (x, y) AS system.main.age(x, y)",
}
_UNKNOWN = "a plan that DuckDB writes in a way we do not know"
_SERIALIZE = (
    "SELECT json_serialize_plan(?, skip_null := true, skip_empty := false, skip_default := false, optimize := true)"
)


def bind(
    text: str,
    shadows: Mapping[str, Sequence[Column]],
    *,
    rows: Mapping[str, int] | None = None,
    now: datetime.datetime,
    setup: Callable[[duckdb.DuckDBPyConnection], None] | None = None,
) -> Bound:
    """The plan of one SELECT over tables with these columns.

    `rows` says about how many rows tables have, which decides the join order and nothing else. `now` is what now(),
    current_date and their like stand for. `setup` brings the connection what else the query needs: functions. Raises
    DuckDB's own error for what DuckDB refuses, and `NotPlannable`.
    """
    with _connection(setup) as connection:
        _prepare(connection, shadows, rows or {}, now)
        statements = connection.extract_statements(text)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise NotPlannable("a statement that is not one SELECT")
        query = statements[0].query
        columns = _user_columns(connection, query)
        volatile = _volatile_functions(connection) if setup else _shared_database().volatile
        expressions = ExpressionReader(TypeText(connection), volatile=volatile)
        bound = Bound(_read(expressions, _serialized(connection, query)), columns)
        _check(connection, bound)
        return bound


def _user_columns(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Column, ...]:
    try:
        return _described(connection, query)
    except duckdb.PermissionException as error:
        raise NotPlannable("a file that only DuckDB knows how to read") from error


def _read(expressions: ExpressionReader, json_plan: Json) -> Node:
    try:
        return Reader(expressions).read(json_plan)
    except RecursionError as error:
        raise NotPlannable("an expression of very many parts") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NotPlannable(f"{_UNKNOWN}: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _Shared:
    """The process's own DuckDB for binding, for one query at a time: opening one and asking it for its functions takes
    30 ms, five times as long as binding a query of TPC-H."""

    connection: duckdb.DuckDBPyConnection
    volatile: frozenset[str]
    lock: threading.Lock


@functools.cache
def _shared_database() -> _Shared:
    connection = _opened()
    return _Shared(connection, _volatile_functions(connection), threading.Lock())


def _opened() -> duckdb.DuckDBPyConnection:
    # No files: what a query reads has been made a shadow, or DuckDB shall read it in a task and not here.
    return duckdb.connect(":memory:", config={"threads": 1, "enable_external_access": False})


@contextmanager
def _connection(setup: Callable[[duckdb.DuckDBPyConnection], None] | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to an empty database; what `setup` does is seen by no other query."""
    if setup:
        with _opened() as connection:
            setup(connection)
            yield connection
        return
    shared = _shared_database()
    with shared.lock, shared.connection.cursor() as connection:
        connection.execute("BEGIN TRANSACTION")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")


def _volatile_functions(connection: duckdb.DuckDBPyConnection) -> frozenset[str]:
    rows = connection.execute("SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'").fetchall()
    return frozenset(name for (name,) in rows)


def _prepare(
    connection: duckdb.DuckDBPyConnection,
    shadows: Mapping[str, Sequence[Column]],
    rows: Mapping[str, int],
    now: datetime.datetime,
) -> None:
    _set_optimizers(connection, _OPTIMIZERS)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET python_enable_replacements = false")
    moment = now.astimezone(datetime.UTC).isoformat(sep=" ")
    connection.execute(f"SET VARIABLE emberflow_now = CAST('{moment}' AS TIMESTAMPTZ)")
    for name, definition in _CLOCKS.items():
        connection.execute(f"CREATE MACRO {quoted(name)}{definition}")
    largest = max(rows.values(), default=0)
    for table, columns in shadows.items():
        written = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
        connection.execute(f"CREATE TABLE {quoted(table)} ({written})")
        if largest:
            # Only how the tables compare matters. The rows are NULL: nothing looks at them.
            count = max(1, rows.get(table, 0) * _HINT_ROWS_MAX // largest)
            one = quoted(columns[0].name)
            connection.execute(f"INSERT INTO {quoted(table)} ({one}) SELECT NULL FROM range({count})")


def _set_optimizers(connection: duckdb.DuckDBPyConnection, on: frozenset[str]) -> None:
    optimizers = [name for (name,) in connection.execute("FROM duckdb_optimizers()").fetchall()]
    off = ",".join(name for name in optimizers if name not in on)
    connection.execute(f"SET disabled_optimizers = '{off}'")


def _described(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Column, ...]:
    rows = connection.execute(f"DESCRIBE (\n{query.strip().rstrip(';')}\n)").fetchall()
    return tuple(Column(row[0], row[1]) for row in rows)


def _serialized(connection: duckdb.DuckDBPyConnection, query: str) -> Json:
    answer = _answer(connection, query)
    if answer is None:
        # Folded constants of some types (BIT) DuckDB cannot write as JSON; unfolded they are casts of strings.
        _set_optimizers(connection, _OPTIMIZERS - {"expression_rewriter"})
        answer = _answer(connection, query)
    if answer is not None and answer.get("error"):
        # DuckDB 1.4 loses columns of CTEs that it puts inline; our own rules leave out what nobody reads, too.
        _set_optimizers(connection, _OPTIMIZERS - {"unused_columns"})
        answer = _answer(connection, query)
    if answer is None:
        raise NotPlannable("a constant that DuckDB does not write out")
    if answer.get("error"):
        raise NotPlannable(f"a plan that DuckDB does not write out: {answer.get('error_message', '')[:200]}")
    if len(answer["plans"]) != 1:
        raise NotPlannable("a statement that DuckDB runs as several")
    return answer["plans"][0]


def _answer(connection: duckdb.DuckDBPyConnection, query: str) -> Json | None:
    """None: what DuckDB wrote is not JSON."""
    row = connection.execute(_SERIALIZE, [query]).fetchone()
    assert row is not None
    try:
        # 2.0 writes NaN in its own way.
        return json.loads(re.sub(r'(?<="value":)-?nan(?=[,}])', "NaN", row[0], flags=re.IGNORECASE))
    except json.JSONDecodeError:
        return None
    except RecursionError as error:
        raise NotPlannable("an expression of very many parts") from error


def _check(connection: duckdb.DuckDBPyConnection, bound: Bound) -> None:
    """Binds the plan's text, so that what we could not write is found out here and not by a worker."""

    def shadow(leaf: Scan | Input) -> str:
        assert isinstance(leaf, Scan)
        return quoted(leaf.table)

    text = select(bound.plan, source=shadow, names=[column.name for column in bound.columns])
    try:
        columns = _described(connection, text)
        connection.execute(f"EXPLAIN {text}")  # further than binding: some subqueries are refused by the optimizer
    except duckdb.Error as error:
        raise NotPlannable(f"an expression that we cannot write: {error}") from error
    if columns != bound.columns:
        raise NotPlannable("an expression whose type we cannot keep")
