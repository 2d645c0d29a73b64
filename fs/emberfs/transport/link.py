"""The client's end of one connection, from the handshake to its loss: calls out, answers in.

Invariants:
  - The memory of a call is written to only between `send` and the end of the call's future. What comes for a call that
    was given up goes to scratch memory.
  - A call that fails with the connection is told by what may have happened: `Unavailable` if no byte of it left or
    if it changes nothing, else `UpdateUnknown`.

Does not know: how to connect, or what to do after a loss.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from socket import AF_UNIX, SOCK_SEQPACKET, socket, socketpair
from typing import NamedTuple

from ..errors import EmberError, ProtocolError, Unreachable, UpdateUnknown
from ..messages import Foreign, Message
from ..runtime import AsyncioRuntime
from .aside import Aside, is_large
from .blocks import scratch
from .codec import decode_failure, decode_message
from .config import TcpConfig
from .frame import HEADER_BYTES_MAX, Frame, Kind, encode_frame, encode_places
from .handshake import Hello, accept_answer, certificate_of, client_hello, decode_hello, encode_hello
from .region import Block, Blocks, Place, Region, find
from .ucx_rail import Rails
from .window import Window
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")

PLACED_BYTES_MIN = 32 << 10
"""Below, to write and read the bytes on the socket costs less than to copy them and say where they are."""


class Call:
    """A request of this process, from `connection.call` to its answer."""

    __slots__ = (
        "block",
        "body",
        "buffers",
        "changes_nothing",
        "fills",
        "future",
        "landed_aside",
        "link",
        "moving",
        "name",
        "number",
        "outcome",
        "outgoing",
        "places",
        "released",
        "weight",
    )

    def __init__(self, request: Message, body: bytes, buffers: Sequence[memoryview], future: asyncio.Future[Message]):
        self.name = "request" if isinstance(request, Foreign) else type(request).__name__
        self.changes_nothing = request.changes_nothing
        self.fills = request.fills_buffers and bool(buffers)
        self.body = body
        self.buffers: Sequence[memoryview] = buffers
        self.weight = len(body) + sum(map(len, buffers))
        self.future = future
        self.number = 0
        self.outgoing: Outgoing | None = None
        """None before it has a place in a connection's queue."""
        self.link: Link | None = None
        """The connection it was sent over."""
        self.block: Block | None = None
        """Stands for those buffers that lie in no region."""
        self.places: list[Sent] = []
        """Of its buffers, if it was sent so."""
        self.released: asyncio.Future[None] | None = None
        """Its buffers lie in regions themselves, or are on a rail: done when no server needs them any more."""
        self.moving = 0
        """Buffers of it that are on a rail."""
        self.landed_aside = False
        """Bytes of its answer came over a rail."""
        self.outcome: Message | Exception | None = None
        """The answer, once it has come. The call ends when nothing is moving either."""

    @property
    def may_have_happened(self) -> bool:
        """True if the server may have done something that matters."""
        return self.outgoing is not None and self.outgoing.began and not self.changes_nothing

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Sent(NamedTuple):
    """A buffer of a call, as the server knows it."""

    place: Place
    number: int
    """Of the region when the call was sent."""
    staged: memoryview | None
    """What stands for it; None: it is itself in a region."""


