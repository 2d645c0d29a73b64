"""A worker process of the local executor: runs one call after another, on its main thread.

A second thread listens to the driver, so an interruption arrives while a call runs. What is printed, by Python, by C or
by a child, goes to a pipe that the driver reads; all of it is in the pipe before the driver hears of the call's end.
"""

from __future__ import annotations

import faulthandler
import io
import os
import queue
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from .context import CallContext
from .frames import Bye, Channel, Ended, Interrupt, Ready, Report, Run
from .outcome import Failure, outcome_of
from .printing import flush_output

OOM_SCORE_ADJ = 500
"""If the machine runs out of memory a worker goes before the driver (0), whose job would be lost with it."""


def main(socket_fd: int, name: str) -> None:
    """Serves the driver at the other end of the socket until it says `Bye`."""
    # The driver decides what a Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    _Worker(name, Channel(socket.socket(fileno=socket_fd))).serve()


class _Worker:
    def __init__(self, name: str, channel: Channel) -> None:
        self._name = name
        self._channel = channel
        self._state: dict[str, object] = {}
        self._calls: queue.SimpleQueue[tuple[Run, bytes, CallContext] | None] = queue.SimpleQueue()

    def serve(self) -> None:
        threading.Thread(target=self._listen, name="emberflow-listener", daemon=True).start()
        self._channel.send(Ready())
        while (call := self._calls.get()) is not None:
            self._run(*call)

    def _listen(self) -> None:
        number, context = 0, None
        with suppress(EOFError):
            while True:
                message, payload = self._channel.receive()
                match message:
                    case Run():
                        number, context = message.number, self._context(message)
                        self._calls.put((message, payload, context))
                    case Interrupt() if message.number == number and context is not None:
                        context.interrupt()
                    case Bye():
                        self._calls.put(None)
        os.killpg(0, signal.SIGKILL)

    def _context(self, run: Run) -> CallContext:
        return CallContext(
            self._name,
            cpus=run.cpus,
            memory_bytes=run.memory_bytes,
            state=self._state,
            report=lambda note: self._channel.send(Report(), note),
        )

    def _run(self, run: Run, payload: bytes, context: CallContext) -> None:
        run.surroundings.enter()
        outcome = outcome_of(run.function, payload, context)
        context.on_interrupt(None)
        flush_output()
        if isinstance(outcome, Failure):
            self._channel.send(Ended(outcome))
        else:
            self._channel.send(Ended(None), outcome)
