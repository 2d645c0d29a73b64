"""Sorting records by key, from Parquet to Parquet."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..process import Job, cost_row, cpu_s, interleave, wall_s
from ..records import Dataset
from ..runner import OURS, Row
from .outputs import check_sorted
from .sides import DUCKDB, FORCED, POLARS, RAY, SMALLPOND, automatic, command, forced, our_job, those_set_up

if TYPE_CHECKING:
    from .rows import Size

AUTOMATIC_GOAL = 1.15
FORCED_GOAL = 1.3
SMALLPOND_GOAL = 0.2


def rows(directory: Path, records: Dataset, size: Size) -> list[Row]:
    """All rows."""
    jobs = sort_jobs(directory, records, those_set_up([DUCKDB, POLARS, SMALLPOND, RAY] if size.has_goals else [DUCKDB]))
    costs = interleave(jobs, size.rounds)
    what = f"sort {records.size_bytes / 1e9:g} GB"
    peers = [DUCKDB, POLARS, RAY, SMALLPOND]
    goals = (AUTOMATIC_GOAL, FORCED_GOAL, SMALLPOND_GOAL) if size.has_goals else (None, None, None)
    found = [
        cost_row(f"{what}, CPU s", cpu_s, costs, peers=peers, baseline=DUCKDB, goal=goals[0]),
        cost_row(f"{what}, forced, CPU s", cpu_s, costs, ours=FORCED, baseline=DUCKDB, goal=goals[1]),
        cost_row(f"{what}, wall s", wall_s, costs, peers=peers, baseline=DUCKDB),
        cost_row(f"{what}, forced, wall s", wall_s, costs, ours=FORCED, baseline=DUCKDB),
    ]
    if SMALLPOND in costs:
        # It shuffles to sort, as we do when we are forced to; by ourselves we do not.
        name = f"{what}, beside smallpond, CPU s"
        found.append(cost_row(name, cpu_s, costs, baseline=SMALLPOND, goal=goals[2]))
        name = f"{what}, forced, beside smallpond, CPU s"
        found.append(cost_row(name, cpu_s, costs, ours=FORCED, baseline=SMALLPOND, goal=goals[2]))
    return found


def sort_jobs(directory: Path, records: Dataset, peers: list[str]) -> dict[str, Job]:
    """Ours, ours through the exchange, and the peers'."""
    store, jobs = directory / "store", {}
    for name, session in {OURS: automatic(store), FORCED: forced(store)}.items():
        output = directory / f"sorted-{name}"
        job = our_job("sort", session, store, output, inputs=records.files, output=str(output))
        jobs[name] = replace(job, check=functools.partial(check_sorted, output, records))
    for peer in peers:
        single = peer in (DUCKDB, POLARS)
        output = directory / f"sorted-{peer}{'.parquet' if single else ''}"
        root = directory / "smallpond-root"
        rooted = {"data_root": str(root)} if peer == SMALLPOND else {}
        jobs[peer] = Job(
            command=command(peer, "sort", inputs=records.files, output=str(output), **rooted),
            outputs=[output, root],
            check=functools.partial(check_sorted, output, records, by_names=False),
        )
    return jobs
