"""Keys that are not spread: 60 % of the rows on one, or all of them NULL, against the same job on keys that are."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..process import Job, interleave, paired_ratio, run_job, wall_s
from ..records import RECORD_BYTES, Dataset, Keys, make_dataset
from ..runner import Row
from .outputs import check_same_results, check_sorted
from .sides import DUCKDB, command, forced, our_job

if TYPE_CHECKING:
    from .rows import Size

GOAL = 2.0
UNIFORM = "uniform"
SKEWED: dict[Keys, str] = {"hot": "60 % on one key", "null": "all keys NULL"}
# Their results are one row each: it is the way there that costs.
AGGREGATE = "SELECT count(*), sum(n), max(m) FROM (SELECT count(*) n, max(payload) m FROM records GROUP BY key)"
JOIN = (
    "SELECT count(*), count(d.key), max(r.payload), max(d.m) FROM records r "
    "LEFT JOIN (SELECT key, max(payload) m FROM few GROUP BY key) d ON r.key = d.key"
)
"""With the keys of a sixteenth of the records."""


def rows(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    kinds: list[Keys] = ["uniform", *SKEWED]
    data = {
        keys: make_dataset(directory / f"keys-{keys}", size.data_bytes // RECORD_BYTES, keys=keys) for keys in kinds
    }
    found = _rows("sort", {keys: _sort_job(directory, data[keys]) for keys in kinds}, size)
    for name, text in {"aggregate": AGGREGATE, "join": JOIN}.items():
        found += _rows(name, {keys: _query_job(directory, data[keys], name, text) for keys in kinds}, size)
    return found


def _rows(name: str, jobs: dict[str, Job], size: Size) -> list[Row]:
    costs = interleave(jobs, size.rounds)
    return [
        Row(
            row=f"{name} of {size.data_bytes / 1e9:g} GB, {what}, by uniform: wall",
            ours=paired_ratio(wall_s, costs[keys], costs[UNIFORM]),
            goal=GOAL if size.has_goals else None,
            at_most=True,
        )
        for keys, what in SKEWED.items()
    ]


def _sort_job(directory: Path, records: Dataset) -> Job:
    store, output = directory / "store", directory / "skew-sorted"
    job = our_job("sort", forced(store), store, output, inputs=records.files, output=str(output))
    return replace(job, check=functools.partial(check_sorted, output, records))


def _query_job(directory: Path, records: Dataset, name: str, text: str) -> Job:
    """Checked against DuckDB's answer."""
    store, output, theirs = directory / "store", directory / "skew-ours", directory / "skew-duckdb"
    given = {"tables": {"records": records.files, "few": records.files[:1]}, "texts": {name: text}}

    def check() -> None:
        run_job(Job(command=command(DUCKDB, "queries", output=str(theirs), **given), outputs=[theirs]))
        check_same_results(output, theirs, [name])

    job = our_job("queries", forced(store), store, output, output=str(output), **given)
    return replace(job, check=check)
