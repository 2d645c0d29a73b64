"""Partitioning records into 16 parts by the hash of their key: to exchange files on the store, and to Parquet."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..process import Job, cost_row, cpu_s, interleave, wall_s
from ..records import Dataset
from ..runner import OURS, Row, verify
from .outputs import check_partitioned
from .sides import DUCKDB, POLARS, RAY, SMALLPOND, automatic, command, our_job, those_set_up

if TYPE_CHECKING:
    from .rows import Size

PARTS = 16
SHUFFLE = "shuffle"
"""We again, to shuffle files in place of Parquet."""
SHUFFLE_GOAL = 1.6
PARQUET_GOAL = 1.0
SMALLPOND_GOAL = 0.2


def rows(directory: Path, records: Dataset, size: Size) -> list[Row]:
    """All rows."""
    peers = those_set_up([DUCKDB, POLARS, SMALLPOND, RAY] if size.has_goals else [DUCKDB])
    costs = interleave(_jobs(directory, records, peers), size.rounds)
    for cost in costs[SHUFFLE]:
        verify(cost.told["records"] == records.summary.records, "the shuffle files do not hold all records")
    what = f"hash-{PARTS} of {records.size_bytes / 1e9:g} GB"
    shown = [DUCKDB, POLARS, RAY, SMALLPOND]
    goals = (SHUFFLE_GOAL, PARQUET_GOAL, SMALLPOND_GOAL) if size.has_goals else (None, None, None)
    found = [
        cost_row(f"{what} to shuffle files, CPU s", cpu_s, costs, ours=SHUFFLE, baseline=POLARS, goal=goals[0]),
        cost_row(f"{what} to Parquet, CPU s", cpu_s, costs, peers=shown, baseline=DUCKDB, goal=goals[1]),
        cost_row(f"{what} to shuffle files, wall s", wall_s, costs, ours=SHUFFLE, baseline=POLARS),
        cost_row(f"{what} to Parquet, wall s", wall_s, costs, peers=shown, baseline=DUCKDB),
    ]
    if SMALLPOND in costs:
        # What it partitions into are the files that it shuffles through: Parquet, which it then links.
        name = f"{what} to shuffle files, beside smallpond, CPU s"
        found.append(cost_row(name, cpu_s, costs, ours=SHUFFLE, baseline=SMALLPOND, goal=goals[2]))
        found.append(cost_row(f"{what} to Parquet, beside smallpond, CPU s", cpu_s, costs, baseline=SMALLPOND))
    return found


def _jobs(directory: Path, records: Dataset, peers: list[str]) -> dict[str, Job]:
    store = directory / "store"
    session, given = automatic(store), {"inputs": records.files, "parts": PARTS}
    output = directory / "parts-ours"
    parquet = our_job("partition", session, store, output, output=str(output), **given)
    jobs = {
        SHUFFLE: our_job("shuffle", session, store, **given),
        OURS: replace(parquet, check=functools.partial(check_partitioned, output, records, parts=PARTS)),
    }
    for peer in peers:
        output, root = directory / f"parts-{peer}", directory / "smallpond-root"
        rooted = {"data_root": str(root)} if peer == SMALLPOND else {}
        jobs[peer] = Job(
            command=command(peer, "partition", output=str(output), **given, **rooted),
            outputs=[output, root],
            check=functools.partial(check_partitioned, output, records, parts=PARTS),
        )
    return jobs
