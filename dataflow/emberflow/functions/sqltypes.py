"""DuckDB's types, as the user writes them and as Arrow has them.

The vocabulary is smallpond's: `UDFType.BIGINT`, `UDFListType(UDFType.VARCHAR)`; a type's name in SQL does as well.

Does not know: functions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import duckdb
import pyarrow as pa

from ..errors import InvalidArgument
from ..query import quoted


class UDFType(enum.Enum):
    """DuckDB's plain types."""

    SQLNULL = '"NULL"'
    BOOLEAN = "BOOLEAN"
    TINYINT = "TINYINT"
    UTINYINT = "UTINYINT"
    SMALLINT = "SMALLINT"
    USMALLINT = "USMALLINT"
    INTEGER = "INTEGER"
    INT = "INTEGER"  # noqa: PIE796 - smallpond's examples write it
    UINTEGER = "UINTEGER"
    BIGINT = "BIGINT"
    UBIGINT = "UBIGINT"
    HUGEINT = "HUGEINT"
    UUID = "UUID"
    FLOAT = "FLOAT"
    DOUBLE = "DOUBLE"
    DATE = "DATE"
    TIMESTAMP = "TIMESTAMP"
    TIMESTAMP_MS = "TIMESTAMP_MS"
    TIMESTAMP_NS = "TIMESTAMP_NS"
    TIMESTAMP_S = "TIMESTAMP_S"
    TIME = "TIME"
    TIME_TZ = "TIME WITH TIME ZONE"
    TIMESTAMP_TZ = "TIMESTAMP WITH TIME ZONE"
    VARCHAR = "VARCHAR"
    BLOB = "BLOB"
    BIT = "BIT"
    INTERVAL = "INTERVAL"


@dataclass(frozen=True, slots=True)
class UDFListType:
    """A list: `UDFListType(UDFType.INTEGER)`."""

    child: TypeSpec


@dataclass(frozen=True, slots=True)
class UDFStructType:
    """A struct: `UDFStructType({"host": "VARCHAR", "port": "INTEGER"})`, or the types alone, for fields v1, v2, ..."""

    fields: Mapping[str, TypeSpec] | Sequence[TypeSpec]


@dataclass(frozen=True, slots=True)
class UDFMapType:
    """A map: `UDFMapType(UDFType.VARCHAR, UDFType.INTEGER)`."""

    key: TypeSpec
    value: TypeSpec


@dataclass(frozen=True, slots=True)
class UDFAnyParameters:
    """In the place of parameter types: any number of arguments of any type."""


TypeSpec: TypeAlias = str | UDFType | UDFListType | UDFStructType | UDFMapType
"""A DuckDB type, by its name in SQL or in smallpond's vocabulary."""


def sql_type(given: TypeSpec) -> str:
    """A type's name in SQL, as DuckDB itself writes it. Raises `InvalidArgument` for what is none."""
    match given:
        case UDFType():
            return given.value
        case UDFListType(child):
            return sql_type(child) + "[]"
        case UDFMapType(key, value):
            return f"MAP({sql_type(key)}, {sql_type(value)})"
        case UDFStructType(fields):
            named = fields if isinstance(fields, Mapping) else {f"v{i}": child for i, child in enumerate(fields, 1)}
            inner = ", ".join(f"{quoted(name)} {sql_type(child)}" for name, child in named.items())
            return f"STRUCT({inner})"
        case str():
            try:
                return str(duckdb.sqltype(given))
            except (duckdb.Error, RuntimeError) as error:
                raise InvalidArgument(f"{given!r} is no DuckDB type: {error}") from error
        case _:
            raise InvalidArgument(f"a type is a name like 'BIGINT', or of UDFType, not {given!r}")


def arrow_schema(types: Mapping[str, TypeSpec]) -> pa.Schema:
    """The Arrow schema that DuckDB gives columns of these types, without loss: a HUGEINT stays one."""
    chosen = ", ".join(f"NULL::{sql_type(type_)} AS {quoted(name)}" for name, type_ in types.items())
    if not chosen:
        raise InvalidArgument("a schema needs at least one column")
    with _connection() as connection:
        relation = connection.sql(f"SELECT {chosen} LIMIT 0")
        # DuckDB 2 gives a reader where 1.4 gives a table.
        return relation.arrow().schema


def duckdb_types(schema: pa.Schema) -> dict[str, str]:
    """The columns and DuckDB types that an Arrow schema is read as."""
    with _connection() as connection:
        # Not an empty table: pyarrow makes none with extension types inside others.
        connection.register("shadow", pa.RecordBatchReader.from_batches(schema, []))
        return {str(row[0]): str(row[1]) for row in connection.execute("DESCRIBE shadow").fetchall()}


def _connection() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"arrow_lossless_conversion": True})
