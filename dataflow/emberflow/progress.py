"""A progress bar for one query: rows as they come by, or DuckDB's own estimate while it works alone.

Shown on a terminal, or when asked for. It never changes what the query does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import duckdb
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

_POLL_INTERVAL_S = 0.1


@contextmanager
def row_progress(title: str, *, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A counter of rows with their rate on stderr; the block calls what it is given with each number of new rows.

    `show=None` means: on a terminal only.
    """
    console = Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield lambda rows: None
        return
    rate = TextColumn("{task.completed:,.0f} rows, {task.fields[rate]:,.0f}/s")
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), rate, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=None, rate=0.0)

        def advance(rows: int) -> None:
            bar.update(task, advance=rows, rate=bar.tasks[0].speed or 0.0)

        yield advance


@contextmanager
def query_progress(cursor: duckdb.DuckDBPyConnection, title: str, *, show: bool | None) -> Iterator[None]:
    """A bar on stderr while the block runs queries on `cursor`. `show=None` means: on a terminal only."""
    console = Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield
        return
    # DuckDB estimates only when its own bar is on, which must then not be printed.
    cursor.execute("SET enable_progress_bar = true")
    cursor.execute("SET enable_progress_bar_print = false")
    done = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=100)

        def poll() -> None:
            while not done.wait(_POLL_INTERVAL_S):
                # Negative while DuckDB has no estimate.
                bar.update(task, completed=max(0.0, cursor.query_progress()))

        poller = threading.Thread(target=poll, name="emberflow-progress", daemon=True)
        poller.start()
        try:
            yield
            bar.update(task, completed=100)
        finally:
            done.set()
            poller.join()
