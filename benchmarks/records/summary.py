"""What valsort says of records: how many, whether in order, how many keys are there again, and a checksum of them all.

The checksum is valsort's: the sum, modulo 2**128, of the CRC-32 (zlib's) of each whole record. It does not depend on
the order, and changes with a record that is lost, there twice, or changed (but for one such change in 2**32). Two
files' summaries make the summary of the one after the other, as `valsort -s` does with those of partitions: files can
be summarized in parallel, and the seams between them are checked all the same.

Does not know: whose records these are. Who made them tells what the checksum should be.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import operator
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .files import read_records
from .generator import KEY_BYTES, RECORD_BYTES, Records


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of records in an order."""

    records: int = 0
    checksum: int = 0
    unordered: int = 0
    """Neighbours whose first has the greater key."""
    duplicates: int = 0
    """Neighbours with one key. In order: how many records there are beyond the first of each key."""
    first_key: bytes = b""
    last_key: bytes = b""

    def __add__(self, after: Summary) -> Summary:
        """Of these records and, after them, the others."""
        if not (self.records and after.records):
            return self if self.records else after
        return Summary(
            records=self.records + after.records,
            checksum=(self.checksum + after.checksum) % 2**128,
            unordered=self.unordered + after.unordered + (self.last_key > after.first_key),
            duplicates=self.duplicates + after.duplicates + (self.last_key == after.first_key),
            first_key=self.first_key,
            last_key=after.last_key,
        )

    def holds_the_same(self, other: Summary) -> bool:
        """The same records, in whatever order."""
        return (self.records, self.checksum) == (other.records, other.checksum)


def summarize_records(batches: Iterable[Records]) -> Summary:
    """Of records in memory."""
    return functools.reduce(operator.add, map(_summary, batches), Summary())


def processes_for(records: int) -> int:
    """How many processes are worth starting for so many records: each takes a second, in which one does a million."""
    return max(1, min(os.cpu_count() or 1, records // 2_000_000))


def summarize(paths: Sequence[str], *, processes: int = 1) -> list[Summary]:
    """Of each file, in that many processes; their sum is that of the files in this order."""
    if processes == 1:
        return [_summarize_file(path) for path in paths]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_summarize_file, paths))


def _summarize_file(path: str) -> Summary:
    return summarize_records(read_records(path))


def _summary(records: Records) -> Summary:
    if not len(records):
        return Summary()
    high, low = _as_numbers(records)
    equal_high = high[1:] == high[:-1]
    return Summary(
        records=len(records),
        checksum=sum(map(zlib.crc32, _each(records))) % 2**128,
        unordered=int(np.count_nonzero((high[1:] < high[:-1]) | (equal_high & (low[1:] < low[:-1])))),
        duplicates=int(np.count_nonzero(equal_high & (low[1:] == low[:-1]))),
        first_key=records[0, :KEY_BYTES].tobytes(),
        last_key=records[-1, :KEY_BYTES].tobytes(),
    )


def _as_numbers(records: Records) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint16]]:
    """The keys' first 8 bytes and their last 2, which compare as the bytes do."""
    high = np.ascontiguousarray(records[:, :8]).view(">u8").ravel().astype(np.uint64)
    return high, np.ascontiguousarray(records[:, 8:KEY_BYTES]).view(">u2").ravel().astype(np.uint16)


def _each(records: Records) -> Iterable[bytes]:
    """The records one by one; some thousands at a time are objects."""
    rows = np.ascontiguousarray(records).view(f"V{RECORD_BYTES}").ravel()
    return itertools.chain.from_iterable(rows[at : at + 8192].tolist() for at in range(0, len(rows), 8192))
