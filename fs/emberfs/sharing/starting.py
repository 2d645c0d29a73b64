"""How a process starts the server that goes on with a store which it owns, and hands the store on.

The server gets the lock as an open file and loads its code; then it waits for a line, the order to serve. Until that
line it has touched nothing, and it ends if the line does not come: whoever starts it may still think better of it, or
die. It is no child of ours: a session of its own, so that no Ctrl-C reaches it, adopted by the system.

Another thread may fork meanwhile. The child must not have the pipes: who reads from one would wait until the child
ends, and the child may be waiting for the server.

Does not know: what a server does.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import msgspec

from ..errors import EmberError, StoreBusy, Unavailable
from ..meta.handover import Unwritten
from ..transport.codec import decode_failure
from .forking import no_fork
from .ownership import Mode, Ownership

LOAD_S = 30.0
"""The server's code may take so long to load."""
OPEN_S = 120.0
"""The store may take so long to open."""
LOG = "owner.log"


class Order(msgspec.Struct, frozen=True):
    """What a server is told."""

    settings: str
    """JSON of a `StoreConfig`."""
    left: Unwritten | None = None
    """From the service that ran before. None: it left nothing."""


class Answer(msgspec.Struct, frozen=True):
    """A line of the server: it has loaded, it serves, or why not."""

    serves: bool = False
    failure: bytes = b""
    """An error, as on the wire."""


class NewServer:
    """A server that is loaded and waits. `serve` or `close`."""

    def __init__(self, ownership: Ownership) -> None:
        """Raises Unavailable if there can be none. Blocks."""
        self._ownership = ownership
        directory = ownership.directory
        if not sys.executable:
            raise Unavailable("this program does not say which Python runs it, so no server can be started")
        with open(directory / LOG, "ab") as log:
            if log.tell() > 1 << 20:
                log.truncate(0)
            with no_fork:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "emberfs.sharing", str(directory), str(ownership.file)],
                    bufsize=0,  # A buffer has a lock, and a child that closes it would need that.
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd="/",
                    env={**os.environ, "PYTHONPATH": _import_path()},
                    pass_fds=[ownership.file],
                    start_new_session=True,
                )
                assert self._process.stdin is not None and self._process.stdout is not None
                self._to, self._from = self._process.stdin, self._process.stdout
                _pipes.update((self._to, self._from))
        self._received = b""
        try:
            self._answer(LOAD_S)
        except BaseException:
            self.close()
            raise

    def serve(self, order: Order) -> None:
        """Let it begin, and return when it serves. We own the store no longer. Blocks.

        Raises what opening the store raised, Unavailable.
        """
        try:
            left = memoryview(msgspec.json.encode(order) + b"\n")
            while left:
                left = left[self._to.write(left) :]
            self._ownership.close()
            if not self._answer(OPEN_S).serves:
                raise Unavailable(f"the server of {self._ownership.directory} did not begin")
        except OSError as error:
            raise Unavailable(f"the server of {self._ownership.directory} has ended: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Let go of it: if it serves, it goes on; else it ends."""
        with no_fork:
            self._to.close()
            self._from.close()
            _pipes.difference_update((self._to, self._from))
        self._process.wait()  # Only a step between us and the server, which ends at once.

    def _answer(self, timeout_s: float) -> Answer:
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(deadline_s - time.monotonic(), 0))
            read = os.read(self._from.fileno(), 1 << 16) if ready else b""
            if not read:
                why = "ended" if ready else f"said nothing for {timeout_s:g} s"
                raise Unavailable(f"the server started for this store {why}: see {self._ownership.directory / LOG}")
            self._received += read
        line, self._received = self._received.split(b"\n", 1)
        answer = msgspec.json.decode(line, type=Answer)
        if answer.failure:
            raise decode_failure(memoryview(answer.failure))
        return answer


def start_server(ownership: Ownership, settings: str) -> None:
    """Start a server on a store that nobody serves, and that we hold the lock of. Blocks; raises as `NewServer`."""
    try:
        ownership.declare(Mode.STARTING)
        NewServer(ownership).serve(Order(settings))
    except EmberError:
        raise
    except OSError as error:
        raise StoreBusy(f"no server can be started for this store: {error}", str(ownership.directory)) from error
    finally:
        ownership.close()


_pipes: set[IO[bytes]] = set()
"""To servers of this process that are being started."""


def _forget_after_fork() -> None:
    for pipe in _pipes:
        pipe.close()
    _pipes.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _import_path() -> str:
    """Where the server finds this package, and what we find."""
    ours = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
