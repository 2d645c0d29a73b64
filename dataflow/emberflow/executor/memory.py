"""How much memory a worker holds, and when a call holds too much."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CallOutOfMemory

OVERDRAFT = 1.25
"""A call is ended at this multiple of its memory: DuckDB's limit is half of it, and allocators keep some."""


def held_bytes(pid: int) -> int:
    """The memory that only this process holds (resident, not backed by files); 0 where the kernel does not say."""
    try:
        words = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Over one call on a worker. What the worker held before it, warm state, does not count."""

    def __init__(self, pid: int, *, memory_bytes: int) -> None:
        self._pid = pid
        self._memory_bytes = memory_bytes
        self._before_bytes = held_bytes(pid)

    def check(self, call: str, worker: str) -> None:
        """Raises `CallOutOfMemory` if the call holds too much."""
        grown_bytes = held_bytes(self._pid) - self._before_bytes
        if grown_bytes > self._memory_bytes * OVERDRAFT:
            raise CallOutOfMemory(
                f"{call} was given {self._memory_bytes >> 20} MiB of memory and was ended when it held "
                f"{grown_bytes >> 20} MiB on worker {worker}"
            )
