"""Python operators over batches: what goes into a function, what may come out, and how failures are told.

Run: pytest tests/dataflow/test_functions_steps.py.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import pickle
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pytest
from emberflow.errors import CallCancelled, InvalidArgument, UserCodeError
from emberflow.functions import PythonStep, apply, shipping
from emberflow.functions.rows import rows
from emberflow.functions.sqltypes import duckdb_types
from emberflow.functions.steps import Kind


def queried(sql: str, *, lossless: bool = True) -> pa.Table:
    """What DuckDB makes of a query, in Arrow."""
    with duckdb.connect(config={"arrow_lossless_conversion": lossless}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        made = connection.sql(sql).arrow()
        return made if isinstance(made, pa.Table) else made.read_all()


def ran(
    kind: Kind, function: Callable[..., Any], table: pa.Table | None = None, *, chunk: int = 3, **options: Any
) -> pa.Table:
    """The table that comes out when the rows go in `chunk` at a time."""
    table = NUMBERS if table is None else table
    step = PythonStep(kind=kind, function=function, **options)
    schema, batches = apply(step, iter(table.to_batches(max_chunksize=chunk)), table.schema)
    return pa.Table.from_batches(batches, schema)


NUMBERS = pa.table({"a": pa.array(range(10), pa.int32()), "b": [str(n) for n in range(10)]})
ONE_OF_EACH = """
    SELECT 5::HUGEINT h, -170141183460469231731687303715884105727::HUGEINT lowest, 7::UHUGEINT uh, 1.50::DECIMAL(5,2) d,
           TIMESTAMPTZ '2020-01-02 03:04:05+02' tz, TIMESTAMP '2020-01-02 03:04:05' ts, DATE '2020-01-02' dt,
           TIME '01:02:03' tm, '01:02:03.5-02:30'::TIMETZ ttz, '101'::BIT bits, 'x'::ENUM('x', 'y') e, 'ab'::BLOB bl,
           '{"k": 1}'::JSON j, [1, NULL]::HUGEINT[] hl, {'p': 1::HUGEINT, 'q': NULL} s, MAP {'k': 2::HUGEINT} m,
           MAP {[1]: 'v'} ml, '6e6d9ca2-3f5b-4f1e-8a2a-0b1c2d3e4f50'::UUID u, NULL::INT n, true t, 0.5::FLOAT f
