"""Large payloads of a connection by UCX, beside the socket that carries its frames.

A *rail* is a pair of UCX workers, one at each end of one connection. The frame that announces a payload travels on the
socket as ever; each of its large buffers is a tagged message on the rail, received straight into where it belongs.

Invariants:
  - A side receives only what a frame has announced, and sends only once the other side has said that the rail works
    towards it (`is_up`): a large message has come through, so a firewall between the two costs speed and nothing else.
  - Memory is used until `done` was called or `close` has returned, which destroys the worker. `done` is called from the
    loop only, never from within `send` or `receive`.
  - What fails or stands still ends the connection: a rail is never mended, the next connection has a new one.
  - Bytes that landed were the sender's while it held the connection, not longer. Who receives asks `Wire.is_open`
    before it believes them.

Does not know: frames, calls. UCX's own choices are in `ucx_library`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..errors import Unavailable
from .blocks import Sump
from .config import UCX_AUTO, ucx_kinds
from .ucx_library import Context, UcxError, Worker

log = logging.getLogger("emberline.transport")

TRANSPORTS = {"rdma": "ib", "shm": "shm", "tcp": "tcp"}
"""Kind of device -> how UCX names it, best first."""

RAILS_MAX = 64
"""Of one process: a worker has 4 MiB of its own and up to ten file descriptors."""

STEPS_MAX = 8
"""Of a worker, before we look what is done: a step of TCP brings a part of a message."""
ROUNDS_MAX = 16
"""Of so many steps, before others have their turn."""
IDLE_ROUNDS_MAX = 8
"""Rounds that found nothing before the loop sleeps: the rest of a message is often there at once."""

_PROBE_BYTES = 1 << 20
"""Travels as large buffers do."""
_PROBE_TAG = 0


class Rails:
    """What UCX finds on this machine, and the rails of one process over it."""

    def __init__(self, devices: str) -> None:
        """`devices` as `ucx_kinds` has them. Raises Unavailable without the library, or without any of them."""
        self.count = 0
        self.sump = Sump()
        """Where large buffers go that nobody wants."""
        self._contexts: dict[str, Context] = {}
        for kind in ucx_kinds(devices):
            try:
                self._contexts[kind] = Context(TRANSPORTS[kind])
            except UcxError as error:
                level = logging.DEBUG if devices == UCX_AUTO else logging.WARNING
                log.log(level, "UCX finds no device of kind %s: %s", kind, error)
        if not self._contexts:
            raise Unavailable(f"UCX finds no device here for ucx={devices!r}")
        log.info("large buffers may go by UCX over: %s", ", ".join(self._contexts))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is, best first."""
        return tuple(self._contexts)

    def common(self, theirs: tuple[str, ...], *, is_same_host: bool) -> str:
        """The kind to use with a peer that has `theirs`; empty: none."""
        for kind in self._contexts:
            if kind in theirs and (is_same_host or kind != "shm"):
                return kind
        return ""

    def open(
        self, kind: str, loop: asyncio.AbstractEventLoop, *, lost: Callable[[Exception], None], dead_s: float
    ) -> Rail:
        """A rail of our own end, not connected yet. Raises UcxError."""
        context = self._contexts.get(kind)
        if context is None:
            raise UcxError(f"no device of kind {kind!r}")
        if self.count >= RAILS_MAX:
            raise UcxError(f"there are {RAILS_MAX} rails already")
        rail = Rail(Worker(context), loop, lost=lost, dead_s=dead_s, closed=self._closed)
        self.count += 1
        return rail

    def close(self) -> None:
        """After all rails."""
        assert not self.count
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def _closed(self) -> None:
        self.count -= 1


class _Transfer:
    """A message on its way."""

    __slots__ = ("done", "request", "view")

    def __init__(self, request: int, view: memoryview, done: Callable[[], None]) -> None:
        self.request = request
        """0: it was done at once."""
        self.view = view
        """Keeps the memory."""
        self.done = done


