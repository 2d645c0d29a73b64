"""Calls as tasks of a Ray cluster: an existing one, or one that is started on this machine.

Each call is a Ray task that asks for its CPUs and memory and is never retried by Ray; what happens to it comes back as
the stream of `ray_call`, which one thread per running call follows. Our own line (`Slots`) stands before Ray's, because
Ray starves a big task behind small ones.

What a worker printed just before it died is in Ray's logs only. What else a cluster needs (working_dir, packages, a
token) is set in the program's own `ray.init` or by Ray's environment variables.
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
from . import ray_cluster
from .base import Call
from .frames import Run
from .outcome import error_of
from .slots import Slots
from .submission import Submission
from .surroundings import surroundings

if TYPE_CHECKING:
    from .ray_call import Event

FORCE_S = 1.0
"""How long after its grace a call is killed from outside, if its worker did not manage to."""


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
        self._task = self._ray.remote(max_retries=0, num_returns="streaming")(_bootstrap())

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
        outcome: bytes | BaseException
        try:
            outcome = self._outcome(submission)
        except Exception as error:
            outcome = self._translated(error, submission)
        self._slots.end(submission, outcome)

    def _outcome(self, submission: Submission) -> bytes | BaseException:
        call = submission.call
        run = Run(
            number=0,
            function=call.function,
            cpus=call.cpus,
            memory_bytes=submission.memory_bytes,
            surroundings=surroundings(),
        )
        task = self._task.options(num_cpus=call.cpus, memory=submission.memory_bytes, name=call.name)
        events = task.remote(run.surroundings.path, msgspec.msgpack.encode(run), call.payload, self._grace_s)
        force = threading.Timer(self._grace_s + FORCE_S, self._kill, args=(events,))
        force.daemon = True

        def cancel() -> None:
            force.start()
            self._ray.cancel(events)

        submission.interruption.on(cancel)
        try:
            return self._followed(events, submission)
        finally:
            submission.interruption.on(None)
            force.cancel()

    def _followed(self, events: Any, submission: Submission) -> bytes | BaseException:
        """The end of the stream. Raises Ray's error where the stream breaks off."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        outcome: bytes | BaseException | None = None
        for reference in events:
            match self._ray.get(reference):
                case "started", _:
                    submission.started_s = time.monotonic()
                case "report", note:
                    submission.report(note)
                case "output", data:
                    submission.output(decoder.decode(data))
                case "failed", failure:
                    outcome = error_of(failure)
                case "answered", answer:
                    outcome = answer
        assert outcome is not None
        return outcome

    def _kill(self, events: Any) -> None:
        with suppress(self._ray.exceptions.RayError):  # Its end and this crossed.
            self._ray.cancel(events, force=True)

    def _translated(self, error: Exception, submission: Submission) -> Exception:
        """What an error of Ray means to whoever waits for the call."""
        names, call = self._ray.exceptions, submission.call
        match error:
            case names.OutOfMemoryError():
                return CallOutOfMemory(f"{call.name}: {error}")
            case names.TaskCancelledError():
                return CallCancelled(f"{call.name} was cancelled, by somebody else: {error}")
            case names.WorkerCrashedError() | names.NodeDiedError() | names.ObjectLostError():
                return WorkerDied(f"{call.name}: {error}")
            case names.LocalRayletDiedError() | names.RaySystemError():
                return WorkerDied(f"{call.name}: {error}")
            case names.RayError():
                return FlowError(f"{call.name}: {error}")
        return error


def _bootstrap() -> Callable[[tuple[str, ...], bytes, bytes, float], Iterator[Event]]:
    """The task. Ray pickles a nested function by value, so it runs before anything of ours can be imported."""

    def run_call(path: tuple[str, ...], run: bytes, payload: bytes, grace_s: float) -> Iterator[Event]:
        import sys

        sys.path.extend(entry for entry in path if entry not in sys.path)
        from . import ray_call

        yield from ray_call.run(run, payload, grace_s)

    return run_call
