"""The server's end of one connection: requests in, each one a task, and exactly one answer for each.

Invariants:
  - Nothing is served before the handshake, to a stranger nothing but `Join`, and to others what their role may send.
  - A request that changes nothing is stopped when its caller cancels it or is lost. An update goes on to its end.
  - Memory of a request's buffers is used again only after its handler returned: one that raised or was stopped may have
    left a worker thread behind that still writes to it.

Does not know: what services do, or how connections are accepted.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from socket import socket

from msgspec.structs import replace

from ..errors import AccessDenied, EmberError, LimitExceeded, ProtocolError, Unavailable
from ..messages import Join, Message
from ..runtime import AsyncioRuntime
from .aside import Aside, is_large
from .blocks import BlockPool
from .codec import decode_message, encode_failure, encode_message
from .config import TcpConfig
from .door import Door
from .frame import HEADER_BYTES_MAX, Frame, Kind, decode_places, encode_frame
from .handshake import answer_hello, certificate_of, check_sender, decode_hello, encode_hello, this_host
from .region import ForeignRegions
from .types import Service
from .ucx_lane import Lanes
from .window import Window
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")


class _Served:
    """A request, from its header to the last byte of its answer."""

    __slots__ = ("block", "call", "is_answered", "is_placed", "moving", "refusal", "request", "task", "views", "weight")

    def __init__(self, call: int, request: Message, weight: int) -> None:
        self.call = call
        self.request = request
        self.weight = weight
        self.refusal: EmberError | None = None
        self.block: memoryview | None = None
        self.views: list[memoryview] = []
        self.task: asyncio.Task[None] | None = None
        self.is_placed = False
        """Its views are the client's own memory."""
        self.moving = 0
        """What has still to come before it is served, or to leave before it has ended: its frame, buffers on a lane."""
        self.is_answered = False
        """The answer is on its way out, or out."""


