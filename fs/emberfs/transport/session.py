"""The server's end of one connection: requests in, and exactly one answer for each.

A request is served as soon as it is there: in place, until it waits for something; from then on it is a task.

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
import socket as socket_options
import ssl
from collections.abc import Callable, Iterable, Sequence
from socket import socket

from msgspec.structs import replace

from ..errors import AccessDenied, EmberError, LimitExceeded, Overloaded, ProtocolError, Unavailable
from ..half_run import HalfRun
from ..messages import Join, Message, ReadChunks
from ..messages.base import GRANTED
from ..meter import Meter
from ..runtime import AsyncioRuntime
from ..stopwatch import Stopwatch, current
from .aside import Aside, is_large
from .blocks import BlockPool, scratch
from .codec import decode_message, encode_failure, encode_message, kind_of
from .config import TcpConfig
from .door import Door
from .frame import HEADER_BYTES_MAX, Frame, Kind, decode_places, encode_frame
from .gate import Gate
from .grant_keys import GrantKeys
from .handshake import answer_hello, certificate_of, check_sender, decode_hello, encode_hello, this_host
from .region import ForeignRegions
from .turns import Line, Turn, Turns
from .types import Service
from .ucx_rail import Rails
from .window import Window
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")

LANES_MAX = 256
"""That a client opens in the life of one connection."""
KEEPALIVE = {
    (socket_options.SOL_SOCKET, socket_options.SO_KEEPALIVE): 1,
    (socket_options.IPPROTO_TCP, socket_options.TCP_KEEPIDLE): 30,
    (socket_options.IPPROTO_TCP, socket_options.TCP_KEEPINTVL): 10,
    (socket_options.IPPROTO_TCP, socket_options.TCP_KEEPCNT): 3,
    (socket_options.IPPROTO_TCP, socket_options.TCP_USER_TIMEOUT): 30_000,
}
"""Of a lane that nobody watches: a client that vanished is noticed within a minute."""
AdoptLane = Callable[[int, bool, str | None], None]
"""Takes (socket that a lane of a client ends in, True if it is a stream, whose grants it reads under; None: it needs
none) as its own. Raises OSError."""


class _Served(Turn):
    """A request, from its header to the last byte of its answer."""

    __slots__ = (
        "arrived_s",
        "block",
        "call",
        "is_answered",
        "is_placed",
        "lengths",
        "moving",
        "refusal",
        "request",
        "session",
        "takes_turns",
        "task",
        "views",
        "weight",
    )

    def __init__(self, session: Session, frame: Frame, weight: int) -> None:
        is_fetch = frame.kind == Kind.FETCH
        body_bytes = len(frame.body)
        super().__init__(
            held_bytes=body_bytes if is_fetch else weight,
            fills_bytes=weight - body_bytes if is_fetch else 0,
            weight=weight,
        )
        self.session = session
        self.call = frame.call
        self.request = _NOBODY
        self.weight = weight
        self.takes_turns = False
        """Else it is served at once, whatever there is to do."""
        self.refusal: EmberError | None = None
        self.lengths: Sequence[int] = ()
        """Of buffers to fill, for which there is no memory before it begins."""
        self.block: memoryview | None = None
        self.views: list[memoryview] = []
        self.task: asyncio.Task[None] | None = None
        self.arrived_s = 0.0
        """When the last byte of it was there."""
        self.is_placed = False
        """Its views are the client's own memory."""
        self.moving = 0
        """What has still to come before it is served, or to leave before it has ended: its frame, buffers on a rail."""
        self.is_answered = False
        """The answer is on its way out, or out."""

    def begin(self) -> None:
        self.session.start(self)

    def refuse(self, error: Overloaded) -> None:
        self.session.fail(self, error)


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
        meter: Meter,
        turns: Turns,
        name: str,
        is_stranger: bool,
        on_change: Callable[[Session], None],
        door: Door | None = None,
        is_local: bool = False,
        adopt_lane: AdoptLane | None = None,
        rails: Rails | None = None,
        grant_keys: GrantKeys | None = None,
    ) -> None:
        """`on_change` is called when a call has ended and when the connection is lost. In the loop's thread.

        `door`: where a client of this host may go on with its memory, if it is not there already (`is_local`).
        `adopt_lane`: who serves the lanes of such a client, and of any other one that needs no TLS. `rails`: its large
        buffers may go by UCX. `grant_keys`: those of the grants that readers come with.
        """
        self.wire = Wire(runtime.loop, sock, self, takes_descriptors=is_local)
        self.greeted: asyncio.Future[None] = runtime.future()
        self._runtime = runtime
        self._service = service
        self._config = config
        self._pool = pool
        self._meter = meter
        self._turns = turns
        self._line = Line()
        self._reads = 0
        self._name = name
        self._is_stranger = is_stranger
        self._certificate = certificate_of(sock)
        self._grant_keys = grant_keys
        self._gate: Gate | None = None
        """Of a reader or writer."""
        self._on_change = on_change
        self._door = door
        self._regions = ForeignRegions() if is_local else None
        self._rails = rails
        self._aside: Aside | None = None
        self._adopt_lane = None if isinstance(sock, ssl.SSLSocket) else adopt_lane
        self._lanes = 0
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
            if served is not None and served.request.changes_nothing:
                self._stop(served)
        elif kind == Kind.HELLO:
            self._greet(frame)
        elif kind == Kind.REGION and self._is_admitted and self._regions is not None:
            self._regions.add(frame.call, self.wire.take_descriptor())
        elif kind == Kind.LANE and self._is_admitted and self._adopt_lane is not None:
            self._take_lane(self._adopt_lane)
        elif kind == Kind.FORGET and self._regions is not None:
            self._regions.forget(frame.call)
        elif kind == Kind.RAIL and self._aside is not None:
            self._aside.take_offer(frame)
        elif kind == Kind.RAIL_UP and self._aside is not None:
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
            self._arrived(served)

    def _arrived(self, served: _Served) -> None:
        served.arrived_s = self._runtime.now_s()
        if served.refusal is not None:
            self.fail(served, served.refusal)
        elif served.takes_turns:
            is_first, self._reads = self._reads != self.wire.reads, self.wire.reads
            self._turns.enter(self._line, served, at_once=is_first)
        else:
            self.start(served)

    def lost(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.warning("connection from %s closed: %s", self._name, error)
        if self._aside is not None:
            self._aside.close()
        if not self.greeted.done():
            self.greeted.set_result(None)
        self._turns.leave(self._line)
        for served in list(self._calls.values()):
            if served.task is None or served.is_answered:
                self._forget(served)
            elif served.request.changes_nothing:
                served.task.cancel()
        self._on_change(self)

    def _take_lane(self, adopt: AdoptLane) -> None:
        """Whoever may read chunks may read them over a lane: that is all a lane is for. Raises ProtocolError."""
        try:
            check_sender(ReadChunks([], [], []), self._certificate)
        except EmberError as error:
            raise ProtocolError(str(error)) from error
        if self._regions is not None:
            self._lanes += 1
            if self._lanes > LANES_MAX:
                raise ProtocolError(f"more than {LANES_MAX} lanes of one connection")
            self._hand_over(adopt, self.wire.take_descriptor(), is_stream=False)
        elif self._gate is not None:
            raise ProtocolError("a reader has no streams")
        elif self._calls or self.wire.is_sending:
            raise ProtocolError("a connection with calls on it cannot become a lane")
        else:
            self._runtime.loop.call_soon(self._become_lane, adopt)

    def _become_lane(self, adopt: AdoptLane) -> None:
        """Once the frame that asks for it has been handled."""
        if self.wire.is_closed:
            return
        try:
            sock = self.wire.detach()
        except ProtocolError as error:
            self.wire.lose(error)
            return
        for option, value in KEEPALIVE.items():
            sock.setsockopt(*option, value)
        with sock.dup() as answering:
            if self._hand_over(adopt, sock.detach(), is_stream=True):
                # Nothing was under way, so there is room for it.
                answering.send(encode_frame(Kind.LANE, 0))

    def _hand_over(self, adopt: AdoptLane, descriptor: int, *, is_stream: bool) -> bool:
        try:
            adopt(descriptor, is_stream, self._gate.tenant if self._gate is not None else None)
        except OSError as error:  # The client finds that its lane is over, and goes on without.
            log.warning("no lane for %s: %s", self._name, error)
            return False
        return True

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
            if self._rails is not None and not self._is_stranger:
                answer = replace(answer, rails=list(self._rails.kinds), host=this_host())
                self._aside = Aside(self.wire, self._rails, self._runtime.loop, dead_s=self._config.dead_s)
            if self._adopt_lane is not None:
                answer = replace(answer, lanes=True)
        except EmberError as error:
            log.warning("connection from %s refused: %s", self._name, error)
            self.wire.send(Outgoing(encode_frame(Kind.ERROR, 0, encode_failure(error, _NOBODY))))
            self.wire.close_when_sent()
            return
        if self._certificate is not None and self._certificate.role in GRANTED:
            tenant, wall_ns = self._certificate.tenant, self._runtime.wall_ns
            self._gate = Gate(self._grant_keys, tenant=tenant, wall_ns=wall_ns)
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
        served = _Served(self, frame, weight)
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
            if self._gate is not None:
                self._gate.check(served.request, frame.lengths)
            if self._is_draining:
                raise Unavailable("the server is shutting down")
            if placed is None and (frame.kind == Kind.FETCH) != (served.request.fills_buffers and bool(frame.lengths)):
                raise ProtocolError("buffers to be filled where bytes are sent, or the other way round")
            if served.request.takes_turns:
                if placed is not None and served.request.fills_buffers:
                    served.held_bytes = len(frame.body)  # The rest is the client's own memory.
                self._turns.admit(self._line, served)
                served.takes_turns = True
        except EmberError as error:
            served.refusal = error
        self._window.take(weight)
        self._calls[frame.call] = served
        if placed is not None and served.request.fills_buffers:
            served.views, served.is_placed = placed, True
            return served
        if frame.kind == Kind.FETCH:
            served.lengths = frame.lengths
            return served
        if served.refusal is not None:
            if frame.kind == Kind.REQUEST:
                served.views = list(scratch(total))
            elif frame.kind == Kind.ASIDE_REQUEST and self._aside is not None:
                served.views = self._aside.unwanted(frame.lengths)
            return served
        self._make_room(served, frame.lengths)
        if placed is not None:
            for view, theirs in zip(served.views, placed, strict=True):
                view[:] = theirs  # Once; what is checked and stored is ours: they may change theirs at any time.
        return served

    def _take_aside(self, frame: Frame) -> Iterable[memoryview]:
        served = self._arriving = self._take(frame)
        if self._aside is None:
            raise ProtocolError("a request that comes over a rail, and there is none")
        small, count = self._aside.receive(frame.call, served.views, functools.partial(self._came, served))
        served.moving = count + 1
        return small

    def _came(self, served: _Served) -> None:
        """The payload of its frame, or a buffer on the rail."""
        served.moving -= 1
        if served.moving:
            return
        if self.wire.is_open():
            self._arrived(served)
        else:  # The client may have used its memory for something else while we took the bytes from there.
            self.wire.lose(ConnectionError("the other side closed the connection"))

    def _make_room(self, served: _Served, lengths: Sequence[int]) -> None:
        served.block = block = self._pool.take(sum(lengths))
        begin = 0
        for length in lengths:
            served.views.append(block[begin : begin + length])
            begin += length

    def _stop(self, served: _Served) -> None:
        """Nobody waits for its answer any more."""
        if served.task is not None:
            served.task.cancel()
        elif served.takes_turns and self._turns.withdraw(self._line, served):
            self.fail(served, Unavailable("the call was cancelled"))

    def start(self, served: _Served) -> None:
        """Serve a request; in place, if its handler waits for nothing."""
        if served.lengths:
            self._make_room(served, served.lengths)
        watch = self._meter.watch()
        call = self._serve(served, watch)
        before = current.set(watch)  # Of what is done here, of its task and of those that it spawns.
        try:
            awaited = call.send(None)
            served.task = self._runtime.spawn(HalfRun(call, awaited), "transport-serve")
        except StopIteration:
            return
        finally:
            current.reset(before)

    async def _serve(self, served: _Served, watch: Stopwatch) -> None:
        try:
            reply = await self._service.handle(served.request, served.views)
            body = encode_message(reply)
            if len(body) > HEADER_BYTES_MAX - 4 * len(served.views):
                raise LimitExceeded(f"a reply of {len(body)} bytes is over the limit: ask for less at once")
        except asyncio.CancelledError as stopped:
            self._count(served, watch, type(stopped).__name__)
            self.fail(served, Unavailable("the call was cancelled"))
        except Exception as error:
            self._count(served, watch, type(error).__name__)
            self.fail(served, error)
        else:
            self._count(served, watch, "")
            self._reply(served, reply, body)

    def _count(self, served: _Served, watch: Stopwatch, error: str) -> None:
        """Before it is answered: whoever has the answer finds it counted, and no longer than it took for them."""
        views = served.views
        self._meter.record(
            kind_of(served.request),
            watch,
            arrived_s=served.arrived_s,
            payload_bytes=sum(map(len, views)) if views else 0,
            error=error,
        )

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
                small, count = self._aside.send(served.call, payload, functools.partial(self._left, served))
                served.moving = count + 1
                header = encode_frame(Kind.ASIDE_REPLY, served.call, body, counts)
                self._answer(served, header, small, size=sum(counts))
                return
        self._answer(served, encode_frame(Kind.REPLY, served.call, body, counts), payload, size=sum(counts))

    def _left(self, served: _Served) -> None:
        """The frame of its answer, or a buffer on the rail."""
        served.moving -= 1
        if not served.moving:
            self._ended(served)

    def fail(self, served: _Served, error: Exception) -> None:
        served.block = None
        self._answer(served, encode_frame(Kind.ERROR, served.call, encode_failure(error, served.request)))

    def _answer(self, served: _Served, header: bytes, payload: Sequence[memoryview] = (), *, size: int = 0) -> None:
        """`size`: of everything that is to be sent, on the rail too."""
        served.is_answered = True
        if self.wire.is_closed:
            self._ended(served)
            return
        if served.takes_turns:
            self._turns.answer(self._line, served, size)
        on_sent = self._left if served.moving else self._ended
        self.wire.send(Outgoing(header, payload, functools.partial(on_sent, served)))

    def _ended(self, served: _Served) -> None:
        self._forget(served)
        if served.block is not None:
            self._pool.give(served.block)
        self._on_change(self)

    def _forget(self, served: _Served) -> None:
        """Nothing is held for it any more."""
        if self._calls.pop(served.call, None) is None:
            return
        self._window.give(served.weight)
        if served.takes_turns:
            self._turns.end(self._line, served)


_NOBODY = Message()
"""Stands where a request could not be read."""
