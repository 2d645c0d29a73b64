"""What runs calls somewhere: the one interface of the inline, local and Ray executors.

A call is a function by name and the bytes it is given; the answer is bytes. An executor knows nothing of SQL, plans or
files: it gives a call the CPUs and the memory it asks for, never more in sum than there are, and tells the truth about
how it ended. A call that was cancelled, or whose worker died, may have had any part of its effects; callers make
effects harmless by writing under an attempt's own name.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One run of a function on a worker."""

    name: str
    """For people: in logs and reports, "join 3/8"."""
    function: str
    """"package.module:function", called as `function(payload, context)` and answering with bytes."""
    payload: bytes
    cpus: int = 1
    memory_bytes: int = 0
    """What it may use; 0: its share by `cpus`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What an executor has in sum, and what the calls that run at one moment may sum to."""

    cpus: int
    memory_bytes: int


class Context(Protocol):
    """What a running call is given. One per call."""

    worker: str
    """Which worker runs it: "local-0", a Ray node and process."""
    cpus: int
    memory_bytes: int
    state: dict[str, object]
    """Kept by the worker from call to call: a warm connection, open filesystems."""

    def report(self, note: bytes) -> None:
        """Tells the caller something while the call runs (progress). Cheap; may be dropped, never reordered."""

    def on_interrupt(self, interrupt: Callable[[], None] | None) -> None:
        """What to call, from another thread, when the call is cancelled; None: nothing any more. If the call was
        cancelled already it is called at once."""


class Handle(Protocol):
    """A call that was submitted."""

    call: Call
    future: Future[bytes]
    """Done when the call has ended: its bytes, the exception it raised (with the remote traceback as a note),
    `CallCancelled`, `WorkerDied`, or `CallOutOfMemory`."""

    @property
    def started_s(self) -> float | None:
        """When a worker took it up, by `time.monotonic()`; None while it waits."""

    def cancel(self) -> None:
        """Asks the call to stop: `interrupt`, and after the grace time an end to its worker. Returns at once."""


class Executor(Protocol):
    """Runs calls. Safe to use from many threads."""

    capacity: Capacity

    def submit(
        self,
        call: Call,
        *,
        on_report: Callable[[bytes], None] | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> Handle:
        """Queues a call. `on_report` and `on_output` (what it prints, in pieces) are called from the executor's
        threads. Raises `InvalidArgument` for a call that needs more than the capacity."""

    def close(self) -> None:
        """Cancels what runs, ends every worker this executor started, and waits for that. Twice is allowed."""
