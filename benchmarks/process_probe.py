"""Runs one command and prints, as one JSON object, what it took: the part of `process` that is a process of its own.

    python -S -E process_probe.py {"command": [...], "timeout_s": 60, "watches_memory": false}

Invariants:
  - CPU is that of the whole tree. Whatever the command leaves behind (daemons) becomes a child of this process, is
    asked to end, later killed, and is counted.
  - The kernel's own sum is used where it is complete. It leaves out processes whose parent ignores SIGCHLD, so every
    process is also looked at now and then; the greater of the two sums counts.

Does not know: what the command does. Needs nothing but the standard library, and little of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

LOOK_INTERVAL_S = 0.1
LEFT_BEHIND_S = 15.0
"""For what was asked to end."""
_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Tree:
    """The processes below this one, as they were seen."""

    def __init__(self, *, watches_memory: bool) -> None:
        self.main = 0
        self.pss_bytes_max = {"main": 0, "below": 0, "beside": 0}
        """At the worst moment of each: the command's own process, those below it in sum, those it let go in sum."""
        self._watches_memory = watches_memory
        self._cpu_s: dict[tuple[int, str], float] = {}

    @property
    def cpu_s(self) -> float:
        """Of all that were ever seen, each as it was seen last."""
        return sum(self._cpu_s.values())

    def look(self) -> list[int]:
        """Look at each; returns who is there."""
        parents: dict[int, int] = {}
        seen: dict[int, tuple[str, float]] = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(") ")[2].split()
            except OSError:
                continue  # It has ended.
            parents[int(name)] = int(fields[1])
            # Numbers are given again: with its start time one is a process' own.
            seen[int(name)] = fields[19], (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        found = _below(os.getpid(), parents)
        for pid in found:
            started, cpu_s = seen[pid]
            self._cpu_s[pid, started] = cpu_s
        if self._watches_memory:
            below = _below(self.main, parents)
            parts = {"main": [self.main], "below": below, "beside": set(found) - {self.main, *below}}
            for part, pids in parts.items():
                self.pss_bytes_max[part] = max(self.pss_bytes_max[part], sum(map(_pss_bytes, pids)))
        return found


def _below(top: int, parents: dict[int, int]) -> list[int]:
    """Every process whose parent, or parent's parent and so on, is `top`."""
    found: list[int] = []
    generation = {top}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found += generation
    return found


def _pss_bytes(pid: int) -> int:
    """A process' own memory, and its share of what it shares; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def run(command: list[str], *, timeout_s: float, watches_memory: bool) -> dict[str, object]:
    """What the command printed, how it ended, and what it took."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tree = Tree(watches_memory=watches_memory)
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    tree.main = process.pid
    ended = threading.Event()

    def look_on() -> None:
        while not ended.wait(LOOK_INTERVAL_S):
            tree.look()
            if time.perf_counter() - began_s > timeout_s:
                _signal(tree, signal.SIGKILL)

    watch = threading.Thread(target=look_on)
    watch.start()
    assert process.stdout is not None
    # A daemon may hold the pipe open: the lines are read by a thread, and the command's end is what is waited for.
    printed: list[str] = []
    reader = threading.Thread(target=lambda out: printed.extend(out), args=(process.stdout,), daemon=True)
    reader.start()
    status = process.wait()
    wall_s = time.perf_counter() - began_s
    ended.set()
    watch.join()
    _reap(tree, until_s=time.perf_counter() + LEFT_BEHIND_S)
    reader.join(1.0)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": status,
        "printed": "".join(printed),
        "wall_s": wall_s,
        "cpu_s": max(usage.ru_utime + usage.ru_stime, tree.cpu_s),
        "pss_bytes": tree.pss_bytes_max,
    }


def _reap(tree: Tree, *, until_s: float) -> None:
    """Wait for what the command left behind; what is still there at `until_s` is killed."""
    _signal(tree, signal.SIGTERM)
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            tree.look()
            if time.perf_counter() > until_s:
                _signal(tree, signal.SIGKILL)
            time.sleep(LOOK_INTERVAL_S)


def _signal(tree: Tree, number: signal.Signals) -> None:
    for pid in tree.look():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
