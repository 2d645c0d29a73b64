"""A lazy result: rows that are made each time they are asked for.

Methods that return a `DataFrame` only say what is to be done. Everything else does it: in this process, streaming out
of DuckDB in Arrow batches, or by a job. The rows of `compute` are kept; all others are made each time.
"""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa

from .engine import arrow_reader
from .errors import ExchangeCorrupt, InvalidArgument
from .files import FILE_SIZE_BYTES
from .query import Query, of_table, quoted
from .text import exportable, wide_columns
from .writer import Mode, WriteOptions, WriteReport, write

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from .functions.udf import Udf
    from .grouped import Grouped
    from .plan.frames import Frame
    from .session import Session

BATCH_ROWS = 16_384
"""Rows in a batch: eight of DuckDB's vectors. A column of texts of up to 128 KiB on average stays under
Arrow's 2 GiB."""

_PREVIEW_ROWS = 20

JoinHow = Literal["inner", "left", "right", "full", "semi", "anti", "cross"]
Schema: TypeAlias = Mapping[str, str] | pa.Schema


class LazyWrite:
    """A write that waits for `compute`, or for `Session.wait`."""

    def __init__(self, frame: DataFrame, url: str, options: WriteOptions) -> None:
        self._frame = frame
        self._url = url
        self._options = options
        self.report: WriteReport | None = None

    def compute(self) -> WriteReport:
        """Writes, unless it is written; gives the report."""
        if self.report is None:
            self.report = write(self._frame, self._url, self._options)
        return self.report

    def is_computed(self) -> bool:
        """Whether it is written."""
        return self.report is not None