class Rail:
    """One end. Everything happens in the loop's thread."""

    def __init__(
        self,
        worker: Worker,
        loop: asyncio.AbstractEventLoop,
        *,
        lost: Callable[[Exception], None],
        dead_s: float,
        closed: Callable[[], None],
    ) -> None:
        """`lost` is called, at most once and from the loop, when the rail cannot go on. `closed`: after the end."""
        self.is_up = False
        """The other side has said that what we send arrives."""
        self.address = worker.address()
        self._worker = worker
        self._loop = loop
        self._lost = lost
        self._closed = closed
        self._dead_s = dead_s
        self._transfers: list[_Transfer] = []
        self._receiving = 0
        self._has_moved = False
        """Since the watch looked last."""
        self._watch: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._is_due = False
        """`_progress` is scheduled."""
        loop.add_reader(worker.fd, self._progress)
        self._soon()

    def connect(self, address: bytes, *, proved: Callable[[], None]) -> None:
        """Join the other end. `proved` is called when large messages come through. Raises UcxError."""
        self._worker.connect(address)
        self.send(memoryview(bytes(_PROBE_BYTES)), _PROBE_TAG, _nothing)
        self._begin(self._worker.receive, memoryview(bytearray(_PROBE_BYTES)), _PROBE_TAG, proved)

    def send(self, view: memoryview, tag: int, done: Callable[[], None]) -> None:
        """Send the bytes of `view`. `done` is called when they are not needed any more."""
        self._begin(self._worker.send, view, tag, done)

    def receive(self, view: memoryview, tag: int, done: Callable[[], None]) -> None:
        """Fill `view` with a message that the other side has sent or is about to. `done` is called when it is there."""
        self._receiving += 1

        def landed() -> None:
            self._receiving -= 1
            done()

        self._begin(self._worker.receive, view, tag, landed)
        if self._watch is None:
            self._has_moved = True
            self._watch = self._loop.call_later(self._dead_s, self._look)

    def close(self) -> None:
        """The memory of every transfer is its owner's again when this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._worker.fd)
        if self._watch is not None:
            self._watch.cancel()
        self._worker.destroy()
        self._transfers.clear()
        self._closed()

    def _begin(
        self, act: Callable[[memoryview, int], int], view: memoryview, tag: int, done: Callable[[], None]
    ) -> None:
        try:
            self._transfers.append(_Transfer(act(view, tag), view, done))
        except UcxError as error:
            self._loop.call_soon(self._fail, error)
        self._soon()

    def _soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        self._is_due = False
        idle = 0
        try:
            for _ in range(ROUNDS_MAX):
                if self._is_closed:
                    return
                if self._worker.progress(STEPS_MAX):
                    self._has_moved = True
                    idle = 0
                else:
                    idle += 1
                if self._transfers and idle <= 1:
                    self._collect()
                if self._is_closed:
                    return
                if (idle >= IDLE_ROUNDS_MAX or not self._transfers) and self._worker.arm():
                    return
        except UcxError as error:
            self._fail(error)
            return
        self._soon()

    def _collect(self) -> None:
        """Tell the owners of what is done."""
        going: list[_Transfer] = []
        done: list[_Transfer] = []
        for transfer in self._transfers:
            is_done = not transfer.request or self._worker.is_done(transfer.request)
            (done if is_done else going).append(transfer)
        self._transfers = going
        for transfer in done:
            if not self._is_closed:
                transfer.done()

    def _fail(self, error: Exception) -> None:
        if not self._is_closed:
            self._lost(error)

    def _look(self) -> None:
        """What was announced should be arriving."""
        self._watch = None
        if not self._receiving:
            return
        if not self._has_moved:
            self._fail(UcxError(f"what was announced did not come by UCX for {self._dead_s} s"))
            return
        self._has_moved = False
        self._watch = self._loop.call_later(self._dead_s, self._look)


def _nothing() -> None:
    """For whoever sends the probe."""
