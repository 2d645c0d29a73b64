"""Calls as tasks of a Ray cluster: an existing one, or one that is started on this machine.

One thread per running call follows its task (`ray_task.py`). Our own line (`Slots`) stands before Ray's, because Ray
starves a big task behind small ones.

What a worker printed just before it died is in Ray's logs only. What else a cluster needs (working_dir, packages, a
token) is set in the program's own `ray.init` or by Ray's environment variables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from . import ray_cluster
from .base import Call
from .ray_task import RayTask, RayTasks
from .slots import Slots
from .submission import Submission


class RayExecutor:
    """Runs calls on the nodes of a Ray cluster."""

    def __init__(
        self,
        *,
        address: str | None = None,
        cpus: int | None = None,
        memory_bytes: int | None = None,
        grace_s: float = 2.0,
    ) -> None:
        """Uses the Ray that the program has initialised; or else connects to the cluster at `address` (or
        `RAY_ADDRESS`); or else starts one here, which ends with the last executor that uses it. Calls sum to `cpus` and
        `memory_bytes` at most, by default all that the cluster has now. A cancelled call has `grace_s` to end before
        its worker is killed."""
        self._ray = ray_cluster.acquire(self, address=address, cpus=cpus, memory_bytes=memory_bytes)
        self.capacity, largest = ray_cluster.capacity(self._ray, cpus=cpus, memory_bytes=memory_bytes)
        self._slots = Slots(self.capacity, start=self._start, largest=largest)
        self._grace_s = grace_s
        self._tasks = RayTasks(self._ray)

    def submit(
        self,
        call: Call,
        *,
        on_report: Callable[[bytes], None] | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> Submission:
        """Queues a call."""
        return self._slots.submit(call, on_report=on_report, on_output=on_output)

    def close(self) -> None:
        """Cancels what runs, waits for its end, and lets go of Ray."""
        self._slots.close()
        ray_cluster.release(self)

    def _start(self, submission: Submission) -> None:
        threading.Thread(target=self._run, args=(submission,), name="emberflow-ray", daemon=True).start()

    def _run(self, submission: Submission) -> None:
        self._slots.end(submission, RayTask(self._tasks, submission, grace_s=self._grace_s).outcome())
