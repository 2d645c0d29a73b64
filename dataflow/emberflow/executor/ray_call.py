"""A call inside a Ray worker: a generator of what happens to it, which Ray streams to the driver.

The call runs on a thread of its own, and the generator, on the worker's main thread, hands on what it reports, what it
prints and how it ends. Ray cancels a task by a KeyboardInterrupt on the main thread, which so can always be taken:
it becomes the call's interruption. Whoever ends the generator, the call has ended before or the process has.
"""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

import msgspec
import ray

from ..errors import CallOutOfMemory
from .context import CallContext
from .frames import Run
from .memory import MemoryWatch
from .outcome import Failure, failure_of, outcome_of
from .printing import captured_output

Event: TypeAlias = tuple[str, object]
""""started", Where | "report", bytes | "output", bytes | "failed", Failure | "answered", bytes."""


class Where(msgspec.Struct, frozen=True):
    """Where a call runs."""

    worker: str
    node: str
    pid: int
    thread: int
    """The call's own, by the number that the kernel knows it by."""


STATE: dict[str, object] = {}
"""`Context.state`: Ray gives the next task of a job to the same process."""

POLL_S = 0.05
"""Ray's interruption does not wake a thread that waits."""


def run(encoded: bytes, payload: bytes, grace_s: float) -> Iterator[Event]:
    """Runs the call of an encoded `Run`. A call that Ray interrupts has `grace_s` before its process is ended."""
    call = msgspec.msgpack.decode(encoded, type=Run)
    worker = f"{socket.gethostname()}-{os.getpid()}"
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    context = CallContext(
        worker,
        cpus=call.cpus,
        memory_bytes=call.memory_bytes,
        state=STATE,
        report=lambda note: events.put(("report", note)),
    )
    gate = threading.Event()
    thread = threading.Thread(
        target=_run, args=(gate, call, payload, context, events), name="emberflow-call", daemon=True
    )
    try:
        thread.start()
        # The driver has to know it before the call begins, which may not let this thread run again.
        yield "started", Where(worker, ray.get_runtime_context().get_node_id(), os.getpid(), thread.native_id or 0)
        gate.set()
        yield from _until_ended(call, events, context, grace_s)
    finally:
        # After the call has ended this does nothing. It is still running if Ray ends the generator from outside.
        context.interrupt()
        if thread.is_alive():
            thread.join(grace_s)
        if thread.is_alive():
            os._exit(1)


def _run(
    gate: threading.Event, call: Run, payload: bytes, context: CallContext, events: queue.SimpleQueue[Event]
) -> None:
    gate.wait()
    call.surroundings.enter()
    with captured_output(lambda data: events.put(("output", data))):
        outcome = outcome_of(call.function, payload, context)
        context.on_interrupt(None)
    events.put(("failed", outcome) if isinstance(outcome, Failure) else ("answered", outcome))


def _until_ended(call: Run, events: queue.SimpleQueue[Event], context: CallContext, grace_s: float) -> Iterator[Event]:
    deadline_s = math.inf
    watch = MemoryWatch(os.getpid(), memory_bytes=call.memory_bytes)
    while True:
        try:
            event = _next(events, deadline_s, lambda: watch.check(call.name, context.worker))
        except KeyboardInterrupt:
            deadline_s = time.monotonic() + grace_s
            context.interrupt()
            continue
        except CallOutOfMemory as error:
            yield "failed", failure_of(error, where=context.worker)
            os._exit(1)
        yield event
        if event[0] in ("failed", "answered"):
            return


def _next(events: queue.SimpleQueue[Event], deadline_s: float, check: Callable[[], None]) -> Event:
    while time.monotonic() < deadline_s:
        check()
        with suppress(queue.Empty):
            return events.get(timeout=POLL_S)
    os._exit(1)
