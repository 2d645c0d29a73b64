"""Records in several files, and what is known of them from when they were made."""

from __future__ import annotations

import functools
import json
import multiprocessing
import operator
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .files import BATCH_RECORDS, write_records
from .generator import RECORD_BYTES, Keys, Records, make_records
from .summary import Summary, processes_for, summarize_records

FILES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Files of one kind of records, and what their records sum up to."""

    files: list[str]
    summary: Summary

    @property
    def size_bytes(self) -> int:
        """Of the records, not of the files."""
        return self.summary.records * RECORD_BYTES


def make_dataset(
    directory: Path,
    records: int,
    *,
    keys: Keys = "uniform",
    seed: int = 0,
    files: int = FILES,
    raw: bool = False,
) -> Dataset:
    """Records 0 to `records - 1`, unless the directory has them already, made by several processes if they are many.

    `raw`: bare records in place of Parquet.
    """
    of_files = directory / "summary.json"
    paths = [str(directory / f"part-{number:05}.{'raw' if raw else 'parquet'}") for number in range(files)]
    made_as = [records, keys, seed, files, raw]
    if of_files.exists():
        known = json.loads(of_files.read_text())
        assert known["made_as"] == made_as, f"{directory} holds other records"
        return Dataset(files=paths, summary=Summary(records=records, checksum=known["checksum"]))
    directory.mkdir(parents=True)
    ends = [records * number // files for number in range(files + 1)]
    parts = [(path, begin, end - begin, seed, keys) for path, begin, end in zip(paths, ends, ends[1:], strict=False)]
    processes = processes_for(records)
    if processes == 1:
        made = list(map(_make_part, parts))
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            made = list(pool.map(_make_part, parts))
    summary = functools.reduce(operator.add, made)
    of_files.write_text(json.dumps({"made_as": made_as, "checksum": summary.checksum}))
    return Dataset(files=paths, summary=Summary(records=records, checksum=summary.checksum))


def _make_part(part: tuple[str, int, int, int, Keys]) -> Summary:
    path, first, count, seed, keys = part
    summary = Summary()

    def batches() -> Iterator[Records]:
        nonlocal summary
        for begin in range(first, first + count, BATCH_RECORDS):
            made = make_records(begin, min(BATCH_RECORDS, first + count - begin), seed=seed, keys=keys)
            summary += summarize_records([made])
            yield made

    write_records(path, batches())
    return summary
