"""One forward call's door to the rows of its sequences.

Attention hands in a layer's fresh rows and gets back what its queries look at. `Fresh` is the door without a cache:
every segment begins at position 0, and the fresh rows are all there are, with their gradients. `Step` is the door to a
`Cache`: rows are written as they come, and addresses that all layers share are computed once.

A batch is worked through in runs: a segment of many tokens is a run by itself, and neighbouring segments of one token
each (decoding) are one run, whose rows are gathered and attended to together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..model.batch import Batch, Segment
from ..model.lesson import Lessons
from .cache import Cache
from .spec import RowSpec


class Rows(Protocol):
    """What attention needs of a forward call."""

    @property
    def runs(self) -> tuple[tuple[Segment, ...], ...]:
        """Segments in order; of several in a run each has one token."""

    @property
    def lessons(self) -> Lessons | None:
        """What indexers are to be taught in this call; None: nothing."""

    def append(self, layer: int, kind: str, segment: Segment, first: int, fresh: Tensor, begin: int) -> Tensor:
        """Keeps `fresh` as the segment's rows from `first` on; gives its rows from `begin` to the last fresh one."""


class Fresh:
    """No cache: nothing came before, and nothing is kept."""

    def __init__(self, batch: Batch, lessons: Lessons | None = None) -> None:
        self.runs = tuple((segment,) for segment in batch.segments)
        self.lessons = lessons

    def append(self, layer: int, kind: str, segment: Segment, first: int, fresh: Tensor, begin: int) -> Tensor:
        assert first == 0 and begin == 0
        return fresh


class Step:
    """A forward call on sequences of a cache. The sequences' lengths move when it is `done`."""

    def __init__(self, cache: Cache, batch: Batch, *, apart: bool = False) -> None:
        """`apart`: every segment is a run by itself."""
        self.cache = cache
        self.batch = batch
        self.lessons: Lessons | None = None
        self._specs = [{row.kind: row for row in rows} for rows in cache.spec.layers]
        self._known: dict[object, Tensor | None] = {}
        assert not torch.is_grad_enabled(), "rows in a cache have no gradients"
        sequences = [s.sequence for s in batch.segments]
        assert len(set(sequences)) == len(sequences), "a sequence is in a batch once"
        runs: list[list[Segment]] = []
        for segment in batch.segments:
            assert segment.sequence is not None
            assert segment.first == cache.length(segment.sequence)
            # What replays does so in whole pages: `write` knows nothing of it.
            assert segment.end <= cache.known(segment.sequence) or segment.first >= cache.known(segment.sequence)
            assert segment.count > 1 or segment.first >= cache.known(segment.sequence)
            cache.reserve(segment.sequence, segment.end)
            if segment.count == 1 and not apart and runs and runs[-1][0].count == 1:
                runs[-1].append(segment)
            else:
                runs.append([segment])
        for segment in batch.segments:
            assert segment.sequence is not None
            cache.begin(segment.sequence, segment.end)
        self.runs = tuple(tuple(run) for run in runs)

    def done(self) -> None:
        """All rows of all layers are written."""
        for segment in self.batch.segments:
            assert segment.sequence is not None
            self.cache.advance(segment.sequence, segment.end)

    def spec(self, layer: int, kind: str) -> RowSpec:
        return self._specs[layer][kind]

    def pool(self, layer: int, kind: str) -> Tensor:
        return self.cache.pool(layer, kind)

    def append(self, layer: int, kind: str, segment: Segment, first: int, fresh: Tensor, begin: int) -> Tensor:
        assert segment.sequence is not None
        row = self.spec(layer, kind)
        last = first + fresh.shape[0]
        pool = self.cache.pool(layer, kind)
        if row.trailing is None:
            if fresh.shape[0] and segment.end > self.cache.known(segment.sequence):
                self._put(pool, row, segment.sequence, first, last, fresh)
            return self.cache.read(layer, row, segment.sequence, begin, last)
        # A ring forgets: what came before is read before the fresh rows take its place.
        before = self.cache.read(layer, row, segment.sequence, begin, first) if begin < first else None
        kept = min(fresh.shape[0], self.cache.ring(row))
        self._put(pool, row, segment.sequence, last - kept, last, fresh[fresh.shape[0] - kept :])
        return fresh if before is None else torch.cat([before, fresh])

    def _put(self, pool: Tensor, row: RowSpec, sequence: int, first: int, last: int, fresh: Tensor) -> None:
        slots = self.known(
            ("put", row.tokens, row.trailing, sequence, first, last),
            lambda: self.cache.slots(row, sequence, first, last),
        )
        assert slots is not None
        pool.index_copy_(0, slots, fresh.to(pool.dtype))

    def write(self, layer: int, kind: str, run: tuple[Segment, ...], numbers: tuple[int, ...], fresh: Tensor) -> None:
        """Keeps fresh[i] as row numbers[i] of run[i]'s sequence."""
        row = self.spec(layer, kind)
        slots = self.known(
            ("write", row.tokens, row.trailing, run, numbers),
            lambda: self._slots(row, run, torch.tensor(numbers, device=self.cache.device)[:, None])[:, 0],
        )
        assert slots is not None
        self.cache.pool(layer, kind).index_copy_(0, slots, fresh.to(row.dtype))

    def last(self, layer: int, kind: str, run: tuple[Segment, ...], count: int) -> Tensor:
        """[B, count]: where the last `count` rows of one token lie, this call's own included; -1 before position 0."""
        row = self.spec(layer, kind)

        def find() -> Tensor:
            ends = torch.tensor([s.end for s in run], device=self.cache.device)[:, None]
            numbers = ends - count + torch.arange(count, device=self.cache.device)
            return self._slots(row, run, numbers).masked_fill(numbers < 0, -1)

        slots = self.known(("last", row.trailing, run, count), find)
        assert slots is not None
        return slots

    def all(self, layer: int, kind: str, run: tuple[Segment, ...]) -> Tensor:
        """[B, N]: where all rows of whole windows lie; -1 behind a sequence's last."""
        row = self.spec(layer, kind)

        def find() -> Tensor:
            counts = [s.end // row.tokens for s in run]
            numbers = torch.arange(max(counts), device=self.cache.device).expand(len(run), -1)
            limit = torch.tensor(counts, device=self.cache.device)[:, None]
            return self._slots(row, run, numbers).masked_fill(numbers >= limit, -1)

        slots = self.known(("all", row.tokens, run), find)
        assert slots is not None
        return slots

    def slots(self, layer: int, kind: str, run: tuple[Segment, ...], numbers_BK: Tensor) -> Tensor:
        """[B, K]: where these rows lie; -1 stays -1."""
        row = self.spec(layer, kind)
        return self._slots(row, run, numbers_BK.clamp(min=0)).masked_fill(numbers_BK < 0, -1)

    def known(self, key: object, find: Callable[[], Tensor | None]) -> Tensor | None:
        """What layers share of this call, found when first asked for."""
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def _slots(self, row: RowSpec, run: tuple[Segment, ...], numbers_BK: Tensor) -> Tensor:
        sequences = self.known(
            ("sequences", run), lambda: torch.tensor([s.sequence for s in run], device=self.cache.device)
        )
        assert sequences is not None
        if row.trailing is not None:
            ring = self.cache.ring(row)
            return sequences[:, None] * ring + numbers_BK.remainder(ring)
        per_page = row.rows_per_page
        pages = self.cache.tables[sequences[:, None], numbers_BK // per_page]
        return pages * per_page + numbers_BK % per_page
