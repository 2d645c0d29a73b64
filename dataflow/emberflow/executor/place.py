"""One place of the local executor: a thread that keeps a worker process and runs one call after another on it.

The process starts with the first call. It is replaced when it dies, when a cancelled call outlives its grace, when a
call holds too much memory, and when it keeps too much afterwards.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from ..errors import CallCancelled, CallOutOfMemory, WorkerDied
from .frames import Ended, Message, Report, Run
from .memory import MemoryWatch, held_bytes
from .outcome import error_of
from .process import WorkerProcess
from .submission import Submission
from .surroundings import surroundings

TICK_S = 0.5
"""How often a running call's memory and its grace are looked at."""

START_S = 60.0
"""Importing our libraries takes 0.2 to 0.6 s on local disk; on a cold network mount it has taken many times that."""


class Place:
    """Runs the calls it is given, in order."""

    def __init__(
        self,
        name: str,
        *,
        grace_s: float,
        keep_bytes: int,
        turn: Callable[[Submission], AbstractContextManager[bool]],
        ended: Callable[[Place, Submission, bytes | BaseException], None],
    ) -> None:
        """A process that holds more than `keep_bytes` after a call is replaced. A call runs within its `turn`, if that
        says so. `ended` is told of each call's end,
        when the place is free for the next."""
        self._name = name
        self._grace_s = grace_s
        self._keep_bytes = keep_bytes
        self._turn = turn
        self._ended = ended
        self._calls: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()
        self._process: WorkerProcess | None = None
        self._number = 0
        # A daemon: if the program ends without closing us, the workers' guards see to them.
        self._thread = threading.Thread(target=self._mind, name=f"emberflow-{name}", daemon=True)
        self._thread.start()

    def give(self, submission: Submission) -> None:
        """Its turn has come. Returns at once."""
        self._calls.put(submission)

    def leave(self) -> None:
        """No more calls: end the process. Returns at once."""
        self._calls.put(None)

    def join(self) -> None:
        """Waits until `leave` is done, unless this is called by the place itself."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _mind(self) -> None:
        while (submission := self._calls.get()) is not None:
            with self._turn(submission) as has_come:
                outcome = self._outcome(submission) if has_come else CallCancelled(submission.call.name)
            process = self._process
            is_bloated = process is not None and held_bytes(process.pid) > self._keep_bytes
            if is_bloated:
                self._process = None
            self._ended(self, submission, outcome)
            if is_bloated and process is not None:
                process.stop(self._grace_s)
        if self._process is not None:
            self._process.stop(self._grace_s)

    def _outcome(self, submission: Submission) -> bytes | BaseException:
        """Runs it to its end, whatever end that is."""
        ooms = _oom_kills()
        try:
            self._ready_process(submission)
            return self._run(submission)
        except EOFError:
            process, self._process = self._process, None
            assert process is not None
            words = f"{submission.call.name}: worker {self._name} {process.bury(submission.output)}"
            if process.was_killed and _oom_kills() > ooms:
                return CallOutOfMemory(f"{words}\nThe kernel had run out of memory and killed a process.")
            return WorkerDied(words)
        except Exception as error:
            # Its grace or its memory is used up, or no process can be started, or a call wrote into our socket:
            # what the process is doing is not known.
            process, self._process = self._process, None
            if process is not None:
                process.kill(submission.output)
            return error

    def _ready_process(self, submission: Submission) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.forget_output()
            return
        if self._process is not None:
            self._process.bury(lambda _: None)
            self._process = None
        self._process = WorkerProcess(self._name)
        deadline_s = time.monotonic() + START_S
        while self._next_frame(submission) is None:
            if time.monotonic() > deadline_s:
                raise WorkerDied(f"{submission.call.name}: worker {self._name} did not start in {START_S:.0f} s")

    def _run(self, submission: Submission) -> bytes | BaseException:
        process, call = self._process, submission.call
        assert process is not None
        if submission.cancelled_s is not None:
            return CallCancelled(call.name)
        self._number += 1
        run = Run(
            number=self._number,
            name=call.name,
            function=call.function,
            cpus=call.cpus,
            memory_bytes=submission.memory_bytes,
            surroundings=surroundings(),
        )
        watch = MemoryWatch(process.pid, memory_bytes=submission.memory_bytes)
        process.send(run, call.payload)
        submission.started_s = time.monotonic()
        submission.interruption.on(partial(process.interrupt, self._number))
        while True:
            match self._next_frame(submission):
                case Report(), note:
                    submission.report(note)
                case Ended(failure), answer:
                    return answer if failure is None else error_of(failure)
                case None:
                    watch.check(call.name, self._name)

    def _next_frame(self, submission: Submission) -> tuple[Message, bytes] | None:
        """The process's next frame; None after a tick without one. Raises `CallCancelled` when the grace is over."""
        assert self._process is not None
        timeout_s = TICK_S
        if submission.cancelled_s is not None:
            timeout_s = min(TICK_S, submission.cancelled_s + self._grace_s - time.monotonic())
            if timeout_s <= 0:
                raise CallCancelled(submission.call.name)
        return self._process.receive(timeout_s, submission.output)


def _oom_kills() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    try:
        words = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
