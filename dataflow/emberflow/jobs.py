"""The jobs of a session: which frames need one, on what they run, and how their rows come back.

Does not know: how SQL is cut into stages (`plan`), or how tasks run (`job`, `executor`).
"""

from __future__ import annotations

import datetime
import posixpath
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from .catalog import SessionCatalog
from .errors import ExchangeCorrupt, InvalidArgument, SessionClosed, UnsupportedType
from .exchange import ExchangeReader, Source, restored
from .executor import Capacity, Executor, InlineExecutor, LocalExecutor, machine_capacity
from .executor.machine import this_machine
from .files import FileOutput, FileSink
from .job.config import JobConfig
from .job.event import Event
from .job.history import JobInfo, check_id, jobs_at
from .job.job import Job
from .job.record import Record
from .job.shares import ShareConfig
from .job.steps import Output, Place, create
from .job.task import nothing
from .partitioned import PartitionKeys
from .plan.conditions import Condition
from .plan.explain import explained
from .plan.filescans import File, ResolvedScan
from .plan.footers import Footers
from .plan.frames import Apply, Computed, Frame, PartialSql, Repartition, Shuffle
from .plan.nodes import Column
from .plan.pipes import Program
from .plan.planner import Planner
from .plan.resolving import listed
from .plan.scantext import FileScan, find
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
TOGETHER_BYTES = 4 << 20
"""Where `partitions` are asked for, neighbours share a task up to so much: one of its own costs about the same CPU. Not
where tasks run the user's Python: what a row costs there nobody knows."""

Made = TypeVar("Made")


