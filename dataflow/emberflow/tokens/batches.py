"""The steps of a run, one after the other, some of them read ahead.

Invariant: what comes next is a number, the step. So the iterator pickles as where it is, and goes on from there in a
forked child: batches that its parent's threads were reading are read again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from .dataset import Samples, TokenDataset
    from .ranges import Rows

_THREADS_MAX = 4
_ORDER_SAMPLES = 4096
"""So many are put in order, and looked up, at once: each call costs as much as some reads."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One rank's share of one step."""

    step: int
    samples: Samples


class Batches(Iterator[TokenBatch]):
    """See `TokenDataset.batches`. For one thread at a time; `close` it, or let it go, to end the reading ahead."""

    def __init__(
        self, dataset: TokenDataset, batch_size: int, *, step: int, rank: int, ranks: int, prefetch: int
    ) -> None:
        if not 0 <= rank < ranks:
            raise InvalidArgument(f"rank {rank} is none of {ranks}")
        if batch_size < 1 or batch_size % ranks:
            raise InvalidArgument(f"a batch of {batch_size} samples has no equal parts for {ranks} ranks")
        if step < 0 or prefetch < 0:
            raise InvalidArgument("start and prefetch are at least 0")
        self._dataset = dataset
        self._batch_size = batch_size
        self._rank = rank
        self._ranks = ranks
        self._prefetch = prefetch
        self.step = step
        """The next one."""
        self._ahead_steps = max(1, _ORDER_SAMPLES // (batch_size // ranks))
        self._ahead: tuple[int, Rows | None] = (0, None)
        """Where the samples of `ahead_steps` steps are, from one on."""
        self._pool: ThreadPoolExecutor | None = None
        self._reading: deque[Future[TokenBatch]] = deque()
        """The steps from `step` on."""
        self._pid = os.getpid()

    def __next__(self) -> TokenBatch:
        if not self._prefetch:
            batch = self._read(self.step)
        else:
            if self._pid != os.getpid():
                # The threads are the parent's.
                self._pool, self._reading, self._pid = None, deque(), os.getpid()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(min(self._prefetch, _THREADS_MAX), "emberflow-tokens")
            while len(self._reading) < self._prefetch:
                self._reading.append(self._pool.submit(self._read, self.step + len(self._reading)))
            try:
                batch = self._reading[0].result()
            except BaseException:
                # The step is still the next one, and is read again.
                self._reading.clear()
                raise
            self._reading.popleft()
            self._reading.append(self._pool.submit(self._read, self.step + 1 + len(self._reading)))
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the reading ahead, and waits for what is being read; `next` begins it again."""
        pool, self._pool = self._pool, None
        self._reading.clear()
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _batches, (self._dataset, self._batch_size, self.step, self._rank, self._ranks, self._prefetch)

    def _read(self, step: int) -> TokenBatch:
        first, rows = self._ahead
        if rows is None or not first <= step < first + self._ahead_steps:
            # Threads may do this at the same time, to the same end.
            indices = self._dataset.indices(
                step, self._batch_size, rank=self._rank, ranks=self._ranks, steps=self._ahead_steps
            )
            first, rows = self._ahead = step, self._dataset.rows(indices.reshape(-1))
        share = self._batch_size // self._ranks
        begin = (step - first) * share
        return TokenBatch(step, self._dataset.read_rows(rows, begin, begin + share))


def _batches(dataset: TokenDataset, batch_size: int, step: int, rank: int, ranks: int, prefetch: int) -> Batches:
    return Batches(dataset, batch_size, step=step, rank=rank, ranks=ranks, prefetch=prefetch)
