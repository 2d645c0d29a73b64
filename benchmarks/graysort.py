"""GraySort as a real job: records are made, sorted through the exchange, and proven to be sorted.

    python -m benchmarks graysort --size 1GB

What gensort, the sorter and valsort do is done by `records`, emberflow and `records` again; DuckDB sorts the same files
beside it. Rates are of the whole job, from the start of the process to its end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from .dataflow.sides import DUCKDB, FORCED
from .dataflow.sort import sort_jobs
from .process import Cost, cost_row, interleave
from .records import RECORD_BYTES, make_dataset
from .runner import OURS, Row

MB = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much there is to sort."""

    data_bytes: int
    rounds: int


FULL = Size(data_bytes=1000 * MB, rounds=3)
QUICK = Size(data_bytes=100 * MB, rounds=1)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows. Raises WrongResult if the records are not sorted, or not those that were made."""
    begin_s = time.perf_counter()
    records = make_dataset(directory / "records", size.data_bytes // RECORD_BYTES)
    made_s = time.perf_counter() - begin_s
    checked_s = 0.0
    jobs = sort_jobs(directory, records, [DUCKDB])
    validate = jobs[FORCED].check

    def validate_timed() -> None:
        nonlocal checked_s
        begin_s = time.perf_counter()
        validate()
        checked_s = time.perf_counter() - begin_s

    jobs = {OURS: replace(jobs[FORCED], check=validate_timed), DUCKDB: jobs[DUCKDB]}
    costs = interleave(jobs, size.rounds)
    gigabytes = records.size_bytes / 1e9

    def mb_per_s(cost: Cost) -> float:
        return records.size_bytes / MB / cost.wall_s

    def cpu_s_per_gb(cost: Cost) -> float:
        return cost.cpu_s / gigabytes

    what = f"{records.summary.records:,} records"
    return [
        replace(cost_row(f"sort {what}, MB/s", mb_per_s, costs, baseline=DUCKDB), at_most=False),
        cost_row(f"sort {what}, CPU s/GB", cpu_s_per_gb, costs, baseline=DUCKDB),
        Row(row=f"make {what}, MB/s", ours=records.size_bytes / MB / made_s),
        Row(row=f"validate {what}, MB/s", ours=records.size_bytes / MB / checked_s),
    ]
