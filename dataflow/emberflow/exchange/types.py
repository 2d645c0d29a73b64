"""DuckDB's types through Arrow and back, without loss.

With `SETTINGS`, Arrow holds every type of DuckDB's except a few, and those travel as another type: `sent` casts a
producer's columns to it, and `restored` casts what a consumer reads back to what they were. Both give SQL expressions.
Values, types and DuckDB's own hash() are then the same on both sides.

| type | travels as | because |
|---|---|---|
| ENUM | VARCHAR | Arrow gives it as a dictionary, and reads it as VARCHAR; its hash() is of the number |
| INTERVAL | VARCHAR | Arrow has nanoseconds, which overflow, silently, after 292 years of hours |
| BOOLEAN inside another type | UTINYINT | DuckDB 1.4 reads it wrong |
| UNION | STRUCT of its tag and its members | in Arrow one whose member is NULL is no longer told from NULL |

A UNION inside another type has no such form, and is refused.

A type is only sent if DuckDB says, of no rows, that it comes back as it was; `sent` raises `UnsupportedType` before
there is anything to lose. Does not know what the columns mean, or how they get from one side to the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from ..errors import UnsupportedType
from ..plan.nodes import Column
from ..query import literal, quoted

SETTINGS: Mapping[str, Any] = {
    "arrow_lossless_conversion": True,
    # 64-bit offsets: a batch with more than 2 GiB of text is an error without.
    "arrow_large_buffer_size": True,
}
"""What a DuckDB needs that gives rows to an exchange (`duckdb.connect(config=dict(SETTINGS))`); they hold for all its
connections. And the time zone is UTC, as in every session of ours."""

_SUBSTITUTES = {"enum": "VARCHAR", "interval": "VARCHAR"}
_SUBSTITUTES_INSIDE = {**_SUBSTITUTES, "boolean": "UTINYINT"}
_MENTIONS = ("ENUM", "INTERVAL", "BOOLEAN", "UNION")
_DECIMAL = re.compile(r"DECIMAL\(\d+,\d+\)")
_ARRIVED: dict[pa.Schema, list[str]] = {}
_ARRIVED_MAX = 1000
_SURE = frozenset(
    {
        *("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
        *("FLOAT", "DOUBLE", "VARCHAR", "BLOB", "DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"),
    }
)
"""Types, DECIMAL beside them, that every DuckDB gives back; asking costs two milliseconds a type."""


def sent(columns: Sequence[Column], names: Sequence[str], connection: duckdb.DuckDBPyConnection) -> list[str]:
    """An expression for each column, called names[i] in the producer's query, that gives it as it travels.

    Raises `UnsupportedType` for a type that would not come back as it was.
    """
    asked = ", ".join(f"current_setting('{setting}')" for setting in SETTINGS)
    assert connection.execute(f"SELECT {asked}").fetchall() == [(True,) * len(SETTINGS)], SETTINGS
    for column in {column.type: column for column in columns}.values():
        if column.type not in _SURE and not _DECIMAL.fullmatch(column.type):
            _check(column, connection)
    return [_sent(column.type, name, connection) for column, name in zip(columns, names, strict=True)]


def are_narrow(columns: Sequence[Column]) -> bool:
    """Whether decimals of up to 18 digits may travel in 4 or 8 bytes (`Engine.narrow_decimals`): where no other column
    takes another form by it, as BLOBs do, which would be views. pyarrow 18 has no name for such decimals."""
    types = {column.type for column in columns}
    decimals = {type_ for type_ in types if _DECIMAL.fullmatch(type_)}
    return bool(decimals) and types - decimals <= _SURE - {"BLOB"} and hasattr(pa, "decimal64")


def restored(columns: Sequence[Column], schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """An expression for each column of a registered reader with this schema that gives it its DuckDB type again."""
    return [
        _restored(column.type, name, type_, connection)
        for column, name, type_ in zip(columns, schema.names, _arrived(schema, connection), strict=True)
    ]


def _arrived(schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """As what types DuckDB sees the columns of a reader; the tasks of a stage ask for the same ones."""
    known = _ARRIVED.get(schema)
    if known is None:
        cursor = connection.cursor()
        cursor.register("emberflow_types", pa.Table.from_batches([], schema))
        known = _described("FROM emberflow_types", cursor)
        if len(_ARRIVED) >= _ARRIVED_MAX:
            _ARRIVED.clear()
        _ARRIVED[schema] = known
    return known


def _sent(type_: str, name: str, connection: duckdb.DuckDBPyConnection) -> str:
    column = quoted(name)
    if not any(word in type_ for word in _MENTIONS):
        return column
    parsed: Any = connection.type(type_)
    if parsed.id == "union":
        fields = [f"tag := CAST(union_tag({column}) AS VARCHAR)"]
        for i, (member, member_type) in enumerate(_members(parsed)):
            substitute = _substitute(member_type, _SUBSTITUTES_INSIDE)
            fields.append(f"m{i} := CAST(union_extract({column}, {literal(member)}) AS {substitute})")
        return f"CASE WHEN {column} IS NOT NULL THEN struct_pack({', '.join(fields)}) END"
    substitute = _substitute(parsed, _SUBSTITUTES)
    return column if substitute == str(parsed) else f"CAST({column} AS {substitute})"


def _restored(type_: str, name: str, arrived: str, connection: duckdb.DuckDBPyConnection) -> str:
    column = quoted(name)
    if type_.startswith("UNION("):
        cases = []
        for i, (member, member_type) in enumerate(_members(connection.type(type_))):
            value = f"union_value({quoted(member)} := CAST({column}.m{i} AS {member_type}))"
            cases.append(f"WHEN {literal(member)} THEN CAST({value} AS {type_})")
        return f"CASE {column}.tag {' '.join(cases)} END"
    return column if arrived == type_ else f"CAST({column} AS {type_})"


def _members(union: Any) -> list[tuple[str, Any]]:
    # The first child is the tag.
    members: list[tuple[str, Any]] = union.children[1:]
    return members


def _substitute(type_: Any, substitutes: Mapping[str, str]) -> str:
    """DuckDB's text for a type, with the substitutes in the place of what they stand for."""
    kind = type_.id
    if kind in substitutes:
        return substitutes[kind]
    if kind in ("list", "array"):
        # An array's second child is its size.
        (_, child), *size = type_.children
        return f"{_substitute(child, _SUBSTITUTES_INSIDE)}[{size[0][1] if size else ''}]"
    if kind in ("struct", "map", "tuple"):
        inside = [(name, _substitute(child, _SUBSTITUTES_INSIDE)) for name, child in type_.children]
        fields = [f"{quoted(name)} {child}" if kind == "struct" else child for name, child in inside]
        return f"{kind.upper()}({', '.join(fields)})"
    if kind == "union":
        raise UnsupportedType("a UNION inside another type does not go through Arrow")
    return str(type_)


def _check(column: Column, connection: duckdb.DuckDBPyConnection) -> None:
    """Sends no rows of a type, there and back."""
    try:
        cursor = connection.cursor()
        expression = _sent(column.type, "x", connection)
        relation = cursor.sql(f"SELECT {expression} AS x FROM (SELECT CAST(NULL AS {column.type}) AS x) LIMIT 0")
        # Its name in DuckDB 1.4 is deprecated in 2.0.
        table = relation.to_arrow_table() if hasattr(relation, "to_arrow_table") else relation.fetch_arrow_table()
        (expression,) = restored([column], table.schema, connection)
        cursor.register("emberflow_types", table)
        query = f"SELECT {expression} AS back, CAST(NULL AS {column.type}) AS wanted FROM emberflow_types"
        back, wanted = _described(query, cursor)
    except (duckdb.Error, pa.ArrowException, UnsupportedType) as error:
        raise UnsupportedType(f"the type {column.type} of {column.name!r} cannot be exchanged: {error}") from error
    if back != wanted:
        raise UnsupportedType(f"the type {column.type} of {column.name!r} comes out of Arrow as {back}")


def _described(query: str, cursor: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[1] for row in cursor.execute(f"DESCRIBE {query}").fetchall()]
