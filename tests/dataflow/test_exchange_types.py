"""Every DuckDB type through an exchange file: values, types and hash() are the same on the other side."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from emberflow.errors import UnsupportedType
from emberflow.exchange import (
    SETTINGS,
    ExchangeReader,
    ExchangeWriter,
    Source,
    are_narrow,
    hash_columns,
    restored,
    sent,
)
from emberflow.plan.nodes import Column
from fsspec.implementations.local import LocalFileSystem

BEFORE_2 = int(duckdb.__version__.split(".")[0]) < 2


def connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"python_enable_replacements": False, "threads": 2, **SETTINGS})
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    return connection


@pytest.fixture(scope="module")
def producer() -> Iterator[duckdb.DuckDBPyConnection]:
    with connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def consumer() -> Iterator[duckdb.DuckDBPyConnection]:
    """Another DuckDB: nothing may pass but through the file."""
    with connect() as connection:
        yield connection


def columns_of(query: str, connection: duckdb.DuckDBPyConnection) -> list[Column]:
    return [Column(row[0], row[1]) for row in connection.execute(f"DESCRIBE {query}").fetchall()]


def arrow_of(query: str, connection: duckdb.DuckDBPyConnection) -> pa.Table:
    relation = connection.sql(query)
    return relation.fetch_arrow_table() if BEFORE_2 else relation.to_arrow_table()


def exchanged(
    query: str, directory: Path, producer: duckdb.DuckDBPyConnection, consumer: duckdb.DuckDBPyConnection
) -> str:
    """Sends the rows of a query through a file; the query that gives them again, to the consumer."""
    columns = columns_of(query, producer)
    expressions = [f"{e} AS c{i}" for i, e in enumerate(sent(columns, [c.name for c in columns], producer))]
    table = arrow_of(f"SELECT {', '.join(expressions)} FROM ({query})", producer)
    with (directory / "exchange").open("wb") as file:
        writer = ExchangeWriter(file, schema=table.schema, columns=columns, num_partitions=1, compression="lz4")
        for batch in table.to_batches():
            writer.write(batch, None)
        index = writer.close()
    reader = ExchangeReader([Source(LocalFileSystem(), str(directory / "exchange"), index)], [0])
    consumer.register("arrived", reader)
    names = [
        f"{e} AS {column.name}" for column, e in zip(columns, restored(columns, reader.schema, consumer), strict=True)
    ]
    return f"SELECT {', '.join(names)} FROM arrived"


TYPES = {
    "BOOLEAN": "true, false",
    "TINYINT": "-128, 127, 0",
    "SMALLINT": "-32768, 32767",
    "INTEGER": "-2147483648, 2147483647",
    "BIGINT": "-9223372036854775808, 9223372036854775807",
    "HUGEINT": "-170141183460469231731687303715884105728, 170141183460469231731687303715884105727, -1, 0",
    "UTINYINT": "0, 255",
    "USMALLINT": "0, 65535",
    "UINTEGER": "0, 4294967295",
    "UBIGINT": "0, 18446744073709551615",
    "UHUGEINT": "'0', '340282366920938463463374607431768211455'",
    "BIGNUM": "'-123456789012345678901234567890123456789012345678901234567890', '0'",
    "FLOAT": "'nan', '-0.0', 'inf', '-inf', '1.5e-45', '3.4e38'",
    "DOUBLE": "'nan', '-0.0', '0.0', 'inf', '-inf', '5e-324', '0.1'",
    "DECIMAL(4,1)": "-999.9, 999.9, 0",
    "DECIMAL(9,2)": "-9999999.99, 9999999.99",
    "DECIMAL(18,3)": "-999999999999999.999, 999999999999999.999",
    "DECIMAL(38,10)": "'-9999999999999999999999999999.9999999999', '9999999999999999999999999999.9999999999'",
    "VARCHAR": "'', 'a', 'ünï ☃ 𝄞', 'a' || chr(0) || 'b', repeat('long ', 100)",
    "BLOB": r"'\x00\xFF', '', 'abc'",
    "BIT": "'0', '101', '0000000011111111', repeat('10', 40)",
    "DATE": "'2020-02-29', '0001-01-01', '5877642-06-25 (BC)', '5881580-07-10', 'infinity', '-infinity'",
    "TIME": "'00:00:00', '23:59:59.999999', '24:00:00'",
    "TIME WITH TIME ZONE": "'00:00:00+15:59:59', '12:34:56.123456-05:30', '24:00:00-15:59:59'",
    "TIMESTAMP_S": "'2020-01-01 00:00:01', '1900-01-01', 'infinity', '-infinity'",
    "TIMESTAMP_MS": "'2020-01-01 00:00:01.123', '1900-01-01', 'infinity', '-infinity'",
    "TIMESTAMP": "'2020-01-01 00:00:01.123456', '0001-01-01', 'infinity', '-infinity'",
    "TIMESTAMP_NS": "'2020-01-01 00:00:01.123456789', '1900-01-01', 'infinity', '-infinity'",
    "TIMESTAMP WITH TIME ZONE": "'2020-01-01 00:00:01.123456+05', 'infinity', '-infinity'",
    "INTERVAL": "'1 year -3 days 4 microseconds', '30 days', '1 month', '-5 microseconds', '2000000 hours', '0 days'",
    "UUID": "'00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff', "
    "'80000000-0000-4000-8000-000000000001'",
    "ENUM('b', 'a', 'it''s', '')": "'a', 'b', 'it''s', ''",
    "JSON": """'{"a": [1, null, "x"]}', 'null', '"text"'""",
    "INTEGER[]": "[1, NULL, 3], [], [NULL]",
    "VARCHAR[]": "['a', NULL, ''], []",
    "BOOLEAN[]": "[true, false, NULL, false], []",
    "INTEGER[3]": "[1, NULL, 3], [4, 5, 6]",
    "DECIMAL(20,2)[2][]": "[[1.5, NULL]], []",
    'STRUCT(a INTEGER, "it\'s" VARCHAR)': "{'a': 1, 'it''s': 'x'}, {'a': NULL, 'it''s': NULL}",
    "STRUCT(b BOOLEAN, n STRUCT(b BOOLEAN))": "{'b': false, 'n': {'b': false}}, {'b': true, 'n': NULL}",
    "MAP(VARCHAR, INTEGER)": "MAP {'a': 1, 'b': NULL}, MAP {}",
    "MAP(ENUM('k', 'l'), INTERVAL[])": "MAP {'l': ['1 month'::INTERVAL, NULL], 'k': []}",
    "UNION(n INTEGER, t VARCHAR)": "union_value(n := 1), union_value(t := 'x'), union_value(t := NULL)",
    'UNION(tag INTEGER, "{it\'s}" VARCHAR)': "union_value(tag := 1), union_value(\"{it's}\" := 'x')",
    "UNION(e ENUM('x'), b BOOLEAN, l INTEGER[])": "union_value(e := 'x'), union_value(b := false), "
    "union_value(l := [1])",
    "STRUCT(m MAP(VARCHAR, HUGEINT[]), u UUID, t TIME WITH TIME ZONE)[]": "[{'m': MAP {'k': [1, NULL]}, "
    "'u': 'ffffffff-ffff-ffff-ffff-ffffffffffff', 't': '12:00:00+01'}, NULL]",
    "ENUM('x', 'y')[]": "['y', NULL, 'x'], []",
    "STRUCT(\"interval\" ENUM('ENUM(', 'BOOLEAN'), b BIT, big BIGNUM)": "{'interval': 'ENUM(', 'b': '01', 'big': 7}",
}
"""Type -> literals of it."""

TYPES_OF_2 = {
    "TIME_NS": "'12:34:56.123456789'",
    "TIMESTAMPTZ_NS": "'2020-01-01 00:00:01.123456789+00'",
    "VARIANT": "1::VARIANT, 'x'::VARIANT, {'a': [1, NULL]}::VARIANT",
    "GEOMETRY": "'POINT (1 2)'",
    "TUPLE(INTEGER, BOOLEAN)": "row(1, false), row(NULL, true)",
    '"NULL"': "NULL",
    '"NULL"[]': "[NULL], []",
}


@pytest.mark.parametrize("type_", [*TYPES, *(() if BEFORE_2 else TYPES_OF_2)])
def test_a_type_comes_back_as_it_was(
    type_: str, tmp_path: Path, producer: duckdb.DuckDBPyConnection, consumer: duckdb.DuckDBPyConnection
) -> None:
    literals = {**TYPES, **TYPES_OF_2}[type_]
    # NULL first, in the middle and last.
    values = f"SELECT NULL AS x UNION ALL (SELECT unnest([{literals}, NULL]))"
    if "UNION(" in type_:  # A list has no common type of them.
        parts = [f"union_value({part}" for part in literals.split("union_value(")[1:]]
        values = " UNION ALL ".join(["SELECT NULL", *(f"SELECT ({part.strip(' ,')})::{type_}" for part in parts)])
    query = f"SELECT CAST(x AS {type_}) AS x FROM ({values}) v(x)"
    assert [column.type for column in columns_of(query, producer)] == [type_]

    again = exchanged(query, tmp_path, producer, consumer)
    shown = "SELECT x::VARCHAR, hash(x), x IS NULL FROM"
    expected = producer.execute(f"{shown} ({query})").fetchall()
    assert len(expected) >= 2
    assert consumer.execute(f"{shown} ({again})").fetchall() == expected
    again = exchanged(query, tmp_path, producer, consumer)
    assert columns_of(again, consumer) == columns_of(query, producer)


def test_a_filter_over_what_came_back_is_right(
    tmp_path: Path, producer: duckdb.DuckDBPyConnection, consumer: duckdb.DuckDBPyConnection
) -> None:
    query = """SELECT i, i % 2 = 0 AS b, i::HUGEINT AS h, i::VARCHAR AS s, i::VARCHAR::JSON AS j,
        i::DECIMAL(9, 1) AS d, i::VARCHAR::BLOB AS bl, TIMESTAMP '2020-01-01' + to_days(i::INTEGER) AS ts,
        {'b': i % 2 = 0, 'h': i::HUGEINT} AS st,
        (DATE '2020-01-01' + i::INTEGER) AS dt, [i % 2 = 0] AS l, to_days(i::INTEGER) AS iv,
        CASE WHEN i = 1 THEN 'b' ELSE 'a' END::ENUM('a', 'b') AS e FROM range(3) r(i)"""
    filters = [
        *("b", "NOT b", "b = false", "h = 1", "h > 0::HUGEINT", "s = '1'", "s LIKE '1%'", "s IN ('1', '7')", "j = '1'"),
        *("d = 1", "bl = '1'::BLOB", "ts > TIMESTAMP '2020-01-01'", "st.b", "NOT st.b", "st.b = true", "st.h = 1"),
        *("dt = DATE '2020-01-02'", "l[1]", "iv = INTERVAL '1 day'", "e = 'b'", "i >= 1"),
    ]
    for condition in filters:
        again = exchanged(query, tmp_path, producer, consumer)
        expected = producer.execute(f"SELECT i FROM ({query}) WHERE {condition}").fetchall()
        assert consumer.execute(f"SELECT i FROM ({again}) WHERE {condition}").fetchall() == expected, condition
        assert expected


@pytest.mark.skipif(not BEFORE_2, reason="every type goes through Arrow in DuckDB 2")
@pytest.mark.parametrize("type_", ["VARIANT", "TIME_NS", "STRUCT(v VARIANT)[]", "STRUCT(INTEGER, INTEGER)"])
def test_what_cannot_go_through_is_refused_before_a_row_is_sent(
    type_: str, producer: duckdb.DuckDBPyConnection
) -> None:
    with pytest.raises(UnsupportedType, match="of 'x'"):
        sent([Column("x", type_)], ["c0"], producer)


def test_a_type_may_be_written_in_another_way(producer: duckdb.DuckDBPyConnection) -> None:
    columns = [Column("x", "ENUM('a','b') []"), Column("y", "int8[]")]
    assert sent(columns, ["c0", "c1"], producer) == ['CAST("c0" AS VARCHAR[])', '"c1"']


@pytest.mark.parametrize(
    "type_", ["GADGET", "UNION(n INTEGER)[]", "STRUCT(u UNION(n INTEGER))", "UNION(l UNION(n BIT))"]
)
def test_a_type_that_nobody_can_send_is_refused(type_: str, producer: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(UnsupportedType, match="of 'x'"):
        sent([Column("x", type_)], ["c0"], producer)


def test_a_dictionary_is_refused() -> None:
    schema = pa.schema([("x", pa.list_(pa.dictionary(pa.int8(), pa.string())))])
    with pytest.raises(ValueError, match="no Arrow dictionaries"):
        ExchangeWriter(io.BytesIO(), schema=schema, columns=[Column("x", "VARCHAR[]")], num_partitions=1)


@pytest.mark.parametrize("type_", ["DECIMAL(4,1)", "DECIMAL(9,2)", "DECIMAL(18,3)", "DECIMAL(38,10)"])
def test_decimals_in_the_bytes_that_they_have(
    type_: str, tmp_path: Path, producer: duckdb.DuckDBPyConnection, consumer: duckdb.DuckDBPyConnection
) -> None:
    values = f"SELECT CAST(x AS {type_}) AS x, 'text' AS t FROM (SELECT unnest([{TYPES[type_]}, NULL]) AS x)"
    hashes = hash_columns([arrow_of(values, producer).column(0)])
    producer.execute("SET GLOBAL arrow_output_version = '1.5'")
    try:
        narrow = arrow_of(values, producer)
        query = exchanged(values, tmp_path, producer, consumer)
    finally:
        producer.execute("RESET GLOBAL arrow_output_version")
    digits = int(type_[8:].split(",")[0])
    assert narrow.schema.field(0).type.bit_width == (32 if digits <= 9 else 64 if digits <= 18 else 128)
    assert (hash_columns([narrow.column(0)]) == hashes).all()
    assert columns_of(query, consumer) == columns_of(values, producer)
    assert consumer.execute(query).fetchall() == producer.execute(values).fetchall()


def test_where_something_else_would_change_decimals_stay_wide() -> None:
    decimal, text, blob = Column("d", "DECIMAL(9,2)"), Column("t", "VARCHAR"), Column("b", "BLOB")
    assert are_narrow([text, decimal])
    assert not are_narrow([decimal, blob])
    assert not are_narrow([decimal, Column("l", "DECIMAL(9,2)[]")])
    assert not are_narrow([text])
