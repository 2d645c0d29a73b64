"""What this machine has: the CPUs and the memory this process may use.

A container's limits count, as far as the kernel shows them: CPU affinity, and the quota and memory limit of every
control group from ours up. Memory is what may be used in all, not what is free at the moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .base import Capacity

CGROUPS = Path("/sys/fs/cgroup")


def machine_capacity() -> Capacity:
    """CPUs by affinity and quota, at least one; memory by the smallest limit."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _groups():
        cpus = min(cpus, _quota_cpus(folder) or cpus)
        memory_bytes = min(memory_bytes, _limit_bytes(folder) or memory_bytes)
    return Capacity(cpus=cpus, memory_bytes=memory_bytes)


def _groups() -> Iterator[Path]:
    """Folders of the control groups this process is in, version 1 and 2, each with its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root = CGROUPS / controllers.removeprefix("name=") if controllers else CGROUPS
        folder = root / name.lstrip("/")
        while folder.is_relative_to(root):
            yield folder
            folder = folder.parent


def _quota_cpus(folder: Path) -> int | None:
    words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
    # "max" and -1 are no limit. A quota of one and a half CPUs runs two threads, each three quarters of the time.
    return -(-int(words[0]) // int(words[1])) if len(words) == 2 and words[0].isdigit() else None


def _limit_bytes(folder: Path) -> int | None:
    words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    return int(words[0]) if words and words[0].isdigit() else None


def _words(*paths: Path) -> list[str]:
    """What the files say, word by word; nothing if one is not there."""
    try:
        return [word for path in paths for word in path.read_text().split()]
    except OSError:
        return []
