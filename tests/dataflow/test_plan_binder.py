"""What a plan says of a query besides its answer, and what does not become a plan. Run: pytest
tests/dataflow/test_plan_binder.py."""

from __future__ import annotations

import copy
import datetime
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pytest
from emberflow.plan import binder
from emberflow.plan.binder import NotPlannable, bind
from emberflow.plan.describe import describe
from emberflow.plan.nodes import (
    Aggregate,
    Bound,
    Column,
    Expr,
    Filter,
    Fixed,
    Input,
    Join,
    Node,
    Project,
    Scan,
    Shared,
    Sort,
    Window,
    walk,
)
from emberflow.plan.render import select

NOW = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=datetime.UTC)
SHADOWS = {
    "t": [Column("a", "INTEGER"), Column("b", "BIGINT"), Column("s", "VARCHAR"), Column("d", "DOUBLE")],
    "u": [Column("a", "INTEGER"), Column("c", "DECIMAL(10,2)"), Column("st", "STRUCT(x INTEGER, y VARCHAR)")],
}


def plan(sql: str) -> Node:
    return bind(sql, SHADOWS, now=NOW).plan


def only(kind: type, node: Node) -> Any:
    (found,) = [each for each in walk(node) if isinstance(each, kind)]
    return found


def output(sql: str) -> Expr:
    """The expression of a query that selects one."""
    node = plan(sql)
    assert isinstance(node, Project)
    (expr,) = node.exprs
    return expr


# ---- shapes


def test_filters_are_pushed_to_the_scans_and_only_what_is_needed_is_read() -> None:
    node = plan("SELECT t.s FROM t JOIN u USING (a) WHERE u.c > 5 AND t.b = 7")
    join = only(Join, node)
    assert join.kind == "inner"
    assert [condition.comparison for condition in join.conditions] == ["="]
    scans = {scan.table: scan for scan in walk(node) if isinstance(scan, Scan)}
    assert {name: sorted(c.name for c in scan.columns) for name, scan in scans.items()} == {
        "t": ["a", "b", "s"],
        "u": ["a", "c"],
    }
    assert all(isinstance(each.child, Scan) for each in walk(node) if isinstance(each, Filter))


def test_a_scan_of_no_columns_counts_rows() -> None:
    assert only(Scan, plan("SELECT count(*) FROM t")).positions == ()


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT b FROM t WHERE a IN (SELECT a FROM u)", "semi"),
        ("SELECT b FROM t WHERE EXISTS (SELECT 1 FROM u WHERE u.a = t.a AND u.c > t.b)", "semi"),
        ("SELECT b FROM t WHERE NOT EXISTS (SELECT 1 FROM u WHERE u.a = t.a AND u.c > t.b)", "anti"),
        ("SELECT b FROM t WHERE a NOT IN (SELECT a FROM u)", "mark"),
        ("SELECT a IN (SELECT a FROM u) FROM t", "mark"),
        ("SELECT b FROM t LEFT JOIN u ON t.a = u.a", "left"),
        ("SELECT c FROM t FULL JOIN u ON t.a = u.a", "full"),
    ],
)
def test_the_kinds_of_joins(sql: str, kind: str) -> None:
    assert kind in {node.kind for node in walk(plan(sql)) if isinstance(node, Join)}


def test_what_compares_the_sides_of_an_outer_join_is_a_condition_and_the_rest_its_residual() -> None:
    join = only(Join, plan("SELECT * FROM t LEFT JOIN u ON t.a = u.a AND t.b > u.c AND t.b + u.a = 3"))
    assert sorted(condition.comparison for condition in join.conditions) == ["=", ">"]
    assert join.residual is not None
    assert len(join.residual.columns) == 2


def test_a_scalar_subquery_may_match_one_row() -> None:
    joins = [node for node in walk(plan("SELECT (SELECT c FROM u WHERE u.a = t.a) FROM t")) if isinstance(node, Join)]
    assert any(join.single and join.kind == "left" for join in joins)
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 a, 1::BIGINT b, '' s, 1::DOUBLE d")
        connection.execute("CREATE TABLE u AS SELECT 1 a, i::DECIMAL(10, 2) c, {'x': 1, 'y': ''} st FROM range(2) r(i)")
        text = select(plan("SELECT (SELECT c FROM u WHERE u.a = t.a) FROM t"), source=table_of)
        with pytest.raises(duckdb.Error, match="More than one row returned by a subquery"):
            connection.execute(text).fetchall()


