"""A task: a function from files to files, the same in every executor.

It reads shares of files, exchanges and small tables, runs its segments one after the other, and writes one file under
its attempt's own name; then it *publishes*: a manifest that names the attempt is created where none was. Whoever comes
second, a retry, a copy of a straggler, an attempt that was thought dead, finds the manifest and takes its own file
away. So any number of attempts, at any time, make one output.

Does not know: plans, other tasks, or when it runs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import duckdb
import msgspec
import numpy as np
import pyarrow as pa

from ..engine import Engine, EngineConfig, arrow_reader, duckdb_minor
from ..errors import CallCancelled, FlowError
from ..exchange import (
    SETTINGS,
    ExchangeIndex,
    ExchangeReader,
    ExchangeWriter,
    Source,
    are_narrow,
    hash_columns,
    partition_of,
    restored,
    sent,
)
from ..executor.base import Context
from ..files import FileOutput, FileSink
from ..functions import shipping
from ..functions.steps import PythonStep, apply
from ..functions.udf import Udf
from ..plan.nodes import Column
from ..query import Query, quoted
from ..sources import StorageOptions, open_url
from ..text import written
from .spill import SpillWatch
from .steps import Output, Place

BATCH_ROWS = 122_880
"""Rows that move at once: as many as DuckDB's row group holds."""

_REPORT_ROWS = 1_000_000
_MEMORY_FRACTION = 0.5


