"""What a job's events amount to: sums, stages and runs, at any moment.

Fed by events one after the other; the progress bar, `emberline jobs show` and the report all read the same tally.

Does not know: where events come from, or how anything looks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .event import Event


@dataclass(frozen=True, slots=True)
class Run:
    """An attempt whose output counts: which worker ran it, and when. Times are since the job began."""

    stage: int
    task: int
    worker: str
    start_s: float
    end_s: float
    rows: int
    size_bytes: int
    cpu_s: float
    spilled_bytes: int | None

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class StageTally:
    """One stage."""

    id: int
    label: str = ""
    tasks: int = 0
    reused: int = 0
    inputs: tuple[int, ...] = ()
    explain: str = ""
    sql: str = ""
    """Of its first task."""
    start_s: float = 0.0
    runs: dict[int, Run] = field(default_factory=dict)
    """By task; the latest that counted."""
    submitted: set[int] = field(default_factory=set)
    retries: int = 0
    recomputed: int = 0
    speculated: int = 0
    _reused_rows: int = 0
    _reused_bytes: int = 0
    _so_far: dict[int, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Tasks whose output counts now."""
        return self.reused + len(self.runs)

    @property
    def is_done(self) -> bool:
        return self.done >= self.tasks

    @property
    def rows(self) -> int:
        """Of all its tasks, those that still run as far as they have told."""
        return self._reused_rows + self.rows_run

    @property
    def rows_run(self) -> int:
        """Less those of what was reused."""
        running = sum(rows for task, rows in self._so_far.items() if task not in self.runs)
        return sum(run.rows for run in self.runs.values()) + running

    @property
    def size_bytes(self) -> int:
        return self._reused_bytes + sum(run.size_bytes for run in self.runs.values())

    @property
    def cpu_s(self) -> float:
        return sum(run.cpu_s for run in self.runs.values())

    @property
    def spilled_bytes(self) -> int | None:
        """None: nobody said."""
        known = [run.spilled_bytes for run in self.runs.values() if run.spilled_bytes is not None]
        return sum(known) if known else None

    @property
    def median_s(self) -> float | None:
        return statistics.median(run.seconds for run in self.runs.values()) if self.runs else None

    @property
    def max_s(self) -> float | None:
        return max((run.seconds for run in self.runs.values()), default=None)

    @property
    def skew(self) -> float | None:
        """How many times the usual rows the fullest task had; None where there is nothing to compare."""
        rows = [run.rows for run in self.runs.values()]
        usual = statistics.median(rows) if len(rows) > 1 else 0
        return max(rows) / usual if usual else None

    def note(self, event: Event) -> None:
        """Counts one event of the stage."""
        data = event.data
        if event.kind == "stage":
            self.label, self.explain = str(data.get("label", "")), str(data.get("explain", ""))
            self.tasks, self.reused = int(data.get("tasks", 0)), int(data.get("reused", 0))
            self.inputs = tuple(int(id) for id in data.get("inputs", ()))
            self._reused_rows, self._reused_bytes = int(data.get("rows", 0)), int(data.get("size_bytes", 0))
            self.start_s = event.at_s
        elif event.kind == "task":
            self.submitted.add(event.task)
            self.sql = self.sql or str(data.get("sql", ""))
        elif event.kind == "rows":
            self._so_far[event.task] = int(data.get("rows", 0))
        elif event.kind == "finished":
            self.runs[event.task] = _run(event, data)
        elif event.kind == "retry":
            self.retries += 1
            self._so_far.pop(event.task, None)
        elif event.kind == "speculate":
            self.speculated += 1
        elif event.kind == "recompute":
            self.recomputed += 1
            self._so_far.pop(event.task, None)
            if self.runs.pop(event.task, None) is None:
                self.reused -= 1


def _run(event: Event, data: Mapping[str, Any]) -> Run:
    seconds = float(data.get("seconds", 0.0))
    return Run(
        stage=event.stage,
        task=event.task,
        worker=str(data.get("worker", "")),
        start_s=max(0.0, event.at_s - seconds),
        end_s=event.at_s,
        rows=int(data.get("rows", 0)),
        size_bytes=int(data.get("size_bytes", 0)),
        cpu_s=float(data.get("cpu_s", 0.0)),
        spilled_bytes=data.get("spilled_bytes"),
    )


TROUBLES = ("retry", "recompute", "speculate", "failed")


class Tally:
    """One job."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.stages: dict[int, StageTally] = {}
        self.runs: list[Run] = []
        """All that ever counted, in the order they ended."""
        self.troubles: list[Event] = []
        self.at_s = 0.0
        """When the latest event was."""
        for event in events:
            self.note(event)

    def note(self, event: Event) -> None:
        """Counts one more event."""
        self.at_s = max(self.at_s, event.at_s)
        if event.kind in TROUBLES:
            self.troubles.append(event)
        if event.stage < 0:
            return
        stage = self.stages.setdefault(event.stage, StageTally(event.stage))
        stage.note(event)
        if event.kind == "finished":
            self.runs.append(stage.runs[event.task])

    def name_of(self, event: Event | Run) -> str:
        """A task, or the whole job, for people: as errors and logs name it."""
        if event.stage < 0:
            return "the job"
        stage = self.stages.get(event.stage)
        return f"{stage.label if stage else 'stage'} {event.stage}.{event.task}"

    @property
    def running(self) -> list[StageTally]:
        """The stages that have begun and are not done."""
        return [stage for stage in self.stages.values() if not stage.is_done]

    @property
    def workers(self) -> list[str]:
        """Those that ran something, in the order of their names."""
        return sorted({run.worker for run in self.runs}, key=_natural)

    @property
    def left_s(self) -> float | None:
        """How long the stages that run will still take, if their tasks go on as they did; None: nothing to go by."""
        running = self.running
        if not running or any(stage.median_s is None for stage in running):
            return None
        work_s = sum((stage.tasks - stage.done) * (stage.median_s or 0.0) for stage in running)
        return work_s / max(1, len(self.workers))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """local-2 comes before local-10."""
    pieces = "".join(c if c.isdigit() else f"\0{c}\0" for c in name).split("\0")
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]
