"""Every statement of the corpus, and TPC-H's queries: the plan's text has DuckDB's own answer.

Run: pytest tests/dataflow/test_plan_corpus.py.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pytest
from emberflow.plan.binder import NotPlannable, bind
from emberflow.plan.nodes import Bound, Column, Input, KeyFilter, Node, Scan, walk
from emberflow.plan.render import select
from emberflow.query import quoted

from benchmarks import tpch

from .corpus import STATEMENTS, TABLES, Statement

NOW = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=datetime.UTC)

REFUSED = {
    "refused0": "a recursive CTE",
    "refused1": "an ASOF join",
    "refused2": "a positional join",
    "refused3": "a SAMPLE",
    "refused4": "a LIMIT that is not a plain number",
    "refused6": "a LIMIT that is not a plain number",
    "refused7": "a reference to a BIGINT that is a ROWID",
}
if duckdb.__version__.startswith("1."):
    REFUSED["scalar33"] = "an expression that we cannot write: "  # the type of a row() has no text in 1.4


@pytest.fixture(scope="module")
def tables() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, query in TABLES.items():
            connection.execute(f"CREATE TABLE {name} AS {query}")
        yield connection


@pytest.fixture(scope="module")
def shadows(tables: duckdb.DuckDBPyConnection) -> dict[str, list[Column]]:
    return {name: columns_of(tables, f"FROM {name}") for name in TABLES}


@pytest.fixture(scope="module")
def plan_of(shadows: dict[str, list[Column]]) -> Callable[[Statement], Bound]:
    """A statement's plan, made once: several tests look at all of them."""
    return functools.cache(lambda statement: bind(statement.sql, shadows, now=NOW))


def columns_of(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Column]:
    return [Column(row[0], row[1]) for row in connection.execute(f"DESCRIBE ({sql}\n)").fetchall()]


def shadow(leaf: Scan | Input) -> str:
    assert isinstance(leaf, Scan)
    return quoted(leaf.table)


def text_of(bound: Bound) -> str:
    return select(bound.plan, source=shadow, names=[column.name for column in bound.columns])


def answer(connection: duckdb.DuckDBPyConnection, sql: str, *, ordered: bool) -> tuple[list[Column], list[Any]]:
    """Names and types, and rows; as text where Python has no such value (infinite dates, members of a UNION)."""
    columns = columns_of(connection, sql)
    foreign = ("TIME", "DATE", "INTERVAL", "UNION")
    names = [f"x.c{i}" for i in range(len(columns))]
    shown = [
        f"CAST({name} AS VARCHAR)" if any(word in column.type for word in foreign) else name
        for name, column in zip(names, columns, strict=True)
    ]
    aliases = ", ".join(f"c{i}" for i in range(len(columns)))
    rows = connection.execute(f"SELECT {', '.join(shown)} FROM ({sql}\n) AS x({aliases})").fetchall()
    return columns, rows if ordered else sorted(rows, key=repr)


def same(a: Any, b: Any) -> bool:
    """Equal, NaN to NaN and -0.0 to -0.0; floats that were summed within 1e-9."""
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b) or a == b:
            return repr(a) == repr(b)
        return math.isclose(a, b, rel_tol=1e-9)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: statement.name)
def test_the_plans_text_has_duckdbs_answer(
    statement: Statement, tables: duckdb.DuckDBPyConnection, plan_of: Callable[[Statement], Bound]
) -> None:
    if statement.name in REFUSED:
        with pytest.raises(NotPlannable) as refusal:
            plan_of(statement)
        assert refusal.value.reason.startswith(REFUSED[statement.name])
        return
    bound = plan_of(statement)
    expected_columns, expected = answer(tables, statement.sql, ordered=statement.ordered)
    columns, rows = answer(tables, text_of(bound), ordered=statement.ordered)
    assert list(bound.columns) == columns == expected_columns
    assert len(rows) == len(expected)
    if not statement.unstable:
        differing = [pair for pair in zip(rows, expected, strict=True) if not same(*pair)]
        assert not differing


def test_every_operator_has_the_types_it_says(
    tables: duckdb.DuckDBPyConnection, plan_of: Callable[[Statement], Bound]
) -> None:
    """The text of each part of each plan binds to the types the plan has for it: no overload is another."""

    def source(leaf: Scan | Input) -> str:
        if isinstance(leaf, Scan):
            return quoted(leaf.table)
        nulls = ", ".join(f"CAST(NULL AS {c.type}) AS c{i}" for i, c in enumerate(leaf.columns))
        return f"(SELECT {nulls})"

    checked = 0
    for statement in STATEMENTS:
        if statement.name in REFUSED:
            continue
        for node in walk(plan_of(statement).plan):
            types = [column.type for column in columns_of(tables, select(node, source=source))]
            # The row's number, which nothing refers to, is read as a NULL.
            assert types == [column.type.replace("ROWID", "BIGINT") for column in node.columns] or not node.columns
            checked += 1
    assert checked > 500


def test_the_corpus_covers_the_operators(plan_of: Callable[[Statement], Bound]) -> None:
    plans = [plan_of(s).plan for s in STATEMENTS if s.name not in REFUSED]
    kinds = {type(node) for plan in plans for node in walk(plan)}
    # Key filters come when stages are cut.
    assert kinds == set(Node.__args__) - {KeyFilter}
    assert len(STATEMENTS) >= 150


@pytest.fixture(scope="module")
def market() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as connection:
        for name, files in tpch.data(0.01).items():
            connection.execute(f"CREATE VIEW {name} AS FROM read_parquet({files})")
        yield connection


@pytest.mark.parametrize("knows_sizes", [False, True])
@pytest.mark.parametrize("number", range(1, 23))
def test_tpch_has_duckdbs_answer(
    market: duckdb.DuckDBPyConnection, tpch_queries: dict[int, str], number: int, knows_sizes: bool
) -> None:
    names = [name for (name,) in market.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()]
    shadows = {name: columns_of(market, f"FROM {name}") for name in names}
    counts = {name: market.table(name).count("*").fetchall()[0][0] for name in names} if knows_sizes else None
    query = tpch_queries[number].strip().rstrip(";")
    bound = bind(query, shadows, rows=counts, now=NOW)
    columns, rows = answer(market, text_of(bound), ordered=True)
    expected_columns, expected = answer(market, query, ordered=True)
    assert list(bound.columns) == columns == expected_columns
    assert same(rows, expected)
