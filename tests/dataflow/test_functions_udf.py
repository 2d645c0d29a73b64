"""Scalar functions in SQL: types from annotations and from smallpond's vocabulary, NULLs, errors, travelling.

Run: pytest tests/dataflow/test_functions_udf.py.
"""

from __future__ import annotations

import datetime
import decimal
import math
import pickle
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from emberflow.errors import InvalidArgument
from emberflow.functions import Udf, UDFAnyParameters, UDFListType, UDFMapType, UDFStructType, UDFType, udf
from emberflow.functions.sqltypes import sql_type


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


@udf(params=[UDFType.INT, UDFType.INT], return_type=UDFType.INT)
def gcd(a, b):  # type: ignore[no-untyped-def]
    return math.gcd(a, b)


@udf
def host(url: str) -> str:
    return url.split("/")[0]


@udf
def or_zero(n: int | None) -> int:
    return n or 0


@udf(params=[UDFType.BIGINT], return_type=UDFType.BIGINT, use_arrow_type=True, name="twice")
def doubled(n: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.multiply(n, 2)


def value(connection: duckdb.DuckDBPyConnection, expression: str) -> Any:
    ((found,),) = connection.execute(f"SELECT {expression}").fetchall()
    return found


def test_smallponds_decorator(connection: duckdb.DuckDBPyConnection) -> None:
    gcd.register(connection)
    assert (gcd.parameters, gcd.return_type) == (("INTEGER", "INTEGER"), "INTEGER")
    assert value(connection, "gcd(12, 18)") == 6
    assert value(connection, "gcd(12, NULL)") is None
    assert gcd(12, 18) == 6
    assert connection.cursor().execute("SELECT typeof(gcd(1, 2))").fetchall() == [("INTEGER",)]


def test_arrow_arrays_go_in_and_out(connection: duckdb.DuckDBPyConnection) -> None:
    doubled.register(connection)
    assert connection.execute("SELECT sum(twice(range)) FROM range(5000)").fetchall() == [(24995000,)]


def test_types_come_from_annotations(connection: duckdb.DuckDBPyConnection) -> None:
    def everything(
        a: int, b: float, c: str, d: bool, e: bytes, f: datetime.datetime, g: datetime.date, h: list[int], i: uuid.UUID
    ) -> list[list[str]]:
        return [[str(a), c]]

    made = Udf.of(everything)
    expected = ["BIGINT", "DOUBLE", "VARCHAR", "BOOLEAN", "BLOB", "TIMESTAMP", "DATE", "BIGINT[]", "UUID"]
    assert made.parameters == tuple(expected)
    assert made.return_type == "VARCHAR[][]"
    assert made.null_handling == "default"
    made.register(connection)
    call = "everything(1, 2, 'c', true, 'e', now()::timestamp, today(), [1], uuid())"
    assert value(connection, call) == [["1", "c"]]


def test_an_annotation_that_allows_none_is_given_nulls(connection: duckdb.DuckDBPyConnection) -> None:
    or_zero.register(connection)
    assert value(connection, "or_zero(NULL)") == 0
    Udf.of(or_zero.function, name="strict", null_handling="default").register(connection)
    assert value(connection, "strict(NULL)") is None


def money(n: decimal.Decimal) -> int:
    return int(n)


def record(n: int) -> dict[str, int]:
    return {"n": n}


def untyped(n):  # type: ignore[no-untyped-def]
    return n


def many(*n: int) -> int:
    return len(n)


def either(n: int | str) -> int:
    return int(n)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (money, r"n is a Decimal; a type is, for example, 'DECIMAL\(18, 2\)'. Pass params=\[\.\.\.\]"),
        (record, r"its result is a dict; a type is, for example, 'STRUCT\(.*Pass return_type="),
        (untyped, "n has no annotation that can be read"),
        (many, "can be any number of arguments"),
        (either, "n is a .*'BIGINT'"),
        (lambda n: n, "needs a name"),
    ],
)
def test_what_annotations_do_not_say_must_be_written(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Udf.of(function)


def test_any_arguments(connection: duckdb.DuckDBPyConnection) -> None:
    Udf.of(many, UDFAnyParameters()).register(connection)
    assert value(connection, "many(1, 'a', NULL::int) IS NULL") is True
    assert value(connection, "many(1, 'a')") == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("int", "INTEGER"),
        ("decimal(10, 2)", "DECIMAL(10,2)"),
        (UDFListType(UDFType.INTEGER), "INTEGER[]"),
        (UDFListType(UDFStructType({"int": "INTEGER", "a b": "varchar"})), 'STRUCT("int" INTEGER, "a b" VARCHAR)[]'),
        (UDFStructType(["INTEGER", UDFType.VARCHAR]), 'STRUCT("v1" INTEGER, "v2" VARCHAR)'),
        (UDFMapType(UDFType.VARCHAR, UDFListType("BIGINT")), "MAP(VARCHAR, BIGINT[])"),
    ],
)
def test_types_have_names(connection: duckdb.DuckDBPyConnection, given: Any, expected: str) -> None:
    assert sql_type(given) == expected
    connection.execute(f"SELECT NULL::{expected}")


