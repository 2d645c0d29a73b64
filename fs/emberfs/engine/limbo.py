"""Blocks that no record names any more, until nobody can be reading them.

Invariant: a block is released when every read that began before it was given up is over.

Does not know: what blocks are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence


class Limbo:
    """Of one target."""

    def __init__(self, release: Callable[[int], None]) -> None:
        """`release` is called with the position of each block that may be used again."""
        self._release = release
        self._epoch = 0
        self._reads_by_epoch: dict[int, int] = {}
        self._blocks: deque[tuple[int, Sequence[int]]] = deque()
        """(epoch, positions): free once no read of that epoch or an earlier one is left."""

    def begin_read(self) -> int:
        """A read begins; returns its epoch, for `end_read`."""
        epoch = self._epoch
        self._reads_by_epoch[epoch] = self._reads_by_epoch.get(epoch, 0) + 1
        return epoch

    def end_read(self, epoch: int) -> None:
        """A read of that epoch is over."""
        left = self._reads_by_epoch[epoch] - 1
        if left:
            self._reads_by_epoch[epoch] = left
            return
        del self._reads_by_epoch[epoch]
        if self._blocks:
            self._release_all()

    def add(self, positions: Sequence[int]) -> None:
        """No record names these any more."""
        self._blocks.append((self._epoch, positions))
        self._epoch += 1
        self._release_all()

    def _release_all(self) -> None:
        oldest = min(self._reads_by_epoch, default=self._epoch + 1)
        while self._blocks and self._blocks[0][0] < oldest:
            for position in self._blocks.popleft()[1]:
                self._release(position)