class Link:
    """One connection to a server."""

    def __init__(
        self,
        runtime: AsyncioRuntime,
        sock: socket,
        *,
        config: TcpConfig,
        address: str,
        on_change: Callable[[Link], None],
        blocks: Blocks | None = None,
        key: str = "",
    ) -> None:
        """`on_change` is called when there is room for calls, and when there will be none any more.

        `blocks`: the server is on this host, behind a unix socket, and takes memory. `key`: what it gave us for that.
        """
        self._runtime = runtime
        self.wire = Wire(runtime.loop, sock, self)
        self.welcome: asyncio.Future[None] = runtime.future()
        """Done when the server has let us in; else the error."""
        self.answer: Hello | None = None
        """What the server said of itself."""
        self.is_draining = False
        """The server takes no more calls."""
        self._blocks = blocks
        self._announced: dict[int, weakref.ref[Region]] = {}
        """Regions that the server knows, by number."""
        self._config = config
        self._address = address
        self._certificate = certificate_of(sock)
        self._on_change = on_change
        self._window = Window(0, 0)
        self._calls: dict[int, Call] = {}
        self._count = 0
        self._arriving: tuple[Call, Message | Exception] | None = None
        self._lane_ends: deque[socket] = deque()
        """The server's ends of new lanes that are on their way to it."""
        self._lane: asyncio.Future[None] | None = None
        """Done when the server says that this connection is a lane."""
        self._aside: Aside | None = None
        self.wire.send(Outgoing(encode_frame(Kind.HELLO, 0, encode_hello(client_hello(config, key=key)))))

    def open_rail(self, rails: Rails) -> None:
        """Let large buffers go by UCX as soon as that works, if the server has it. After the welcome."""
        assert self.answer is not None
        self._aside = Aside(self.wire, rails, self._runtime.loop, dead_s=self._config.dead_s)
        self._aside.offer(self.answer)

    @property
    def has_rail(self) -> bool:
        """True if large buffers go by UCX both ways."""
        return self._aside is not None and self._aside.is_whole

    @property
    def wants_rail(self) -> bool:
        """True if large buffers go by UCX, or will soon unless that fails."""
        return self._aside is not None and self._aside.is_there

    def has_room(self, weight: int) -> bool:
        """True if a call of `weight` bytes may be sent now."""
        return self._window.has_room(weight)

    def send(self, call: Call) -> None:
        """Send `call`, for which there is room. Its future gets the answer, or the error."""
        self._count += 1
        call.number = self._count
        call.link = self
        lengths = [len(buffer) for buffer in call.buffers]
        if self._blocks is not None and call.buffers:
            self._place(call, lengths, self._blocks)
        if call.places:
            places = encode_places((sent.number, sent.place.offset) for sent in call.places)
            call.outgoing = Outgoing(encode_frame(Kind.PLACED, call.number, places + call.body, lengths))
        elif self._aside is not None and self._aside.is_up and not call.fills and any(map(is_large, call.buffers)):
            small, call.moving = self._aside.send(call.number, call.buffers, functools.partial(self._moved, call))
            call.released = self._runtime.future()
            call.outgoing = Outgoing(encode_frame(Kind.ASIDE_REQUEST, call.number, call.body, lengths), small)
            call.outgoing.began = True  # What is on the rail cannot be taken back.
        else:
            header = encode_frame(Kind.FETCH if call.fills else Kind.REQUEST, call.number, call.body, lengths)
            call.outgoing = Outgoing(header, () if call.fills else call.buffers)
        call.body = b""
        self._calls[call.number] = call
        self._window.take(call.weight)
        self.wire.send(call.outgoing)

    def give_up(self, call: Call) -> None:
        """Nobody waits for `call` any more: its memory is its owner's again when this returns."""
        if self._calls.get(call.number) is not call or self.wire.is_closed:
            return
        assert call.outgoing is not None
        if self.wire.take_back(call.outgoing):
            self._forget(call)
            return
        call.outgoing.detach()
        if call.released is None:
            call.buffers = ()
        elif not call.places:
            self._leave_rail(call)
        if self._arriving is not None and self._arriving[0] is call:
            self.wire.reader.divert()
        if call.changes_nothing:  # An update goes on to its end anyway.
            self.wire.send(Outgoing(encode_frame(Kind.CANCEL, call.number)))

    def disown(self, call: Call) -> None:
        """The server may use the memory of `call`, which was given up, for ever: it is not ours any more.

        What moves on a rail cannot be taken away from UCX: it is waited for, and ends in time (`ucx_rail`).
        """
        if not call.moving:
            self._release(call, is_answered=False)

    @property
    def is_local(self) -> bool:
        """The server is on this host, and takes memory."""
        return self._blocks is not None

    async def become_lane(self) -> socket:
        """This connection, over TCP and without calls, as a stream. Raises ConnectionError."""
        self._lane = asyncio.get_running_loop().create_future()
        self.wire.send(Outgoing(encode_frame(Kind.LANE, 0)))
        try:
            await self._lane
            return self.wire.detach()
        except BaseException:
            self.wire.lose(ConnectionError("no lane"))
            raise

    def open_lane(self) -> socket | None:
        """Our end of a new local lane; None: the server serves none."""
        if self.wire.is_closed or self.is_draining or self.answer is None or not self.answer.lanes:
            return None
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        self._lane_ends.append(theirs)
        self.wire.send(Outgoing(encode_frame(Kind.LANE, 0), fd=theirs.fileno(), on_sent=self._lane_was_sent))
        return ours

    def _lane_was_sent(self) -> None:
        self._lane_ends.popleft().close()

    # ---- memory

    def _place(self, call: Call, lengths: Sequence[int], blocks: Blocks) -> None:
        """Name the buffers by where they lie, or by what stands for them. Few bytes travel on the socket as ever."""
        found = [find(buffer) for buffer in call.buffers]
        missing = [length for place, length in zip(found, lengths, strict=True) if place is None]
        if missing and sum(lengths) < PLACED_BYTES_MIN:
            return
        begin = 0
        if missing:
            call.block = blocks.take(max(sum(missing), 1))
        for place, buffer, length in zip(found, call.buffers, lengths, strict=True):
            staged = None
            if place is None:
                assert call.block is not None
                staged = call.block.view[begin : begin + length]
                place = Place(call.block.place.region, call.block.place.offset + begin)
                begin += length
                if not call.fills:
                    staged[:] = buffer
            self._announce(place.region)
            call.places.append(Sent(place, place.region.number, staged))
        if any(sent.staged is None for sent in call.places):
            call.released = asyncio.get_running_loop().create_future()

    def _announce(self, region: Region) -> None:
        if region.number in self._announced:
            return
        for number, known in list(self._announced.items()):
            if (old := known()) is None or old.number != number:
                del self._announced[number]
                self.wire.send(Outgoing(encode_frame(Kind.FORGET, number)))
        self._announced[region.number] = weakref.ref(region)
        self.wire.send(Outgoing(encode_frame(Kind.REGION, region.number), fd=region.fd))

    def _take_placed(self, call: Call, frame: Frame) -> None:
        """The buffers have been filled in place: bring what stands for them to where it belongs."""
        self._arriving = call, ProtocolError("given up")
        if call.future.done():
            return
        try:
            reply = decode_message(frame.body)
        except ProtocolError as error:
            self._arriving = call, error
            return
        if len(frame.lengths) != len(call.places) or any(map(operator.gt, frame.lengths, map(len, call.buffers))):
            raise ProtocolError(f"a reply to {call.name} that does not fit its buffers")
        if any(sent.place.region.number != sent.number for sent in call.places):
            # Another server was lost that had a part of the region: what came since is not in the new pages.
            self._arriving = call, Unreachable(f"{call.name}: its memory was renewed")
            return
        for sent, buffer, count in zip(call.places, call.buffers, frame.lengths, strict=True):
            if sent.staged is not None and count:
                buffer[:count] = sent.staged[:count]
        self._arriving = call, reply

    def _release(self, call: Call, *, is_answered: bool) -> None:
        """No server needs the memory of `call` any more; or (`not is_answered`) one may use it for ever.

        It may write to it; or read, late, what is to be written, and must not find what its owner did with it since.
        """
        block, call.block = call.block, None
        if is_answered and block is not None and self._blocks is not None:
            self._blocks.give(block)
        if not is_answered:
            for sent in call.places:
                if sent.staged is None and sent.place.region.number == sent.number:
                    self._renew(sent.place.region)
        call.places = []
        if call.released is not None and not call.released.done():
            call.released.set_result(None)

    def _renew(self, region: Region) -> None:
        try:
            region.renew()
        except OSError as error:  # The other calls of this connection must hear of its loss all the same.
            log.error("memory that %s may still use could not be renewed: %s", self._address, error)

    # ---- the wire's

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        kind = frame.kind
        if kind == Kind.REPLY:
            return self._take_reply(self._called(frame), frame)
        if kind == Kind.ASIDE_REPLY:
            return self._take_aside(self._called(frame), frame)
        if kind == Kind.PLACED_REPLY:
            self._take_placed(self._called(frame), frame)
            return ()
        if kind == Kind.ERROR and frame.call:
            self._arriving = self._called(frame), decode_failure(frame.body)
        elif kind == Kind.ERROR:
            self._refuse(decode_failure(frame.body))
        elif kind == Kind.HELLO:
            self._take_welcome(decode_hello(frame.body))
        elif kind == Kind.LANE and self._lane is not None and not self._lane.done():
            self._lane.set_result(None)
        elif kind == Kind.GOODBYE:
            self.is_draining = True
            self._on_change(self)
        elif kind == Kind.RAIL and self._aside is not None:
            self._aside.take_answer(frame)
        elif kind == Kind.RAIL_UP and self._aside is not None:
            self._aside.take_up()
        elif kind != Kind.PING:
            raise ProtocolError(f"a server does not send {kind.name}")
        return ()

    def end(self) -> None:
        if self._arriving is None:
            return
        (call, outcome), self._arriving = self._arriving, None
        call.outcome = outcome
        if not call.moving:
            self._finish(call)

    def lost(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.warning("connection to %s closed: %s", self._address, error)
        if self._aside is not None:
            self._aside.close()
        self._refuse(error)
        while self._lane_ends:
            self._lane_was_sent()
        if self._lane is not None and not self._lane.done():
            self._lane.set_exception(ConnectionError(f"lost: {error}"))
        calls, self._calls = self._calls, {}
        for call in calls.values():
            assert call.outgoing is not None
            self._release(call, is_answered=not call.outgoing.began)
            kind = UpdateUnknown if call.may_have_happened else Unreachable
            call.fail(kind(f"{call.name}: the connection to {self._address} was lost ({error})"))
        self._on_change(self)

    def _moved(self, call: Call) -> None:
        """A buffer of `call` has left or come over the rail."""
        call.moving -= 1
        if call.moving:
            return
        if call.outcome is not None:
            self._finish(call)
        elif call.future.done():
            self._leave_rail(call)

    def _leave_rail(self, call: Call) -> None:
        """Nobody waits for `call` any more: its memory is its owner's again as soon as nothing of it moves."""
        if not call.moving:
            call.buffers = ()
            self._release(call, is_answered=False)

    def _finish(self, call: Call) -> None:
        if call.landed_aside and not self.wire.is_open():
            # The server may have used its memory for something else while we took the bytes from there.
            self.wire.lose(ConnectionError("the other side closed the connection"))
            return
        if isinstance(call.outcome, Exception):
            call.fail(call.outcome)
        elif call.outcome is not None and not call.future.done():
            call.future.set_result(call.outcome)
        self._forget(call)
        self._on_change(self)

    def _called(self, frame: Frame) -> Call:
        call = self._calls.get(frame.call)
        if call is None or call.outcome is not None:
            raise ProtocolError(f"an answer to call {frame.call}, which nobody made")
        return call

    def _take_reply(self, call: Call, frame: Frame) -> Iterable[memoryview]:
        sinks = self._sinks(call, frame)
        return scratch(sum(frame.lengths)) if sinks is None else sinks

    def _sinks(self, call: Call, frame: Frame) -> list[memoryview] | None:
        """Where the bytes of a reply go; None: nobody wants them."""
        self._arriving = call, ProtocolError("given up")
        if call.future.done():
            return None
        try:
            reply = decode_message(frame.body)
        except ProtocolError as error:
            self._arriving = call, error
            return None
        self._arriving = call, reply
        if not frame.lengths:
            return []
        if not call.fills or len(frame.lengths) != len(call.buffers):
            raise ProtocolError(f"a reply with {len(frame.lengths)} buffers to {call.name}")
        sinks = [buffer[:length] for buffer, length in zip(call.buffers, frame.lengths, strict=True)]
        if sum(map(len, sinks)) != sum(frame.lengths):
            raise ProtocolError(f"a reply to {call.name} that does not fit into its buffers")
        return sinks

    def _take_aside(self, call: Call, frame: Frame) -> Iterable[memoryview]:
        if self._aside is None:
            raise ProtocolError("an answer that comes over a rail, and there is none")
        sinks = self._sinks(call, frame)
        if sinks is None:
            sinks = self._aside.unwanted(frame.lengths)
        small, count = self._aside.receive(call.number, sinks, functools.partial(self._moved, call))
        call.moving += count
        call.landed_aside = True
        if call.released is None:
            call.released = self._runtime.future()
        return small

    def _take_welcome(self, answer: Hello) -> None:
        if self.welcome.done():
            raise ProtocolError("a second welcome")
        try:
            accept_answer(self._config, answer, certificate=self._certificate)
        except EmberError as error:
            self._refuse(error)
            return
        self.wire.reader.header_bytes_max = HEADER_BYTES_MAX
        self._window = Window(answer.calls_max, answer.bytes_max)
        self.answer = answer
        self.welcome.set_result(None)

    def _refuse(self, error: Exception) -> None:
        if not self.welcome.done():
            self.welcome.set_exception(error)

    def _forget(self, call: Call) -> None:
        del self._calls[call.number]
        self._window.give(call.weight)
        self._release(call, is_answered=True)
        if self.is_draining and not self._calls:
            self.wire.close_when_sent()
