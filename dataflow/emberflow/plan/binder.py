"""SQL text to a plan: DuckDB parses, binds and optimises it over empty tables, and we read its answer.

The tables are shadows: the names and types of the real ones and no rows, so DuckDB's optimizers know nothing of the
data; those that would look at it, or that make operators for DuckDB's own use, are off. What is left on pushes filters
down, finds the join order and takes subqueries apart.

Invariants: a plan's text binds again, to the names and types the query has; anything else is `NotPlannable`.
Does not know: files, stages, how a plan is run.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence

import duckdb

from .expressions import ExpressionReader
from .fields import Json, NotPlannable
from .nodes import Bound, Column, Input, Node, Scan
from .reader import Reader
from .render import select
from .typetext import TypeText, quoted

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
_MOMENT = "getvariable('emberflow_now')"
_CLOCKS = {
    **dict.fromkeys(("now", "get_current_timestamp", "transaction_timestamp", "current_timestamp"), _MOMENT),
    **dict.fromkeys(("current_date", "today"), f"CAST({_MOMENT} AT TIME ZONE 'UTC' AS DATE)"),
    **dict.fromkeys(("get_current_time",), f"CAST({_MOMENT} AS TIMETZ)"),
    **dict.fromkeys(("current_localtime",), f"CAST({_MOMENT} AT TIME ZONE 'UTC' AS TIME)"),
    **dict.fromkeys(("current_localtimestamp",), f"{_MOMENT} AT TIME ZONE 'UTC'"),
}
_SERIALIZE = (
    "SELECT json_serialize_plan(?, skip_null := true, skip_empty := false, skip_default := false, optimize := true)"
)


def bind(
    text: str,
    shadows: Mapping[str, Sequence[Column]],
    *,
    now: datetime.datetime,
    setup: Callable[[duckdb.DuckDBPyConnection], None] | None = None,
) -> Bound:
    """The plan of one SELECT over tables with these columns.

    `now` is what now(), current_date and their like stand for. `setup` brings the connection what the query needs
    besides tables: functions, settings. Raises DuckDB's own error for what DuckDB refuses, and `NotPlannable`.
    """
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        _prepare(connection, shadows, now)
        if setup:
            setup(connection)
        statements = connection.extract_statements(text)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise NotPlannable("a statement that is not one SELECT")
        columns = _described(connection, statements[0].query)
        types = TypeText(connection)
        volatile = connection.execute("SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'")
        names = frozenset(name for (name,) in volatile.fetchall())
        expressions = ExpressionReader(types, volatile=names, now=now)
        plan = Reader(expressions).read(_serialized(connection, statements[0].query))
        bound = Bound(plan, columns)
        _check(connection, bound)
        return bound


def _prepare(
    connection: duckdb.DuckDBPyConnection, shadows: Mapping[str, Sequence[Column]], now: datetime.datetime
) -> None:
    optimizers = [name for (name,) in connection.execute("FROM duckdb_optimizers()").fetchall()]
    off = ",".join(name for name in optimizers if name not in _OPTIMIZERS)
    connection.execute(f"SET disabled_optimizers = '{off}'")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET python_enable_replacements = false")
    moment = now.astimezone(datetime.UTC).isoformat(sep=" ")
    connection.execute(f"SET VARIABLE emberflow_now = CAST('{moment}' AS TIMESTAMPTZ)")
    for name, value in _CLOCKS.items():
        connection.execute(f"CREATE MACRO {quoted(name)}() AS {value}")
    for table, columns in shadows.items():
        written = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
        connection.execute(f"CREATE TABLE {quoted(table)} ({written})")


def _described(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Column, ...]:
    rows = connection.execute(f"DESCRIBE (\n{query.strip().rstrip(';')}\n)").fetchall()
    return tuple(Column(row[0], row[1]) for row in rows)


def _serialized(connection: duckdb.DuckDBPyConnection, query: str) -> Json:
    for folds in (True, False):
        if not folds:
            # Folded constants of some types (BIT) DuckDB cannot write as JSON; unfolded they are casts of strings.
            connection.execute(
                "SET disabled_optimizers = current_setting('disabled_optimizers') || ',expression_rewriter'"
            )
        row = connection.execute(_SERIALIZE, [query]).fetchone()
        assert row is not None
        try:
            # 2.0 writes NaN in its own way.
            answer = json.loads(re.sub(r'(?<="value":)-?nan(?=[,}])', "NaN", row[0]))
        except json.JSONDecodeError:
            continue
        if answer.get("error"):
            raise NotPlannable(f"a plan that DuckDB does not write out: {answer.get('error_message', '')[:200]}")
        if len(answer["plans"]) != 1:
            raise NotPlannable("a statement that DuckDB runs as several")
        return answer["plans"][0]
    raise NotPlannable("a constant that DuckDB does not write out")


def _check(connection: duckdb.DuckDBPyConnection, bound: Bound) -> None:
    """Binds the plan's text, so that what we could not write is found out here and not by a worker."""

    def shadow(leaf: Scan | Input) -> str:
        assert isinstance(leaf, Scan)
        return quoted(leaf.table)

    text = select(bound.plan, source=shadow, names=[column.name for column in bound.columns])
    try:
        columns = _described(connection, text)
    except duckdb.Error as error:
        raise NotPlannable(f"an expression that we cannot write: {error}") from error
    if columns != bound.columns:
        raise NotPlannable("an expression whose type we cannot keep")
