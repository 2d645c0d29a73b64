"""The door of a process that owns a store for itself: others knock, and it moves out.

A knock is a connection and a line; the answer is a line at once, that somebody is in, again every second, and one when
it is done. So who knocks can tell an owner that is busy from one that is stopped.

Does not know: what moving out is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ..errors import DeadlineExceeded, EmberError, StoreBusy, Unavailable
from ..runtime import AsyncioRuntime
from .socket_place import SocketPlace

log = logging.getLogger("emberline.sharing")

LINE_BYTES_MAX = 4096
SILENT_S = 3.0
"""An owner that says nothing for so long is stopped, or as good as that."""
WAIT_S = 1.0
"""An owner that is busy says so this often."""


class Door:
    """Listens in the loop of a store's runtime."""

    def __init__(
        self, runtime: AsyncioRuntime, directory: Path, move_out: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Raises OSError where there can be no socket."""
        self._runtime = runtime
        self._move_out = move_out
        self._place = SocketPlace(directory)
        self._answering: set[asyncio.Task[None]] = set()
        self._knocking: set[socket.socket] = set()
        try:
            self._listening: socket.socket | None = self._place.listen()
        except BaseException:
            self._place.close()
            raise

    def open(self) -> None:
        """Answer from now on. Holds the baton."""
        self._runtime.loop.call_soon(self._watch)

    def _watch(self) -> None:
        if self._listening is not None:
            self._runtime.loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Nobody is let in any more; those who are get their answer. Holds the baton."""
        if self._listening is not None:
            self._runtime.loop.remove_reader(self._listening)
            self._place.remove()
            self._listening.close()
            self._listening = None
            self._place.close()

    def forget_after_fork(self) -> None:
        """In the child: who knocks must not wait for us when the parent is gone."""
        if self._listening is not None:
            self._listening.close()
        for knocking in self._knocking:
            knocking.close()

    async def end(self) -> None:
        """`close`, and let go of those who knocked: they find out that we have gone."""
        self.close()
        if self._answering:
            await self._runtime.sleep(0)  # Goes on in the loop's thread.
            tasks = list(self._answering)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            knocking, _ = self._listening.accept()
        except OSError:
            return
        knocking.setblocking(False)
        task = self._runtime.spawn(self._answer(knocking), "sharing-door")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, knocking: socket.socket) -> None:
        loop = self._runtime.loop
        self._knocking.add(knocking)
        with knocking:
            try:
                await loop.sock_recv(knocking, LINE_BYTES_MAX)
                moving = self._runtime.spawn(self._move_out(), "sharing-move-out")
                while not moving.done():
                    await loop.sock_sendall(knocking, _line(wait=True))
                    await asyncio.wait([moving], timeout=WAIT_S)
                try:
                    moving.result()
                except (EmberError, OSError) as error:
                    log.warning("another process wants to use the store, and cannot: %s", error)
                    await loop.sock_sendall(knocking, _line(refused=str(error)))
                else:
                    await loop.sock_sendall(knocking, _line(moved=True))
            except OSError:
                pass  # Whoever it was has gone.
            finally:
                self._knocking.discard(knocking)


def _line(**content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"


def knock(directory: Path, pid: int) -> None:
    """Ask the process `pid` to move out; returns when it has. Blocks.

    Raises Unavailable (nobody is behind the door), DeadlineExceeded (it does not answer), StoreBusy (it cannot).
    """
    place = SocketPlace(directory)
    try:
        with place.connect(timeout_s=SILENT_S) as door, door.makefile("rb") as answers:
            door.sendall(b"may we share?\n")
            answer = {"wait": True}
            while "wait" in answer:
                line = answers.readline(LINE_BYTES_MAX)
                if not line:
                    raise Unavailable("the owner has gone")
                answer = json.loads(line)
    except TimeoutError:
        raise DeadlineExceeded(
            f"process {pid} owns this store and does not answer: is it stopped? Continue or end it", str(directory)
        ) from None
    except OSError as error:
        raise Unavailable(f"the owner, process {pid}, cannot be reached: {error}") from error
    finally:
        place.close()
    if "refused" in answer:
        why = answer["refused"]
        raise StoreBusy(f"process {pid} owns this store and cannot share it now: {why}", str(directory), pid=pid)
