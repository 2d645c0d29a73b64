"""One DuckDB inside this process, as every session and every worker sets it up.

The time zone is UTC, whatever the machine says; variables of the caller's program are not tables; a cache that trusts
equal modification times is off; filesystems are registered when a query names their protocol; and what DuckDB (or
Arrow, on its behalf) raises becomes one of our errors, or the filesystem's own again.

Any number of threads may use one engine: every query works on a cursor of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from fsspec.registry import known_implementations, registry

from .copies import Copies
from .errors import DatasetNotFound, FlowError, InvalidArgument, OutOfMemory, QueryError, SessionClosed
from .sources import Failures, StorageOptions, UrlFileSystem, protocols_in

if TYPE_CHECKING:
    from .functions.udf import Udf

_FILES_NOT_FOUND = "No files found that match the pattern"


def duckdb_minor() -> str:
    """The version that results are those of, as "2.0"."""
    return ".".join(duckdb.__version__.split(".")[:2])


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits and places of one DuckDB. `None` leaves the choice to it."""

    threads: int | None = None
    """Threads that run queries; by default one per core."""
    memory_limit: str | None = None
    """Memory for queries before they spill, with its unit: "4GB", "512MiB". By default 80 % of the machine's."""
    temp_directory: str
    """Local directory that queries spill to."""
    storage_options: StorageOptions = field(default_factory=dict)
    """Per protocol, what fsspec is given to open a filesystem."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of DuckDB's."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InvalidArgument(f"threads is at least 1, not {self.threads}")


class Engine:
    """A DuckDB connection, its filesystems, and its errors made ours."""

    def __init__(self, config: EngineConfig, copies: Copies | None = None) -> None:
        self.config = config
        self._copies = copies
        self._lock = threading.Lock()
        self._failures = Failures()
        self._filesystems: dict[str, UrlFileSystem] = {}
        """By protocol."""
        self._udfs: dict[str, Udf] = {}
        self._limits: tuple[int, int] | None = None
        self._keeps_order = True
        self._are_narrow = False
        self._closed = False
        self._connection = self._connect()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        settings: dict[str, Any] = {
            **self.config.settings,
            "temp_directory": self.config.temp_directory,
            "python_enable_replacements": False,
            # It trusts equal modification times, so it serves stale bytes after a quick overwrite.
            "enable_external_file_cache": False,
        }
        if self.config.threads is not None:
            settings["threads"] = self.config.threads
        if self.config.memory_limit is not None:
            settings["memory_limit"] = self.config.memory_limit
        try:
            connection = duckdb.connect(config=settings)
            connection.execute("SET GLOBAL TimeZone = 'UTC'")
        except duckdb.Error as error:
            raise InvalidArgument(f"DuckDB refuses the session's settings: {error}") from error
        return connection

    def close(self) -> None:
        """Ends the connection. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._connection.close()

    def create_functions(self, udfs: Sequence[Udf]) -> None:
        """Makes the functions known, in place of earlier ones of their names."""
        with self._lock:
            for udf in udfs:
                if self._udfs.get(udf.name) is not udf:
                    udf.register(self._connection)
                    self._udfs[udf.name] = udf

    def limit(self, *, threads: int, memory_bytes: int) -> None:
        """New limits, for what runs from now on."""
        if (threads, memory_bytes) != self._limits:
            self._connection.execute(f"SET GLOBAL threads = {threads}")
            self._connection.execute(f"SET GLOBAL memory_limit = '{memory_bytes}B'")
            self._limits = threads, memory_bytes

    def keep_order(self, keeps_order: bool) -> None:
        """Whether rows keep the order that nobody asked for, in what runs from now on."""
        if keeps_order != self._keeps_order:
            self._connection.execute(f"SET GLOBAL preserve_insertion_order = {str(keeps_order).lower()}")
            self._keeps_order = keeps_order

    def narrow_decimals(self, are_narrow: bool) -> None:
        """Whether decimals of up to 18 digits leave in the 4 or 8 bytes that they have in DuckDB, or in 16; from now
        on."""
        if are_narrow != self._are_narrow:
            self._connection.execute(f"SET GLOBAL arrow_output_version = '{'1.5' if are_narrow else '1.0'}'")
            self._are_narrow = are_narrow

    def interrupt(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Stops what the cursor runs; from any thread."""
        cursor.interrupt()

    @contextmanager
    def running(self, text: str, values: Iterable[object] = ()) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor for queries like `text`: the filesystems it and `values` name are registered, errors are ours."""
        with self._lock:
            if self._closed:
                raise SessionClosed("the session is closed")
            self._register(protocols_in(text, values))
            cursor = self._connection.cursor()
        try:
            with self.translating(text):
                yield cursor
        finally:
            cursor.close()

    @contextmanager
    def keeping_files(self) -> Iterator[None]:
        """In the block, which is inside of `running`, each file of a store is opened once, and read as it was then. For
        an engine that runs one query at a time."""
        with ExitStack() as stack:
            for filesystem in list(self._filesystems.values()):
                stack.enter_context(filesystem.keeping())
            yield

    @contextmanager
    def translating(self, text: str) -> Iterator[None]:
        """Raises what DuckDB (or Arrow, on its behalf) raises inside as one of our errors, or as the store's own."""
        try:
            yield
        except FlowError:
            raise
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            message = str(error)
            if failure := self._failures.find(message):
                failure.add_note(f"while running: {text}")
                raise failure from None
            if _FILES_NOT_FOUND in message:
                raise DatasetNotFound(message) from error
            if isinstance(error, duckdb.OutOfMemoryException) or message.startswith("Out of Memory Error"):
                raise OutOfMemory(message) from error
            if isinstance(error, (duckdb.Error, pa.ArrowException)) or (type(error) is OSError and error.errno is None):
                raise QueryError(message, text) from error
            raise

    def _register(self, protocols: set[str]) -> None:
        """Gives DuckDB the filesystems of `protocols` it has not got. A protocol unknown to fsspec is left alone:
        most likely it is a string in the data."""
        for protocol in sorted(protocols - self._filesystems.keys()):
            if protocol in registry or protocol in known_implementations:
                options = self.config.storage_options
                filesystem = UrlFileSystem(protocol, options=options, failures=self._failures, copies=self._copies)
                self._connection.register_filesystem(filesystem)
                self._filesystems[protocol] = filesystem


def arrow_reader(
    cursor: Any,
    text: str,
    values: Any,
    batch_rows: int,
    *,
    exported: Callable[[list[tuple[str, str]]], str] | None = None,
) -> pa.RecordBatchReader:
    """Starts a query whose batches are read as they come. `exported` is told each column and its type, and gives the
    text to run in its place.

    DuckDB 2.0 streams only from a relation, which also knows its types: asking DESCRIBE would open all files twice.
    1.4 holds the GIL while it binds a relation, and can hang.
    """
    if hasattr(cursor, "fetch_record_batch"):
        if exported is not None:
            rows = cursor.execute(f"DESCRIBE {text}", values).fetchall()
            text = exported([(str(row[0]), str(row[1])) for row in rows])
        return cursor.execute(text, values).fetch_record_batch(batch_rows)
    try:
        relation = cursor.sql(text, params=values)
    except (duckdb.BinderException, duckdb.CatalogException):
        # A relation does not say where in the text; a statement does.
        cursor.execute(f"EXPLAIN {text}", values)
        raise
    if exported is not None:
        wanted = exported(list(zip(relation.columns, map(str, relation.types), strict=True)))
        if wanted != text:
            relation = cursor.sql(wanted, params=values)
    return relation.to_arrow_reader(batch_rows)
