"""A progress bar for one query: rows as they come by.

Shown on a terminal, or when asked for. It never changes what the query does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def row_progress(title: str, *, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A counter of rows with their rate on stderr; the block calls what it is given with each number of new rows.

    `show=None` means: on a terminal only.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda rows: None
        return
    # Not for a query that shows nothing: it costs as long to import as such a query runs.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.completed:,.0f} rows, {task.fields[rate]:,.0f}/s")
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), rate, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=None, rate=0.0)

        def advance(rows: int) -> None:
            bar.update(task, advance=rows, rate=bar.tasks[0].speed or 0.0)

        yield advance