class Jobs:
    """Runs what a session's own DuckDB does not. Safe to use from many threads."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        # Of what is below, and held for moments only: jobs run side by side.
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._executors: dict[str, Executor] = {}
        """Under a lock of their own: some take seconds to start."""
        self._results: weakref.WeakKeyDictionary[Frame, Computed] = weakref.WeakKeyDictionary()
        """Rows that the user keeps, for as long as anything refers to their frames."""
        self._making: weakref.WeakKeyDictionary[Frame, threading.RLock] = weakref.WeakKeyDictionary()
        """Held while a frame's rows are made, so that they are made once."""
        self._anew: weakref.WeakKeyDictionary[Frame, str] = weakref.WeakKeyDictionary()
        """Frames whose steps are not to be found, and what makes them others."""
        self._running: set[Job] = set()
        self._has_ended = threading.Condition(self._lock)
        """Told whenever a job leaves `_running`."""
        self._count = 0
        self._now: datetime.datetime | None = None
        self._mended: set[str] = set()
        """Damaged files that no longer count: of several who meet the same damage one sees to it."""
        self._closed = False
        self.scans: dict[FileScan, tuple[list[File], ResolvedScan]] = {}
        """Files that were looked into, as they were then."""
        self.footers = Footers()
        self.narrowed: dict[tuple[FileScan, tuple[File, ...], tuple[Condition, ...]], ResolvedScan] = {}
        """Which of them hold what was asked for."""
        self.last: list[Event] = []
        """What the latest job told."""

    def close(self) -> None:
        """Cancels the jobs that run, waits for their end, and ends the executors."""
        with self._lock:
            self._closed = True
            for job in self._running:
                job.stop()
            self._has_ended.wait_for(lambda: not self._running)
        with self._starting:
            executors, self._executors = list(self._executors.values()), {}
        for executor in executors:
            executor.close()

    # ---- what needs a job

    def is_needed(self, frame: Frame, *, to_files: bool = False) -> bool:
        """Whether the frame's rows are made by a job; else one DuckDB in this process makes them. Files that are
        partitioned are made by one even of rows that are here."""
        if self.computed(frame) is not None:
            return to_files and isinstance(frame, Repartition) and frame.by == "hash"
        if not isinstance(frame, Query):
            return True
        if self.config.shuffle == "always" or self.config.executor == "ray" or frame.deterministic:
            return True
        sources = [source for source in frame.tables.values() if not isinstance(source, pa.Table)]
        if any(not isinstance(source, Query) and not self.is_computed(source) for source in sources):
            return True
        return self.size_bytes(frame) > self.memory_bytes * _IN_PROCESS_FACTOR

    def size_bytes(self, frame: Frame) -> int:
        """The bytes of all files that a frame reads, as they are on disk."""
        if isinstance(frame, Repartition | Shuffle | Apply):
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

    # ---- rows that are kept

    def computed(self, frame: Frame) -> Computed | None:
        """The frame's rows, if a job has made them, or those of the frame that it reads and does nothing else with."""
        if isinstance(frame, Computed):
            return frame
        with self._lock:
            found = self._results.get(frame)
        source = frame.source if found is None and isinstance(frame, Query) else None
        return found if source is None or isinstance(source, pa.Table) else self.computed(source)

    def is_computed(self, frame: Frame) -> bool:
        """Whether the frame's rows are here."""
        return self.computed(frame) is not None

    def compute(self, frame: Frame, *, now: datetime.datetime | None = None, progress: bool | None = None) -> Computed:
        """Runs the frame's job, unless its rows are here already, and keeps them as long as the frame is referred to.
        `now` is what now() gives, if a larger whole says it. `progress` shows a bar; None: on a terminal."""
        with self._alone(frame):
            computed = self.computed(frame)
            if computed is None:
                computed = self.whole(lambda: self._computed(frame, now or self.now(), progress))
                with self._lock:
                    self._results[frame] = computed
            return computed

    def forget(self, frame: Frame) -> None:
        """The frame's rows will be made anew, every step of them."""
        while isinstance(frame, Query) and isinstance(source := frame.source, Frame):
            frame = source
        with self._alone(frame), self._lock:
            self._results.pop(frame, None)
            self._anew[frame] = uuid.uuid4().hex

    def _alone(self, frame: Frame) -> threading.RLock:
        with self._lock:
            return self._making.setdefault(frame, threading.RLock())

    # ---- running

    def rows_of(self, query: Query) -> Query:
        """A query that gives the same rows in this process: of what a job has made, which nobody keeps, or the very
        same, if they are of a type that does not go through exchanges."""
        try:
            computed = self.computed(query)
            return of_table(computed or self.whole(lambda: self._computed(query, self.now(), None)))
        except UnsupportedType:
            if any(not isinstance(source, pa.Table | Query) for source in query.tables.values()):
                raise
            return query

    def columns(self, frame: Frame) -> tuple[Column, ...]:
        """The frame's columns, by planning; by running it, if a function without a schema decides."""
        computed = self.computed(frame)
        columns = self.planner(frame).pipes(frame)[1] if computed is None else computed.columns
        return self.compute(frame).columns if columns is None else columns

    def _computed(self, frame: Frame, now: datetime.datetime, progress: bool | None) -> Computed:
        program = self.planner(frame, now=now).program(frame)
        job = self._job(program, frame, None)
        info = JobInfo(id=job.id, name=_name_of(frame), query=_text_of(frame))
        with self._recorded(job, info, progress=progress):
            outputs = job.run()
        exchange = program.result
        columns = program.columns
        if columns is None:
            columns = exchange.columns = _found_columns(outputs)
        return Computed(exchange, columns, tuple(outputs), program.partitions)

    def write(
        self,
        frame: Frame,
        sink: FileSink,
        *,
        target: str,
        publish: Callable[[Sequence[FileOutput], PartitionKeys | None], None],
        progress: bool | None,
    ) -> list[FileOutput]:
        """Runs the frame's job into files, and has them put in place while the job still counts as running."""
        now = self.now()

        def written() -> list[FileOutput]:
            program = self.planner(frame, now=now).program(frame, to_files=True, one=sink.one_file is not None)
            job = self._job(program, frame, sink)
            info = JobInfo(
                id=job.id,
                name=f"write {target}",
                query=_text_of(frame),
                staging=posixpath.dirname(sink.url),
                target=target,
            )
            with self._recorded(job, info, progress=progress):
                outputs = job.run()
                if program.partitioned is not None:
                    assert len(outputs) == program.partitioned.count
                    for partition, output in enumerate(outputs):
                        for file in output.files:
                            file.partition = partition
                files = [file for output in outputs for file in output.files]
                publish(files, program.partitioned)
            return files

        return self.whole(written)

    def whole(self, run: Callable[[], Made]) -> Made:
        """What `run` gives; it runs once more if rows that were kept turn out to be damaged, and are made again."""
        try:
            return run()
        except ExchangeCorrupt as error:
            if not self.mend(error):
                raise
        return run()

    def mend(self, error: ExchangeCorrupt, query: Query | None = None) -> bool:
        """Has the rows made again that a damaged file belongs to, or says that it is of none that are known: those
        that are kept, and those that `query` reads."""
        with self._lock:
            kept = [(frame, made) for frame, made in self._results.items() if self._holds(made, error.path)]
            for frame, _ in kept:
                del self._results[frame]
            is_known = error.path in self._mended
            self._mended.add(error.path)
        read = [] if query is None else [made for made in query.tables.values() if isinstance(made, Computed)]
        damaged = [made for _, made in kept] + [made for made in read if self._holds(made, error.path)]
        for made in damaged:
            for output in made.outputs:
                directory, name = posixpath.split(output.url)
                Place(directory, self.config.storage_options).drop(int(name.partition("-")[0]))
        for frame, _ in kept:
            self.compute(frame)
        return is_known or bool(damaged)

    def _holds(self, made: Computed, path: str) -> bool:
        return any(open_url(output.url, self.config.storage_options)[1] == path for output in made.outputs)

    # ---- a job

    def now(self) -> datetime.datetime:
        """What now() gives in what begins now; for jobs that have a name, what it gave in the first of them."""
        if self._closed:
            raise SessionClosed("the session is closed")
        if self.config.job_id is None:
            return datetime.datetime.now(datetime.UTC)
        while self._now is None:
            check_id(self.config.job_id)
            filesystem, directory = jobs_at(self.root, self.config.storage_options)
            path = f"{directory}/{self.config.job_id}.now"
            filesystem.makedirs(directory, exist_ok=True)
            try:
                create(filesystem, path, datetime.datetime.now(datetime.UTC).isoformat().encode())
            except FileExistsError:
                pass  # an earlier session's, or another's of the same name
            try:
                self._now = datetime.datetime.fromisoformat(filesystem.cat_file(path).decode())
            except FileNotFoundError:
                pass  # it was old, and a sweep has taken it just now
        return self._now

    def planner(self, frame: Frame, *, now: datetime.datetime | None = None) -> Planner:
        """What makes the frame's program."""
        config = StageConfig(
            partitions=self.config.partitions,
            partition_bytes=self.config.partition_bytes,
            broadcast_bytes=0 if self.config.shuffle == "always" else self.config.broadcast_bytes,
        )
        now = now or self.now()
        return Planner(config, SessionCatalog(self, now), now=now, udfs=self.session.udfs)

    def _job(self, program: Program, frame: Frame, sink: FileSink | None) -> Job:
        with self._lock:
            self._count += 1
            number = self._count
            salt = self._anew.get(frame, "")
        task_bytes = 2 * self.config.partition_bytes
        return Job(
            program,
            self.executor(frame),
            self.root,
            id=f"{self.config.job_id or uuid.uuid4().hex[:12]}-{number}",
            config=JobConfig(
                cpus_per_task=self.threads_of(frame),
                timeout_s=self.config.timeout_s,
                shares=ShareConfig(
                    scan_bytes=self.config.partition_bytes,
                    task_bytes=task_bytes,
                    together_bytes=task_bytes if self.config.partitions is None else TOGETHER_BYTES,
                    together_python_bytes=task_bytes if self.config.partitions is None else -1,
                    functions=frozenset(udf.name for udf in self.session.udfs),
                ),
            ),
            storage_options=self.config.storage_options,
            udfs=self.session.udfs,
            sink=sink,
            salt=salt,
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
        shows = job_progress(info.name, show=progress, stages=len(job.program.stages))
        with self._under_way(job), record, shows as shown:

            def watch(event: Event) -> None:
                last.append(event)
                record.note(event)
                shown(event)

            job.watch, job.use = watch, record.use
            yield

    @contextmanager
    def _under_way(self, job: Job) -> Iterator[None]:
        """The block is something that closing the session cancels and waits for."""
        with self._lock:
            if self._closed:
                raise SessionClosed("the session is closed")
            self._running.add(job)
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(job)
                self._has_ended.notify_all()

    def threads_of(self, frame: Frame) -> int:
        """Threads of a task of the frame's job."""
        while isinstance(frame, Apply):
            frame = frame.child
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
        with self._starting:
            if self._closed:
                raise SessionClosed("the session is closed")
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
            return LocalExecutor(
                workers=workers, cpus=capacity.cpus, memory_bytes=capacity.memory_bytes, machine=this_machine()
            )
        from .executor.ray import RayExecutor

        return RayExecutor(address=self.config.ray_address, cpus=capacity.cpus, memory_bytes=capacity.memory_bytes)

    # ---- rows back

    def register(self, cursor: Any, name: str, frame: Frame) -> ExchangeReader | None:
        """Makes `name` a view of the frame's rows in a cursor of the session's own DuckDB. Gives what reads them, if
        there are any. Raises `ExchangeCorrupt` if files are gone."""
        computed = self.compute(frame)
        columns = computed.exchange.columns
        assert columns is not None
        outputs = [output for output in computed.outputs if output.rows]
        if not outputs:
            names = [column.name for column in computed.columns]
            cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS {nothing(columns, names)}")
            return None
        reader = self._reader(computed, outputs)
        cursor.register(f"{name}_arrow", reader)
        exprs = restored(columns, reader.schema, cursor)
        listed = ", ".join(f"{e} AS {quoted(c.name)}" for e, c in zip(exprs, computed.columns, strict=True))
        cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS SELECT {listed} FROM {quoted(name + '_arrow')}")
        return reader

    def batches(self, computed: Computed) -> Iterator[pa.RecordBatch]:
        """Rows that a job has made, in the order of its tasks, with columns c0, c1, ... as they travel. Raises
        `ExchangeCorrupt`."""
        if outputs := [output for output in computed.outputs if output.rows]:
            yield from self._reader(computed, outputs)

    def _reader(self, computed: Computed, outputs: Sequence[Output]) -> ExchangeReader:
        sources = []
        for output in outputs:
            filesystem, path = open_url(output.url, self.config.storage_options)
            if not filesystem.exists(path):
                raise ExchangeCorrupt(f"{path} is gone", path)
            sources.append(Source(filesystem, path, output.exchange()))
        return ExchangeReader(sources, range(computed.exchange.partitions))


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
    return _text_of(frame.child) if isinstance(frame, Repartition | Shuffle | Apply) else ""


def _name_of(frame: Frame) -> str:
    text = " ".join(_text_of(frame).split()) or "compute"
    return text if len(text) <= _NAME_CHARS else f"{text[:_NAME_CHARS]}..."
