"""Calls on threads of this process: for small jobs, which a worker's start would outweigh.

A call shares everything with the program around it: what it prints goes where the program prints, its memory is not
watched, and a call that does not heed its interruption ends when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .base import Call, Capacity
from .context import CallContext
from .outcome import error_of, failure_of, resolve
from .slots import Slots
from .submission import Submission


class InlineExecutor:
    """Runs each call on a thread of its own, as many at a time as there are CPUs."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._slots = Slots(capacity, start=self._start)
        # Taken and put back by one atomic operation each; the last one put back is the warmest.
        self._idle: list[tuple[str, dict[str, object]]] = [
            (f"inline-{number}", {}) for number in reversed(range(capacity.cpus))
        ]

    def submit(
        self,
        call: Call,
        *,
        on_report: Callable[[bytes], None] | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> Submission:
        """Queues a call. `on_output` hears nothing."""
        return self._slots.submit(call, on_report=on_report, on_output=on_output)

    def close(self) -> None:
        """Cancels what runs and waits until it has ended."""
        self._slots.close()

    def _start(self, submission: Submission) -> None:
        worker, state = self._idle.pop()
        # A daemon: a program that is done does not wait for a call that heeds no interruption.
        thread = threading.Thread(target=self._run, args=(submission, worker, state), name=worker, daemon=True)
        thread.start()

    def _run(self, submission: Submission, worker: str, state: dict[str, object]) -> None:
        call = submission.call
        context = CallContext(
            worker, cpus=call.cpus, memory_bytes=submission.memory_bytes, state=state, report=submission.report
        )
        submission.interruption.on(context.interrupt)
        submission.started_s = time.monotonic()
        outcome: bytes | BaseException
        try:
            outcome = resolve(call.function)(call.payload, context)
        except Exception as error:
            outcome = error
        except BaseException as error:  # The call's end (SystemExit), not that of whoever waits for it.
            outcome = error_of(failure_of(error, where=worker))
        self._idle.append((worker, state))
        self._slots.end(submission, outcome)