"""
AS_PYTHON = {
    "h": 5,
    "lowest": -170141183460469231731687303715884105727,
    "uh": 7,
    "d": decimal.Decimal("1.50"),
    "tz": datetime.datetime(2020, 1, 2, 1, 4, 5, tzinfo=datetime.UTC),
    "ts": datetime.datetime(2020, 1, 2, 3, 4, 5),
    "dt": datetime.date(2020, 1, 2),
    "tm": datetime.time(1, 2, 3),
    "ttz": datetime.time(1, 2, 3, 500000, datetime.timezone(-datetime.timedelta(hours=2, minutes=30))),
    "bits": "101",
    "e": "x",
    "bl": b"ab",
    "j": '{"k": 1}',
    "hl": [1, None],
    "s": {"p": 1, "q": None},
    "m": {"k": 2},
    "ml": [([1], "v")],
    "u": uuid.UUID("6e6d9ca2-3f5b-4f1e-8a2a-0b1c2d3e4f50"),
    "n": None,
    "t": True,
    "f": 0.5,
}


def test_map_gives_the_whole_new_row() -> None:
    out = ran("map", lambda row: {"c": row["a"] + int(row["b"])})
    assert out == pa.table({"c": [2 * n for n in range(10)]})


def test_flat_map_gives_any_number_of_rows() -> None:
    out = ran("flat_map", lambda row: ({"n": row["a"]} for _ in range(row["a"] % 3)))
    assert out.column("n").to_pylist() == [1, 2, 2, 4, 5, 5, 7, 8, 8]


def test_filter_keeps_rows_and_types() -> None:
    table = queried("SELECT range::HUGEINT h, MAP {'k': range} m FROM range(10)")
    out = ran("filter", lambda row: row["h"] % 4 and row["m"]["k"], table)
    assert out.schema == table.schema
    assert [row["h"] for batch in out.to_batches() for row in rows(batch)] == [1, 2, 3, 5, 6, 7, 9]


@pytest.mark.parametrize("chunk", [1, 3, 350, 1000])
def test_map_batches_gets_tables_of_exactly_that_many_rows(chunk: int) -> None:
    table = pa.table({"n": range(1000)})
    out = ran("map_batches", lambda t: pa.table({"rows": [t.num_rows]}), table, chunk=chunk, batch_rows=350)
    assert out.to_pylist() == [{"rows": 350}, {"rows": 350}, {"rows": 300}]


@pytest.mark.parametrize(
    "function",
    [
        lambda table: table,
        lambda table: table.to_pandas(),
        lambda table: table.combine_chunks().to_batches()[0],
        lambda table: table.to_reader(),
        lambda table: iter([table.slice(0, 1), table.slice(1).to_pandas()]),
        lambda table: [table],
    ],
    ids=["table", "pandas", "batch", "reader", "iterator", "list"],
)
def test_map_batches_takes_tables_in_every_form(function: Callable[[pa.Table], Any]) -> None:
    out = ran("map_batches", function, batch_rows=4)
    assert out.to_pylist() == NUMBERS.to_pylist()
    assert out.schema.metadata is None


def test_map_batches_computes_with_wide_integers() -> None:
    table = queried("SELECT range::HUGEINT h FROM range(3)")
    assert ran("map_batches", lambda t: pa.table({"s": [sum(t["h"].to_pylist())]}), table).to_pylist() == [{"s": 3}]
    wide = ran("map_batches", lambda t: t, table, schema={"h": "HUGEINT"})
    assert duckdb_types(wide.schema) == {"h": "HUGEINT"}
    with pytest.raises(InvalidArgument, match="39 digits"):
        ran("map_batches", lambda t: t, queried("SELECT 170141183460469231731687303715884105727 h"))


def test_a_class_is_made_once() -> None:
    made: list[object] = []

    class Scale:
        def __init__(self) -> None:
            made.append(self)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"n": row["a"] * 2}

    assert ran("map", Scale).column("n").to_pylist() == list(range(0, 20, 2))
    assert len(made) == 1


def test_rows_have_python_values() -> None:
    seen: list[dict[str, Any]] = []
    ran("filter", seen.append, queried(ONE_OF_EACH))
    assert seen == [AS_PYTHON]
    assert {name: type(value) for name, value in seen[0].items()} == {k: type(v) for k, v in AS_PYTHON.items()}


def test_without_extension_types_wide_integers_are_ints_too() -> None:
    seen: list[dict[str, Any]] = []
    ran("filter", seen.append, queried("SELECT 5::HUGEINT h, 1.5::DECIMAL(38, 1) d, [6::HUGEINT] l", lossless=False))
    assert seen == [{"h": 5, "d": decimal.Decimal("1.5"), "l": [6]}]
    assert type(seen[0]["h"]) is int


def test_what_goes_through_unchanged_keeps_its_values() -> None:
    refused = {"bits", "ttz", "uh"}
    chosen = [name for name in AS_PYTHON if name not in refused]
    out = ran("map", lambda row: {name: row[name] for name in chosen}, queried(ONE_OF_EACH))
    assert rows(out.to_batches()[0]) == [{name: AS_PYTHON[name] for name in chosen}]
    types = duckdb_types(out.schema)
    assert types["lowest"] == "HUGEINT"
    assert types["d"] == "DECIMAL(38,2)"
    assert types["m"] == "MAP(VARCHAR, HUGEINT)"
    assert types["tz"] == "TIMESTAMP WITH TIME ZONE"
    assert types["u"] == "UUID"
    assert types["n"] == "INTEGER"


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (1, "BIGINT"),
        (2**70, "HUGEINT"),
        (1.5, "DOUBLE"),
        ("x", "VARCHAR"),
        (True, "BOOLEAN"),
        (b"x", "BLOB"),
        (decimal.Decimal("1.25"), "DECIMAL(38,2)"),
        (datetime.date(2020, 1, 1), "DATE"),
        (datetime.datetime(2020, 1, 1), "TIMESTAMP"),
        (
            datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=3))),
            "TIMESTAMP WITH TIME ZONE",
        ),
        (datetime.time(1, 2), "TIME"),
        (datetime.timedelta(days=1), "INTERVAL"),
        (uuid.UUID(int=5), "UUID"),
        ([1, 2], "BIGINT[]"),
        ({"a": 1, "b": "x"}, "STRUCT(a BIGINT, b VARCHAR)"),
    ],
)
def test_types_are_taken_from_the_first_rows(value: Any, type_: str) -> None:
    out = ran("map", lambda row: {"v": value})
    assert duckdb_types(out.schema) == {"v": type_}
    assert rows(out.to_batches()[0])[0] == {"v": value}


@pytest.mark.parametrize(
    ("type_", "value", "stored"),
    [
        ("HUGEINT", 5, 5),
        ("UHUGEINT", 2**127, 2**127),
        ("UUID", "6e6d9ca2-3f5b-4f1e-8a2a-0b1c2d3e4f50", uuid.UUID("6e6d9ca2-3f5b-4f1e-8a2a-0b1c2d3e4f50")),
        ("JSON", "[1]", "[1]"),
        ("DOUBLE", 5, 5.0),
        ("BIGINT", 5.0, 5),
        ("INT", None, None),
        ("MAP(VARCHAR, INT)", {"k": 1}, {"k": 1}),
        ("MAP(VARCHAR, HUGEINT)", {"k": 2**70, "l": None}, {"k": 2**70, "l": None}),
        ("STRUCT(u UUID, n INT)[]", [{"u": str(uuid.UUID(int=1))}, None], [{"u": uuid.UUID(int=1), "n": None}, None]),
        ("HUGEINT[][]", [[1, None], None, []], [[1, None], None, []]),
        ("DECIMAL(10, 3)", decimal.Decimal("1.5"), decimal.Decimal("1.500")),
    ],
)
def test_a_schema_says_the_types(type_: str, value: Any, stored: Any) -> None:
    out = ran("map", lambda row: {"v": value, "dropped": 1}, schema={"v": type_, "missing": "INT"})
    with duckdb.connect() as connection:
        connection.register("made", out)
        described = connection.execute("SELECT DISTINCT typeof(v), typeof(missing) FROM made").fetchall()
    assert described == [(duckdb.sqltype(type_), "INTEGER")]
    assert rows(out.to_batches()[0])[0] == {"v": stored, "missing": None}


def test_an_arrow_schema_is_taken_as_it_is() -> None:
    schema = pa.schema([("c", pa.int16())])
    out = ran("map", lambda row: {"c": None if row["a"] == 0 else row["a"]}, schema=schema)
    assert out.schema == schema
    assert out.column("c").null_count == 1


def test_keys_of_later_rows_count_and_missing_ones_are_null() -> None:
    out = ran("map", lambda row: {"x": 1} if row["a"] == 0 else {"y": row["b"]}, NUMBERS.slice(0, 2))
    assert out.to_pylist() == [{"x": 1, "y": None}, {"x": None, "y": "1"}]


@pytest.mark.parametrize("kind", ["map", "flat_map", "filter", "map_batches"])
def test_without_rows_the_function_is_not_called(kind: Kind) -> None:
    def never(row: Any) -> Any:
        raise AssertionError

    out = ran(kind, never, NUMBERS.slice(0, 0))
    assert (out.schema, out.num_rows) == (NUMBERS.schema, 0)
    if kind != "filter":
        assert duckdb_types(ran(kind, never, NUMBERS.slice(0, 0), schema={"c": "DATE"}).schema) == {"c": "DATE"}


def test_batches_without_output_come_before_the_first_with() -> None:
    out = ran("flat_map", lambda row: [{"n": row["a"]}] if row["a"] > 7 else [])
    assert out.to_pylist() == [{"n": 8}, {"n": 9}]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda row: {"c": row["a"] if row["a"] < 7 else row["a"] + 0.5},
            r"gave 7\.5 \(float\) for 'c' in row 7, where the first rows have BIGINT. Say it: schema={'c': 'DOUBLE'}",
        ),
        (
            lambda row: {"k": 1, "c": row["a"] if row["a"] < 7 else "seven"},
            r"gave 'seven' \(str\) for 'c' in row 7, .* schema={'k': 'BIGINT', 'c': '\.\.\.'}",
        ),
        (
            lambda row: {"c": row["a"] if row["a"] != 1 else "one"},
            r"gave 'one' \(str\) for 'c' in row 1, and 0 before it: no type takes that. Say it: schema={'c': '\.\.\.'}",
        ),
        (
            lambda row: {"c": [row["a"] if row["a"] < 7 else row["a"] + 0.5]},
            r"gave \[7\.5\] \(list\) for 'c' in row 7, where the first rows have BIGINT\[\]",
        ),
        (
            lambda row: {"c": (datetime.date if row["a"] < 7 else datetime.datetime)(2020, 1, 1)},
            r"gave datetime.datetime\(.* in row 7, where the first rows have DATE",
        ),
        (lambda row: {"c": None}, r"gave only None .* for 'c' in the first 3 rows.*schema={'c': '\.\.\.'}"),
        (lambda row: {"c": 1} if row["a"] < 5 else {"c": 1, "d": 2}, r"gave 'd' in row 5, which no row before had"),
        (lambda row: {1: 2}, r"the key 1; keys are the names of columns"),
        (lambda row: 5, r"gave a int, not a dict: 5\nfor the row {'a': 0, 'b': '0'}"),
        (lambda row: {"c": object()}, r"gave <object object .*no type takes that"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(UserCodeError, match=words) as caught:
        ran("map", function)
    assert "map function" in str(caught.value)


def test_what_does_not_fit_a_given_schema() -> None:
    with pytest.raises(UserCodeError, match=r"for 'c' in row 3, where the schema says INTEGER") as caught:
        ran("map", lambda row: {"c": 2**40 if row["a"] == 3 else 0}, schema={"c": "INT"})
    assert caught.value.row == "{'a': 3, 'b': '3'}"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda table: 5, "gave a int, not a table"),
        (lambda table: None, "gave a NoneType, not a table"),
        (lambda table: [table, "x"], "gave a str among its tables"),
        (lambda table: pa.table({"c": pa.nulls(2)}), "gave only None for 'c' in the first table"),
        (lambda table: pa.table({"c": [1]} if table["a"][0].as_py() == 0 else {"d": [1]}), r"columns \['d'\]; \['c'\]"),
        (
            lambda table: pa.table({"c": [1] if table["a"][0].as_py() == 0 else [1.5]}),
            "gave 'c' as double, where the first table has int64",
        ),
    ],
)
def test_tables_that_do_not_fit(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(UserCodeError, match=words):
        ran("map_batches", function, batch_rows=4)


@pytest.mark.parametrize("given", [None, "text", {"a": 1}, 5])
def test_flat_map_takes_lists_only(given: Any) -> None:
    with pytest.raises(UserCodeError, match="not a list of dicts"):
        ran("flat_map", lambda row: given)


def parse(row: dict[str, Any]) -> dict[str, Any]:
    return {"n": deeper(row)}


def deeper(row: dict[str, Any]) -> int:
    if row["a"] == 4:
        raise LookupError(f"no {row['b']}")
    return 1


def test_an_error_shows_the_users_lines_and_the_row() -> None:
    with pytest.raises(UserCodeError) as caught:
        ran("map", parse)
    text = str(caught.value)
    assert text.startswith("map function 'parse' failed on the row {'a': 4, 'b': '4'}: LookupError: no 4\n  File ")
    assert text.rstrip().endswith("raise LookupError(f\"no {row['b']}\")")
    assert "emberflow/functions" not in text
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_long_row_is_cut() -> None:
    with pytest.raises(UserCodeError) as caught:
        ran("map", lambda row: row["none"], pa.table({"text": ["x" * 5000]}))
    assert len(caught.value.row) == 200


@pytest.mark.parametrize("error", [LookupError("no"), KeyError("k")])
def test_the_error_and_its_cause_travel(error: Exception) -> None:
    def function(row: Any) -> Any:
        raise error

    with pytest.raises(UserCodeError) as caught:
        ran("map", function)
    there = pickle.loads(pickle.dumps(caught.value))
    assert str(there) == str(caught.value)
    assert (there.function, there.row) == (caught.value.function, caught.value.row)
    assert repr(there.__cause__) == repr(error)


def test_an_error_travels_without_a_cause_that_cannot() -> None:
    class Local(Exception):
        pass

    def function(row: Any) -> Any:
        raise Local("only here")

    with pytest.raises(UserCodeError) as caught:
        ran("map", function)
    there = pickle.loads(pickle.dumps(caught.value))
    assert there.__cause__ is None
    assert "Local: only here" in str(there)


@pytest.mark.parametrize("kind", ["map", "flat_map", "filter"])
def test_it_stops_between_rows_when_interrupted(kind: Kind) -> None:
    seen: list[int] = []

    def function(row: dict[str, Any]) -> Any:
        seen.append(row["a"])
        return [] if kind == "flat_map" else {"c": 1}

    step = PythonStep(kind=kind, function=function, schema=None if kind == "filter" else {"c": "INT"})
    _, batches = apply(step, iter(NUMBERS.to_batches()), NUMBERS.schema, interrupted=lambda: len(seen) == 4)
    with pytest.raises(CallCancelled, match=f"cancelled in the {kind} function"):
        list(batches)
    assert seen == [0, 1, 2, 3]


def test_it_runs_as_it_is_drawn() -> None:
    drawn = itertools.count()

    def endless() -> Iterator[pa.RecordBatch]:
        while True:
            next(drawn)
            yield NUMBERS.to_batches()[0]

    _, batches = apply(PythonStep(kind="map", function=lambda row: row), endless(), NUMBERS.schema)
    assert next(batches).num_rows == 10
    assert next(drawn) <= 2


def test_a_step_travels() -> None:
    factor = 3
    step = PythonStep(kind="map", function=lambda row: {"n": row["a"] * factor}, schema={"n": "INT"}, version="2")
    there = pickle.loads(pickle.dumps(step))
    assert (there.kind, there.schema, there.version) == ("map", step.schema, "2")
    assert there.function({"a": 2}) == {"n": 6}
    with pytest.raises(InvalidArgument, match="cannot be sent"):
        shipping.dumps(PythonStep(kind="map", function=(n for n in ()).__next__))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "reduce"}, "a step is one of map"),
        ({"function": "a + 1"}, "map takes a function"),
        ({"batch_rows": 0}, "at least one row"),
        ({"kind": "filter", "schema": {"a": "INT"}}, "takes no schema"),
        ({"schema": {"a": "NOPE"}}, "'NOPE' is no DuckDB type"),
        ({"schema": {}}, "at least one column"),
        ({"schema": {"a": "BIT"}}, "cast it in SQL"),
        ({"schema": {"a": "STRUCT(t TIMETZ)[]"}}, "cast it in SQL"),
    ],
)
def test_a_step_that_can_never_be_right(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        PythonStep(**{"kind": "map", "function": dict, **options})


def test_pandas_frames_of_objects_that_no_column_takes() -> None:
    with pytest.raises(UserCodeError, match=r"map_batches function '.*' failed"):
        ran("map_batches", lambda table: pd.DataFrame({"c": [object(), 5]}))


def test_a_filter_answer_that_is_neither_true_nor_false() -> None:
    with pytest.raises(UserCodeError, match=r"filter function '.*' failed: ValueError"):
        ran("filter", lambda row: pd.Series([True, False]))
