"""The large buffers of a connection's frames, which travel on a rail beside its socket.

The client offers its end of a rail once it was let in, the server answers with its own or with none; each then sends
the other one large message and says RAIL_UP when the other's has come. From then on a frame of an ASIDE kind has only
its small buffers in its payload, and each large one is a message on the rail.

Does not know: calls but by number, or what UCX does (`ucx_rail`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ..errors import ProtocolError
from ..types import BATCH_ITEMS_MAX
from .frame import ASIDE_BYTES_MIN, Frame, Kind, encode_frame
from .handshake import Hello, RailOffer, decode_offer, encode_offer, this_host
from .ucx_library import UcxError
from .ucx_rail import Rail, Rails
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")

INDEX_BITS = 16
"""Of a tag: the place of a buffer in its call. Before it the number of the call, which is never 0 as the probe's is."""

assert BATCH_ITEMS_MAX < 1 << INDEX_BITS


class Aside:
    """Of one connection, at either end of it."""

    def __init__(self, wire: Wire, rails: Rails, loop: asyncio.AbstractEventLoop, *, dead_s: float) -> None:
        self._wire = wire
        self._rails = rails
        self._loop = loop
        self._dead_s = dead_s
        self._rail: Rail | None = None
        self._is_proved = False
        """Messages of the other side arrive."""

    @property
    def is_there(self) -> bool:
        """There is a rail, or it is being laid."""
        return self._rail is not None

    @property
    def is_up(self) -> bool:
        """True if large buffers may be sent."""
        return self._rail is not None and self._rail.is_up

    @property
    def is_whole(self) -> bool:
        """True if large buffers go over the rail both ways. As a client."""
        return self.is_up and self._is_proved

    def offer(self, answer: Hello) -> None:
        """As a client: offer a rail to the server that has said `answer`, if both have the devices."""
        host = this_host()
        kind = self._rails.common(tuple(answer.rails), is_same_host=bool(host) and answer.host == host)
        if kind and self._open(kind) and self._rail is not None:
            self._tell(RailOffer(kind, self._rail.address))

    def take_offer(self, frame: Frame) -> None:
        """As a server: a RAIL frame has come. Raises ProtocolError."""
        if self._rail is not None:
            raise ProtocolError("a second rail")
        offer = decode_offer(frame.body)
        address = b""
        if self._open(offer.kind) and self._rail is not None:
            address = self._rail.address
            self._connect(self._rail, offer.address)
        self._tell(RailOffer(offer.kind, address))

    def take_answer(self, frame: Frame) -> None:
        """As a client: a RAIL frame has come. Raises ProtocolError."""
        offer = decode_offer(frame.body)
        if self._rail is None:
            raise ProtocolError("a rail that nobody asked for")
        if offer.address:
            self._connect(self._rail, offer.address)
        else:
            self.close()

    def take_up(self) -> None:
        """A RAIL_UP frame has come."""
        if self._rail is not None:
            self._rail.is_up = True

    def send(self, call: int, views: Sequence[memoryview], done: Callable[[], None]) -> tuple[list[memoryview], int]:
        """Send the large ones of `views`. Returns the others, and how often `done` will be called: as each has left."""
        assert self._rail is not None
        return _part(self._rail.send, call, views, done)

    def receive(self, call: int, views: Sequence[memoryview], done: Callable[[], None]) -> tuple[list[memoryview], int]:
        """Fill the large ones of `views`. Returns the others, and how often `done` will be called: when each is there.

        Raises ProtocolError where there is no rail.
        """
        if self._rail is None:
            raise ProtocolError("buffers that come over a rail, and there is none")
        return _part(self._rail.receive, call, views, done)

    def unwanted(self, lengths: Sequence[int]) -> list[memoryview]:
        """Memory to receive what nobody reads."""
        return [self._rails.sump.piece(length) for length in lengths]

    def close(self) -> None:
        """The memory of every transfer is its owner's again when this returns."""
        if self._rail is not None:
            self._rail.close()
            self._rail = None

    def _open(self, kind: str) -> bool:
        try:
            self._rail = self._rails.open(kind, self._loop, lost=self._lost, dead_s=self._dead_s)
        except UcxError as error:
            log.warning("a connection goes on without UCX: %s", error)
        return self._rail is not None

    def _connect(self, rail: Rail, address: bytes) -> None:
        try:
            rail.connect(address, proved=self._proved)
        except UcxError as error:
            self._loop.call_soon(self._lost, error)

    def _proved(self) -> None:
        self._is_proved = True
        self._wire.send(Outgoing(encode_frame(Kind.RAIL_UP, 0)))

    def _lost(self, error: Exception) -> None:
        if self._is_proved or self.is_up:
            self._wire.lose(error)
        elif self._rail is not None:
            # Nothing of ours is on it, and the other side will never hear that it may use it.
            log.warning("a connection goes on without UCX: %s", error)
            self.close()

    def _tell(self, offer: RailOffer) -> None:
        self._wire.send(Outgoing(encode_frame(Kind.RAIL, 0, encode_offer(offer))))


def is_large(view: memoryview) -> bool:
    """True if it travels on a rail."""
    return len(view) >= ASIDE_BYTES_MIN


def _part(
    act: Callable[[memoryview, int, Callable[[], None]], None],
    call: int,
    views: Sequence[memoryview],
    done: Callable[[], None],
) -> tuple[list[memoryview], int]:
    small, count = [], 0
    for index, view in enumerate(views):
        if is_large(view):
            act(view, call << INDEX_BITS | index, done)
            count += 1
        else:
            small.append(view)
    return small, count