class DataFrame:
    """Rows to come. Made by a `Session`; safe to use from many threads."""

    def __init__(self, session: Session, frame: Frame) -> None:
        self.session = session
        self.frame = frame
        self._schema: dict[str, str] | None = None

    @property
    def query(self) -> Query:
        """The rows as something that SQL can read: those that were computed, if they were."""
        if isinstance(self.frame, Query) and self.session.computed(self.frame) is None:
            return self.frame
        return of_table(self.frame)

    @property
    def schema(self) -> dict[str, str]:
        """Columns and their DuckDB types, in order; looked up once per frame. Reads the metadata of the sources, and
        plans; runs a job only where a Python function without a schema decides, and keeps its rows."""
        if self._schema is None:
            query = self.query
            if all(isinstance(source, pa.Table) for source in query.tables.values()):
                copies = self.session.copies
                with (
                    copies.lent(query.text) as loan,
                    self.session.running(query) as cursor,
                    loan.told(),
                    copies.binding(loan),
                ):
                    rows = cursor.execute(f"DESCRIBE {query.text}", query.params).fetchall()
                self._schema = {str(row[0]): str(row[1]) for row in rows}
            else:
                self._schema = {column.name: column.type for column in self.session.jobs.columns(self.frame)}
        return self._schema

    def _named(self, name: str) -> str | None:
        """The column of this name, whatever its case, as DuckDB has it."""
        return next((column for column in self.columns if column.lower() == name.lower()), None)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.schema)

    # ---- rows by SQL

    def filter(
        self, condition: str | Callable[[dict[str, Any]], bool], *, udfs: Sequence[Udf] = (), **step: Any
    ) -> DataFrame:
        """The rows for which the SQL `condition` is true, or the function of a row's dictionary."""
        if callable(condition):
            return self._applied("filter", condition, **step)
        self._with_functions(udfs, step)
        return self._derived("SELECT * FROM", f"WHERE ({condition}\n)")

    def select(self, *expressions: str) -> DataFrame:
        """The given columns or SQL expressions: `select("a", "b + 1 as c")`."""
        if not expressions:
            raise InvalidArgument("select() needs at least one column or expression")
        return self._derived(f"SELECT {', '.join(expressions)} FROM")

    def with_column(self, name: str, expression: str) -> DataFrame:
        """All columns, and one more (or one replaced) by a SQL expression."""
        if self._named(name) is not None:
            return self._derived(f"SELECT * REPLACE (({expression}) AS {quoted(name)}) FROM")
        return self._derived(f"SELECT *, ({expression}) AS {quoted(name)} FROM")

    def drop(self, *columns: str) -> DataFrame:
        """All columns but these."""
        return self._derived(f"SELECT * EXCLUDE ({', '.join(map(quoted, columns))}) FROM")

    def rename(self, names: Mapping[str, str]) -> DataFrame:
        """Columns under new names: {"old": "new"}."""
        # RENAME passes by a column that is not there; REPLACE does not.
        same = ", ".join(f"{quoted(old)} AS {quoted(old)}" for old in names)
        listed = ", ".join(f"{quoted(old)} AS {quoted(new)}" for old, new in names.items())
        return self._derived(f"SELECT * REPLACE ({same}) FROM")._derived(f"SELECT * RENAME ({listed}) FROM")

    def limit(self, limit: int) -> DataFrame:
        """At most the first `limit` rows; which they are is certain only after a sort."""
        if limit < 0:
            raise InvalidArgument(f"limit() takes a number of rows, not {limit}")
        return self._derived("SELECT * FROM", f"LIMIT {limit}")

    def sort(self, *by: str) -> DataFrame:
        """All rows in the order of SQL expressions: `sort("host", "n desc nulls last")`. Global, whatever the size."""
        if not by:
            raise InvalidArgument("sort() needs at least one column or expression")
        return self._derived("SELECT * FROM", f"ORDER BY {', '.join(by)}")

    def distinct(self, *on: str) -> DataFrame:
        """One of each row, or one row for each value of `on`."""
        chosen = f"DISTINCT ON ({', '.join(on)}) *" if on else "DISTINCT *"
        return self._derived(f"SELECT {chosen} FROM")

    def sample(self, fraction: float, *, seed: int = 0) -> DataFrame:
        """About this share of the rows, each by the hash of its values and the seed: the same ones each time."""
        if not 0 <= fraction <= 1:
            raise InvalidArgument(f"sample() takes a fraction from 0 to 1, not {fraction}")
        listed = ", ".join(map(quoted, self.columns))
        return self._derived("SELECT * FROM", f"WHERE hash({listed}, {seed}) < {int(fraction * 2**64)}::UHUGEINT")

    def join(self, other: DataFrame, on: str | Sequence[str] | None = None, how: JoinHow = "inner") -> DataFrame:
        """Rows of both where they match. `on`: names that both have, or one SQL condition over `left` and `right`."""
        kinds = {"inner", "left", "right", "full", "semi", "anti", "cross"}
        if how not in kinds:
            raise InvalidArgument(f"how is one of {', '.join(sorted(kinds))}, not {how!r}")
        if (how == "cross") != (on is None):
            raise InvalidArgument("join() needs `on`, and a cross join has none")
        clause = ""
        if isinstance(on, str):
            is_name = self._named(on) is not None and other._named(on) is not None
            clause = f"USING ({quoted(on)})" if is_name else f"ON ({on})"
        elif on is not None:
            clause = f"USING ({', '.join(map(quoted, on))})"
        text = f'SELECT * FROM "left" {how.upper()} JOIN "right" {clause}'
        return self.session.sql(text, left=self, right=other)

    def union(self, other: DataFrame, *, by_name: bool = False) -> DataFrame:
        """The rows of both, equal ones as often as they are; columns by position, or by name."""
        return self.session.sql(
            f"SELECT * FROM a UNION ALL {'BY NAME ' if by_name else ''}SELECT * FROM b", a=self, b=other
        )

    def group_by(self, *keys: str) -> Grouped:
        """Groups of equal `keys` (SQL expressions), for `.agg("count(*) AS n", ...)`."""
        from .grouped import Grouped

        return Grouped(self, keys)

    def agg(self, *aggregates: str) -> DataFrame:
        """One row of SQL aggregates over all rows: `agg("count(*) AS n", "sum(x) AS total")`."""
        return self.group_by().agg(*aggregates)

    # ---- rows by Python, and partitions

    def map(
        self,
        sql_or_function: str | Callable[[dict[str, Any]], Any],
        *,
        schema: Schema | None = None,
        udfs: Sequence[Udf] = (),
        **step: Any,
    ) -> DataFrame:
        """SQL expressions for each row ("a + 1 as b"), or a function from a row's dictionary to another's.

        Of a function, `schema` maps the columns it makes to DuckDB types, and `version` stands for its meaning where
        steps that were done before are looked for. `udfs` are functions that the SQL calls.
        """
        if callable(sql_or_function):
            return self._applied("map", sql_or_function, schema=schema, **step)
        self._with_functions(udfs, step)
        return self._derived(f"SELECT {sql_or_function} FROM")

    def flat_map(
        self,
        sql_or_function: str | Callable[[dict[str, Any]], Any],
        *,
        schema: Schema | None = None,
        udfs: Sequence[Udf] = (),
        **step: Any,
    ) -> DataFrame:
        """Any number of rows for each: SQL with unnest(), or a function that gives a list of dictionaries."""
        if callable(sql_or_function):
            return self._applied("flat_map", sql_or_function, schema=schema, **step)
        self._with_functions(udfs, step)
        return self._derived(f"SELECT {sql_or_function} FROM")

    def map_batches(
        self,
        function: Callable[[pa.Table], Any],
        *,
        batch_size: int = 122_880,
        schema: Schema | None = None,
        **step: Any,
    ) -> DataFrame:
        """A function from an Arrow table of at most `batch_size` rows to another table."""
        return self._applied("map_batches", function, schema=schema, batch_rows=batch_size, **step)

    def repartition(
        self,
        npartitions: int,
        hash_by: str | Sequence[str] | None = None,
        by: str | None = None,
        by_rows: bool = False,
    ) -> DataFrame:
        """The rows in so many partitions: by whole files, `by_rows` evenly, by the hash of columns, or `by` the value
        of an integer column; both may be SQL expressions. What works on a partition at a time (`partial_sql`,
        functions) keeps the partitions. If they are by columns, and written to a directory of Parquet right after,
        later readers are told: a join or a group on these columns then moves no rows (docs/formats.md)."""
        from .plan.frames import Repartition

        if npartitions < 1:
            raise InvalidArgument(f"repartition() takes at least 1 partition, not {npartitions}")
        if sum((hash_by is not None, by is not None, by_rows)) > 1:
            raise InvalidArgument("repartition() takes one of hash_by, by and by_rows")
        if hash_by is not None:
            keys = (hash_by,) if isinstance(hash_by, str) else tuple(hash_by)
            return DataFrame(self.session, Repartition(self.frame, npartitions, "hash", keys))
        if by is not None:
            return DataFrame(self.session, Repartition(self.frame, npartitions, "value", (by,)))
        return DataFrame(self.session, Repartition(self.frame, npartitions, "rows" if by_rows else "files"))

    def random_shuffle(self, *, partitions: int | None = None, seed: int = 0) -> DataFrame:
        """All rows in an order that the seed decides, in as many partitions as they were, or in 8 if that is not known.
        Seeds count modulo 2**64."""
        from .plan.frames import Shuffle

        if partitions is not None and partitions < 1:
            raise InvalidArgument(f"random_shuffle() takes at least 1 partition, not {partitions}")
        return DataFrame(self.session, Shuffle(self.frame, partitions, seed % 2**64))

    def partial_sort(self, by: str | Sequence[str]) -> DataFrame:
        """The rows of each partition in order."""
        keys = (by,) if isinstance(by, str) else tuple(by)
        return self.session.partial_sql(f"SELECT * FROM {{0}} ORDER BY {', '.join(keys)}", self)

    def partial_sql(self, query: str, *others: DataFrame, udfs: Sequence[Udf] = ()) -> DataFrame:
        """A query over one partition at a time; `{0}` is this frame, `{1}` the next."""
        return self.session.partial_sql(query, self, *others, udfs=udfs)

    # ---- doing it

    def compute(self) -> DataFrame:
        """Makes the rows now, by a job, and keeps them as long as the frame is used, until the session ends; gives back
        the frame. What is derived from it from then on reads these rows."""
        self.session.jobs.compute(self.frame)
        return self

    def is_computed(self) -> bool:
        """Whether the rows are here already."""
        return self.session.jobs.is_computed(self.frame)

    def recompute(self) -> DataFrame:
        """Makes the rows anew."""
        self.session.jobs.forget(self.frame)
        return self.compute()

    def count(self) -> int:
        """Number of rows."""
        if (made := self.session.computed(self.frame)) is not None:
            return sum(output.rows for output in made.outputs)
        counting = self.query.wrapped("SELECT count(*) AS n FROM")
        rows = list(DataFrame(self.session, counting).iter_rows())
        return int(rows[0]["n"])

    def take(self, limit: int) -> list[dict[str, Any]]:
        """At most the first `limit` rows as dictionaries."""
        return self.limit(limit).take_all()

    def take_all(self) -> list[dict[str, Any]]:
        """All rows as dictionaries."""
        return list(self.iter_rows())

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The rows one by one, as dictionaries; only a batch of them is in memory."""
        reader = self.to_batches()
        # After the rows: of a function without a schema they are what says the columns.
        wide = wide_columns(self.schema)
        for batch in reader:
            for row in batch.to_pylist():
                for name in wide:
                    row[name] = None if row[name] is None else int(row[name])
                yield row

    async def stream(self, batch_rows: int = BATCH_ROWS) -> AsyncIterator[pa.RecordBatch]:
        """The batches of the rows, each waited for in a thread."""
        import asyncio

        reader = await asyncio.to_thread(self.to_batches, batch_rows)
        while (batch := await asyncio.to_thread(next, reader, None)) is not None:
            yield batch

    def to_batches(self, batch_rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """A reader of record batches of at most about `batch_rows` rows, filled as it is read. 128-bit integers
        come as decimal128(38, 0)."""
        return self.batches_of(self.query, batch_rows, exported=True)

    def to_arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        try:
            return self.to_batches().read_all()
        except ExchangeCorrupt:
            # Made again already; but a stream cannot take back the rows that it gave before it met the damage.
            return self.to_batches().read_all()

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a pandas frame. 128-bit integers, which sums are, become int64, or float64 if they do not fit."""
        table = self.to_arrow()
        for name in wide_columns(self.schema):
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

    def write_parquet_lazy(self, url: str, *, mode: Mode = "error", compression: str = "zstd") -> LazyWrite:
        """As `write_parquet`, when `compute` or `Session.wait` asks for it."""
        return LazyWrite(self, url, WriteOptions(format="parquet", mode=mode, compression=compression))

    def write_csv(self, url: str, *, mode: Mode = "error", progress: bool | None = None) -> WriteReport:
        """Writes CSV with a header, as `write_parquet` does: one file if `url` ends in `.csv` (or that and `.gz`,
        `.zst`)."""
        return write(self, url, WriteOptions(format="csv", mode=mode, progress=progress))

    def write_json(self, url: str, *, mode: Mode = "error", progress: bool | None = None) -> WriteReport:
        """Writes JSON lines, as `write_parquet` does: one file if `url` ends in `.json` or `.jsonl` (or those and
        `.gz`, `.zst`)."""
        return write(self, url, WriteOptions(format="json", mode=mode, progress=progress))

    def explain(self) -> str:
        """How the rows would be made: the stages of a job, or DuckDB's physical plan."""
        if self.session.needs_job(self.frame):
            from .plan.explain import explained

            program = self.session.jobs.planner(self.frame).program(self.frame)
            return explained(program, threads=self.session.jobs.threads_of(self.frame))
        with self.session.running(self.query) as cursor:
            rows = cursor.execute(f"EXPLAIN {self.query.text}", self.query.params).fetchall()
        return "in this process, by one DuckDB:\n" + "\n".join(str(row[-1]) for row in rows)

    def batches_of(self, query: Query, batch_rows: int = BATCH_ROWS, *, exported: bool = False) -> pa.RecordBatchReader:
        """A reader of the batches of `query`, a form of this frame's, run in its session; `exported`: with 128-bit
        integers as decimals."""
        stream = self._mended(query, batch_rows, exported)
        schema = next(stream)
        assert isinstance(schema, pa.Schema)
        return pa.RecordBatchReader.from_batches(schema, stream)

    def __repr__(self) -> str:
        shown = self.frame.text if isinstance(self.frame, Query) else type(self.frame).__name__
        return f"<DataFrame of {shown!r}>"

    def _repr_html_(self) -> str:
        rows = self.take(_PREVIEW_ROWS + 1)
        head = "".join(
            f"<th>{html.escape(name)}<br><small>{html.escape(type_)}</small></th>"
            for name, type_ in self.schema.items()
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows[:_PREVIEW_ROWS]
        )
        more = "<p>more rows follow</p>" if len(rows) > _PREVIEW_ROWS else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _derived(self, before: str, after: str = "") -> DataFrame:
        return DataFrame(self.session, self.query.wrapped(before, after))

    def _applied(self, kind: Any, function: Any, *, schema: Schema | None = None, **step: Any) -> DataFrame:
        from .functions import shipping
        from .functions.steps import PythonStep
        from .plan.frames import Apply

        # Said now, and with the name of what is at fault, rather than when a task is sent.
        shipping.dumps(function)
        return DataFrame(
            self.session, Apply(self.frame, PythonStep(kind=kind, function=function, schema=schema, **step))
        )

    def _with_functions(self, udfs: Sequence[Udf], step: Mapping[str, Any]) -> None:
        if step:
            raise InvalidArgument(f"{', '.join(step)} is of Python functions; this is SQL")
        for udf in udfs:
            self.session.create_function(udf)

    def _mended(self, query: Query, batch_rows: int, exported: bool) -> Iterator[Any]:
        """The Arrow schema, then the batches. Rows of a job that turn out to be damaged are made again, once, unless
        some were given out already."""
        has_schema = has_rows = False
        for is_last in (False, True):
            rows = self.session.jobs.rows_of(query) if self.session.needs_job(query) else query
            try:
                stream = self._stream(rows, batch_rows, exported)
                schema = next(stream)
                if not has_schema:
                    has_schema = True
                    yield schema
                for batch in stream:
                    has_rows = True
                    yield batch
                return
            except ExchangeCorrupt as error:
                if not self.session.jobs.mend(error, rows) or has_rows or is_last:
                    raise

    def _stream(self, query: Query, batch_rows: int, exported: bool) -> Iterator[Any]:
        """The Arrow schema, then the batches. Keeps the cursor open while they are drawn."""
        copies = self.session.copies
        with copies.lent(query.text) as loan, self.session.running(query) as cursor, loan.told():
            export = (lambda columns: exportable(query, dict(columns)).text) if exported else None
            # While this is drawn from, other queries are bound in this thread, which have no part in the loan.
            with copies.binding(loan):
                reader = arrow_reader(cursor, query.text, query.params, batch_rows, exported=export)
            yield reader.schema
            yield from reader
