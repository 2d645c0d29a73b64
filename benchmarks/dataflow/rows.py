"""Which rows there are, and how much work is in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..records import RECORD_BYTES, make_dataset
from ..runner import Row
from . import partition, skew, sort, startup, tpch, workers

GB = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    """Of records, to be sorted and partitioned."""
    budgeted_bytes: int
    """Of records, to be sorted within a budget."""
    budget_bytes: int
    """For the workers' memory in sum."""
    scale_factor: float
    """Of TPC-H."""
    queries: range
    """Of TPC-H, by their numbers."""
    rounds: int
    startup_rounds: int
    has_goals: bool
    """And peers that take long, for which there are environments of their own."""


FULL = Size(
    data_bytes=GB,
    budgeted_bytes=4 * GB,
    budget_bytes=1 << 30,
    scale_factor=1,
    queries=range(1, 23),
    rounds=3,
    startup_rounds=9,
    has_goals=True,
)
QUICK = Size(
    data_bytes=GB // 100,
    budgeted_bytes=GB // 10,
    budget_bytes=1 << 29,
    scale_factor=0.01,
    queries=range(1, 23, 6),
    rounds=1,
    startup_rounds=2,
    has_goals=False,
)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    records = make_dataset(directory / "records", size.data_bytes // RECORD_BYTES)
    return [
        *startup.rows(directory, size),
        *sort.rows(directory, records, size),
        *partition.rows(directory, records, size),
        *tpch.rows(directory, size),
        *workers.rows(directory, records, size),
        *skew.rows(directory, size),
    ]
