"""The large buffers of a connection's frames, which travel on a lane beside its socket.

The client offers its end of a lane once it was let in, the server answers with its own or with none; each then sends
the other one large message and says LANE_UP when the other's has come. From then on a frame of an ASIDE kind has only
its small buffers in its payload, and each large one is a message on the lane.

Does not know: calls but by number, or what UCX does (`ucx_lane`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ..errors import ProtocolError
from ..types import BATCH_ITEMS_MAX
from .frame import ASIDE_BYTES_MIN, Frame, Kind, encode_frame
from .handshake import Hello, LaneOffer, decode_offer, encode_offer, this_host
from .ucx_lane import Lane, Lanes
from .ucx_library import UcxError
from .wire import Outgoing, Wire

log = logging.getLogger("emberline.transport")

INDEX_BITS = 16
"""Of a tag: the place of a buffer in its call. Before it the number of the call, which is never 0 as the probe's is."""

assert BATCH_ITEMS_MAX < 1 << INDEX_BITS


class Aside:
    """Of one connection, at either end of it."""

    def __init__(self, wire: Wire, lanes: Lanes, loop: asyncio.AbstractEventLoop, *, dead_s: float) -> None:
        self._wire = wire
        self._lanes = lanes
        self._loop = loop
        self._dead_s = dead_s
        self._lane: Lane | None = None
        self._is_proved = False
        """Messages of the other side arrive."""

    @property
    def is_up(self) -> bool:
        """True if large buffers may be sent."""
        return self._lane is not None and self._lane.is_up

    @property
    def is_whole(self) -> bool:
        """True if large buffers go over the lane both ways. As a client."""
        return self.is_up and self._is_proved

    def offer(self, answer: Hello) -> None:
        """As a client: offer a lane to the server that has said `answer`, if both have the devices."""
        host = this_host()
        kind = self._lanes.common(tuple(answer.lanes), is_same_host=bool(host) and answer.host == host)
        if kind and self._open(kind) and self._lane is not None:
            self._tell(LaneOffer(kind, self._lane.address))

    def take_offer(self, frame: Frame) -> None:
        """As a server: a LANE frame has come. Raises ProtocolError."""
        if self._lane is not None:
            raise ProtocolError("a second lane")
        offer = decode_offer(frame.body)
        address = b""
        if self._open(offer.kind) and self._lane is not None:
            address = self._lane.address
            self._connect(self._lane, offer.address)
        self._tell(LaneOffer(offer.kind, address))

    def take_answer(self, frame: Frame) -> None:
        """As a client: a LANE frame has come. Raises ProtocolError."""
        offer = decode_offer(frame.body)
        if self._lane is None:
            raise ProtocolError("a lane that nobody asked for")
        if offer.address:
            self._connect(self._lane, offer.address)
        else:
            self.close()

    def take_up(self) -> None:
        """A LANE_UP frame has come."""
        if self._lane is not None:
            self._lane.is_up = True

    def send(self, call: int, views: Sequence[memoryview], done: Callable[[], None]) -> tuple[list[memoryview], int]:
        """Send the large ones of `views`. Returns the others, and how often `done` will be called: as each has left."""
        assert self._lane is not None
        return _part(self._lane.send, call, views, done)

    def receive(self, call: int, views: Sequence[memoryview], done: Callable[[], None]) -> tuple[list[memoryview], int]:
        """Fill the large ones of `views`. Returns the others, and how often `done` will be called: when each is there.

        Raises ProtocolError where there is no lane.
        """
        if self._lane is None:
            raise ProtocolError("buffers that come over a lane, and there is none")
        return _part(self._lane.receive, call, views, done)

    def close(self) -> None:
        """The memory of every transfer is its owner's again when this returns."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _open(self, kind: str) -> bool:
        try:
            self._lane = self._lanes.open(kind, self._loop, lost=self._lost, dead_s=self._dead_s)
        except UcxError as error:
            log.warning("a connection goes on without UCX: %s", error)
        return self._lane is not None

    def _connect(self, lane: Lane, address: bytes) -> None:
        try:
            lane.connect(address, proved=self._proved)
        except UcxError as error:
            self._loop.call_soon(self._lost, error)

    def _proved(self) -> None:
        self._is_proved = True
        self._wire.send(Outgoing(encode_frame(Kind.LANE_UP, 0)))

    def _lost(self, error: Exception) -> None:
        if self._is_proved or self.is_up:
            self._wire.lose(error)
        elif self._lane is not None:
            # Nothing of ours is on it, and the other side will never hear that it may use it.
            log.warning("a connection goes on without UCX: %s", error)
            self.close()

    def _tell(self, offer: LaneOffer) -> None:
        self._wire.send(Outgoing(encode_frame(Kind.LANE, 0, encode_offer(offer))))


def is_large(view: memoryview) -> bool:
    """True if it travels on a lane."""
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
