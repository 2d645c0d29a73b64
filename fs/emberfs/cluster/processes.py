"""Server processes on this host: started detached, found again by pid and start time, stopped without touching others.

A pid alone may be somebody else's by now. What we started is known by (pid, start time since boot), written beside its
log; a process that does not match both is never signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import AccessDenied, Unavailable
from .waiting import Say, wait_until

STOP_TIMEOUT_S = 20.0
START_POLL_S = 0.02
LAST_LINES = 3


class ServerProcess:
    """One server of a cluster under `directory`: config.toml, server.log, ready.json, pid.json."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name
        self._log_begin_bytes = 0
        """What is before that in its log is from an earlier start."""

    @property
    def log(self) -> Path:
        """What it logged, one JSON object a line."""
        return self.directory / "server.log"

    def pid(self) -> int | None:
        """Of the running process; None if it does not run."""
        try:
            known = json.loads((self.directory / "pid.json").read_bytes())
            pid, started = int(known["pid"]), known["started"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return pid if _start_time(pid) == started else None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.pid() is not None:
            return
        with _uninterrupted():
            self._start()

    def _start(self) -> None:
        config = self.directory / "config.toml"
        with open(self.log, "ab") as log, open(self.directory / "ready.json", "wb") as ready:
            self._log_begin_bytes = log.tell()
            server = [sys.executable, "-m", "emberline", "server", "--config", str(config)]
            process = subprocess.Popen(
                ["/bin/sh", "-c", _NOTE_AND_EXEC, str(self.directory / "pid.json"), *server],
                stdin=subprocess.DEVNULL,
                stdout=ready,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        _children[process.pid] = process
        try:
            known = {"pid": process.pid, "started": _start_time(process.pid)}
            note = self.directory / "pid.json.known"
            note.write_text(json.dumps(known))
            note.replace(self.directory / "pid.json")
        except BaseException:
            process.kill()  # Nobody would find it again.
            raise

    def is_ready(self) -> bool:
        """It serves."""
        try:
            return b'"ready": true' in (self.directory / "ready.json").read_bytes()
        except FileNotFoundError:
            return False

    def wait_ready(self, deadline_s: float, *, say: Say = lambda _: None) -> None:
        """Wait until it serves, by the monotonic clock. Raises Unavailable, with the end of its log."""
        words = f"{self.name} does not serve yet"

        def look() -> tuple[bool, str]:
            is_ready = self.is_ready()
            _reap()
            if not is_ready and self.pid() is None:
                raise Unavailable(f"{self.name} ended at its start")
            return is_ready, words

        timeout_s = max(0.0, deadline_s - time.monotonic())
        try:
            wait_until(look, say=say, said=words, timeout_s=timeout_s, poll_s=START_POLL_S)
        except Unavailable as error:
            raise Unavailable(f"{error}: {self.last_words()} (its log: {self.log})") from error

    def last_words(self) -> str:
        """The end of what it logged since it was started here."""
        try:
            logged = self.log.read_bytes()[self._log_begin_bytes :]
        except FileNotFoundError:
            logged = b""
        lines = [line for line in logged.decode(errors="replace").splitlines() if line.strip()]
        return "; ".join(map(_message, lines[-LAST_LINES:])) or "it logged nothing"

    def stop(self, *, by: int = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop it and wait; after `timeout_s` it is killed."""
        pid = self.pid()
        if pid is None:
            return
        try:
            os.kill(pid, by)
        except PermissionError as error:
            raise AccessDenied(f"{self.name} is process {pid} of another user") from error
        if not _wait(lambda: self.pid() is None, timeout_s) and self.pid() == pid:
            os.kill(pid, signal.SIGKILL)
            _wait(lambda: self.pid() is None, timeout_s)


def _message(line: str) -> str:
    """Of a line of a log. An error that ends a server is a plain line."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line.strip().removeprefix("Error: ")


# The server notes its own process before it becomes one: whoever starts it may be killed right after the fork, and a
# process that nobody finds again would keep its port. Field 22 is the time it was started; the name of sh has no space.
_NOTE_AND_EXEC = """
started=$(cut -d ' ' -f 22 "/proc/$$/stat" 2>/dev/null) &&
    printf '{"pid": %s, "started": %s}' "$$" "$started" >"$0.own" && mv "$0.own" "$0"
exec "$@"
"""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Started by this very process, which has to collect them when they end."""


def _reap() -> None:
    for pid, process in list(_children.items()):
        if process.poll() is not None:
            del _children[pid]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: between a fork and the note of its pid it would lose the process.

    By a handler, which an exec undoes: a blocked signal would stay blocked in the server.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread is interrupted.
        return
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])


def _wait(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while True:
        _reap()
        if done():
            return True
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none (or only its exit status)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] == b"Z" else int(fields[19])
