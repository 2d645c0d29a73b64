"""A session: one DuckDB inside this process, the filesystems it may reach, and its limits.

Any number of threads may use one session: every call works on a cursor of its own. Nothing is read before a
`DataFrame` is asked for rows. The time zone is UTC, whatever the machine says.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import duckdb
import pyarrow as pa

from .dataframe import DataFrame
from .engine import Engine, EngineConfig
from .errors import InvalidArgument
from .query import Query, literal, of_table, parse, quoted
from .sources import StorageOptions, expand_directories

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

Table: TypeAlias = Union[DataFrame, pa.Table, pa.RecordBatchReader, "pd.DataFrame"]
"""What `Session.sql` takes as a named table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Limits and places of a session. `None` leaves the choice to DuckDB."""

    threads: int | None = None
    """Threads that run queries; by default one per core."""
    memory_limit: str | None = None
    """Memory for queries before they spill, with its unit: "4GB", "512MiB". By default 80 % of the machine's."""
    temp_directory: str | None = None
    """Local directory that queries spill to. By default one under the system's, removed with the session."""
    storage_options: StorageOptions = field(default_factory=dict)
    """Per protocol, what fsspec is given to open a filesystem: {"s3": {"endpoint_url": "..."}}."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InvalidArgument(f"threads is at least 1, not {self.threads}")


def init(
    *,
    threads: int | None = None,
    memory_limit: str | None = None,
    temp_directory: str | None = None,
    storage_options: StorageOptions | None = None,
) -> Session:
    """A new session; `SessionConfig` describes the settings. Close it, or use it in a `with` block."""
    return Session(
        SessionConfig(
            threads=threads,
            memory_limit=memory_limit,
            temp_directory=temp_directory,
            storage_options=storage_options or {},
        )
    )


class Session:
    """Makes `DataFrame`s from SQL, files and tables in memory, and runs them."""

    def __init__(self, config: SessionConfig | None = None) -> None:
        self.config = config or SessionConfig()
        spill = self.config.temp_directory
        if spill is None:
            spill = tempfile.mkdtemp(prefix="emberflow-")
            weakref.finalize(self, shutil.rmtree, spill, ignore_errors=True)
        self.engine = Engine(
            EngineConfig(
                threads=self.config.threads,
                memory_limit=self.config.memory_limit,
                temp_directory=spill,
                storage_options=self.config.storage_options,
            )
        )

    def sql(self, query: str, /, params: Sequence[Any] | Mapping[str, Any] | None = None, **tables: Table) -> DataFrame:
        """The lazy result of one query over whole datasets: `select ... from 'ember://store/*.parquet'`.

        `params` fill the placeholders `?` (a list) or `$name` (a mapping). Each of `tables` is a name the query
        may use: a `DataFrame`, an Arrow table or reader, or a pandas frame. Raises `QueryError` at once for text
        that is not one query; names, types and files are checked when rows or the schema are asked for.
        """
        return DataFrame(self, parse(query, params, {name: self._query_of(table) for name, table in tables.items()}))

    def read_parquet(
        self,
        paths: str | Iterable[str],
        *,
        recursive: bool = True,
        columns: Sequence[str] | None = None,
        union_by_name: bool = False,
    ) -> DataFrame:
        """Parquet files, patterns or directories; of a directory all files below it, or only its own.

        Hive partitions (`column=value/`) become columns. With `union_by_name` files may differ in their columns.
        """
        chosen = ", ".join(quoted(column) for column in columns) if columns else "*"
        options = {"union_by_name": "true"} if union_by_name else {}
        return self._read("read_parquet", paths, suffix="parquet", recursive=recursive, chosen=chosen, options=options)

    def read_json(
        self, paths: str | Iterable[str], *, schema: Mapping[str, str] | None = None, recursive: bool = True
    ) -> DataFrame:
        """JSON lines or arrays, plain, .gz or .zst. `schema` maps columns to DuckDB types; else inferred."""
        options = {"columns": _struct(schema)} if schema else {}
        return self._read("read_json", paths, suffix="json*", recursive=recursive, options=options)

    def read_csv(
        self,
        paths: str | Iterable[str],
        *,
        schema: Mapping[str, str] | None = None,
        delim: str | None = None,
        recursive: bool = True,
    ) -> DataFrame:
        """CSV files, plain, .gz or .zst. `schema` maps columns to DuckDB types; what is not given is inferred."""
        options = {"columns": _struct(schema)} if schema else {}
        if delim is not None:
            options["delim"] = literal(delim)
        return self._read("read_csv", paths, suffix="csv*", recursive=recursive, options=options)

    def from_arrow(self, table: pa.Table | pa.RecordBatchReader) -> DataFrame:
        """An Arrow table; a reader is read to its end."""
        return DataFrame(self, of_table(table.read_all() if isinstance(table, pa.RecordBatchReader) else table))

    def from_pandas(self, frame: pd.DataFrame) -> DataFrame:
        """A pandas frame, without its index."""
        return self.from_arrow(pa.Table.from_pandas(frame, preserve_index=False))

    def from_items(self, items: Sequence[Any]) -> DataFrame:
        """Python values: mappings are rows, anything else is one column named `item`."""
        rows = [item if isinstance(item, Mapping) else {"item": item} for item in items]
        if not rows:
            raise InvalidArgument("from_items() needs at least one item to know the columns")
        return self.from_arrow(pa.Table.from_pylist(rows))

    def close(self) -> None:
        """Ends the session; frames made from it can no longer run. Closing twice is allowed."""
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(
        self,
        function: str,
        paths: str | Iterable[str],
        *,
        suffix: str,
        recursive: bool,
        options: Mapping[str, str],
        chosen: str = "*",
    ) -> DataFrame:
        pattern = f"{'**/' if recursive else ''}*.{suffix}"
        expanded = expand_directories(paths, pattern=pattern, options=self.config.storage_options)
        arguments = ["[" + ", ".join(literal(path) for path in expanded) + "]"]
        arguments += [f"{name} = {value}" for name, value in options.items()]
        return DataFrame(self, Query(text=f"SELECT {chosen} FROM {function}({', '.join(arguments)})"))

    def _query_of(self, table: Table) -> Query:
        if isinstance(table, DataFrame):
            return table.query
        if isinstance(table, (pa.Table, pa.RecordBatchReader)):
            return self.from_arrow(table).query
        return self.from_pandas(table).query

    @contextmanager
    def running(self, query: Query) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that can run `query`: its filesystems and tables are registered. DuckDB's errors become ours."""
        with self.engine.running(query.text, query.params.values()) as cursor:
            for name, table in query.tables.items():
                cursor.register(name, table)
            yield cursor


def _struct(schema: Mapping[str, str]) -> str:
    """A schema as the struct literal that DuckDB's readers take for `columns`."""
    return "{" + ", ".join(f"{literal(name)}: {literal(type_)}" for name, type_ in schema.items()) + "}"
