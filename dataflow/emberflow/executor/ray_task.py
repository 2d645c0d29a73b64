"""One call as a Ray task, seen from the driver: starting it, following it, killing it.

The task asks Ray for the call's CPUs and memory and is never retried by Ray. What happens to it comes back as the
stream of `ray_call`.
"""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import CallCancelled, CallOutOfMemory, FlowError, WorkerDied
from .frames import Run
from .outcome import error_of
from .submission import Submission
from .surroundings import surroundings

if TYPE_CHECKING:
    from .ray_call import Event, Where

FORCE_S = 1.0
"""How long after its grace a call is killed from outside, if its own process did not manage to."""


class RayTasks:
    """The functions that run in Ray's workers. Ray pickles nested functions by value, so they run where nothing of ours
    can be imported yet."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.run_call = ray.remote(max_retries=0, num_returns="streaming")(_run_call())
        self.kill = ray.remote(max_retries=0, num_cpus=0)(_kill())


def _run_call() -> Callable[[tuple[str, ...], bytes, bytes, float], Iterator[Event]]:
    def run_call(path: tuple[str, ...], run: bytes, payload: bytes, grace_s: float) -> Iterator[Event]:
        import signal
        import sys

        # Ray cancels by the handler of SIGINT. Where a shell script runs the driver in its background, there is none.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        from . import ray_call

        yield from ray_call.run(run, payload, grace_s)

    return run_call


def _kill() -> Callable[[int, int], None]:
    def kill(pid: int, thread: int) -> None:
        import os
        import signal

        # Without the call's own thread the process runs another call by now.
        if os.path.exists(f"/proc/{pid}/task/{thread}"):
            os.kill(pid, signal.SIGKILL)

    return kill


class RayTask:
    """One run of a call."""

    def __init__(self, tasks: RayTasks, submission: Submission, *, grace_s: float) -> None:
        self._tasks = tasks
        self._ray = tasks.ray
        self._submission = submission
        self._grace_s = grace_s
        self._where: Where | None = None

    def outcome(self) -> bytes | BaseException:
        """Runs it to its end, whatever end that is."""
        try:
            return self._run()
        except Exception as error:
            return self._translated(error)

    def _run(self) -> bytes | BaseException:
        call, submission = self._submission.call, self._submission
        run = Run(
            number=0,
            name=call.name,
            function=call.function,
            cpus=call.cpus,
            memory_bytes=submission.memory_bytes,
            surroundings=surroundings(),
        )
        task = self._tasks.run_call.options(num_cpus=call.cpus, memory=submission.memory_bytes, name=call.name)
        events = task.remote(run.surroundings.path, msgspec.msgpack.encode(run), call.payload, self._grace_s)
        force = threading.Timer(self._grace_s + FORCE_S, self._kill, args=(events,))
        force.daemon = True

        def cancel() -> None:
            force.start()
            self._ray.cancel(events)

        submission.interruption.on(cancel)
        try:
            return self._followed(events)
        finally:
            submission.interruption.on(None)
            force.cancel()

    def _followed(self, events: Any) -> bytes | BaseException:
        """The end of the stream. Raises Ray's error where the stream breaks off."""
        submission = self._submission
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        outcome: bytes | BaseException | None = None
        try:
            for reference in events:
                match self._ray.get(reference):
                    case "started", where:
                        self._where = where
                        submission.started_s = time.monotonic()
                    case "report", note:
                        submission.report(note)
                    case "output", data:
                        submission.output(decoder.decode(data))
                    case "failed", failure:
                        outcome = error_of(failure)
                    case "answered", answer:
                        outcome = answer
        except self._ray.exceptions.RayError:
            # A worker whose call held too much memory says so and goes.
            if outcome is None:
                raise
        assert outcome is not None
        return outcome

    def _kill(self, events: Any) -> None:
        """Of a call that lets no other thread of its process run: Ray's cancel cannot reach it, forced or not."""
        where = self._where
        with suppress(self._ray.exceptions.RayError):  # Its end and this crossed.
            if where is None:
                self._ray.cancel(events, force=True)
                return
            there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(where.node, soft=False)
            self._tasks.kill.options(scheduling_strategy=there).remote(where.pid, where.thread)

    def _translated(self, error: Exception) -> Exception:
        """What an error of Ray means to whoever waits for the call."""
        errors, name = self._ray.exceptions, self._submission.call.name
        at = f"{name} on worker {self._where.worker}" if self._where else name
        if isinstance(error, errors.OutOfMemoryError):
            return CallOutOfMemory(f"{at}: {error}")
        if isinstance(error, errors.TaskCancelledError):
            return CallCancelled(f"{at}: Ray was told to cancel it: {error}")
        gone = (errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError)
        if isinstance(error, (*gone, errors.ObjectLostError, errors.RaySystemError)):
            return WorkerDied(f"{at}: {error}")
        return FlowError(f"{at}: {error}") if isinstance(error, errors.RayError) else error
