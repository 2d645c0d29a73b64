"""A job: a program's stages run to their end, whatever happens to workers on the way.

The driver keeps almost nothing: what is done is in the steps' directories, so a driver that dies is followed by one
that finds its tasks done. One loop, one thread: submit what can run, take the next event, decide. Rules:

- a task whose worker died, or whose disk or store failed, runs again, up to `attempts_max` times; what the user's SQL
  or function got wrong does not;
- out of memory: again, with twice the memory, while there is as much;
- a damaged or missing intermediate: its maker's task runs again first; if what it makes may come out otherwise,
  whatever read the earlier attempt runs again too;
- a straggler is run a second time beside itself; the first to publish counts.
"""

from __future__ import annotations

import posixpath
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from ..engine import duckdb_minor
from ..errors import (
    CallCancelled,
    CallOutOfMemory,
    ExchangeCorrupt,
    InvalidArgument,
    OutOfMemory,
    QueryError,
    WorkerDied,
)
from ..exchange import read
from ..executor.base import Call, Executor, Handle
from ..files import FileSink
from ..functions import shipping
from ..functions.udf import Udf
from ..plan.explain import stage_lines
from ..plan.grade import grade
from ..plan.pipes import ByRange, Exchange, Program, Stage
from ..sources import StorageOptions, open_kept, open_url
from .config import JobConfig
from .event import Event
from .identity import Unknown, digest, exchange_identity, stage_identity, stores, udf_identity
from .rendering import Rendering, SortKeyValue, Written, boundaries_of, text_of
from .repair import Repair
from .shares import Spec, cut
from .states import Stages, StageState, TaskState
from .steps import Output, Place, new_attempt
from .task import Task

_RUN = "emberflow.job.task:run"
_TICK_S = 0.5
_STRAGGLER_DONE_MIN = 0.75
# Times `attempts_max` that a task may end and not count, because what it read was made again meanwhile.
_ATTEMPTS_BOUND = 10


