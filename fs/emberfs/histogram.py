"""How long things took: a histogram of seconds whose buckets grow with the value.

Eight buckets to a doubling, from a microsecond to a thousand seconds: a percentile is off by a sixteenth at most, and
the memory is bounded whatever is recorded. A histogram is what a server keeps, what travels, and what is added up.

Invariants: counts, sum and maximum of a merge are those of recording everything into one; of a difference they are
those of what came between, the maximum apart, which is then known to its bucket only.

Does not know: what is measured, or by which clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import frexp, inf, ldexp

import msgspec

PARTS = 8
"""Buckets to a doubling."""
EXPONENT_MIN = -19
"""The first bucket has everything below 2**-20 s, 1 us."""
EXPONENT_MAX = 10
"""The last one has everything from 2**10 s on, a quarter of an hour."""
_OVER = (EXPONENT_MAX - EXPONENT_MIN + 1) * PARTS + 1
_SHIFT = 1 - PARTS - EXPONENT_MIN * PARTS


class Histogram(msgspec.Struct, array_like=True):
    """Counts per bucket; only buckets that something fell into are there."""

    counts: dict[int, int] = msgspec.field(default_factory=dict)
    total_s: float = 0.0
    max_s: float = 0.0

    @property
    def count(self) -> int:
        """How many were recorded."""
        return sum(self.counts.values())

    def record(self, seconds: float) -> None:
        """Count one. A clock that went backwards counts as 0."""
        bucket = _bucket_of(seconds)
        try:
            self.counts[bucket] += 1
        except KeyError:
            self.counts[bucket] = 1
        if seconds > 0.0:
            self.total_s += seconds
            if seconds > self.max_s:
                self.max_s = seconds

    def record_all(self, values: Sequence[float]) -> None:
        """Count each of `values`. Sorting them costs a quarter of looking for the bucket of each."""
        values = sorted(max(value, 0.0) for value in values) if min(values, default=0.0) < 0.0 else sorted(values)
        begin = 0
        while begin < len(values):
            bucket = _bucket_of(values[begin])
            end = bisect_left(values, _bound_s(bucket + 1), begin)
            self.counts[bucket] = self.counts.get(bucket, 0) + end - begin
            begin = end
        if values:
            self.total_s += sum(values)
            self.max_s = max(self.max_s, values[-1])

    def merge(self, other: Histogram) -> None:
        """Add what `other` holds."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)

    def since(self, earlier: Histogram) -> Histogram:
        """What was recorded after `earlier`, an older copy of this one."""
        counts = {
            bucket: count - before
            for bucket, count in self.counts.items()
            if count > (before := earlier.counts.get(bucket, 0))
        }
        if not counts:
            return Histogram()
        max_s = min(self.max_s, _bound_s(max(counts) + 1))
        return Histogram(counts, max(self.total_s - earlier.total_s, 0.0), max_s)

    def copy(self) -> Histogram:
        """One that stays as this one is now."""
        return Histogram(dict(self.counts), self.total_s, self.max_s)

    def quantile_s(self, part: float) -> float:
        """What `part` (0 to 1) of the values are not above, to its bucket's middle; 0.0 where nothing was recorded."""
        left = part * self.count
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return min((_bound_s(bucket) + _bound_s(bucket + 1)) / 2, self.max_s)
        return self.max_s

    def cumulative(self) -> list[tuple[float, int]]:
        """(seconds, how many are below), for each doubling: what Prometheus takes. The last one is without end."""
        rows = []
        seen, buckets = 0, sorted(self.counts.items())
        for exponent in range(EXPONENT_MIN - 1, EXPONENT_MAX + 1):
            end = (exponent - EXPONENT_MIN + 1) * PARTS + 1
            while buckets and buckets[0][0] < end:
                seen += buckets.pop(0)[1]
            rows.append((ldexp(1.0, exponent), seen))
        return [*rows, (inf, seen + sum(count for _, count in buckets))]


def _bucket_of(seconds: float) -> int:
    fraction, exponent = frexp(seconds)
    if exponent < EXPONENT_MIN or seconds <= 0.0:
        return 0
    if exponent > EXPONENT_MAX:
        return _OVER
    return exponent * PARTS + int(fraction * (2 * PARTS)) + _SHIFT


def _bound_s(bucket: int) -> float:
    """The least value of `bucket`."""
    if bucket <= 0:
        return 0.0
    if bucket > _OVER:
        return inf
    doublings, part = divmod(bucket - 1, PARTS)
    return ldexp(PARTS + part, EXPONENT_MIN - 1 + doublings) / PARTS
