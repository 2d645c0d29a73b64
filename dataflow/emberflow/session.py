"""A session: what frames are made by, and where they run.

A query over what fits this machine's memory runs in one DuckDB inside this process, whole. Anything else, Python
functions, partitions, more data than memory, or `shuffle="always"`, runs as a job: stages of tasks on an executor, with
exchange files between them.

Any number of threads may use one session. Nothing is read before a `DataFrame` is asked for rows.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args

import duckdb
import pyarrow as pa

from .copies import Copies
from .dataframe import DataFrame, LazyWrite
from .engine import Engine, EngineConfig
from .errors import ExchangeCorrupt, InvalidArgument
from .plan.scantext import small
from .quantities import bytes_of
from .query import Query, literal, of_table, parse, quoted
from .sources import StorageOptions, expand_directories

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from .exchange import ExchangeReader
    from .functions.udf import Udf
    from .jobs import Jobs
    from .plan.frames import Computed, Frame

Table: TypeAlias = Union[DataFrame, pa.Table, pa.RecordBatchReader, "pd.DataFrame"]
"""What `Session.sql` takes as a named table."""

ExecutorName = Literal["auto", "inline", "local", "ray"]
Shuffle = Literal["auto", "always"]

_COPIES_SHARE = 16
"""Copies of files may hold one part in so many of the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Limits and places of a session. `None` leaves the choice to it."""

    threads: int | None = None
    """Threads that run queries; by default one per core for a query in this process, one for a task of a job."""
    memory_limit: str | None = None
    """Memory for queries before they spill, with its unit: "4GB", "512MiB"; for a job, of all its workers together.
    By default 80 % of the machine's."""
    copies_bytes: int | None = None
    """What of that memory may hold copies of a store's files that queries in this process read again and again; by
    default a sixteenth. 0: there are none."""
    temp_directory: str | None = None
    """Local directory in which the session makes its own, for what queries spill and jobs keep; that one goes when the
    session is closed. By default the system's."""
    storage_options: StorageOptions = field(default_factory=dict)
    """Per protocol, what fsspec is given to open a filesystem: {"s3": {"endpoint_url": "..."}}."""
    executor: ExecutorName = "auto"
    """What runs jobs: "inline" threads of this process, "local" worker processes, "ray"; "auto": inline for little
    data, else local."""
    workers: int | None = None
    """Worker processes of a local executor; by default as many as tasks fit the machine's cores."""
    ray_address: str | None = None
    """A Ray cluster to join; by default Ray is started here."""
    data_root: str | None = None
    """Directory, on any filesystem that all workers reach, for what jobs keep between stages: a job that is cut short
    goes on from there, and steps done once are not done again: those whose inputs and functions are known to be the
    same, and with a `job_id` all others too. `emberflow.job.sweep` takes away what is old. By default a temporary one,
    removed when the session is closed."""
    shuffle: Shuffle = "auto"
    """"always": every query is a job with exchanges, whatever its size."""
    partitions: int | None = None
    """Partitions of every exchange, and at most so many tasks that read one: neighbours of a few MiB in sum share a
    task, unless it runs Python functions. By default as many as the bytes ask for."""
    broadcast_bytes: int = 32 << 20
    """A join's side of at most so much is given to every task whole."""
    partition_bytes: int = 128 << 20
    """What a partition of an exchange, or a task's share of files, should hold."""
    timeout_s: float | None = None
    """A job is cancelled when it has run so long."""
    job_id: str | None = None
    """Names one run: the jobs of this session, by the order in which they begin. A session with the same name and
    `data_root` that asks for the same goes on with their work: random() gives the same numbers, and now() the moment at
    which the first job of that name began. So a program that runs each night gives each night another name."""

    def __post_init__(self) -> None:
        for name in ("threads", "workers", "partitions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} is at least 1, not {value}")
        if self.copies_bytes is not None and self.copies_bytes < 0:
            raise InvalidArgument(f"copies_bytes is at least 0, not {self.copies_bytes}")
        for name, choices in (("executor", get_args(ExecutorName)), ("shuffle", get_args(Shuffle))):
            if getattr(self, name) not in choices:
                raise InvalidArgument(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")


def init(**settings: Any) -> Session:
    """A new session; `SessionConfig` describes the settings. Close it, or use it in a `with` block."""
    known = SessionConfig.__dataclass_fields__
    if unknown := sorted(settings.keys() - known.keys()):
        raise InvalidArgument(f"init() has no setting {', '.join(unknown)}; there are {', '.join(known)}")
    if settings.get("storage_options") is None:
        settings.pop("storage_options", None)
    return Session(SessionConfig(**settings))


class Session:
    """Makes `DataFrame`s from SQL, files and tables in memory, and runs them."""

    def __init__(self, config: SessionConfig | None = None) -> None:
        self.config = config or SessionConfig()
        self._directory: _Directory | None = _Directory(self.config.temp_directory)
        self.spill = self._directory.path
        self.copies = Copies(self.spill, self._copies_bytes)
        self.engine = Engine(
            EngineConfig(
                threads=self.config.threads,
                memory_limit=self._query_memory(),
                temp_directory=self.spill,
                storage_options=self.config.storage_options,
            ),
            self.copies,
        )
        self.udfs: tuple[Udf, ...] = ()
        self._views: dict[str, Query] = {}
        self._lock = threading.Lock()
        self._jobs: Jobs | None = None

    @property
    def jobs(self) -> Jobs:
        """What runs this session's jobs. Made when first needed: it costs imports that a small query does without."""
        with self._lock:
            if self._jobs is None:
                from .jobs import Jobs

                self._jobs = Jobs(self)
            return self._jobs

    def sql(
        self,
        query: str,
        /,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        deterministic: bool = False,
        **tables: Table,
    ) -> DataFrame:
        """The lazy result of one query over whole datasets: `select ... from 'ember://store/*.parquet'`.

        `params` fill the placeholders `?` (a list) or `$name` (a mapping). Each of `tables` is a name the query
        may use: a `DataFrame`, an Arrow table or reader, or a pandas frame; so are the session's views. Raises
        `QueryError` at once for text that is not one query; names, types and files are checked when rows or the schema
        are asked for. `deterministic` runs one thread a task: float sums and ties come out the same each time.
        """
        named = {name: self._query_of(table) for name, table in tables.items()}
        words = _words(query)
        views = {name: view for name, view in self._views.items() if name.lower() in words}
        parsed = parse(query, params, {**views, **named})
        return DataFrame(self, replace(parsed, deterministic=True) if deterministic else parsed)

    def view(self, name: str, table: Table) -> DataFrame:
        """Gives rows a name that every later `sql` of this session may use. Naming it again replaces it."""
        self._views[name] = self._query_of(table)
        return DataFrame(self, self._views[name])

    def create_function(self, udf: Udf) -> None:
        """Makes a Python function usable in SQL by its name; see `emberflow.udf`."""
        self.udfs = (*(known for known in self.udfs if known.name != udf.name), udf)
        self.engine.create_functions((udf,))

    def read_parquet(
        self,
        paths: str | Iterable[str],
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
        self, paths: str | Iterable[str], schema: Mapping[str, str] | None = None, *, recursive: bool = True
    ) -> DataFrame:
        """JSON lines or arrays, plain, .gz or .zst. `schema` maps columns to DuckDB types; else inferred."""
        options = {"columns": _struct(schema)} if schema else {}
        return self._read("read_json", paths, suffix="json*", recursive=recursive, options=options)

    def read_csv(
        self,
        paths: str | Iterable[str],
        schema: Mapping[str, str] | None = None,
        delim: str | None = None,
        *,
        header: bool | None = None,
        recursive: bool = True,
    ) -> DataFrame:
        """CSV files, plain, .gz or .zst. `schema` maps columns to DuckDB types; what is not given is inferred.

        `header`: whether the first line of each file has the columns' names. By default, with a schema: if it has
        those of the schema, which looks at the first file.
        """
        options = {"columns": _struct(schema)} if schema else {}
        if header is None and schema:
            header = self._has_header(paths, schema, delim, recursive=recursive)
        if header is not None:
            options["header"] = str(header).lower()
        if delim is not None:
            options["delim"] = literal(delim)
        return self._read("read_csv", paths, suffix="csv*", recursive=recursive, options=options)

    def read_text(self, paths: str | Iterable[str], *, recursive: bool = True) -> DataFrame:
        """Text files, plain, .gz or .zst: a row for each line, in the one column `line`."""
        options = {
            "columns": "{'line': 'VARCHAR'}",
            "header": "false",
            # A delimiter that text does not have, and no quotes: the line is the field, an empty one too.
            "delim": "'\x01\x02\x03\x04'",
            "force_not_null": "['line']",
            "quote": "''",
            "escape": "''",
            "auto_detect": "false",
            "max_line_size": str(64 << 20),
        }
        return self._read("read_csv", paths, suffix="txt*", recursive=recursive, options=options)

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
        # pyarrow looks at the first row only.
        columns = dict.fromkeys(name for row in rows for name in row)
        return self.from_arrow(pa.table({name: [row.get(name) for row in rows] for name in columns}))

    def partial_sql(self, query: str, *frames: DataFrame, udfs: Sequence[Udf] = (), **tables: DataFrame) -> DataFrame:
        """A query over one partition of its inputs at a time: `{0}`, `{1}` are the frames, or names are `tables`.

        Partitions are those of `DataFrame.repartition` and `random_shuffle`. Functions, `partial_sql`, filters and
        selects keep them, and so do `compute`, groups by their keys, and a join with a frame of one. Of several frames
        the partitions with the same number meet; each has as many, or one, which all the others see whole. A frame that
        has none is taken as tasks are given its rows, alone or beside frames of one partition. Anything else raises
        `InvalidArgument` when the frame is planned. Every other brace in the text stays as it is.
        """
        from .plan.frames import PartialSql, input_name

        inputs = {input_name(i): frame for i, frame in enumerate(frames)}
        for i, name in enumerate(inputs):
            query = query.replace(f"{{{i}}}", name)
        inputs.update(tables)
        for udf in udfs:
            self.create_function(udf)
        if not inputs:
            return self.sql(query)
        text = parse(query, None, {}).text
        return DataFrame(self, PartialSql(text, {name: frame.frame for name, frame in inputs.items()}))

    def wait(self, *frames: DataFrame | LazyWrite) -> None:
        """Computes the frames, and writes what waits to be written, one after the other."""
        for frame in frames:
            frame.compute()

    def close(self) -> None:
        """Cancels the jobs that run and ends the session, its workers and its temporary files; frames made from it can
        no longer run. A reader that was begun may be read to its end; what files it needs stay till then. From any
        thread; closing twice is allowed."""
        if self._jobs is not None:
            self._jobs.close()
        self.engine.close()
        self.copies.close()
        self._directory = None

    shutdown = close

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def needs_job(self, frame: Frame, *, to_files: bool = False) -> bool:
        """Whether a job makes the frame's rows, or the files of them; else one DuckDB in this process does."""
        if isinstance(frame, Query) and self._may_run_here(frame):
            plain = all(isinstance(source, pa.Table) for source in frame.tables.values())
            # Of a few small local files nobody need think, nor import what does.
            if plain and small(frame.text):
                return False
        return self.jobs.is_needed(frame, to_files=to_files)

    def computed(self, frame: Frame) -> Computed | None:
        """The frame's rows, if a job has made them and keeps them."""
        return None if self._jobs is None else self._jobs.computed(frame)

    def _copies_bytes(self) -> int:
        if self.config.copies_bytes is not None:
            return self.config.copies_bytes
        if self.config.memory_limit is not None:
            return (_bytes_of(self.config.memory_limit) or 0) // _COPIES_SHARE
        return self.jobs.memory_bytes // _COPIES_SHARE

    def _query_memory(self) -> str | None:
        """What copies leave of the limit; what DuckDB takes by default leaves more than them."""
        limit = self.config.memory_limit
        if limit is None or (limit_bytes := _bytes_of(limit)) is None:
            return limit
        rest = limit_bytes - self._copies_bytes()
        if rest <= 0:
            raise InvalidArgument(f"copies_bytes leaves nothing of memory_limit={self.config.memory_limit!r}")
        return f"{rest}B"

    def _may_run_here(self, query: Query) -> bool:
        return self.config.shuffle == "auto" and self.config.executor != "ray" and not query.deterministic

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

    def _has_header(
        self, paths: str | Iterable[str], schema: Mapping[str, str], delim: str | None, *, recursive: bool
    ) -> bool:
        """Whether the first line of the first file that matches has the schema's names."""
        options = {"header": "false", "all_varchar": "true"} | ({"delim": literal(delim)} if delim is not None else {})
        for path in [paths] if isinstance(paths, str) else list(paths):
            first = self._read("read_csv", path, suffix="csv*", recursive=recursive, options=options).take(1)
            if first:
                return [str(value).strip().lower() for value in first[0].values()] == [name.lower() for name in schema]
        return False

    def _query_of(self, table: Table) -> Query:
        if isinstance(table, DataFrame):
            return table.query
        if isinstance(table, (pa.Table, pa.RecordBatchReader)):
            return self.from_arrow(table).query
        return self.from_pandas(table).query

    @contextmanager
    def running(self, query: Query) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that can run `query` here: its filesystems and tables are registered, DuckDB's errors become ours.
        Rows of frames that only a job can make are made first. Raises `ExchangeCorrupt` for rows that were made and
        are damaged."""
        readers: list[ExchangeReader] = []
        with nullcontext(self._directory), self.engine.running(query.text, query.params.values()) as cursor:
            for name, table in query.tables.items():
                if isinstance(table, pa.Table):
                    cursor.register(name, table)
                elif (reader := self.jobs.register(cursor, name, table)) is not None:
                    readers.append(reader)
            try:
                yield cursor
            except Exception as error:
                # DuckDB makes text of what a reader below it raises.
                damage = [reader.failure for reader in readers if isinstance(reader.failure, ExchangeCorrupt)]
                if damage:
                    raise damage[0] from error
                raise


def _bytes_of(limit: str) -> int | None:
    """None for what DuckDB is to refuse, or understands by itself."""
    try:
        return bytes_of(limit)
    except InvalidArgument:
        return None


def _words(query: str) -> set[str]:
    """Whatever in a query may be a name, in lower case. Some keywords may."""
    source = query.encode()
    kinds = (duckdb.token_type.identifier, duckdb.token_type.keyword)
    words = set()
    for (start, kind), (end, _) in itertools.pairwise([*duckdb.tokenize(query), (len(source), None)]):
        if kind in kinds:
            word = source[start:end].decode().strip()
            words.add(word.removeprefix('"').removesuffix('"').replace('""', '"').lower())
    return words


class _Directory:
    """A local directory in `parent`, or the system's own, that goes when nothing refers to this any more: neither the
    session, which has been closed, nor a query that is still drawn from."""

    def __init__(self, parent: str | None) -> None:
        try:
            if parent is not None:
                os.makedirs(parent, exist_ok=True)
            self.path = tempfile.mkdtemp(prefix="emberflow-", dir=parent)
        except OSError as error:
            raise InvalidArgument(f"the session has no place for temporary files: {error}") from error
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _struct(schema: Mapping[str, str]) -> str:
    """A schema as the struct literal that DuckDB's readers take for `columns`."""
    return "{" + ", ".join(f"{literal(name)}: {literal(type_)}" for name, type_ in schema.items()) + "}"
