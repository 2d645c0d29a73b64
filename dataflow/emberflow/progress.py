"""Progress bars: rows of one query as they come by, and a job by its events.

Shown on a terminal, or when asked for. They never change what the query or the job does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .job.event import Event
from .job.tally import Tally
from .quantities import plural, seconds_text


@contextmanager
def row_progress(title: str, *, show: bool | None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """A counter of rows with their rate on stderr; the block calls what it is given with each number of new rows.
    `unit`: what else is counted, many of them.

    `show=None` means: on a terminal only.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda rows: None
        return
    # Not for a query that shows nothing: it costs as long to import as such a query runs.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    rate = TextColumn(f"{{task.completed:,.0f}} {unit}, {{task.fields[rate]:,.0f}}/s")
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), rate, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=None, rate=0.0)

        def advance(rows: int) -> None:
            bar.update(task, advance=rows, rate=bar.tasks[0].speed or 0.0)

        yield advance


@contextmanager
def job_progress(title: str, *, show: bool | None, stages: int | None = None) -> Iterator[Callable[[Event], None]]:
    """A bar of a job's tasks on stderr; the block calls what it is given with each event, from any thread.

    `stages` is how many the job has. `show=None` means: on a terminal only.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    tally = Tally()
    lock = threading.Lock()
    with Progress(*columns, TextColumn("{task.fields[told]}"), console=console) as bar:
        task = bar.add_task(title, total=None, told="")

        def note(event: Event) -> None:
            with lock:
                tally.note(event)
                done = sum(stage.done for stage in tally.stages.values())
                total = sum(stage.tasks for stage in tally.stages.values())
                bar.update(task, completed=done, total=total or None, told=progress_text(tally, stages))

        yield note


def progress_text(tally: Tally, stages: int | None) -> str:
    """How far a job is, on one line: "stages 1/3, scan 5/8 tasks, 1,200 rows/s, 40 s left in this stage"."""
    done = sum(stage.is_done for stage in tally.stages.values())
    parts = [f"stages {done}/{stages or len(tally.stages)}"]
    running = tally.running
    parts += [f"{stage.label} {stage.done}/{stage.tasks} tasks" for stage in running[:2]]
    if len(running) > 2:
        parts.append(f"{plural(len(running) - 2, 'more stage')}")
    # Since they began: what earlier stages did says nothing of these.
    seconds = tally.at_s - min((stage.start_s for stage in running), default=tally.at_s)
    rows = sum(stage.rows_run for stage in running)
    if rows and seconds > 0:
        parts.append(f"{rows / seconds:,.0f} rows/s")
    if tally.left_s is not None:
        where = "these stages" if len(running) > 1 else "this stage"
        parts.append(f"{seconds_text(tally.left_s)} left in {where}")
    return ", ".join(parts)
