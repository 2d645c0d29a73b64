"""What more workers bring, and what they need: time with one and with two, and memory while much is sorted."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..process import Job, interleave, paired_ratio, wall_s
from ..records import RECORD_BYTES, Dataset, make_dataset
from ..runner import Row
from .outputs import check_sorted
from .partition import PARTS
from .sides import DUCKDB, command, forced, our_job

if TYPE_CHECKING:
    from .rows import Size

SPEEDUP_GOAL = 1.7
ONE, TWO = "1 worker", "2 workers"
STORE, DISK = "store", "directory"
"""Where the exchange is. The store's server needs some of a core, too; a directory needs none."""


def rows(directory: Path, records: Dataset, size: Size) -> list[Row]:
    """All rows."""
    return [
        _speedup_row(f"sort {records.size_bytes / 1e9:g} GB", "sort", directory, records, size),
        _speedup_row(f"hash-{PARTS} of {records.size_bytes / 1e9:g} GB", "partition", directory, records, size),
        _memory_row(directory, size),
    ]


def _speedup_row(what: str, operation: str, directory: Path, records: Dataset, size: Size) -> Row:
    """Two workers against one, each with one thread, through the exchange; and two threads of DuckDB's against one."""
    store, output = directory / "store", directory / "by-workers"
    given: dict[str, Any] = {"inputs": records.files, "output": str(output)}
    if operation == "partition":
        given["parts"] = PARTS
    jobs = {}
    for count in (1, 2):
        session = forced(store) | {"workers": count, "threads": 1}
        jobs[f"{STORE} {count}"] = our_job(operation, session, store, output, **given)
        jobs[f"{DISK} {count}"] = our_job(operation, session | {"data_root": str(store)}, store, output, **given)
        jobs[f"{DUCKDB} {count}"] = Job(command=command(DUCKDB, operation, threads=count, **given), outputs=[output])
    costs = interleave(jobs, size.rounds)
    speedup = {side: paired_ratio(wall_s, costs[f"{side} 1"], costs[f"{side} 2"]) for side in (STORE, DISK, DUCKDB)}
    return Row(
        row=f"{what}, {TWO} by {ONE}: speedup",
        ours=speedup.pop(STORE),
        peers=speedup,
        goal=SPEEDUP_GOAL if size.has_goals else None,
    )


def _memory_row(directory: Path, size: Size) -> Row:
    """A sort of more than the workers together may have."""
    records = make_dataset(directory / "many-records", size.budgeted_bytes // RECORD_BYTES)
    store, output = directory / "store", directory / "many-sorted"
    session = forced(store) | {"workers": 2, "threads": 1, "memory_limit": f"{size.budget_bytes}B"}
    job = our_job("sort", session, store, output, inputs=records.files, output=str(output))
    job = replace(job, watches_memory=True, check=functools.partial(check_sorted, output, records))
    [cost] = interleave({TWO: job}, 1)[TWO]
    mib = {part: found / 2**20 for part, found in cost.pss_bytes.items()}
    return Row(
        row=f"sort {size.budgeted_bytes / 1e9:g} GB in {size.budget_bytes / 2**20:,.0f} MiB: PSS of workers, MiB",
        ours=mib["below"],
        peers={"driver": mib["main"], "store": mib["beside"]},
        goal=size.budget_bytes / 2**20 if size.has_goals else None,
        at_most=True,
    )
