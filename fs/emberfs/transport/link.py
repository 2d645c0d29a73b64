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
import logging
from collections.abc import Callable, Iterable, Sequence
from socket import socket

from ..errors import EmberError, ProtocolError, Unreachable, UpdateUnknown
from ..messages import Message
from ..runtime import AsyncioRuntime
from .codec import decode_failure, decode_message
from .config import TcpConfig
from .frame import HEADER_BYTES_MAX, Frame, Kind, encode_frame
from .handshake import Hello, accept_answer, certificate_of, client_hello, decode_hello, encode_hello
from .window import Window
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")

_SCRATCH = memoryview(bytearray(64 << 10))
"""Written by everybody, read by nobody."""


class Call:
    """A request of this process, from `connection.call` to its answer."""

    __slots__ = (
        "body",
        "buffers",
        "changes_nothing",
        "fills",
        "future",
        "link",
        "name",
        "number",
        "outgoing",
        "weight",
    )

    def __init__(self, request: Message, body: bytes, buffers: Sequence[memoryview], future: asyncio.Future[Message]):
        self.name = type(request).__name__
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

    @property
    def may_have_happened(self) -> bool:
        """True if the server may have done something that matters."""
        return self.outgoing is not None and self.outgoing.began and not self.changes_nothing

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


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
    ) -> None:
        """`on_change` is called when there is room for calls, and when there will be none any more."""
        self.wire = Wire(runtime.loop, sock, self)
        self.welcome: asyncio.Future[None] = runtime.future()
        """Done when the server has let us in; else the error."""
        self.is_draining = False
        """The server takes no more calls."""
        self._config = config
        self._address = address
        self._certificate = certificate_of(sock)
        self._on_change = on_change
        self._window = Window(0, 0)
        self._calls: dict[int, Call] = {}
        self._count = 0
        self._arriving: tuple[Call, Message | Exception] | None = None
        self.wire.send(Outgoing(encode_frame(Kind.HELLO, 0, encode_hello(client_hello(config)))))

    def has_room(self, weight: int) -> bool:
        """True if a call of `weight` bytes may be sent now."""
        return self._window.has_room(weight)

    def send(self, call: Call) -> None:
        """Send `call`, for which there is room. Its future gets the answer, or the error."""
        self._count += 1
        call.number = self._count
        call.link = self
        lengths = [len(buffer) for buffer in call.buffers]
        header = encode_frame(Kind.FETCH if call.fills else Kind.REQUEST, call.number, call.body, lengths)
        call.body = b""
        call.outgoing = Outgoing(header, () if call.fills else call.buffers)
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
        call.buffers = ()
        if self._arriving is not None and self._arriving[0] is call:
            self.wire.reader.divert(_SCRATCH)
        if call.changes_nothing:  # An update goes on to its end anyway.
            self.wire.send(Outgoing(encode_frame(Kind.CANCEL, call.number)))

    # ---- the wire's

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        kind = frame.kind
        if kind == Kind.REPLY:
            return self._take_reply(self._called(frame), frame)
        if kind == Kind.ERROR and frame.call:
            self._arriving = self._called(frame), decode_failure(frame.body)
        elif kind == Kind.ERROR:
            self._refuse(decode_failure(frame.body))
        elif kind == Kind.HELLO:
            self._take_welcome(decode_hello(frame.body))
        elif kind == Kind.GOODBYE:
            self.is_draining = True
            self._on_change(self)
        elif kind != Kind.PING:
            raise ProtocolError(f"a server does not send {kind.name}")
        return ()

    def end(self) -> None:
        if self._arriving is None:
            return
        (call, outcome), self._arriving = self._arriving, None
        if isinstance(outcome, Exception):
            call.fail(outcome)
        elif not call.future.done():
            call.future.set_result(outcome)
        self._forget(call)
        self._on_change(self)

    def lost(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.warning("connection to %s closed: %s", self._address, error)
        self._refuse(error)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            kind = UpdateUnknown if call.may_have_happened else Unreachable
            call.fail(kind(f"{call.name}: the connection to {self._address} was lost ({error})"))
        self._on_change(self)

    def _called(self, frame: Frame) -> Call:
        call = self._calls.get(frame.call)
        if call is None:
            raise ProtocolError(f"an answer to call {frame.call}, which nobody made")
        return call

    def _take_reply(self, call: Call, frame: Frame) -> Iterable[memoryview]:
        total = sum(frame.lengths)
        self._arriving = call, ProtocolError("given up")
        if call.future.done():
            return _scratch(total)
        try:
            reply = decode_message(frame.body)
        except ProtocolError as error:
            self._arriving = call, error
            return _scratch(total)
        self._arriving = call, reply
        if not frame.lengths:
            return ()
        if not call.fills or len(frame.lengths) != len(call.buffers):
            raise ProtocolError(f"a reply with {len(frame.lengths)} buffers to {call.name}")
        sinks = [buffer[:length] for buffer, length in zip(call.buffers, frame.lengths, strict=True)]
        if sum(map(len, sinks)) != total:
            raise ProtocolError(f"a reply to {call.name} that does not fit into its buffers")
        return sinks

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
        self.welcome.set_result(None)

    def _refuse(self, error: Exception) -> None:
        if not self.welcome.done():
            self.welcome.set_exception(error)

    def _forget(self, call: Call) -> None:
        del self._calls[call.number]
        self._window.give(call.weight)
        if self.is_draining and not self._calls:
            self.wire.close_when_sent()


def _scratch(size: int) -> Iterable[memoryview]:
    while size > 0:
        yield _SCRATCH[:size]
        size -= len(_SCRATCH)
