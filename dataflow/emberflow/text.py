"""CSV and JSON lines from a stream of record batches.

DuckDB turns every row of a JSON file into its line (`to_json`), so that all its types are written as it reads them;
CSV is written by pyarrow. Not by DuckDB's COPY: on 2.0 one whose query fails can hang for ever.

Does not know: where the files go, or when they get their names.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.csv

from .query import Query, quoted

_LINE = "line"
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_CSV_TYPES = {
    *("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
    *("FLOAT", "DOUBLE", "DATE", "TIMESTAMP", "VARCHAR"),
}
"""What pyarrow writes as DuckDB would; every other type is cast to text by DuckDB."""


# Arrow has no 128-bit integers, and DuckDB writes them to Parquet as floating point. As decimals they stay exact.
_WIDE_INTEGERS = frozenset({"HUGEINT", "UHUGEINT"})


class TextWriter(Protocol):
    """What both formats are written through."""

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Write some rows."""

    def close(self) -> None:
        """Write what is left. The file under it stays open."""


def wide_columns(schema: Mapping[str, str]) -> list[str]:
    """The columns of 128-bit integers."""
    return [name for name, type_ in schema.items() if type_ in _WIDE_INTEGERS]


def exportable(query: Query, schema: Mapping[str, str]) -> Query:
    """`query` with 128-bit integers cast to decimals, for formats that have none."""
    wide = wide_columns(schema)
    if not wide:
        return query
    casts = ", ".join(f"CAST({quoted(name)} AS DECIMAL(38, 0)) AS {quoted(name)}" for name in wide)
    return query.wrapped(f"SELECT * REPLACE ({casts}) FROM")


def written(query: Query, schema: Mapping[str, str], format: str) -> Query:
    """`query` as files of the format hold it."""
    query = exportable(query, schema)
    if format == "json":
        return json_query(query)
    return csv_query(query, schema) if format == "csv" else query


def csv_query(query: Query, schema: Mapping[str, str]) -> Query:
    """`query` with the columns that CSV has no form for as text."""
    casts = [
        f"CAST({quoted(name)} AS VARCHAR) AS {quoted(name)}"
        for name, type_ in schema.items()
        if type_ not in _CSV_TYPES and not type_.startswith("DECIMAL")
    ]
    return query.wrapped(f"SELECT * REPLACE ({', '.join(casts)}) FROM") if casts else query


def json_query(query: Query) -> Query:
    """`query` with each row as one text, its line."""
    return query.wrapped(f"SELECT CAST(to_json(emberflow_row) AS VARCHAR) AS {_LINE} FROM", "AS emberflow_row")


def compressed(file: IO[bytes], path: str) -> Any:
    """What to write to, for a path that may end with .gz or .zst. Closing it does not close `file`."""
    codec = _CODECS.get(posixpath.splitext(path)[1])
    return file if codec is None else pa.CompressedOutputStream(pa.PythonFile(_Unclosed(file), mode="w"), codec)


class _Unclosed:
    """A file that the stream over it may not close: its owner decides whether it gets its name."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write
        self.flush = file.flush
        self.closed = False

    def close(self) -> None:
        self.closed = True


class CsvWriter:
    """Rows as CSV with a header."""

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        self._writer = pyarrow.csv.CSVWriter(sink, schema)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


class JsonWriter:
    """Rows of `json_query` as lines."""

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        assert schema.names == [_LINE]
        self._sink = sink

    def write_batch(self, batch: pa.RecordBatch) -> None:
        lines = batch.column(0).to_pylist()
        if lines:
            self._sink.write(("\n".join(lines) + "\n").encode())

    def close(self) -> None:
        """Nothing is held back."""
