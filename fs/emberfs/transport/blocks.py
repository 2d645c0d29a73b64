"""Memory for the buffers of requests, used again and again: fresh pages cost more than the copy that fills them.

It lies in huge pages where the system has them: who takes a MiB out of another process's memory has to hold on to each
page of it, and 256 small ones cost as much as the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

_SCRATCH = memoryview(bytearray(64 << 10))
KEPT_BYTES_MAX = 64 << 20
POOLED_BYTES_MIN = 64 << 10
"""Smaller ones are not worth keeping."""
HUGE_PAGE_BYTES = 2 << 20


class BlockPool:
    """Blocks of memory by rounded size. A recycled block holds what its last user left there."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """A writable block of at least `size` bytes."""
        if size < POOLED_BYTES_MIN:
            return memoryview(bytearray(size))
        capacity = _rounded(size)
        free = self._free.setdefault(capacity, [])
        if not free:
            pages = _huge_pages(max(capacity, HUGE_PAGE_BYTES))
            free += [pages[at : at + capacity] for at in range(0, len(pages), capacity)]
            self._kept_bytes += len(pages)
        self._kept_bytes -= capacity
        return free.pop()

    def give(self, block: memoryview) -> None:
        """Nobody uses `block` any more: not even a thread that was left behind."""
        if len(block) >= POOLED_BYTES_MIN and self._kept_bytes + len(block) <= KEPT_BYTES_MAX:
            self._kept_bytes += len(block)
            self._free.setdefault(len(block), []).append(block)


def _rounded(size: int) -> int:
    """A power of two, or one of three sizes between two of them where those are whole huge pages: a little more than a
    power of two does not take twice the memory, of which only so much is kept."""
    power = 1 << (size - 1).bit_length()
    step = power // 8 if power >= 8 * HUGE_PAGE_BYTES else power
    return size + -size % step


def _huge_pages(size: int) -> memoryview:
    """Zeros, `size` bytes that begin at a huge page and go with their last view."""
    pages = mmap.mmap(-1, size + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A kernel without them.
        pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_PAGE_BYTES
    return memoryview(pages)[begin : begin + size]


def scratch(size: int) -> Iterator[memoryview]:
    """Where bytes go that nobody wants: `size` of them, written by everybody and read by nobody."""
    while size > 0:
        yield _SCRATCH[:size]
        size -= len(_SCRATCH)


class Sump:
    """The same in one piece, for what cannot be cut: everybody's pieces are the same memory."""

    def __init__(self) -> None:
        self._memory = _SCRATCH

    def piece(self, size: int) -> memoryview:
        """`size` bytes."""
        if size > len(self._memory):
            self._memory = memoryview(bytearray(1 << (size - 1).bit_length()))
        return self._memory[:size]
