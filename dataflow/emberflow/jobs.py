"""The jobs of a session: which frames need one, on what they run, and how their rows come back.

Does not know: how SQL is cut into stages (`plan`), or how tasks run (`job`, `executor`).
"""

from __future__ import annotations

import datetime
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .errors import InvalidArgument, UnsupportedType
from .exchange import ExchangeReader, Source, restored
from .executor import Capacity, Executor, InlineExecutor, LocalExecutor, machine_capacity
from .files import FileOutput, FileSink
from .job.event import Event
from .job.history import JobInfo
from .job.job import Job, JobConfig
from .job.record import Record
from .job.shares import ShareConfig
from .job.steps import Output
from .job.task import nothing
from .plan.explain import explained
from .plan.filescans import File, FileScan, ResolvedScan, find, listed, resolve
from .plan.frames import Apply, Computed, Frame, PartialSql, Repartition
from .plan.nodes import Column
from .plan.pipes import Program
from .plan.planner import Planner
from .plan.stages import StageConfig
from .progress import job_progress
from .quantities import bytes_of
from .query import Query, of_table, quoted
from .sources import open_url

if TYPE_CHECKING:
    from .session import Session

_INLINE_BYTES_MAX = 32 << 20
# A query inside this process may read so much more than its memory: DuckDB spills, and most queries hold little.
_IN_PROCESS_FACTOR = 1.0
_NAME_CHARS = 80


