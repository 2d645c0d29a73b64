"""Memory for the buffers of requests, used again and again: fresh pages cost more than the copy that fills them."""

from __future__ import annotations

from collections.abc import Iterator

_SCRATCH = memoryview(bytearray(64 << 10))
KEPT_BYTES_MAX = 64 << 20
POOLED_BYTES_MIN = 64 << 10
"""Smaller ones are not worth keeping."""


class BlockPool:
    """Blocks of memory by power of two. A recycled block holds what its last user left there."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """A writable block of at least `size` bytes."""
        if size < POOLED_BYTES_MIN:
            return memoryview(bytearray(size))
        capacity = 1 << (size - 1).bit_length()
        free = self._free.get(capacity)
        if not free:
            return memoryview(bytearray(capacity))
        self._kept_bytes -= capacity
        return free.pop()

    def give(self, block: memoryview) -> None:
        """Nobody uses `block` any more: not even a thread that was left behind."""
        if len(block) >= POOLED_BYTES_MIN and self._kept_bytes + len(block) <= KEPT_BYTES_MAX:
            self._kept_bytes += len(block)
            self._free.setdefault(len(block), []).append(block)


def scratch(size: int) -> Iterator[memoryview]:
    """Where bytes go that nobody wants: `size` of them, written by everybody and read by nobody."""
    while size > 0:
        yield _SCRATCH[:size]
        size -= len(_SCRATCH)