class Job:
    """Runs one program. `root` is the directory that steps are kept under."""

    def __init__(
        self,
        program: Program,
        executor: Executor,
        root: str,
        *,
        id: str,
        config: JobConfig | None = None,
        storage_options: StorageOptions | None = None,
        udfs: tuple[Udf, ...] = (),
        sink: FileSink | None = None,
        salt: str = "",
        temp_directory: str | None = None,
        watch: Callable[[Event], None] = lambda event: None,
        use: Callable[[str], None] = lambda identity: None,
    ) -> None:
        self.program = program
        self.executor = executor
        self.root = root
        self.id = id
        self.config = config or JobConfig()
        self.storage_options = storage_options or {}
        self.udfs = udfs
        self.sink = sink
        self.salt = salt
        """What makes the job's steps other ones than those of jobs before it."""
        self.temp_directory = temp_directory
        self.watch = watch
        self.use = use
        """Told of a step before anything in it is looked at, so that no sweep takes it away."""
        self.stages = Stages(program)
        self._identities: dict[int, str] = {}
        self._events: queue.SimpleQueue[tuple[TaskState, Handle, str] | None] = queue.SimpleQueue()
        self._pending: deque[TaskState] = deque()
        self._is_stopped = False
        self._repair = Repair(
            self.stages,
            self.storage_options,
            again=self._again,
            tell=lambda task, error: self._tell("recompute", task.stage.stage.id, task.index, error=error),
        )
        self._started_s = time.monotonic()

    # ---- the loop

    def run(self) -> list[Output]:
        """Runs to the end and gives the outputs of the last exchange, in order. Raises the first task's failure."""
        try:
            while not self.stages.is_done:
                self._begin_stages()
                self._submit()
                self._take(self._next_event())
        except BaseException as error:
            self.cancel()
            self._tell("failed", -1, -1, error=f"{type(error).__name__}: {error}")
            raise
        # A straggler's other run may go on; nothing of it must be left to do when the job is done.
        self.cancel()
        self._tell("done", -1, -1)
        return self.stages.outputs_of(self.program.result)

    def stop(self) -> None:
        """Ends the job, from any thread: `run` raises `CallCancelled`."""
        self._is_stopped = True
        self._events.put(None)

    def cancel(self) -> None:
        """Cancels what runs, and waits until it has ended."""
        handles = [handle for task in self.stages.tasks() for handle in task.handles]
        for handle in handles:
            handle.cancel()
        for handle in handles:
            handle.future.exception()

    def _next_event(self) -> tuple[TaskState, Handle, str] | None:
        if self.stages.is_done:
            return None
        if self._is_stopped:
            raise CallCancelled("the job was cancelled")
        timeout_s = self.config.timeout_s
        if timeout_s is not None and time.monotonic() - self._started_s > timeout_s:
            raise CallCancelled(f"the job was cancelled: it ran longer than {timeout_s} s")
        try:
            return self._events.get(timeout=_TICK_S)
        except queue.Empty:
            self._speculate()
            return None

    # ---- stages

    def _begin_stages(self) -> None:
        for stage in self.stages.ready():
            try:
                self._begin(stage)
            except ExchangeCorrupt as error:
                # The driver reads too: the sample of a sort.
                self._repair.mend(error)

    def _begin(self, stage: Stage) -> None:
        outputs = {exchange.id: self.stages.outputs_of(exchange) for exchange in stage.inputs()}
        pieces: list[Spec] = []
        if (found := self.stages.given.get(stage.id)) is None:
            shares = cut(stage, outputs, self.config.shares)
            found, pieces = shares.specs, shares.pieces
        is_last = stage.exchange is self.program.result
        boundaries: tuple[SortKeyValue, ...] = ()
        if isinstance(stage.partitioning, ByRange):
            boundaries = self._boundaries(stage.partitioning.sample, stage.exchange.partitions)
        place = self._place(stage, found, boundaries, is_last)
        written = Written(self.sink.format, self.program.columns) if is_last and self.sink is not None else None
        rendering = Rendering(
            stage, outputs, boundaries=boundaries, compression=self.config.compression, written=written
        )
        state = StageState(stage, place, rendering, self._is_repeatable(stage))
        self.stages.begin(state)
        if pieces:
            self.stages.add_pieces(stage, pieces)
        state.tasks = [TaskState(state, index, spec) for index, spec in enumerate(found)]
        self.use(place.identity)
        for exchange in stage.inputs():
            for output in exchange.made or ():
                self.use(Place(posixpath.dirname(output.url)).identity)
        place.prepare()
        for index, output in place.winners().items():
            if index >= len(found):
                continue
            if not self._is_there(output):
                place.drop(index)
            elif self._still_counts(state.tasks[index], output):
                state.tasks[index].output = output
                state.reused += 1
        self._tell(
            "stage",
            stage.id,
            -1,
            label=stage.label,
            tasks=len(found),
            reused=state.reused,
            rows=sum(output.rows for output in state.outputs),
            size_bytes=sum(output.size_bytes for output in state.outputs),
            inputs=sorted({producer.id for exchange in stage.inputs() for producer in exchange.producers}),
            explain="\n".join(stage_lines(stage, self.program, threads=self.config.cpus_per_task)),
        )
        self._pending.extend(task for task in state.tasks if task.output is None)

    def _is_there(self, output: Output) -> bool:
        """Whether the files of a dataset are where they were left: a write that ended has taken them away."""
        opened = (open_kept(file.staged_url, self.storage_options) for file in output.files)
        return all(filesystem.exists(path) for filesystem, path in opened)

    def _place(self, stage: Stage, found: list[Spec], boundaries: tuple[SortKeyValue, ...], is_last: bool) -> Place:
        """Where the stage's outputs go: by its identity, or if it has none, by one that is the job's own."""
        exchanges = {exchange.id: exchange_identity(exchange, self._identities) for exchange in stage.inputs()}
        extra: list[object] = [self.config.compression, self.salt, self.config.cpus_per_task == 1]
        extra += [repr(boundaries), stores(self.storage_options)]
        if is_last and self.sink is not None:
            extra.append(repr(self.sink))
        try:
            udfs = [udf_identity(udf) for udf in self.udfs]
            identity = stage_identity(stage, found, exchanges, *extra, *udfs)
        except Unknown:
            udfs = [udf_identity(udf, self.id) for udf in self.udfs]
            identity = stage_identity(stage, found, exchanges, *extra, *udfs, stage.id, job=self.id)
        self._identities[stage.id] = identity
        return Place(f"{self.root}/steps/{identity}", self.storage_options)

    def _is_repeatable(self, stage: Stage) -> bool:
        """Whether any two runs of the stage, and of all it comes from, put the same rows into each partition."""
        own = grade(stage, threads=self.config.cpus_per_task) != "unstable"
        return own and all(maker.repeatable for maker in self.stages.makers_of(stage))

    def _boundaries(self, sample: Exchange, partitions: int) -> tuple[SortKeyValue, ...]:
        keys: list[SortKeyValue] = []
        for output in self.stages.outputs_of(sample):
            if output.rows:
                filesystem, path = open_url(output.url, self.storage_options)
                for batch in read(filesystem, path, output.exchange(), (0,)):
                    keys += batch.column(0).to_pylist()
        return boundaries_of(keys, partitions)

    def _still_counts(self, task: TaskState, output: Output) -> bool:
        """Whether an output may be used: it read the attempts that count now, or others that hold the same rows."""
        stage = task.stage.stage
        if all(maker.repeatable for maker in self.stages.makers_of(stage)):
            return True
        current = {output.attempt for exchange in stage.inputs() for output in self.stages.outputs_of(exchange)}
        if current.issuperset(output.inputs):
            return True
        task.stage.place.drop(task.index)
        return False

    # ---- tasks

    def _submit(self) -> None:
        running = sum(len(task.handles) for task in self.stages.tasks())
        room = 3 * self.executor.capacity.cpus + 2 - running
        waiting: list[TaskState] = []
        while self._pending and room > 0:
            task = self._pending.popleft()
            if task.output is not None:
                continue
            if not all(self.stages.is_complete(exchange) for exchange in task.stage.stage.inputs()):
                waiting.append(task)
                continue
            self._start(task)
            room -= 1
        self._pending.extend(waiting)

    def _start(self, task: TaskState) -> None:
        state = task.stage
        is_last = state.stage.exchange is self.program.result
        attempt = new_attempt()
        # What it reads may have been made again since the stage began.
        state.rendering.outputs = {e.id: self.stages.outputs_of(e) for e in state.stage.inputs()}
        runs = state.rendering.runs(task.spec)
        sink = self.sink if is_last and self.sink is not None else state.rendering.sink(task.index)
        work = Task(
            name=task.name,
            place=state.place,
            index=task.index,
            attempt=attempt,
            runs=runs,
            sink=sink,
            columns=state.stage.exchange.columns,
            duckdb=duckdb_minor(),
            udfs=self.udfs,
            storage_options=self.storage_options,
            temp_directory=self.temp_directory,
            seed=int(digest(self.id, state.stage.id, task.index)[:8], 16) / 2**32,
            ordered=state.stage.pipe.ordered,
        )
        call = Call(
            name=task.name,
            function=_RUN,
            payload=shipping.dumps(work),
            cpus=min(self.config.cpus_per_task, self.executor.capacity.cpus),
            memory_bytes=task.memory_bytes,
        )
        task.attempts += 1
        handle = self.executor.submit(
            call,
            on_report=lambda note: self._tell("rows", state.stage.id, task.index, rows=msgspec.msgpack.decode(note)),
            on_output=lambda text: self._tell("output", state.stage.id, task.index, text=text),
        )
        task.handles.append(handle)
        self._tell("task", state.stage.id, task.index, attempt=attempt, sql=text_of(runs))
        handle.future.add_done_callback(lambda _: self._events.put((task, handle, attempt)))

    def _take(self, event: tuple[TaskState, Handle, str] | None) -> None:
        if event is None:
            return
        task, handle, _ = event
        task.handles.remove(handle)
        error = handle.future.exception()
        if error is None:
            if task.output is None:
                self._finish(task, msgspec.msgpack.decode(handle.future.result(), type=Output))
        elif task.output is None and not task.handles:
            self._failed(task, error)

    def _finish(self, task: TaskState, output: Output) -> None:
        if not self._still_counts(task, output):
            if task.attempts >= _ATTEMPTS_BOUND * self.config.attempts_max:
                raise WorkerDied(f"{task.name} read what was made again {task.attempts} times")
            self._pending.append(task)
            return
        task.output = output
        for handle in task.handles:
            handle.cancel()
        self._tell(
            "finished",
            task.stage.stage.id,
            task.index,
            rows=output.rows,
            size_bytes=output.size_bytes,
            seconds=output.seconds,
            cpu_s=output.cpu_s,
            spilled_bytes=output.spilled_bytes,
            worker=output.worker,
        )

    # ---- trouble

    def _failed(self, task: TaskState, error: BaseException) -> None:
        if isinstance(error, ExchangeCorrupt) and task.attempts < self.config.attempts_max:
            self._recompute(task, error)
            return
        if isinstance(error, OutOfMemory | CallOutOfMemory):
            if self._more_memory(task):
                return
            raise error
        again = isinstance(error, WorkerDied | OSError) and not isinstance(
            error, QueryError | FileNotFoundError | InvalidArgument | CallCancelled
        )
        if not again or task.attempts >= self.config.attempts_max:
            error.add_note(f"in {task.name} of {len(task.stage.tasks)}, attempt {task.attempts}")
            raise error
        self._tell("retry", task.stage.stage.id, task.index, error=f"{type(error).__name__}: {error}")
        self._pending.appendleft(task)

    def _more_memory(self, task: TaskState) -> bool:
        """Runs the task again with twice the memory, if there is as much."""
        capacity = self.executor.capacity
        share = capacity.memory_bytes * min(self.config.cpus_per_task, capacity.cpus) // capacity.cpus
        wanted = 2 * (task.memory_bytes or share)
        if wanted > capacity.memory_bytes or task.attempts >= self.config.attempts_max:
            return False
        task.memory_bytes = wanted
        self._tell("retry", task.stage.stage.id, task.index, error="out of memory", memory_bytes=wanted)
        self._pending.appendleft(task)
        return True

    def _recompute(self, task: TaskState, error: ExchangeCorrupt) -> None:
        """Has the maker of a damaged file run again before the task does. That is no fault of the task's."""
        if self._repair.mend(error):
            task.attempts -= 1
        self._pending.append(task)

    def _again(self, task: TaskState) -> None:
        task.output = None
        task.stage.place.drop(task.index)
        self._pending.appendleft(task)

    def _speculate(self) -> None:
        """Runs a straggler a second time, when most of its stage is done and nothing else waits."""
        if self._pending:
            return
        for state in self.stages:
            done = state.outputs
            if not done or len(done) < _STRAGGLER_DONE_MIN * len(state.tasks):
                continue
            usual_s = statistics.median(output.seconds for output in done)
            limit_s = max(self.config.straggler_s, self.config.straggler_factor * usual_s)
            for task in state.tasks:
                started_s = task.handles[0].started_s if len(task.handles) == 1 else None
                if task.output is None and started_s is not None and time.monotonic() - started_s > limit_s:
                    self._tell("speculate", state.stage.id, task.index)
                    self._start(task)

    def _tell(self, kind: str, stage: int, task: int, **data: Any) -> None:
        self.watch(Event(kind, stage, task, time.monotonic() - self._started_s, data))
