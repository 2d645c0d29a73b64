"""Memory for samples, which is used again when nobody has any of it any more.

Fresh memory has a page fault for each 4 KiB, which costs as much as to copy bytes there; and an allocator that threads
ask, and others give back to, returns it to the system again and again.

Samples begin somewhat behind a page's beginning. A file's samples often lie at multiples of 4,096 bytes, and a copy
whose target is 1 to 31 bytes ahead of its source, modulo 4,096, takes up to ten times as long on some processors; a
sample has one token more than the next one is away in the file, so that sample after sample would come to such a place.

Invariant: a block is handed out only while the pool has the one reference to it. An array refers to the memory that it
is a view of, and so does whatever is made of it without a copy (views, memoryviews, tensors).
"""

from __future__ import annotations

import sys
from collections import deque

import numpy as np
import numpy.typing as npt

KEPT_MAX = 16
"""Blocks: batches that are read ahead, and those that a trainer holds."""
KEPT_BYTES_MAX = 16 << 20
"""A longer block is not kept."""
PAGE_WORDS = 1024
AHEAD_WORDS = 16
"""Samples begin so far behind a page's beginning."""

Tokens = npt.NDArray[np.uint32]


class Memory:
    """Of one dataset. Any number of threads may take some: a block that one looks at is out of the others' sight."""

    def __init__(self) -> None:
        self._blocks: deque[tuple[Tokens, int]] = deque(maxlen=KEPT_MAX)
        """And where samples begin in each."""

    def take(self, rows: int, width: int) -> Tokens:
        """[rows, width], with anything in it."""
        size = rows * width
        for _ in range(len(self._blocks)):
            try:
                block, begin = self._blocks.popleft()
            except IndexError:
                break
            is_free = sys.getrefcount(block) == _ALONE and block.size == size + PAGE_WORDS
            # The view is made before others see the block again.
            view = block[begin : begin + size].reshape(rows, width) if is_free else None
            self._blocks.append((block, begin))
            if view is not None:
                return view
        block = np.empty(size + PAGE_WORDS, "<u4")
        begin = (AHEAD_WORDS - block.__array_interface__["data"][0] // 4) % PAGE_WORDS
        view = block[begin : begin + size].reshape(rows, width)
        if view.nbytes <= KEPT_BYTES_MAX:
            self._blocks.append((block, begin))
        return view

    def clear(self) -> None:
        """Keep nothing."""
        self._blocks.clear()

    def __reduce__(self) -> tuple[object, ...]:
        return Memory, ()


def _references_alone() -> int:
    """What is counted of an array that a function's variable refers to, and nothing else: Python's versions differ."""
    block = np.empty(1, "<u4")
    return sys.getrefcount(block)


def _counts_views() -> bool:
    """Whether a view is counted in the same way: not where a debugger has references too, or threads need no lock."""
    block = np.empty(1, "<u4")
    alone, view = sys.getrefcount(block), block.reshape(1, 1)
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return has_lock and alone == _ALONE and sys.getrefcount(block) == _ALONE + 1 and view.base is block


_ALONE = _references_alone()
if not _counts_views():
    _ALONE = -1  # Then nothing is used again.