@pytest.mark.parametrize("type_", list(UDFType))
def test_every_plain_type_is_duckdbs(connection: duckdb.DuckDBPyConnection, type_: UDFType) -> None:
    Udf.of(lambda given: given, [type_], return_type=type_, name="same", null_handling="special").register(connection)
    assert value(connection, "same(NULL)") is None


@pytest.mark.parametrize("given", ["NOPE", "", "INTEGER; DROP TABLE t", 5])
def test_what_is_no_type(given: Any) -> None:
    with pytest.raises(InvalidArgument):
        sql_type(given)


@pytest.mark.parametrize("number", [2**63, 2**70 + 1, -(2**100) - 3])
def test_wide_integers_are_exact(connection: duckdb.DuckDBPyConnection, number: int) -> None:
    Udf.of(lambda: number, [], return_type="HUGEINT", name="wide").register(connection)
    assert value(connection, "wide()") == number


def test_registering_again_replaces(connection: duckdb.DuckDBPyConnection) -> None:
    for result, type_ in ((1, "INT"), ("x", "VARCHAR"), (3, "INT")):
        Udf.of(lambda result=result: result, [], return_type=type_, name="one").register(connection)
        assert value(connection, "one()") == result
    with pytest.raises(InvalidArgument, match="'one' is there already"):
        Udf.of(lambda: 4, [], return_type="INT", name="one").register(connection.cursor())


@pytest.mark.parametrize("name", ["gcd", "bit_length"])
def test_a_name_of_duckdbs_own_gets_an_overload_and_is_never_lost(
    connection: duckdb.DuckDBPyConnection, name: str
) -> None:
    made = Udf.of(lambda given: -1, ["DATE"], return_type="INT", name=name)
    for there in (made, pickle.loads(pickle.dumps(made))):
        there.register(connection)
        assert value(connection, f"{name}(DATE '2020-01-01')") == -1
    with pytest.raises(InvalidArgument, match=f"'{name}' is a name of DuckDB's too"):
        Udf.of(lambda given: -1, ["DATE"], return_type="DATE", name=name).register(connection)
    assert value(connection, "gcd(12::BIGINT, 18)") == 6
    assert value(connection, "bit_length('ab')") == 16


def test_a_function_of_the_same_types_is_exchanged(connection: duckdb.DuckDBPyConnection) -> None:
    for number in (1, 2):
        Udf.of(lambda number=number: number, [], return_type="INT", name="one").register(connection)
        unread = connection.execute("SELECT one() FROM range(3)")
    assert unread.fetchall() == [(2,)] * 3


def test_a_function_that_is_not_deterministic_is_called_per_row(connection: duckdb.DuckDBPyConnection) -> None:
    seen: list[int] = []
    made = Udf.of(lambda n: seen.append(n) or len(seen), ["INT"], return_type="INT", name="serial", deterministic=False)
    made.register(connection)
    assert connection.execute("SELECT serial(1) FROM range(3)").fetchall() == [(1,), (2,), (3,)]


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_error_says_whose_it_is(connection: duckdb.DuckDBPyConnection, vectorized: bool) -> None:
    def broken(n: Any) -> Any:
        raise KeyError("missing thing")

    Udf.of(broken, ["INT"], return_type="INT", vectorized=vectorized).register(connection)
    with pytest.raises(duckdb.InvalidInputException) as caught:
        value(connection, "broken(1)")
    text = str(caught.value)
    assert "SQL function 'broken' failed: KeyError: 'missing thing'" in text
    assert "test_functions_udf.py" in text


def test_it_travels(connection: duckdb.DuckDBPyConnection) -> None:
    scale = 7
    made = Udf.of(lambda n: n * scale, ["INT"], return_type="INT", name="scaled", version="3", deterministic=False)
    there = pickle.loads(pickle.dumps(made))
    there.register(connection)
    assert value(connection, "scaled(6)") == 42
    assert (there.name, there.parameters, there.version, there.deterministic) == ("scaled", ("INTEGER",), "3", False)
    # One that refers to another travels too.
    assert pickle.loads(pickle.dumps(Udf.of(lambda url: host(url), ["VARCHAR"], return_type="VARCHAR", name="h")))(
        "a/b"
    )