class Session:
    """One client of a listener."""

    def __init__(
        self,
        runtime: AsyncioRuntime,
        sock: socket,
        service: Service,
        *,
        config: TcpConfig,
        pool: BlockPool,
        name: str,
        is_stranger: bool,
        on_change: Callable[[Session], None],
        door: Door | None = None,
        is_local: bool = False,
        lanes: Lanes | None = None,
    ) -> None:
        """`on_change` is called when a call has ended and when the connection is lost. In the loop's thread.

        `door`: where a client of this host may go on with its memory, if it is not there already (`is_local`). `lanes`:
        its large buffers may go by UCX.
        """
        self.wire = Wire(runtime.loop, sock, self, takes_descriptors=is_local)
        self.greeted: asyncio.Future[None] = runtime.future()
        self._runtime = runtime
        self._service = service
        self._config = config
        self._pool = pool
        self._name = name
        self._is_stranger = is_stranger
        self._certificate = certificate_of(sock)
        self._on_change = on_change
        self._door = door
        self._regions = ForeignRegions() if is_local else None
        self._lanes = lanes
        self._aside: Aside | None = None
        self._window = Window(config.calls_max, config.bytes_max)
        self._calls: dict[int, _Served] = {}
        self._arriving: _Served | None = None
        self._is_admitted = False
        self._is_draining = False

    @property
    def is_busy(self) -> bool:
        """True while a call is under way."""
        return bool(self._calls)

    def drain(self) -> None:
        """Take no more calls, and tell the client so."""
        self._is_draining = True
        if not self.wire.is_closed:
            self.wire.send(Outgoing(encode_frame(Kind.GOODBYE, 0)))

    def stop(self) -> list[asyncio.Task[None]]:
        """End the connection and stop every call; the tasks that are on their way to their end."""
        self.wire.lose(ConnectionError("the server closed the connection"))
        tasks = [served.task for served in self._calls.values() if served.task is not None]
        for task in tasks:
            task.cancel()
        return tasks

    # ---- the wire's

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        kind = frame.kind
        if kind in (Kind.REQUEST, Kind.FETCH, Kind.PLACED):
            self._arriving = self._take(frame)
            return self._arriving.views if kind == Kind.REQUEST else ()
        if kind == Kind.ASIDE_REQUEST:
            return self._take_aside(frame)
        if kind == Kind.CANCEL:
            served = self._calls.get(frame.call)
            if served is not None and served.task is not None and served.request.changes_nothing:
                served.task.cancel()
        elif kind == Kind.HELLO:
            self._greet(frame)
        elif kind == Kind.REGION and self._is_admitted and self._regions is not None:
            self._regions.add(frame.call, self.wire.take_descriptor())
        elif kind == Kind.FORGET and self._regions is not None:
            self._regions.forget(frame.call)
        elif kind == Kind.LANE and self._aside is not None:
            self._aside.take_offer(frame)
        elif kind == Kind.LANE_UP and self._aside is not None:
            self._aside.take_up()
        elif kind != Kind.PING:
            raise ProtocolError(f"a client does not send {kind.name}")
        return ()

    def end(self) -> None:
        served, self._arriving = self._arriving, None
        if served is None:
            return
        if served.moving:
            self._came(served)
        else:
            self._begin(served)

    def _begin(self, served: _Served) -> None:
        if served.refusal is not None:
            self._fail(served, served.refusal)
        else:
            served.task = self._runtime.spawn(self._serve(served), "transport-serve")
            served.task.add_done_callback(functools.partial(self._look_stopped, served))

    def lost(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.warning("connection from %s closed: %s", self._name, error)
        if self._aside is not None:
            self._aside.close()
        if not self.greeted.done():
            self.greeted.set_result(None)
        for served in list(self._calls.values()):
            if served.task is None or served.is_answered:
                del self._calls[served.call]
            elif served.request.changes_nothing:
                served.task.cancel()
        self._on_change(self)

    # ---- calls

    def _greet(self, frame: Frame) -> None:
        if self.greeted.done():
            raise ProtocolError("a second greeting")
        try:
            theirs = decode_hello(frame.body)
            if self._door is not None and self._regions is not None:
                self._certificate = self._door.enter(theirs.token)
                theirs = replace(theirs, token=self._config.token)
            answer = answer_hello(self._config, theirs, certificate=self._certificate, is_stranger=self._is_stranger)
            if self._door is not None and self._regions is None and not self._is_stranger:
                door, key = self._door.offer(self._certificate)
                answer = replace(answer, door=door, key=key, host=this_host())
            if self._lanes is not None and not self._is_stranger:
                answer = replace(answer, lanes=list(self._lanes.kinds), host=this_host())
                self._aside = Aside(self.wire, self._lanes, self._runtime.loop, dead_s=self._config.dead_s)
        except EmberError as error:
            log.warning("connection from %s refused: %s", self._name, error)
            self.wire.send(Outgoing(encode_frame(Kind.ERROR, 0, encode_failure(error, _NOBODY))))
            self.wire.close_when_sent()
            return
        self._is_admitted = True
        self.greeted.set_result(None)
        self.wire.reader.header_bytes_max = HEADER_BYTES_MAX
        self.wire.send(Outgoing(encode_frame(Kind.HELLO, 0, encode_hello(answer))))

    def _take(self, frame: Frame) -> _Served:
        """Room for a request and its buffers. Raises ProtocolError where the client breaks the rules."""
        if not self._is_admitted:
            raise ProtocolError("a request before the handshake")
        if frame.call in self._calls:
            raise ProtocolError(f"two calls of the same number {frame.call}")
        total = sum(frame.lengths)
        weight = total + len(frame.body)
        if not self._window.has_room(weight):
            raise ProtocolError(f"more is under way than was agreed: {self._window.calls} calls")
        served = _Served(frame.call, _NOBODY, weight)
        body, placed = frame.body, None
        if frame.kind == Kind.PLACED:
            if self._regions is None:
                raise ProtocolError("buffers in regions, and no way to hand over any")
            places, body = decode_places(body, len(frame.lengths))
            placed = self._regions.views(places, frame.lengths)
        try:
            served.request = decode_message(body)
            if self._is_stranger and not isinstance(served.request, Join):
                raise AccessDenied("without a certificate of this cluster one can only join")
            check_sender(served.request, self._certificate)
            if self._is_draining:
                raise Unavailable("the server is shutting down")
            if placed is None and (frame.kind == Kind.FETCH) != (served.request.fills_buffers and bool(frame.lengths)):
                raise ProtocolError("buffers to be filled where bytes are sent, or the other way round")
        except EmberError as error:
            served.refusal = error
        self._window.take(weight)
        self._calls[frame.call] = served
        if placed is not None and served.request.fills_buffers:
            served.views, served.is_placed = placed, True
            return served
        served.block = block = self._pool.take(total)
        begin = 0
        for length in frame.lengths:
            served.views.append(block[begin : begin + length])
            begin += length
        if placed is not None:
            for view, theirs in zip(served.views, placed, strict=True):
                view[:] = theirs  # Once; what is checked and stored is ours: they may change theirs at any time.
        return served

    def _take_aside(self, frame: Frame) -> Iterable[memoryview]:
        served = self._arriving = self._take(frame)
        if self._aside is None:
            raise ProtocolError("a request that comes over a lane, and there is none")
        small, count = self._aside.receive(frame.call, served.views, functools.partial(self._came, served))
        served.moving = count + 1
        return small

    def _came(self, served: _Served) -> None:
        """The payload of its frame, or a buffer on the lane."""
        served.moving -= 1
        if served.moving:
            return
        if self.wire.is_open():
            self._begin(served)
        else:  # The client may have used its memory for something else while we took the bytes from there.
            self.wire.lose(ConnectionError("the other side closed the connection"))

    async def _serve(self, served: _Served) -> None:
        try:
            reply = await self._service.handle(served.request, served.views)
            body = encode_message(reply)
            if len(body) > HEADER_BYTES_MAX - 4 * len(served.views):
                raise LimitExceeded(f"a reply of {len(body)} bytes is over the limit: ask for less at once")
        except Exception as error:
            self._fail(served, error)
        else:
            self._reply(served, reply, body)

    def _look_stopped(self, served: _Served, task: asyncio.Task[None]) -> None:
        """Answers for a task that was stopped: it may have been before its first step."""
        if task.cancelled():
            self._fail(served, Unavailable("the call was cancelled"))

    def _reply(self, served: _Served, reply: Message, body: bytes) -> None:
        counts: Sequence[int] = ()
        payload: list[memoryview] = []
        if served.request.fills_buffers and served.views:
            counts = reply.counts  # type: ignore[attr-defined]  # `Message.fills_buffers` says that it is there.
            if served.is_placed:
                self._answer(served, encode_frame(Kind.PLACED_REPLY, served.call, body, counts))
                return
            payload = [view[:count] for view, count in zip(served.views, counts, strict=True)]
            if self._aside is not None and self._aside.is_up and any(map(is_large, payload)):
                payload, count = self._aside.send(served.call, payload, functools.partial(self._left, served))
                served.moving = count + 1
                header = encode_frame(Kind.ASIDE_REPLY, served.call, body, counts)
                self._answer(served, header, payload, functools.partial(self._left, served))
                return
        self._answer(served, encode_frame(Kind.REPLY, served.call, body, counts), payload)

    def _left(self, served: _Served) -> None:
        """The frame of its answer, or a buffer on the lane."""
        served.moving -= 1
        if not served.moving:
            self._ended(served)

    def _fail(self, served: _Served, error: Exception) -> None:
        served.block = None
        self._answer(served, encode_frame(Kind.ERROR, served.call, encode_failure(error, served.request)))

    def _answer(
        self,
        served: _Served,
        header: bytes,
        payload: Iterable[memoryview] = (),
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        served.is_answered = True
        if self.wire.is_closed:
            self._ended(served)
        else:
            self.wire.send(Outgoing(header, payload, on_sent or functools.partial(self._ended, served)))

    def _ended(self, served: _Served) -> None:
        self._calls.pop(served.call, None)
        self._window.give(served.weight)
        if served.block is not None:
            self._pool.give(served.block)
        self._on_change(self)


_NOBODY = Message()
"""Stands where a request could not be read."""
