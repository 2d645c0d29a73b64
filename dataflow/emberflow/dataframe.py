"""A lazy result: a query that runs, whole and once, each time rows are asked for.

Methods that return a `DataFrame` only compose text. Everything else runs the query: results stream out of DuckDB
in Arrow batches, so what is written or iterated over is never in memory as a whole.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .engine import arrow_reader
from .errors import InvalidArgument
from .files import FILE_SIZE_BYTES
from .query import Query, quoted
from .writer import Mode, WriteOptions, WriteReport, write

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from .session import Session

BATCH_ROWS = 16_384
"""Rows in a batch: eight of DuckDB's vectors. A column of texts of up to 128 KiB on average stays under
Arrow's 2 GiB."""

_PREVIEW_ROWS = 20
# Arrow has no 128-bit integers, and DuckDB writes them to Parquet as floating point. As decimals they stay exact.
_WIDE_INTEGERS = frozenset({"HUGEINT", "UHUGEINT"})


class DataFrame:
    """Rows to come. Made by a `Session`; safe to use from many threads."""

    def __init__(self, session: Session, query: Query) -> None:
        self.session = session
        self.query = query
        self._schema: dict[str, str] | None = None

    @property
    def schema(self) -> dict[str, str]:
        """Columns and their DuckDB types, in order. Reads the metadata of the sources, once per frame."""
        if self._schema is None:
            with self.session.running(self.query) as cursor:
                rows = cursor.execute(f"DESCRIBE {self.query.text}", self.query.params).fetchall()
            self._schema = {str(row[0]): str(row[1]) for row in rows}
        return self._schema

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.schema)

    def filter(self, condition: str) -> DataFrame:
        """The rows for which the SQL `condition` is true."""
        return self._derived("SELECT * FROM", f"WHERE ({condition}\n)")

    def select(self, *expressions: str) -> DataFrame:
        """The given columns or SQL expressions: `select("a", "b + 1 as c")`."""
        if not expressions:
            raise InvalidArgument("select() needs at least one column or expression")
        return self._derived(f"SELECT {', '.join(expressions)} FROM")

    def limit(self, n: int) -> DataFrame:
        """At most the first `n` rows; which they are is certain only under an ORDER BY."""
        if n < 0:
            raise InvalidArgument(f"limit() takes a number of rows, not {n}")
        return self._derived("SELECT * FROM", f"LIMIT {n}")

    def count(self) -> int:
        """Number of rows."""
        counting = self.query.wrapped("SELECT count(*) FROM")
        with self.session.running(counting) as cursor:
            row = cursor.execute(counting.text, counting.params).fetchone()
        assert row is not None
        return int(row[0])

    def take(self, n: int) -> list[dict[str, Any]]:
        """At most the first `n` rows as dictionaries."""
        return self.limit(n).take_all()

    def take_all(self) -> list[dict[str, Any]]:
        """All rows as dictionaries."""
        return list(self.iter_rows())

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The rows one by one, as dictionaries; only a batch of them is in memory."""
        wide = self._wide_columns()
        for batch in self.to_batches():
            for row in batch.to_pylist():
                for name in wide:
                    row[name] = None if row[name] is None else int(row[name])
                yield row

    def to_batches(self, batch_rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """A reader of record batches of at most about `batch_rows` rows, filled as it is read. 128-bit integers
        come as decimal128(38, 0)."""
        return self.batches_of(self.exportable(), batch_rows)

    def to_arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        return self.to_batches().read_all()

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a pandas frame. 128-bit integers, which sums are, become int64, or float64 if they do not fit."""
        table = self.to_arrow()
        for name in self._wide_columns():
            position = table.schema.get_field_index(name)
            try:
                narrow = table.column(position).cast(pa.int64())
            except pa.ArrowInvalid:
                narrow = table.column(position).cast(pa.float64())
            table = table.set_column(position, name, narrow)
        return table.to_pandas()

    def write_parquet(
        self,
        url: str,
        *,
        partition_by: str | list[str] | None = None,
        mode: Mode = "error",
        file_size_bytes: int = FILE_SIZE_BYTES,
        compression: str = "zstd",
        progress: bool | None = None,
    ) -> WriteReport:
        """Writes Parquet to any fsspec URL: one file if `url` ends in `.parquet`, else a directory of files.

        `partition_by` puts the rows of each value into `column=value/`, the way Hive does. Files of an unpartitioned
        directory grow to about `file_size_bytes`. The files are written beside the target and moved into place when
        all are complete; on failure the target is as before. mode "error" refuses a target that has files,
        "overwrite" replaces them, "append" adds to them. `progress` shows a bar; by default on a terminal.
        """
        options = WriteOptions(
            format="parquet",
            mode=mode,
            partition_by=(partition_by,) if isinstance(partition_by, str) else tuple(partition_by or ()),
            file_size_bytes=file_size_bytes,
            compression=compression,
            progress=progress,
        )
        return write(self, url, options)

    def write_csv(self, url: str, *, mode: Mode = "error", progress: bool | None = None) -> WriteReport:
        """Writes CSV with a header, as `write_parquet` does: one file if `url` ends in `.csv` (or that and `.gz`,
        `.zst`)."""
        return write(self, url, WriteOptions(format="csv", mode=mode, progress=progress))

    def write_json(self, url: str, *, mode: Mode = "error", progress: bool | None = None) -> WriteReport:
        """Writes JSON lines, as `write_parquet` does: one file if `url` ends in `.json` or `.jsonl` (or those and
        `.gz`, `.zst`)."""
        return write(self, url, WriteOptions(format="json", mode=mode, progress=progress))

    def explain(self) -> str:
        """DuckDB's physical plan."""
        with self.session.running(self.query) as cursor:
            rows = cursor.execute(f"EXPLAIN {self.query.text}", self.query.params).fetchall()
        return "\n".join(str(row[-1]) for row in rows)

    def batches_of(self, query: Query, batch_rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """A reader of the batches of `query`, a form of this frame's, run in its session."""
        stream = self._stream(query, batch_rows)
        schema = next(stream)
        assert isinstance(schema, pa.Schema)
        return pa.RecordBatchReader.from_batches(schema, stream)

    def exportable(self) -> Query:
        """The query with 128-bit integers cast to decimals, for formats that have none."""
        wide = self._wide_columns()
        if not wide:
            return self.query
        casts = ", ".join(f"CAST({quoted(name)} AS DECIMAL(38, 0)) AS {quoted(name)}" for name in wide)
        return self.query.wrapped(f"SELECT * REPLACE ({casts}) FROM")

    def __repr__(self) -> str:
        return f"<DataFrame of {self.query.text!r}>"

    def _repr_html_(self) -> str:
        rows = self.take(_PREVIEW_ROWS + 1)
        head = "".join(f"<th>{html.escape(name)}<br><small>{type_}</small></th>" for name, type_ in self.schema.items())
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows[:_PREVIEW_ROWS]
        )
        more = "<p>more rows follow</p>" if len(rows) > _PREVIEW_ROWS else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _derived(self, before: str, after: str = "") -> DataFrame:
        return DataFrame(self.session, self.query.wrapped(before, after))

    def _wide_columns(self) -> list[str]:
        return [name for name, type_ in self.schema.items() if type_ in _WIDE_INTEGERS]

    def _stream(self, query: Query, batch_rows: int) -> Iterator[Any]:
        """The Arrow schema, then the batches. Keeps the cursor open while they are drawn."""
        with self.session.running(query) as cursor:
            reader = arrow_reader(cursor, query.text, query.params, batch_rows)
            yield reader.schema
            yield from reader
