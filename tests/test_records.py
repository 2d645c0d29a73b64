"""The records that are sorted in benchmarks, and the validator: it finds each way in which a sort can be wrong.

Run: pytest tests/test_records.py.
"""

from __future__ import annotations

import functools
import operator
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.records import (
    KEY_BYTES,
    RECORD_BYTES,
    Keys,
    Summary,
    make_dataset,
    make_records,
    read_records,
    summarize,
    summarize_records,
    write_records,
)
from benchmarks.records.generator import HOT_KEY, Records
from benchmarks.runner import WrongResult

KINDS: list[Keys] = ["uniform", "skewed", "hot", "null"]


def sorted_records(count: int = 1000, keys: Keys = "uniform") -> Records:
    records = make_records(0, count, keys=keys)
    return records[np.argsort(records[:, :KEY_BYTES].copy().view(f"S{KEY_BYTES}").ravel(), kind="stable")]


# ---- the generator


@pytest.mark.parametrize("keys", KINDS)
def test_a_range_is_what_the_whole_has_there(keys: Keys) -> None:
    whole = make_records(0, 500, seed=3, keys=keys)
    parts = [make_records(first, 100, seed=3, keys=keys) for first in range(0, 500, 100)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(make_records(123, 1, seed=3, keys=keys)[0], whole[123])


def test_the_records_are_the_same_for_ever() -> None:
    """A published checksum: of the first 100,000 records of seed 0."""
    assert make_records(7, 1).tobytes()[:26] == b"XDny0DNo3q0000000000000007"
    assert summarize_records([make_records(0, 100_000)]).checksum == 0xC2DF596FE4A2


def test_seeds_give_different_records_and_kinds_different_keys_alone() -> None:
    assert not np.array_equal(make_records(0, 10), make_records(0, 10, seed=1))
    payloads = [make_records(0, 100, keys=keys)[:, KEY_BYTES:] for keys in KINDS]
    assert all(np.array_equal(payloads[0], other) for other in payloads)


def test_records_are_text() -> None:
    assert make_records(0, 1000).tobytes().isascii()


def test_kinds_of_keys_are_spread_as_they_say() -> None:
    hot = make_records(0, 10_000, keys="hot")[:, :KEY_BYTES]
    share = np.mean([key.tobytes() == HOT_KEY for key in hot])
    assert abs(share - 0.6) < 0.02
    _, counts = np.unique(make_records(0, 10_000, keys="skewed")[:, :6], axis=0, return_counts=True)
    assert [round(each / 10_000, 2) for each in sorted(counts)[-3:]] == [0.13, 0.25, 0.5]
    assert summarize_records([sorted_records(10_000, "skewed")]).duplicates < 10


# ---- files


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("suffix", ["parquet", "raw"])
def test_files_hold_the_records(tmp_path: Path, keys: Keys, suffix: str) -> None:
    path = str(tmp_path / f"records.{suffix}")
    records = make_records(0, 1000, keys=keys)
    write_records(path, iter([records[:300], records[300:]]))
    assert np.array_equal(np.concatenate(list(read_records(path))), records)
    if suffix == "raw":
        assert Path(path).stat().st_size == 1000 * RECORD_BYTES
    elif keys == "null":
        assert pq.read_table(path).column("key").null_count == 1000


def test_files_may_be_anywhere_that_fsspec_reaches() -> None:
    records = make_records(0, 10)
    write_records("memory://test-records/a.parquet", iter([records]))
    assert np.array_equal(np.concatenate(list(read_records("memory://test-records/a.parquet"))), records)


def test_half_a_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(make_records(0, 2).tobytes()[:-1])
    with pytest.raises(WrongResult, match="ends within a record"):
        list(read_records(str(tmp_path / "a.raw")))


def test_a_dataset_is_made_once_and_knows_its_sum(tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "data", 1000, files=3)
    assert [pq.read_metadata(path).num_rows for path in made.files] == [333, 333, 334]
    assert made.size_bytes == 100_000
    first = Path(made.files[0]).stat().st_mtime_ns
    assert make_dataset(tmp_path / "data", 1000, files=3) == made
    assert Path(made.files[0]).stat().st_mtime_ns == first
    assert functools.reduce(operator.add, summarize(made.files)).holds_the_same(made.summary)


# ---- the validator


def test_a_checksum_is_the_sum_of_the_records_crcs() -> None:
    records = make_records(0, 20)
    expected = sum(zlib.crc32(record.tobytes()) for record in records)
    assert summarize_records([records]).checksum == expected


def test_sorted_records_are_in_order_and_the_same_as_before() -> None:
    summary = summarize_records([sorted_records()])
    assert (summary.records, summary.unordered, summary.duplicates) == (1000, 0, 0)
    assert summary.holds_the_same(summarize_records([make_records(0, 1000)]))


@pytest.mark.parametrize("where", [1, 499, 500, 999], ids=str)
def test_an_unsorted_pair_is_found(where: int) -> None:
    records = sorted_records()
    records[[where - 1, where]] = records[[where, where - 1]]
    summary = summarize_records([records[:500], records[500:]])
    assert summary.unordered > 0
    assert summary.holds_the_same(summarize_records([sorted_records()]))


def test_a_difference_in_the_last_character_of_a_key_counts() -> None:
    records = np.repeat(make_records(0, 1), 3, axis=0)
    records[:, KEY_BYTES - 1] = [65, 65, 64]
    summary = summarize_records([records])
    assert (summary.unordered, summary.duplicates) == (1, 1)


def test_a_lost_a_repeated_and_a_changed_record_are_found() -> None:
    records = sorted_records()
    right = summarize_records([records])
    assert not summarize_records([np.delete(records, 17, axis=0)]).holds_the_same(right)
    twice = records.copy()
    twice[17] = twice[18]
    found = summarize_records([twice])
    assert found.records == right.records, "one is lost, one is there twice"
    assert not found.holds_the_same(right)
    assert (found.unordered, found.duplicates) == (0, 1)
    changed = records.copy()
    changed[500, -1] ^= 1
    assert not summarize_records([changed]).holds_the_same(right)


def test_the_seams_between_files_are_checked(tmp_path: Path) -> None:
    records = sorted_records(100)
    paths = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for path, part in zip(paths, [records[:40], records[40:40], records[40:]], strict=True):
        write_records(path, iter([part]))
    summaries = summarize(paths)
    assert functools.reduce(operator.add, summaries) == summarize_records([records])
    assert functools.reduce(operator.add, reversed(summaries)).unordered == 1
    assert Summary() + summaries[0] == summaries[0] + Summary() == summaries[0]


def test_null_keys_come_last() -> None:
    nulls, keys = make_records(0, 10, keys="null"), sorted_records(10)
    assert summarize_records([keys, nulls]).unordered == 0
    assert summarize_records([nulls, keys]).unordered == 1
    assert summarize_records([nulls]).duplicates == 9
