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
_PAIRED_PREFETCH_MIN = 4
_PAIRED_BYTES_MAX = 4 << 20
"""Two steps of so many bytes are read as one: to hand a batch from thread to thread takes as long as to read some."""
_ORDER_SAMPLES = 4096
"""So many are put in order, and looked up, at once: each call costs as much as some reads. At first few, and then twice
as many each time: nobody waits for the first batch until many are looked up."""


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
        step_bytes = 4 * (batch_size // ranks) * (dataset.sequence_tokens + 1)
        is_paired = prefetch >= _PAIRED_PREFETCH_MIN and 2 * step_bytes <= _PAIRED_BYTES_MAX
        self._at_once = 2 if is_paired else 1
        """Steps that are read by one call."""
        self._ahead: tuple[range, Rows | None] = (range(0), None)
        """Steps, and where their samples are."""
        self._pool: ThreadPoolExecutor | None = None
        self._ready: deque[TokenBatch] = deque()
        """The steps from `step` on."""
        self._reading: deque[Future[list[TokenBatch]]] = deque()
        """Those that follow."""
        self._pid = os.getpid()

    def __next__(self) -> TokenBatch:
        if not self._prefetch:
            (batch,) = self._read(self.step, 1, *self._looked_up(self.step, 1))
            self.step += 1
            return batch
        if self._pid != os.getpid():
            # The threads are the parent's.
            self._pool, self._reading, self._pid = None, deque(), os.getpid()
        # Of another step is what an interrupt, between two of the lines below, left behind.
        if self._ready and self._ready[0].step != self.step:
            self._ready.clear()
        while not self._ready:
            self._read_ahead()
            try:
                read = self._reading[0].result()
            except BaseException:
                # The step is still the next one, and is read again.
                self._reading.clear()
                raise
            self._reading.popleft()
            if read[0].step == self.step:
                self._ready.extend(read)
            else:
                self._reading.clear()
        if len(self._ready) == 1:
            self._read_ahead()
        batch = self._ready.popleft()
        self.step += 1
        return batch

    def _read_ahead(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(self._prefetch // self._at_once, _THREADS_MAX), "emberflow-tokens")
        while len(self._reading) < self._prefetch // self._at_once:
            step = self.step + len(self._ready) + len(self._reading) * self._at_once
            where = self._looked_up(step, self._at_once)
            self._reading.append(self._pool.submit(self._read, step, self._at_once, *where))

    def close(self) -> None:
        """Ends the reading ahead, and waits for what is being read; `next` begins it again."""
        pool, self._pool = self._pool, None
        self._ready.clear()
        self._reading.clear()
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _batches, (self._dataset, self._batch_size, self.step, self._rank, self._ranks, self._prefetch)

    def _looked_up(self, step: int, count: int) -> tuple[Rows, int]:
        """Where the samples of so many steps from `step` on are: in those rows, from one of them on."""
        steps, rows = self._ahead
        share = self._batch_size // self._ranks
        if rows is None or step not in steps or step + count > steps.stop:
            steps = range(step, step + max(count, min(_ORDER_SAMPLES // share, 2 * len(steps) or 2 * self._prefetch)))
            indices = self._dataset.indices(
                step, self._batch_size, rank=self._rank, ranks=self._ranks, steps=len(steps)
            )
            rows = self._dataset.rows(indices.reshape(-1))
            self._ahead = steps, rows
        return rows, (step - steps.start) * share

    def _read(self, step: int, count: int, rows: Rows, begin: int) -> list[TokenBatch]:
        share = self._batch_size // self._ranks
        read = self._dataset.read_rows(rows, begin, begin + count * share)
        return [TokenBatch(step + at, read.part(at * share, (at + 1) * share)) for at in range(count)]


def _batches(dataset: TokenDataset, batch_size: int, step: int, rank: int, ranks: int, prefetch: int) -> Batches:
    return Batches(dataset, batch_size, step=step, rank=rank, ranks=ranks, prefetch=prefetch)
