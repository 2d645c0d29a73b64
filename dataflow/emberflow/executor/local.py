"""Calls in warm worker processes of this machine: the default.

A worker starts when there is a call for it and none is idle, in parallel with others, and then serves call after call.
No process is left when the executor is closed, nor when the driver ends in any other way, kill -9 included.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..errors import InvalidArgument
from .base import Call, Capacity
from .machine import Machine
from .place import Place
from .slots import Slots
from .submission import Submission


class LocalExecutor:
    """Up to `workers` processes, which share `cpus` and `memory_bytes`."""

    def __init__(
        self,
        *,
        workers: int,
        cpus: int,
        memory_bytes: int,
        machine: Machine | None = None,
        grace_s: float = 2.0,
        name: str = "local",
    ) -> None:
        """Calls wait for their share of `machine`; None: this executor may use all it is given, whoever else runs. A
        cancelled call has `grace_s` to end before its worker is killed. `name` is the first part of the workers'
        names."""
        if min(workers, cpus, memory_bytes) < 1:
            raise InvalidArgument("an executor has at least one worker, one CPU and one byte of memory")
        self.capacity = Capacity(cpus=cpus, memory_bytes=memory_bytes)
        self._machine = machine
        self._name = name
        self._grace_s = grace_s
        # A worker may keep what is warm, and still leaves the next call half of its share.
        self._keep_bytes = memory_bytes // workers // 2
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._places: list[Place] = []
        self._idle: list[Place] = []
        """The last one is the warmest."""
        self._slots = Slots(self.capacity, start=self._start, places=workers)

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
        """Cancels what runs, ends the workers, and waits for that."""
        self._slots.close()
        with self._lock:
            places, self._places = self._places, []
        for place in places:
            place.leave()
        for place in places:
            place.join()

    def _start(self, submission: Submission) -> None:
        with self._lock:
            place = self._idle.pop() if self._idle else self._new_place()
        place.give(submission)

    def _new_place(self) -> Place:
        place = Place(
            f"{self._name}-{next(self._numbers)}",
            grace_s=self._grace_s,
            keep_bytes=self._keep_bytes,
            turn=self._turn,
            ended=self._ended,
        )
        self._places.append(place)
        return place

    def _turn(self, submission: Submission) -> AbstractContextManager[bool]:
        if self._machine is None:
            return nullcontext(True)
        return self._machine.share(
            submission.call.cpus,
            submission.memory_bytes,
            largest=self.capacity,
            is_cancelled=lambda: submission.cancelled_s is not None,
        )

    def _ended(self, place: Place, submission: Submission, outcome: bytes | BaseException) -> None:
        with self._lock:
            self._idle.append(place)
        self._slots.end(submission, outcome)
