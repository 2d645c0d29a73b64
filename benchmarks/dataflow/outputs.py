"""Checks of what the jobs made. Each raises WrongResult."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..records import Dataset, Summary, processes_for, summarize
from ..runner import verify

RELATIVE_ERROR = 1e-9
"""Between sums of floats that were added in another order."""


def parquet_files(output: Path) -> list[str]:
    """The files of a dataset in the order of their names."""
    return [str(output)] if output.is_file() else sorted(map(str, output.rglob("*.parquet")))


def check_sorted(output: Path, records: Dataset, *, by_names: bool = True) -> None:
    """All records are there, in order from file to file; `by_names`: in that of the files' names, else in some."""
    summaries = summarize(parquet_files(output), processes=processes_for(records.summary.records))
    if not by_names:
        summaries.sort(key=lambda summary: (summary.first_key, summary.last_key))
    found = functools.reduce(operator.add, summaries, Summary())
    verify(found.holds_the_same(records.summary), f"{output} does not hold the records that were to be sorted")
    verify(found.unordered == 0, f"{output} is not sorted: {found.unordered} records come before smaller ones")


def check_partitioned(output: Path, records: Dataset, *, parts: int) -> None:
    """All records are there, spread evenly over that many files or directories of them."""
    files = parquet_files(output)
    found: dict[str, Summary] = {}
    of_directory = len({Path(file).parent for file in files}) > 1
    summaries = summarize(files, processes=processes_for(records.summary.records))
    for file, summary in zip(files, summaries, strict=True):
        part = str(Path(file).parent) if of_directory else file
        found[part] = found.get(part, Summary()) + summary
    total = functools.reduce(operator.add, found.values(), Summary())
    verify(total.holds_the_same(records.summary), f"{output} does not hold the records that were to be partitioned")
    verify(len(found) == parts, f"{output} has {len(found)} parts, not {parts}")
    mean = total.records / parts
    # The spread of a hash: eight standard deviations either way are nobody's luck.
    far = [part for part, summary in found.items() if abs(summary.records - mean) > 8 * math.sqrt(mean)]
    verify(not far, f"{output}: parts of uneven size: {far}")


def check_same_results(ours: Path, theirs: Path, names: Sequence[str]) -> None:
    """Both directories hold the same rows for each name, in whatever order; floats within RELATIVE_ERROR."""
    for name in names:
        mine, other = (_rows(pq.read_table(side / f"{name}.parquet")) for side in (ours, theirs))
        verify(len(mine) == len(other), f"{name}: {len(mine)} rows, not {len(other)}")
        for one, another in zip(mine, other, strict=True):
            same = len(one) == len(another) and all(itertools.starmap(_is_same, zip(one, another, strict=False)))
            verify(same, f"{name}: {one} is not {another}")


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """In an order that the last digits of floats do not change."""
    return sorted(zip(*(column.to_pylist() for column in table.columns), strict=True), key=_place)


def _place(row: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    exact = [str(int(each)) if _is_whole(each) else repr(each) for each in row if not isinstance(each, float)]
    return exact, [f"{each:.6e}" for each in row if isinstance(each, float)]


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE_ERROR)
    return bool(one == other)


def _is_whole(value: Any) -> bool:
    """An exact sum comes as decimal(38, 0) from one side and as a wider decimal or an integer from the other."""
    return isinstance(value, (int, Decimal)) and value == int(value)