class Jobs:
    """Runs what a session's own DuckDB does not. Safe to use from many threads."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self._lock = threading.RLock()
        self._executors: dict[str, Executor] = {}
        self._results: dict[int, tuple[Frame, Computed, list[Output]]] = {}
        self._scans: dict[FileScan, tuple[list[File], ResolvedScan]] = {}
        self._anew: dict[int, tuple[Frame, str]] = {}
        """Frames whose steps are not to be found, and what makes them others."""
        self._count = 0
        self._closed = False
        self.last: list[Event] = []
        """What the latest job told."""

    def close(self) -> None:
        """Ends the executors, and what runs on them."""
        with self._lock:
            executors, self._executors = list(self._executors.values()), {}
            self._closed = True
        for executor in executors:
            executor.close()

    # ---- what needs a job

    def is_needed(self, frame: Frame) -> bool:
        """Whether the frame's rows are made by a job; else one DuckDB in this process makes them."""
        if not isinstance(frame, Query):
            return not isinstance(frame, Computed)
        if self.config.shuffle == "always" or self.config.executor == "ray" or frame.deterministic:
            return True
        sources = [source for source in frame.tables.values() if not isinstance(source, pa.Table)]
        if any(not isinstance(source, Query) and not self.is_computed(source) for source in sources):
            return True
        return self.size_bytes(frame) > self.memory_bytes * _IN_PROCESS_FACTOR

    def size_bytes(self, frame: Frame) -> int:
        """The bytes of all files that a frame reads, as they are on disk."""
        if isinstance(frame, Repartition | Apply):
            return self.size_bytes(frame.child)
        if isinstance(frame, PartialSql):
            return sum(self.size_bytes(child) for child in frame.inputs.values())
        if isinstance(frame, Computed):
            return int(frame.exchange.size_bytes)
        options = self.config.storage_options
        scans = find(frame.text)[1].values()
        own = sum(file.size_bytes for scan in scans for file in listed(scan, options))
        tables = (s.nbytes if isinstance(s, pa.Table) else self.size_bytes(s) for s in frame.tables.values())
        return own + sum(tables)

    @property
    def memory_bytes(self) -> int:
        if self.config.memory_limit is not None:
            return bytes_of(self.config.memory_limit)
        return int(machine_capacity().memory_bytes * 0.8)

    # ---- the catalog that planning asks

    def resolve(self, scan: FileScan) -> ResolvedScan:
        """The scan's files and columns, as they are now: one job sees one state of them. Files that are as they were
        are not looked into again."""
        files = listed(scan, self.config.storage_options)
        known = self._scans.get(scan)
        if known is None or known[0] != files or not all(file.version for file in files):
            with self.session.engine.running(scan.call(scan.paths)) as cursor:
                known = self._scans[scan] = files, resolve(scan, files, cursor)
        return known[1]

    def computed(self, frame: Frame) -> Computed | None:
        """The frame's rows, if an earlier job has made them."""
        found = self._results.get(id(frame))
        return None if found is None else found[1]

    def describe(self, text: str, shadows: Mapping[str, Sequence[Column]]) -> tuple[Column, ...]:
        """The columns of a query over tables with these columns. Raises `QueryError` for one that DuckDB refuses."""
        with self.session.engine.running(text) as cursor:
            for name, columns in shadows.items():
                listed = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
                cursor.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(name)} ({listed})")
            rows = cursor.execute(f"DESCRIBE {text}").fetchall()
        return tuple(Column(str(row[0]), str(row[1])) for row in rows)

    def columns_of(self, table: pa.Table) -> tuple[Column, ...]:
        """A table's columns, as DuckDB has them."""
        with self.session.engine.running("") as cursor:
            cursor.register("emberflow_shape", table.schema.empty_table())
            rows = cursor.execute("DESCRIBE emberflow_shape").fetchall()
        return tuple(Column(str(row[0]), str(row[1])) for row in rows)

    # ---- running

    def compute(self, frame: Frame) -> Computed:
        """Runs the frame's job, unless its rows are here already."""
        with self._lock:
            if isinstance(frame, Computed):
                return frame
            if id(frame) in self._results:
                return self._results[id(frame)][1]
            program = self.planner(frame).program(frame)
            job = self._job(program, frame, None)
            info = JobInfo(id=job.id, name=_name_of(frame), query=_text_of(frame))
            with self._recorded(job, info, progress=None):
                outputs = job.run()
            exchange = program.result
            columns = program.columns
            if columns is None:
                columns = exchange.columns = _found_columns(outputs)
            computed = Computed(exchange, columns, tuple(outputs))
            self._results[id(frame)] = frame, computed, outputs
            return computed

    def rows_of(self, query: Query) -> Query:
        """A query that gives the same rows in this process: of what a job has made, or the very same, if they are of
        a type that does not go through exchanges."""
        try:
            return of_table(self.compute(query))
        except UnsupportedType:
            if any(not isinstance(source, pa.Table | Query) for source in query.tables.values()):
                raise
            return query

    def is_computed(self, frame: Frame) -> bool:
        """Whether the frame's rows are here."""
        return isinstance(frame, Computed) or id(frame) in self._results

    def forget(self, frame: Frame) -> None:
        """The frame's rows will be made anew, every step of them."""
        with self._lock:
            self._results.pop(id(frame), None)
            self._anew[id(frame)] = frame, uuid.uuid4().hex

    def write(
        self,
        frame: Frame,
        sink: FileSink,
        *,
        target: str,
        publish: Callable[[Sequence[FileOutput]], None],
        progress: bool | None,
    ) -> list[FileOutput]:
        """Runs the frame's job into files, and has them put in place while the job still counts as running."""
        with self._lock:
            program = self.planner(frame).program(frame, to_files=True, one=sink.one_file is not None)
            job = self._job(program, frame, sink)
            info = JobInfo(
                id=job.id,
                name=f"write {target}",
                query=_text_of(frame),
                staging=posixpath.dirname(sink.url),
                target=target,
            )
            with self._recorded(job, info, progress=progress):
                files = [file for output in job.run() for file in output.files]
                publish(files)
            return files

    def planner(self, frame: Frame) -> Planner:
        """What makes the frame's program."""
        config = StageConfig(
            partitions=self.config.partitions,
            partition_bytes=self.config.partition_bytes,
            broadcast_bytes=0 if self.config.shuffle == "always" else self.config.broadcast_bytes,
        )
        return Planner(config, self, now=datetime.datetime.now(datetime.UTC), udfs=self.session.udfs)

    def _job(self, program: Program, frame: Frame, sink: FileSink | None) -> Job:
        self._count += 1
        return Job(
            program,
            self.executor(frame),
            self.root,
            id=f"{self.config.job_id or uuid.uuid4().hex[:12]}-{self._count}",
            config=JobConfig(
                cpus_per_task=self.threads_of(frame),
                timeout_s=self.config.timeout_s,
                shares=ShareConfig(
                    scan_bytes=self.config.partition_bytes,
                    task_bytes=2 * self.config.partition_bytes,
                    coalesce=self.config.partitions is None,
                ),
            ),
            storage_options=self.config.storage_options,
            udfs=self.session.udfs,
            sink=sink,
            salt=self._anew.get(id(frame), (frame, ""))[1],
            temp_directory=self.session.spill,
        )

    @contextmanager
    def _recorded(self, job: Job, info: JobInfo, *, progress: bool | None) -> Iterator[None]:
        """The block runs the job: others can see it and end it meanwhile."""
        self.last = last = []
        record = Record(
            self.root,
            info,
            explain=explained(job.program, threads=job.config.cpus_per_task),
            storage_options=self.config.storage_options,
            on_cancel=job.stop,
        )
        with record, job_progress(info.name, show=progress, stages=len(job.program.stages)) as shown:

            def watch(event: Event) -> None:
                last.append(event)
                record.note(event)
                shown(event)

            job.watch, job.use = watch, record.use
            yield

    def threads_of(self, frame: Frame) -> int:
        """Threads of a task of the frame's job."""
        deterministic = isinstance(frame, Query) and frame.deterministic
        return 1 if deterministic else self.config.threads or 1

    @property
    def root(self) -> str:
        """Where steps are kept."""
        return self.config.data_root or f"{self.session.spill}/jobs"

    def executor(self, frame: Frame) -> Executor:
        """What the frame's job runs on."""
        name: str = self.config.executor
        if name == "auto":
            name = "inline" if self.size_bytes(frame) <= _INLINE_BYTES_MAX else "local"
        if name not in self._executors:
            self._executors[name] = self._made(name)
        return self._executors[name]

    def _made(self, name: str) -> Executor:
        machine = machine_capacity()
        cpus = self.config.threads or 1
        workers = self.config.workers or max(1, machine.cpus // cpus)
        capacity = Capacity(cpus=workers * cpus, memory_bytes=self.memory_bytes)
        if name == "inline":
            return InlineExecutor(capacity)
        if name == "local":
            return LocalExecutor(workers=workers, cpus=capacity.cpus, memory_bytes=capacity.memory_bytes)
        from .executor.ray import RayExecutor

        return RayExecutor(address=self.config.ray_address, cpus=capacity.cpus, memory_bytes=capacity.memory_bytes)

    # ---- rows back

    def register(self, cursor: Any, name: str, frame: Frame) -> None:
        """Makes `name` a view of the frame's rows in a cursor of the session's own DuckDB."""
        computed = self.compute(frame)
        columns = computed.exchange.columns
        assert columns is not None
        outputs = [output for output in computed.outputs if output.rows]
        if not outputs:
            names = [column.name for column in computed.columns]
            cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS {nothing(columns, names)}")
            return
        sources = []
        for output in outputs:
            filesystem, path = open_url(output.url, self.config.storage_options)
            sources.append(Source(filesystem, path, output.exchange()))
        reader = ExchangeReader(sources, range(computed.exchange.partitions))
        cursor.register(f"{name}_arrow", reader)
        exprs = restored(columns, reader.schema, cursor)
        listed = ", ".join(f"{e} AS {quoted(c.name)}" for e, c in zip(exprs, computed.columns, strict=True))
        cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS SELECT {listed} FROM {quoted(name + '_arrow')}")


def _found_columns(outputs: Sequence[Output]) -> tuple[Column, ...]:
    """The columns that a function without a schema turned out to make. Raises `InvalidArgument` if it made several
    kinds of rows."""
    made = [output.exchange().columns for output in outputs if output.rows] or [outputs[0].exchange().columns]
    for other in made[1:]:
        if other != made[0]:
            first, second = (", ".join(f"{c.name} {c.type}" for c in columns) for columns in (made[0], other))
            raise InvalidArgument(f"a function made rows of ({first}) and of ({second}); give it a schema")
    return made[0]


def _text_of(frame: Frame) -> str:
    """The SQL of a frame, as far as it has any."""
    if isinstance(frame, Query | PartialSql):
        return frame.text
    return _text_of(frame.child) if isinstance(frame, Repartition | Apply) else ""


def _name_of(frame: Frame) -> str:
    text = " ".join(_text_of(frame).split()) or "compute"
    return text if len(text) <= _NAME_CHARS else f"{text[:_NAME_CHARS]}..."