def test_a_cte_that_is_read_twice_is_shared() -> None:
    node = plan("WITH c AS MATERIALIZED (SELECT a, count(*) AS n FROM t GROUP BY a) FROM c x JOIN c y ON x.n = y.a")
    shared = only(Shared, node)
    assert sum(isinstance(each, Input) and each.id == shared.id for each in walk(shared.body)) == 2


def test_grouping_sets_and_grouping() -> None:
    aggregate = only(Aggregate, plan("SELECT a, s, grouping(s), count(DISTINCT b) FROM t GROUP BY ROLLUP (a, s)"))
    assert sorted(aggregate.sets) == [(), (0,), (0, 1)]
    assert aggregate.groupings == ((1,),)
    assert not aggregate.is_plain
    assert only(Aggregate, plan("SELECT a, count(*) FROM t GROUP BY a")).is_plain


def test_sizes_decide_the_order_of_joins_and_nothing_else() -> None:
    sql = "SELECT count(*) FROM t x JOIN u ON x.a = u.a JOIN t y ON y.b = u.c"
    bound = bind(sql, SHADOWS, now=NOW, rows={"t": 10_000_000, "u": 3})
    assert bound.columns == bind(sql, SHADOWS, now=NOW).columns
    assert {type(node) for node in walk(bound.plan)} == {type(node) for node in walk(plan(sql))}


# ---- what may differ from run to run


@pytest.mark.parametrize("sql", ["random()", "uuid()", "a + random()", "CASE WHEN random() > 0.5 THEN 1 ELSE a END"])
def test_volatile_expressions_say_so(sql: str) -> None:
    assert output(f"SELECT {sql} FROM t").volatile
    assert not output("SELECT a + 1 FROM t").volatile


@pytest.mark.parametrize(
    ("sql", "unstable"),
    [
        ("count(*)", False),
        ("sum(a)", False),
        ("avg(b)", False),
        ("max(d)", False),
        ("median(d)", False),
        ("sum(d)", True),
        ("avg(d)", True),
        ("stddev(a)", True),
        ("first(s)", True),
        ("any_value(s)", True),
        ("list(s)", True),
        ("list(s ORDER BY b)", True),
        ("list(s ORDER BY b, s)", False),
        ("string_agg(s, ',' ORDER BY s)", False),
        ("string_agg(s, ',')", True),
        ("arg_max(s, b)", True),
        ("list(d ORDER BY d)", True),
        ("approx_count_distinct(s)", True),
    ],
)
def test_aggregates_that_see_the_order_of_rows_say_so(sql: str, unstable: bool) -> None:
    (call,) = only(Aggregate, plan(f"SELECT {sql} FROM t")).calls
    assert call.unstable is unstable


@pytest.mark.parametrize(
    ("sql", "unstable"),
    [
        ("row_number() OVER (ORDER BY a)", True),
        ("rank() OVER (ORDER BY a)", False),
        ("sum(b) OVER (ORDER BY a)", False),
        ("sum(b) OVER (ORDER BY a ROWS 1 PRECEDING)", True),
        ("sum(b) OVER (PARTITION BY s)", False),
        ("sum(d) OVER (PARTITION BY s)", True),
        ("lag(b) OVER (ORDER BY a)", True),
        ("count(*) OVER ()", False),
    ],
)
def test_window_functions_that_see_the_order_of_ties_say_so(sql: str, unstable: bool) -> None:
    (call,) = only(Window, plan(f"SELECT {sql} FROM t")).calls
    assert call.expr.unstable is unstable


def table_of(leaf: Scan | Input) -> str:
    assert isinstance(leaf, Scan)
    return leaf.table


