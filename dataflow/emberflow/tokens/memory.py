"""Memory for samples, which is used again when nobody has any of it any more.

Fresh memory has a page fault for each 4 KiB, which costs as much as to copy bytes there; and an allocator that threads
ask, and others give back to, returns it to the system again and again.

Invariant: a block is handed out only while the pool has the one reference to it. An array refers to the memory that it
is a view of, and so does whatever is made of it without a copy (views, memoryviews, tensors).
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT_MAX = 16
"""Blocks: batches that are read ahead, and those that a trainer holds."""
KEPT_BYTES_MAX = 16 << 20
"""What is longer is not kept."""

Tokens = npt.NDArray[np.uint32]


class Memory:
    """Of one dataset. Any number of threads may take some: a block that one looks at is out of the others' sight."""

    def __init__(self, new: Callable[[int], Any]) -> None:
        """`new`: gives a writable buffer of so many bytes."""
        self._new = new
        self._blocks: deque[Tokens] = deque()
        _everyone.add(self)

    def take(self, rows: int, width: int) -> Tokens:
        """[rows, width], with anything in it."""
        size = rows * width
        # Blocks have few sizes, so that what was of one shape will do for others.
        capacity = 1 << max(size - 1, 0).bit_length()
        for _ in range(len(self._blocks)):
            try:
                block = self._blocks.popleft()
            except IndexError:
                break
            view, is_alone = None, sys.getrefcount(block) == _ALONE
            if is_alone and block.size == capacity:
                # The view is made before others see the block again.
                view = block[:size].reshape(rows, width)
            if not is_alone or view is not None or len(self._blocks) < KEPT_MAX - 1:
                self._blocks.append(block)
            if view is not None:
                return view
        if not 0 < 4 * size <= KEPT_BYTES_MAX or len(self._blocks) >= KEPT_MAX:
            return np.empty((rows, width), "<u4")
        # An array as its base would be the one that views refer to, and not the block.
        block = np.frombuffer(memoryview(self._new(4 * capacity)), "<u4")
        view = block[:size].reshape(rows, width)
        assert view.base is block
        self._blocks.append(block)
        return view

    def clear(self) -> None:
        """Keep nothing."""
        self._blocks.clear()

    def __reduce__(self) -> tuple[object, ...]:
        return Memory, (self._new,)


_everyone: weakref.WeakSet[Memory] = weakref.WeakSet()


def _keep_nothing() -> None:
    for memory in list(_everyone):
        memory.clear()


# Afterwards no server fills it in place any more: new memory is quicker.
os.register_at_fork(before=_keep_nothing)


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