@dataclass(frozen=True, slots=True)
class Piece:
    """One producer's output, as a consumer reads it."""

    url: str
    index: ExchangeIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeRows:
    """Partitions of some producers' outputs, read in that order."""

    pieces: tuple[Piece, ...]
    """Those that have rows."""
    attempts: tuple[str, ...]
    """Which have made the outputs, also of those without rows."""
    partitions: tuple[int, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRows:
    """A small table that travels with the task, as an Arrow IPC stream."""

    data: bytes
    columns: tuple[Column, ...]


Rows: TypeAlias = ExchangeRows | TableRows


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSql:
    """A query over named inputs, each with columns c0, c1, ...; `previous` names the rows of the segment before."""

    text: str
    inputs: Mapping[str, Rows] = field(default_factory=dict)
    previous: str | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Inputs whose columns have the user's names."""
    seeded: bool = True
    """It asks for random numbers, or may."""


Run: TypeAlias = RunSql | PythonStep
Stream: TypeAlias = tuple[pa.Schema, Iterator[pa.RecordBatch]]

_EVERYTHING = RunSql(text="SELECT * FROM emberflow_produced", previous="emberflow_produced")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSink:
    """Rows to partitions. `by` says how: "column": the last column is the partition; "hash": by our own hash of the
    columns `keys`; "spread": in turn, from `start` on; "random": by `seed`; "whole": all in the first."""

    by: str
    partitions: int
    start: int = 0
    seed: int = 0
    keys: tuple[int, ...] = ()
    compression: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Everything that an attempt needs to know."""

    name: str
    place: Place
    """Where its step keeps outputs and manifests."""
    index: int
    attempt: str
    runs: tuple[Run, ...]
    sink: ExchangeSink | FileSink
    columns: tuple[Column, ...] | None
    """Of its output, if they are known before it runs."""
    duckdb: str
    """The minor version of the driver's."""
    udfs: tuple[Udf, ...] = ()
    storage_options: StorageOptions = field(default_factory=dict)
    temp_directory: str | None = None
    """Where this machine's workers spill to, if it is there; else under the system's."""
    seed: float = 0.0
    """What random() and uuid() start from, -1 to 1."""
    ordered: bool = False
    """The order of rows within the output matters."""


def run(payload: bytes, context: Context) -> bytes:
    """What executors call: runs a `Task`, publishes its output, and answers with the winner's `Output`.

    Raises FlowError where another DuckDB is installed than the driver has: rows would be of two kinds.
    """
    task = shipping.loads(payload)
    assert isinstance(task, Task)
    if task.duckdb != (here := duckdb_minor()):
        raise FlowError(
            f"the worker {context.worker} has DuckDB {here}, and the driver {task.duckdb}: install the same one"
        )
    attempt = Attempt(task, context)
    return msgspec.msgpack.encode(attempt.run())


class Attempt:
    """One run of a task."""

    def __init__(self, task: Task, context: Context) -> None:
        self.task = task
        self.context = context
        self.interrupted = False
        self.columns: tuple[Column, ...] = task.columns or ()
        self.rows_out = 0
        self._readers: list[ExchangeReader] = []
        self._failure: BaseException | None = None
        """What a function's rows ended with."""
        self._cursors: list[Any] = []
        self._spill = SpillWatch()

    def run(self) -> Output:
        if (winner := self.task.place.winner(self.task.index)) is not None:
            return winner
        started_s, cpu_s = time.monotonic(), time.process_time()
        self.context.on_interrupt(self._interrupt)
        try:
            with self._spill, ExitStack() as stack:
                schema, batches = self._rows(stack)
                output = self._write(schema, self._counted(batches))
        except BaseException as error:
            self._explain(error)
            raise
        finally:
            self.context.on_interrupt(None)
        output.seconds = time.monotonic() - started_s
        output.cpu_s = time.process_time() - cpu_s
        output.worker = self.context.worker
        output.spilled_bytes = self._spill.most_bytes
        output.inputs = sorted({attempt for rows in self._exchange_inputs() for attempt in rows.attempts})
        return self.task.place.publish(self.task.index, output)

    def _exchange_inputs(self) -> Iterator[ExchangeRows]:
        for step in self.task.runs:
            if isinstance(step, RunSql):
                yield from (rows for rows in step.inputs.values() if isinstance(rows, ExchangeRows))

    def _interrupt(self) -> None:
        self.interrupted = True
        for cursor in list(self._cursors):
            with suppress(duckdb.ConnectionException):  # closed meanwhile
                cursor.interrupt()

    def _explain(self, error: BaseException) -> None:
        """Raises what was the matter, where DuckDB only tells what it was told."""
        if self.interrupted:
            raise CallCancelled(f"{self.task.name} was cancelled") from None
        failures = [*(reader.failure for reader in self._readers), self._failure]
        cause = next((failure for failure in failures if failure is not None), error)
        if isinstance(cause, AssertionError):
            # The user's functions raise `UserCodeError`, whatever was raised in them.
            raise FlowError(
                f"a bug in emberflow, not in your query: an assertion failed in {self.task.name}"
                + (f": {cause}" if str(cause) else "")
                + "\nPlease report it with the lines that follow."
            ) from cause
        if cause is not error:
            raise cause from cause.__cause__

    # ---- rows through the segments

    def _rows(self, stack: ExitStack) -> Stream:
        previous: Stream | None = None
        for position, step in enumerate(self.task.runs):
            is_last = position == len(self.task.runs) - 1
            if isinstance(step, RunSql):
                previous = self._sql(step, previous, stack, is_last=is_last)
                continue
            assert previous is not None
            schema, batches = apply(step, previous[1], previous[0], interrupted=lambda: self.interrupted)
            previous = schema, self._noted(batches)
            if is_last:
                # DuckDB says what the types are, and gives them the form in which they travel or are written.
                previous = self._sql(_EVERYTHING, previous, stack, is_last=True)
        assert previous is not None
        return previous

    def _noted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """A function's rows. DuckDB, which draws them, makes text of an error in them; the first one is kept, the
        function's SystemExit too."""
        try:
            yield from batches
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._failure = self._failure or error
            raise

    def _sql(self, step: RunSql, previous: Stream | None, stack: ExitStack, *, is_last: bool) -> Stream:
        to_files = is_last and isinstance(self.task.sink, FileSink)
        engine = engine_of(self.context, self.task, lossless=not to_files)
        engine.limit(
            threads=self.context.cpus, memory_bytes=max(64 << 20, int(self.context.memory_bytes * _MEMORY_FRACTION))
        )
        self._spill.add(engine.config.temp_directory)
        engine.keep_order(self.task.ordered or self.context.cpus == 1)
        engine.create_functions(self.task.udfs)
        cursor = stack.enter_context(engine.running(step.text))
        stack.enter_context(engine.keeping_files())
        self._cursors.append(cursor)
        if step.seeded:
            cursor.execute("SELECT setseed(?)", [self.task.seed]).fetchall()
        for name, rows in step.inputs.items():
            self._register(cursor, name, rows, step.names.get(name))
        if step.previous is not None:
            assert previous is not None
            reader = pa.RecordBatchReader.from_batches(*previous)
            own = tuple(reader.schema.names) if step is _EVERYTHING else step.names.get(step.previous)
            self._view(cursor, step.previous, reader, None, own)
        if self.interrupted:
            raise CallCancelled(f"{self.task.name} was cancelled")
        # Files' queries have their columns in the form in which they travel already, but for what a function has made.
        is_sent = is_last and (not to_files or step is _EVERYTHING)
        exported = (lambda found: self._sent(step.text, found, cursor, engine)) if is_sent else None
        engine.narrow_decimals(False)
        reader = arrow_reader(cursor, step.text, None, BATCH_ROWS, exported=exported)
        return reader.schema, _translated(engine, reader, step.text)

    def _sent(self, text: str, described: list[tuple[str, str]], cursor: Any, engine: Engine) -> str:
        """The query, whose columns are `described` with their types, with them in the form in which they travel."""
        if isinstance(self.task.sink, FileSink):
            return written(Query(text=text), dict(described), self.task.sink.format).text
        found = tuple(Column(name, type_) for name, type_ in described)
        names = [f"c{i}" for i in range(len(found))]
        partition = [names.pop()] if self.task.sink.by == "column" else []
        columns = found[: len(names)]
        self.columns = self.task.columns or columns
        exprs = sent(columns, names, cursor)
        engine.narrow_decimals(are_narrow(columns))
        if exprs == [quoted(name) for name in names] and [c.name for c in columns] == names:
            return text
        listed = ", ".join([*(f"{expr} AS {name}" for expr, name in zip(exprs, names, strict=True)), *partition])
        return f"SELECT {listed} FROM ({text}\n) AS emberflow_sent({', '.join([*names, *partition])})"

    def _register(self, cursor: Any, name: str, rows: Rows, names: tuple[str, ...] | None) -> None:
        if isinstance(rows, TableRows):
            with pa.ipc.open_stream(rows.data) as stream:
                table = stream.read_all()
            self._view(cursor, name, table, rows.columns, names)
            return
        if not rows.pieces:
            cursor.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {nothing(rows.columns, names)}")
            return
        sources = []
        for piece in rows.pieces:
            filesystem, path = open_url(piece.url, self.task.storage_options)
            sources.append(Source(filesystem, path, piece.index))
        reader = ExchangeReader(sources, rows.partitions)
        self._readers.append(reader)
        self._view(cursor, name, reader, rows.columns, names)

    def _view(
        self, cursor: Any, name: str, rows: Any, columns: tuple[Column, ...] | None, names: tuple[str, ...] | None
    ) -> None:
        """`name` as a view of `rows` with DuckDB's own types; columns are c0, c1, ... or have the user's `names`."""
        own = rows.schema.names
        exprs = restored(columns, rows.schema, cursor) if columns else [quoted(n) for n in own]
        given = names or tuple(f"c{i}" for i in range(len(exprs)))
        if list(given) == own and exprs == [quoted(n) for n in own]:
            cursor.register(name, rows)
            return
        cursor.register(f"{name}_arrow", rows)
        listed = ", ".join(f"{expr} AS {quoted(name)}" for expr, name in zip(exprs, given, strict=True))
        cursor.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {listed} FROM {name}_arrow")

    def _counted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        reported = 0
        for batch in batches:
            if self.interrupted:
                raise CallCancelled(f"{self.task.name} was cancelled")
            self._spill.look()
            self.rows_out += batch.num_rows
            if self.rows_out - reported >= _REPORT_ROWS:
                reported = self.rows_out
                self.context.report(msgspec.msgpack.encode(reported))
            yield batch

    # ---- output

    def _write(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Output:
        task = self.task
        if isinstance(task.sink, FileSink):
            files: list[FileOutput] = task.sink.write(
                batches,
                schema,
                stem=f"{task.index:05d}-{task.attempt}",
                options=task.storage_options,
                use_threads=self.context.cpus > 1,
            )
            size = sum(file.size_bytes for file in files)
            return Output(attempt=task.attempt, rows=self.rows_out, size_bytes=size, files=files)
        url = task.place.data_url(task.index, task.attempt)
        filesystem, path = open_url(url, task.storage_options)
        try:
            with filesystem.open(path, "wb") as file:
                index = self._scatter(file, schema, batches, task.sink)
        except BaseException:
            remove_quietly(filesystem, path)
            raise
        return Output(
            attempt=task.attempt,
            url=url,
            rows=self.rows_out,
            size_bytes=index.size_bytes,
            index=msgspec.msgpack.encode(index),
        )

    def _scatter(
        self, file: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch], sink: ExchangeSink
    ) -> ExchangeIndex:
        has_partition = sink.by == "column"
        kept = pa.schema(list(schema)[:-1]) if has_partition else schema
        compression: Any = sink.compression
        writer = ExchangeWriter(
            file, schema=kept, columns=self.columns, num_partitions=sink.partitions, compression=compression
        )
        partitions_of = self._partitions_of(sink)
        for batch in batches:
            where = batch.column(batch.num_columns - 1) if has_partition else partitions_of(batch)
            rows = batch.select(range(batch.num_columns - 1)) if has_partition else batch
            writer.write(rows, where)
        return writer.close()

    def _partitions_of(self, sink: ExchangeSink) -> Callable[[pa.RecordBatch], np.ndarray[Any, Any] | None]:
        if sink.by == "hash":
            return lambda batch: partition_of(hash_columns([batch.column(key) for key in sink.keys]), sink.partitions)
        if sink.by == "random":
            generator = np.random.Generator(np.random.PCG64([sink.seed, self.task.index]))
            return lambda batch: generator.integers(0, sink.partitions, batch.num_rows, dtype=np.uint32)
        if sink.by == "spread":
            position = sink.start

            def spread(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
                nonlocal position
                where = (np.arange(position, position + batch.num_rows) % sink.partitions).astype(np.uint32)
                position += batch.num_rows
                return where

            return spread
        return lambda batch: None


def nothing(columns: Sequence[Column], names: Sequence[str] | None = None) -> str:
    """A SELECT of no rows, with these columns as c0, c1, ... or under the user's names."""
    given = names or [f"c{i}" for i in range(len(columns))]
    listed = (f"CAST(NULL AS {c.type}) AS {quoted(name)}" for c, name in zip(columns, given, strict=True))
    return f"SELECT {', '.join(listed)} WHERE false"


def remove_quietly(filesystem: Any, path: str) -> None:
    """Removes a file that may not be there; what cannot be removed is left to the sweep."""
    try:
        filesystem.rm_file(path)
    except (OSError, FlowError):
        pass


def engine_of(context: Context, task: Task, *, lossless: bool) -> Engine:
    """The worker's DuckDB, made once for each set of storage options: one that gives rows to exchanges, with types
    that Arrow has only by extensions, and one that gives them to files."""
    options = task.storage_options
    named = sorted((name, sorted(map(str, value.items()))) for name, value in options.items())
    key = f"engine {lossless} {named}"
    engine = context.state.get(key)
    if engine is None:
        parent = task.temp_directory if task.temp_directory and os.path.isdir(task.temp_directory) else None
        spill = tempfile.mkdtemp(prefix=f"emberflow-{os.getpid()}-", dir=parent)
        config = EngineConfig(
            threads=context.cpus,
            temp_directory=spill,
            storage_options=options,
            settings=SETTINGS if lossless else {},
        )
        engine = context.state[key] = Engine(config)
    assert isinstance(engine, Engine)
    return engine


def _translated(engine: Engine, reader: pa.RecordBatchReader, text: str) -> Iterator[pa.RecordBatch]:
    with engine.translating(text):
        yield from reader
