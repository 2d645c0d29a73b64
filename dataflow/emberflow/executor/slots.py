"""Who may run now: the line of waiting calls, and the capacity that those who run share.

First come, first served: the call at the head of the line waits until it fits, and nobody passes it, so a big call
is never starved by small ones. Here a call begins and ends exactly once, whatever cancels it when.

Invariants: the running calls never sum to more than the capacity, nor to more calls than `places`; a call's share is
given back before its future is done, so who waits for one call may count on its place for the next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ..errors import CallCancelled, InvalidArgument, SessionClosed
from .base import Call, Capacity
from .submission import Submission


class Slots:
    """Admits calls to an executor. Safe to use from many threads; holds no lock while it calls anybody."""

    def __init__(
        self,
        capacity: Capacity,
        *,
        start: Callable[[Submission], None],
        places: int | None = None,
        largest: Capacity | None = None,
    ) -> None:
        """`start` is called when a call's turn has come, from any thread, and returns soon. `largest` is the most one
        call may ask for, where that is less than the capacity."""
        self.capacity = capacity
        self._largest = largest or capacity
        self._start = start
        self._changed = threading.Condition()
        self._waiting: deque[Submission] = deque()
        self._running: dict[Submission, int] = {}
        """Each with the thread that is just ending it, or 0."""
        self._cpus = capacity.cpus
        self._memory_bytes = capacity.memory_bytes
        self._places = capacity.cpus if places is None else places
        """These three: what is free."""
        self._closed = False

    def submit(
        self, call: Call, *, on_report: Callable[[bytes], None] | None, on_output: Callable[[str], None] | None
    ) -> Submission:
        """Puts a call into the line. Raises `InvalidArgument` if it never fits, `SessionClosed` after `close`."""
        if not 1 <= call.cpus <= self._largest.cpus:
            raise InvalidArgument(f"{call.name} asks for {call.cpus} CPUs; there are {self._largest.cpus}")
        memory_bytes = call.memory_bytes or self._largest.memory_bytes * call.cpus // self._largest.cpus
        if not 0 <= memory_bytes <= self._largest.memory_bytes:
            raise InvalidArgument(
                f"{call.name} asks for {memory_bytes} bytes of memory; there are {self._largest.memory_bytes}"
            )
        submission = Submission(
            call, memory_bytes=memory_bytes, cancel=self.cancel, on_report=on_report, on_output=on_output
        )
        with self._changed:
            if self._closed:
                raise SessionClosed(f"{call.name} was submitted to an executor that is closed")
            self._waiting.append(submission)
        self._advance()
        return submission

    def cancel(self, submission: Submission) -> None:
        """Takes a waiting call out of the line, or asks a running one to stop."""
        with self._changed:
            is_waiting = submission in self._waiting
            is_running = self._running.get(submission) == 0
            if submission.cancelled_s is not None or not (is_waiting or is_running):
                return
            submission.cancelled_s = time.monotonic()
            if is_waiting:
                self._waiting.remove(submission)
        if is_running:
            submission.interruption.request()
            return
        submission.future.set_exception(_cancelled(submission))
        self._advance()

    def end(self, submission: Submission, outcome: bytes | BaseException) -> None:
        """A running call has ended: its share is free, then its future is done."""
        with self._changed:
            assert self._running[submission] == 0
            self._running[submission] = threading.get_ident()
            self._cpus += submission.call.cpus
            self._memory_bytes += submission.memory_bytes
            self._places += 1
        submission.interruption.on(None)
        self._advance()
        if submission.cancelled_s is not None:
            outcome = _cancelled(submission)
        if isinstance(outcome, BaseException):
            submission.future.set_exception(outcome)
        else:
            submission.future.set_result(outcome)
        with self._changed:
            del self._running[submission]
            self._changed.notify_all()

    def close(self) -> None:
        """Cancels every call and waits for the end of those that run. May be called by a listener of a future."""
        with self._changed:
            self._closed = True
            submissions = [*self._waiting, *self._running]
        for submission in submissions:
            submission.cancel()
        this_thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: all(ender == this_thread for ender in self._running.values()))

    def _advance(self) -> None:
        while (submission := self._next()) is not None:
            self._start(submission)

    def _next(self) -> Submission | None:
        """The call whose turn it is, with its share taken."""
        with self._changed:
            if self._closed or not self._waiting:  # Who still waits then is being cancelled.
                return None
            head = self._waiting[0]
            if head.call.cpus > self._cpus or head.memory_bytes > self._memory_bytes or self._places == 0:
                return None
            self._cpus -= head.call.cpus
            self._memory_bytes -= head.memory_bytes
            self._places -= 1
            self._running[head] = 0
            return self._waiting.popleft()


def _cancelled(submission: Submission) -> CallCancelled:
    return CallCancelled(f"{submission.call.name} was cancelled")
