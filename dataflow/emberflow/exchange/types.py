"""DuckDB's types through Arrow and back, without loss.

With `SETTINGS`, Arrow holds every type of DuckDB's except a few, and those travel as another type: `sent` casts a
producer's columns to it, and `restored` casts what a consumer reads back to what they were. Both give SQL expressions.
Values, types and DuckDB's own hash() are then the same on both sides.

| type | travels as | because |
|---|---|---|
| ENUM | VARCHAR | Arrow gives it as a dictionary, and reads it as VARCHAR; its hash() is of the number |
| INTERVAL | VARCHAR | Arrow has nanoseconds, which overflow, silently, after 292 years of hours |
| BOOLEAN inside another type | UTINYINT | DuckDB 1.4 reads it wrong |

A type is only sent if DuckDB says, of no rows, that it comes back as it was; `sent` raises `UnsupportedType` before
there is anything to lose. Does not know what the columns mean, or how they get from one side to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from ..errors import UnsupportedType
from ..plan.nodes import Column
from ..query import quoted

SETTINGS: Mapping[str, Any] = {
    "arrow_lossless_conversion": True,
    # 64-bit offsets: a batch with more than 2 GiB of text is an error without.
    "arrow_large_buffer_size": True,
}
"""What a DuckDB needs that gives rows to an exchange (`duckdb.connect(config=dict(SETTINGS))`); they hold for all its
connections. And the time zone is UTC, as in every session of ours."""

_SUBSTITUTES = {"enum": "VARCHAR", "interval": "VARCHAR"}
_SUBSTITUTES_INSIDE = {**_SUBSTITUTES, "boolean": "UTINYINT"}
_MENTIONS = ("ENUM", "INTERVAL", "BOOLEAN")
_SURE = frozenset(
    {
        *("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
        *("FLOAT", "DOUBLE", "VARCHAR", "BLOB", "DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"),
    }
)
"""Types that every DuckDB gives back; asking costs milliseconds a column."""


def sent(columns: Sequence[Column], names: Sequence[str], connection: duckdb.DuckDBPyConnection) -> list[str]:
    """An expression for each column, called names[i] in the producer's query, that gives it as it travels.

    Raises `UnsupportedType` for a type that would not come back as it was.
    """
    for setting in SETTINGS:
        assert connection.execute(f"SELECT current_setting('{setting}')").fetchall() == [(True,)], setting
    expressions = []
    for column, name in zip(columns, names, strict=True):
        substitute = _substitute(column.type, connection)
        if column.type not in _SURE:
            _check(column, substitute, connection)
        same = substitute == column.type
        expressions.append(quoted(name) if same else f"CAST({quoted(name)} AS {substitute})")
    return expressions


def restored(columns: Sequence[Column], schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """An expression for each column of a registered reader with this schema that gives it its DuckDB type again."""
    arrived = _arrived(schema, connection)
    return [
        quoted(name) if type_ == column.type else f"CAST({quoted(name)} AS {column.type})"
        for column, name, type_ in zip(columns, schema.names, arrived, strict=True)
    ]


def _substitute(type_: str, connection: duckdb.DuckDBPyConnection) -> str:
    """The type that `type_` travels as."""
    if type_ == "BOOLEAN" or not any(word in type_ for word in _MENTIONS):
        return type_
    try:
        parsed: Any = connection.type(type_)
    except duckdb.Error:
        # Without a name for its fields (1.4) a struct has no text that DuckDB reads; `_check` refuses it.
        return type_
    substitute = _rebuilt(parsed, _SUBSTITUTES)
    return type_ if substitute == str(parsed) else substitute


def _rebuilt(type_: Any, substitutes: Mapping[str, str]) -> str:
    """DuckDB's text for a type, with the substitutes in the place of what they stand for."""
    kind = type_.id
    if kind in substitutes:
        return substitutes[kind]
    inside = _SUBSTITUTES_INSIDE
    if kind == "list":
        return f"{_rebuilt(type_.children[0][1], inside)}[]"
    if kind == "array":
        size = dict(type_.children)["size"]
        return f"{_rebuilt(type_.children[0][1], inside)}[{size}]"
    if kind in ("struct", "union", "map", "tuple"):
        # The first child of a union is its tag.
        children = type_.children[1:] if kind == "union" else type_.children
        named = kind in ("struct", "union")
        fields = [(quoted(name) + " " if named else "") + _rebuilt(child, inside) for name, child in children]
        return f"{kind.upper()}({', '.join(fields)})"
    return str(type_)


def _check(column: Column, substitute: str, connection: duckdb.DuckDBPyConnection) -> None:
    """Sends no rows of a type, there and back."""
    try:
        cursor = connection.cursor()
        relation = cursor.sql(f"SELECT CAST(CAST(NULL AS {column.type}) AS {substitute}) AS x LIMIT 0")
        schema = _arrow_schema(relation)
        (expression,) = restored([column], schema, connection)
        cursor.register("emberflow_types", pa.Table.from_batches([], schema))
        (back,) = _described(f"SELECT {expression} FROM emberflow_types", cursor)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UnsupportedType(
            f"the type {column.type} of {column.name!r} does not go through Arrow: {error}"
        ) from error
    if back != column.type:
        raise UnsupportedType(f"the type {column.type} of {column.name!r} comes out of Arrow as {back}")


def _arrow_schema(relation: duckdb.DuckDBPyRelation) -> pa.Schema:
    # Its name in DuckDB 1.4 is deprecated in 2.0.
    table = relation.to_arrow_table() if hasattr(relation, "to_arrow_table") else relation.fetch_arrow_table()
    return table.schema


def _arrived(schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The types that DuckDB gives the columns of an Arrow reader."""
    cursor = connection.cursor()
    cursor.register("emberflow_types", pa.Table.from_batches([], schema))
    return _described("FROM emberflow_types", cursor)


def _described(query: str, cursor: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[1] for row in cursor.execute(f"DESCRIBE {query}").fetchall()]
