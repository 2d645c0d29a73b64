"""TPC-H: its queries in one session, over tables in 8 parts: on the store for us, beside it for DuckDB."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from .. import tpch
from ..process import Job, cost_row, cpu_s, interleave, wall_s
from ..runner import OURS, Row
from .outputs import check_same_results
from .sides import DUCKDB, FORCED, automatic, command, forced, our_job

if TYPE_CHECKING:
    from .rows import Size

AUTOMATIC_WALL_GOAL = 1.5
FORCED_CPU_GOAL = 6.0


def rows(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    files = tpch.data(size.scale_factor)
    costs = interleave(_jobs(directory, files, size.queries), size.rounds)
    what = f"TPC-H SF{size.scale_factor:g}, {len(size.queries)} queries"
    goals = (AUTOMATIC_WALL_GOAL, FORCED_CPU_GOAL) if size.has_goals else (None, None)
    return [
        cost_row(f"{what}, wall s", wall_s, costs, baseline=DUCKDB, goal=goals[0]),
        cost_row(f"{what}, forced, CPU s", cpu_s, costs, ours=FORCED, baseline=DUCKDB, goal=goals[1]),
        cost_row(f"{what}, CPU s", cpu_s, costs, baseline=DUCKDB),
        cost_row(f"{what}, forced, wall s", wall_s, costs, ours=FORCED, baseline=DUCKDB),
    ]


def _jobs(directory: Path, files: dict[str, list[str]], queries: range) -> dict[str, Job]:
    texts = {f"q{number:02}": text for number, text in tpch.queries().items() if number in queries}
    stored = _put(files, f"ember://{directory}/store-tables/!/tpch")
    theirs, store = directory / "tpch-duckdb", directory / "store"
    jobs = {
        # First, so that its results are there for the others to be compared with.
        DUCKDB: Job(
            command=command(DUCKDB, "queries", tables=files, texts=texts, output=str(theirs)),
            outputs=[theirs],
        )
    }
    for name, session in {OURS: automatic(store), FORCED: forced(store)}.items():
        output = directory / f"tpch-{name}"
        job = our_job("queries", session, store, output, tables=stored, texts=texts, output=str(output))
        jobs[name] = replace(job, check=functools.partial(check_same_results, output, theirs, list(texts)))
    return jobs


def _put(files: dict[str, list[str]], place: str) -> dict[str, list[str]]:
    """The tables on a store that this process then lets go of; returns the URLs of their files."""
    filesystem, path = fsspec.url_to_fs(place)
    stored = {}
    for table, paths in files.items():
        filesystem.makedirs(f"{path}/{table}", exist_ok=True)
        for source in paths:
            filesystem.put_file(source, f"{path}/{table}/{Path(source).name}")
        stored[table] = [f"{place}/{table}/{Path(source).name}" for source in paths]
    filesystem.close()  # Else a server would have the store, for us and for each job beside us.
    return stored
