"""Histograms of seconds: what is recorded is found again, merged or not.

Run: pytest tests/fs/test_histogram.py
"""

from __future__ import annotations

import math

import msgspec
import pytest
from emberfs.histogram import Histogram
from hypothesis import given
from hypothesis import strategies as st

SECONDS = st.one_of(
    st.floats(0, 5000, allow_nan=False),
    st.floats(1e-7, 1e-3),
    st.sampled_from([0.0, 0.25, 2**-20, 2**-13, 1.0, 1024.0]),
)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_a_merge_is_what_one_that_saw_everything_has(first: list[float], second: list[float]) -> None:
    merged, whole = histogram_of(first), histogram_of(first + second)
    merged.merge(histogram_of(second))
    assert merged.counts == whole.counts
    assert merged.max_s == whole.max_s
    assert math.isclose(merged.total_s, whole.total_s, abs_tol=1e-9)
    assert merged.count == len(first) + len(second)


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_a_difference_is_what_came_between(first: list[float], second: list[float]) -> None:
    whole = histogram_of(first + second)
    came, expected = whole.since(histogram_of(first)), histogram_of(second)
    assert came.counts == expected.counts
    assert math.isclose(came.total_s, expected.total_s, abs_tol=1e-6)
    assert expected.max_s <= came.max_s <= whole.max_s


@given(st.lists(SECONDS))
def test_a_batch_counts_like_one_after_the_other(values: list[float]) -> None:
    batch, single = Histogram(), histogram_of(values)
    batch.record_all(values)
    assert batch.counts == single.counts
    assert batch.max_s == single.max_s
    assert math.isclose(batch.total_s, single.total_s, abs_tol=1e-9)


@given(st.lists(st.floats(1e-6, 1000), min_size=1), st.floats(0, 1))
def test_a_percentile_is_off_by_a_bucket_at_most(values: list[float], part: float) -> None:
    exact = sorted(values)[max(math.ceil(part * len(values)) - 1, 0)]
    assert histogram_of(values).quantile_s(part) == pytest.approx(exact, rel=0.13)


@given(st.lists(SECONDS))
def test_the_rows_of_prometheus_only_grow_and_end_with_all(values: list[float]) -> None:
    rows = histogram_of(values).cumulative()
    counts = [count for _, count in rows]
    assert counts == sorted(counts)
    assert rows[-1] == (math.inf, len(values))
    assert counts[:-1] == [sum(value < bound for value in values) for bound, _ in rows[:-1]]


def test_a_clock_that_goes_backwards_counts_as_nothing() -> None:
    histogram = histogram_of([-1.0])
    assert (histogram.count, histogram.total_s, histogram.max_s) == (1, 0.0, 0.0)


def test_an_empty_one_has_no_percentile() -> None:
    assert Histogram().quantile_s(0.99) == 0.0


@given(st.lists(SECONDS))
def test_it_travels(values: list[float]) -> None:
    histogram = histogram_of(values)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(histogram), type=Histogram) == histogram
