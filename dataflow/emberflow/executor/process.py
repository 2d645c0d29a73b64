"""The driver's hold on one worker process: starting it, talking to it, hearing what it prints, and its end.

Used by one thread, except for `interrupt`. The process is the leader of a session and process group; killing it kills
what its calls have started.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .frames import Bye, Channel, Interrupt, Message
from .machine import INSIDE
from .surroundings import surroundings

LAST_OUTPUT_CHARS = 8000
LAST_OUTPUT_LINES = 25
"""How much of what a worker printed is kept, and how much is shown in the message about its death."""

EXIT_S = 0.2
"""How long a worker may be seen to exit after its socket has closed, for its own exit code to be known."""

_READ_BYTES = 1 << 16
_SPINNING = "OPENBLAS_THREAD_TIMEOUT"
"""For how long (as a power of two, in cycles) numpy's threads look for work without sleeping, from its import on. By
themselves they do so for tens of milliseconds, of CPUs that other workers are waiting for."""


class WorkerProcess:
    """A process that runs `boot.py`."""

    def __init__(self, name: str) -> None:
        here = surroundings()
        ours, theirs = socket.socketpair()
        self._output, their_output = os.pipe()
        os.set_blocking(self._output, False)
        boot = str(Path(__file__).with_name("boot.py"))
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", boot, str(theirs.fileno()), str(os.getpid()), name, *here.path],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                pass_fds=[theirs.fileno()],
                cwd=here.directory,
                env={_SPINNING: "4", **os.environ, INSIDE: "1"},
                start_new_session=True,
            )
        except BaseException:
            os.close(self._output)
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(their_output)
        self.pid = self._popen.pid
        self._channel = Channel(ours)
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._poll.register(self._output, select.POLLIN)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last_output = ""

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Raises `EOFError` if the process is gone."""
        try:
            self._channel.send(message, payload)
        except OSError as error:
            raise EOFError from error

    def interrupt(self, number: int) -> None:
        """Interrupts call number `number`. From any thread."""
        with suppress(OSError):  # A dead worker's call ends anyway.
            self._channel.send(Interrupt(number))

    def receive(self, timeout_s: float, on_output: Callable[[str], None]) -> tuple[Message, bytes] | None:
        """The next frame, or None if there was none in that time. What was printed before it was sent has gone to
        `on_output` by then. Raises `EOFError` if the process is gone."""
        ready = {descriptor for descriptor, _ in self._poll.poll(max(0.0, timeout_s) * 1000)}
        frame = self._channel.receive() if self._channel.fileno() in ready else None
        if self._output in ready or frame is not None:
            self.read_output(on_output)
        if frame is None and self._has_exited():
            # A child of it may hold the socket open.
            raise EOFError
        return frame

    def read_output(self, on_output: Callable[[str], None]) -> None:
        """Hands on what was printed until now."""
        while True:
            try:
                data = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                return
            text = self._decoder.decode(data, final=not data)
            if text:
                self._last_output = (self._last_output + text)[-LAST_OUTPUT_CHARS:]
                on_output(text)
            if not data:
                # Nobody holds the other end any more: it would be ready for ever.
                with suppress(KeyError):
                    self._poll.unregister(self._output)
                return

    def forget_output(self) -> None:
        """What was printed until now belongs to no call that is to come."""
        self.read_output(lambda _: None)
        self._last_output = ""

    def is_alive(self) -> bool:
        return self._popen.returncode is None and not self._has_exited()

    def stop(self, timeout_s: float) -> None:
        """Lets it end by itself, and kills it if it has not in that time."""
        deadline_s = time.monotonic() + timeout_s
        with suppress(EOFError):
            self.send(Bye())
            while (left_s := deadline_s - time.monotonic()) > 0:
                self.receive(left_s, lambda _: None)
        self.bury(lambda _: None)

    def bury(self, on_output: Callable[[str], None]) -> str:
        """Of a process that is gone: how it ended, and its last words."""
        # It closes its socket a moment before it can be waited for.
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(EXIT_S)
        self.kill(on_output)
        code = self._popen.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        # Python ends its report of a crash with the name of every extension module there is.
        lines = [line for line in self._last_output.splitlines() if line and not line.startswith("Extension modules:")]
        return "\n".join([f"{how}; its last output:", *lines[-LAST_OUTPUT_LINES:]]) if lines else how

    def kill(self, on_output: Callable[[str], None]) -> None:
        """Ends it and its group, and lets go of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self.read_output(on_output)
        os.close(self._output)
        self._channel.close()

    @property
    def was_killed(self) -> bool:
        """By the signal that the kernel sends when memory has run out; only after `bury`."""
        return self._popen.returncode == -signal.SIGKILL

    def _has_exited(self) -> bool:
        # Looks without reaping, so that its number stays its own until its group has been killed.
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # The program around us reaps every child.
            return True