def value(sql: str, **settings: Any) -> Any:
    """The answer of a query that reads no table, through its plan."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(select(bind(sql, {}, now=NOW, **settings).plan, source=table_of)).fetchall()[0][0]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("now()::VARCHAR", "2024-05-06 07:08:09.123456+00"),
        ("current_timestamp::VARCHAR", "2024-05-06 07:08:09.123456+00"),
        ("current_date", datetime.date(2024, 5, 6)),
        ("today()", datetime.date(2024, 5, 6)),
        ("localtimestamp", datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)),
        ("current_localtime()", datetime.time(7, 8, 9, 123456)),
        ("age(TIMESTAMP '2024-05-05 00:00:00')", datetime.timedelta(days=1)),
        ("date_trunc('month', now())::DATE", datetime.date(2024, 5, 1)),
    ],
)
def test_the_clock_stands_still(sql: str, expected: object) -> None:
    assert value(f"SELECT {sql}") == expected


# ---- the binder's connection


def test_functions_of_the_users_own_are_known_to_the_query_that_brings_them_and_to_no_other() -> None:
    def setup(connection: duckdb.DuckDBPyConnection) -> None:
        connection.create_function("twice", lambda x: 2 * x, ["BIGINT"], "BIGINT")
        connection.create_function("noise", lambda x: x, ["BIGINT"], "BIGINT", side_effects=True)

    bound = bind("SELECT twice(b), noise(b) FROM t", SHADOWS, now=NOW, setup=setup)
    assert isinstance(bound.plan, Project)
    assert [expr.volatile for expr in bound.plan.exprs] == [False, True]
    with pytest.raises(duckdb.CatalogException, match="twice"):
        plan("SELECT twice(b) FROM t")


def test_binding_from_many_threads_at_once() -> None:
    results: list[Bound] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(bind(f"SELECT {i} AS x FROM t", SHADOWS, now=NOW)))  # type: ignore[misc]
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert {bound.columns for bound in results} == {(Column("x", "INTEGER"),)}


def test_what_duckdb_refuses_is_duckdbs_own_error() -> None:
    with pytest.raises(duckdb.BinderException, match="nope"):
        plan("SELECT nope FROM t")
    with pytest.raises(duckdb.ParserException):
        plan("SELEC 1")
    with pytest.raises(duckdb.CatalogException, match="does not exist"):
        plan("FROM SHADOWS")  # a variable of ours is no table


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT 1; SELECT 2", "a statement that is not one SELECT"),
        ("INSERT INTO t SELECT * FROM t", "a statement that is not one SELECT"),
        ("PIVOT t ON s USING sum(b)", "a statement that is not one SELECT"),
        ("FROM read_csv('/no/such/file.csv')", "a file that only DuckDB knows how to read"),
        ("FROM '/no/such/file.parquet'", "a file that only DuckDB knows how to read"),
        ("FROM duckdb_schemas()", "the table function duckdb_schemas"),
        ("SELECT rowid FROM t", "a reference to a BIGINT that is a ROWID"),
        ("SELECT a FROM t USING SAMPLE 3 ROWS", "a SAMPLE"),
        ("SELECT row(a, b) IN (SELECT row(a, a) FROM u), (a, b) >= ANY (SELECT a, a FROM u) FROM t", ""),
    ],
)
def test_what_has_no_plan_says_why(sql: str, reason: str) -> None:
    try:
        plan(sql)
    except NotPlannable as refusal:
        assert refusal.reason.startswith(reason)
    except duckdb.Error:
        assert not reason
    else:
        assert not reason


# ---- strictness


def objects(json_: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each object in a JSON value."""
    if isinstance(json_, dict):
        yield path
    if isinstance(json_, dict | list):
        for key, child in json_.items() if isinstance(json_, dict) else enumerate(json_):
            yield from objects(child, (*path, key))


