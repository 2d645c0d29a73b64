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
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from .context import CallContext
from .frames import Run
from .outcome import Failure, outcome_of
from .printing import captured_output

Event: TypeAlias = tuple[str, object]
""""started", the worker's name | "report", bytes | "output", bytes | "failed", Failure | "answered", bytes."""

STATE: dict[str, object] = {}
"""`Context.state`: Ray gives the next task of a job to the same process."""

POLL_S = 0.05
"""Ray's interruption does not wake a thread that waits."""


def run(encoded: bytes, payload: bytes, grace_s: float) -> Iterator[Event]:
    """Runs the call of an encoded `Run`. An interruption of the generator gives the call `grace_s` before the process is ended."""
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
    thread = threading.Thread(target=_run, args=(call, payload, context, events), name="emberflow-call", daemon=True)
    try:
        yield "started", worker
        thread.start()
        yield from _until_ended(events, context, grace_s)
    finally:
        # After the call has ended this does nothing. It is still running if Ray ends the generator from outside.
        context.interrupt()
        if thread.is_alive():
            thread.join(grace_s)
        if thread.is_alive():
            os._exit(1)


def _run(call: Run, payload: bytes, context: CallContext, events: queue.SimpleQueue[Event]) -> None:
    call.surroundings.enter()
    with captured_output(lambda data: events.put(("output", data))):
        outcome = outcome_of(call.function, payload, context)
        context.on_interrupt(None)
    events.put(("failed", outcome) if isinstance(outcome, Failure) else ("answered", outcome))


def _until_ended(events: queue.SimpleQueue[Event], context: CallContext, grace_s: float) -> Iterator[Event]:
    deadline_s = math.inf
    while True:
        try:
            event = _next(events, deadline_s)
        except KeyboardInterrupt:
            deadline_s = time.monotonic() + grace_s
            context.interrupt()
            continue
        yield event
        if event[0] in ("failed", "answered"):
            return


def _next(events: queue.SimpleQueue[Event], deadline_s: float) -> Event:
    while time.monotonic() < deadline_s:
        try:
            return events.get(timeout=POLL_S)
        except queue.Empty:
            pass
    os._exit(1)
