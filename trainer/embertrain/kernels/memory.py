"""Memory of large results, which is used again when nobody has any of it any more.

torch returns large tensors on a CPU to the system and asks for them again. The gradient of all experts' weights then is
new memory in each step, and half of its time goes into page faults. What is kept here is in huge pages where Linux has
them.

Invariant: a block is handed out only while the one reference to it is ours. A tensor made of it has another, and so has
whatever shares that tensor's storage.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections import deque

import torch
from torch import Tensor

LARGE_BYTES = 4 << 20
KEPT_BYTES_MAX = 1 << 30
"""What one process keeps in all; the rest is torch's as before."""


class Blocks:
    """Blocks of memory by their size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, deque[mmap.mmap]] = {}
        self._bytes = 0

    def take(self, size_bytes: int) -> mmap.mmap | None:
        """One with anything in it; None where so much is kept that another would be too much."""
        with self._lock:
            some = self._blocks.setdefault(size_bytes, deque())
            for _ in range(len(some)):
                block = some.popleft()
                some.append(block)
                # Ours is in the queue, and one is this function's.
                if sys.getrefcount(block) == _ALONE:
                    return block
            if self._bytes + size_bytes > KEPT_BYTES_MAX:
                return None
            block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
            some.append(block)
            self._bytes += size_bytes
            return block


def _references(*, has_tensor: bool) -> int:
    """What is counted of a block in a queue that a function's variable refers to as well: Python's versions differ."""
    some = deque([mmap.mmap(-1, 1)])
    block = some.popleft()
    some.append(block)
    tensor = torch.frombuffer(block, dtype=torch.uint8) if has_tensor else None
    count = sys.getrefcount(block)
    del tensor
    return count


_ALONE = _references(has_tensor=False)
_IS_COUNTED = _references(has_tensor=True) == _ALONE + 1 and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether that tells if there is a tensor: not where a debugger has references too, or threads need no lock."""
_blocks = Blocks()


def large(like: Tensor, *shape: int) -> Tensor:
    """A tensor [shape] like another one, with anything in it."""
    size_bytes = math.prod(shape) * like.element_size()
    if not _IS_COUNTED or size_bytes < LARGE_BYTES or like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape)
    block = _blocks.take(size_bytes)
    return like.new_empty(shape) if block is None else torch.frombuffer(block, dtype=like.dtype).view(shape)