# What the reader does not look into: it says the same again, or only how DuckDB went about it.
OPAQUE = (
    "child_filter",
    "bindings",
    "arguments",
    "bound_columns",
    "qualified_name",
    "mark_types",
    "original_arguments",
)
DERIVED = ("sql_range_start", "sql_range_end", "sql_range_start_boundary", "sql_range_end_boundary", "type_info")
TYPES_ONLY = ("function_data", "sql_range_order_type", "input_table_types", "child_types")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT t.a + 1, upper(s) FROM t JOIN u USING (a) WHERE c > 1 AND s IN ('x', 'y') ORDER BY 1 LIMIT 3",
        "SELECT a, sum(b) FILTER (WHERE d > 1), list(s ORDER BY b) FROM t GROUP BY ROLLUP (a)",
        "SELECT DISTINCT ON (a) a, CASE WHEN b = 1 THEN s END FROM t ORDER BY a, b",
        "SELECT sum(b) OVER (PARTITION BY s ORDER BY a ROWS 2 PRECEDING), lag(a) OVER (ORDER BY b) FROM t",
        "SELECT unnest([a, 2]) FROM t UNION ALL SELECT i FROM range(3) r(i)",
        "WITH c AS MATERIALIZED (FROM u) SELECT st.x FROM c WHERE EXISTS (FROM t WHERE t.a = c.a AND t.b > c.c)",
    ],
)
def test_a_word_the_reader_does_not_know_is_refused_wherever_it_stands(
    sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer DuckDB may say more in its plans, and what it says may matter."""
    real: Callable[..., Any] = binder._serialized
    kept: list[Any] = []
    monkeypatch.setattr(binder, "_serialized", lambda *args: kept.append(real(*args)) or copy.deepcopy(kept[-1]))
    plan(sql)
    tried = 0
    for path in list(objects(kept[0])):
        if any(step in (*OPAQUE, *DERIVED, *TYPES_ONLY) for step in path):
            continue
        changed = json.loads(json.dumps(kept[0]))
        place = changed
        for step in path:
            place = place[step]
        place["a_word_of_the_future"] = 1
        monkeypatch.setattr(binder, "_serialized", lambda *args, changed=changed: changed)
        with pytest.raises(NotPlannable):
            plan(sql)
            pytest.fail(f"not seen at {path}")
        tried += 1
    assert tried > 5


# ---- text


def test_describe_is_one_line_an_operator() -> None:
    node = plan("SELECT t.s, sum(u.c) FROM t JOIN u USING (a) WHERE t.b > 5 GROUP BY t.s ORDER BY 2 DESC")
    lines = [line.strip() for line in describe(node).splitlines()]
    assert len(lines) == len([*walk(node)])
    assert lines[0].startswith("sort by ")
    assert any(line.startswith("aggregate sum(") and line.endswith(" by s") for line in lines)
    assert any(line.startswith("inner join on a = a") for line in lines)
    assert "filter (b > 5)" in lines
    assert any(line.startswith("scan u: ") for line in lines)
    assert len(lines) == len(
        [*walk(plan("SELECT t.s, sum(u.c) FROM t JOIN u USING (a) WHERE t.b > 5 GROUP BY t.s ORDER BY 2 DESC"))]
    )


def test_an_order_stands_where_its_limit_is() -> None:
    text = select(plan("SELECT s FROM t ORDER BY b LIMIT 3 OFFSET 1"), source=table_of, names=["s"])
    assert "ORDER BY" in text.rsplit("LIMIT", 1)[0].rsplit(")", 1)[-1]
    assert text.endswith("LIMIT 3 OFFSET 1")
    assert isinstance(plan("SELECT s FROM t ORDER BY b"), Project)
    assert only(Sort, plan("SELECT s FROM t ORDER BY b")).keys


def test_a_part_of_a_plan_reads_what_its_caller_names() -> None:
    leaf = Input(7, (Column("x", "INTEGER"), Column("x", "VARCHAR")))
    node = Filter(leaf, (Expr(("(", 0, " > 1)"), "BOOLEAN"),))
    text = select(node, source=lambda leaf: f"stage_{leaf.id}", names=["x", "x"])
    assert text == 'SELECT t.c0 AS "x", t.c1 AS "x" FROM stage_7 AS t WHERE (t.c0 > 1)'


def test_rows_that_need_no_input_are_fixed() -> None:
    assert only(Fixed, plan("VALUES (1, 'a'), (2, NULL)")).columns[1].type == "VARCHAR"
    assert not only(Fixed, plan("FROM range(5)")).volatile
