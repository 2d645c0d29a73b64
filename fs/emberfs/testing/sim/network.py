"""A simulated network: every message is encoded and decoded, takes time, and may be lost, doubled or cut off.

    fabric = SimFabric(runtime)
    network = fabric.network(process, host="storage-1")     # a `transport.types.Network`

It behaves as TCP connections between hosts do, and a little worse:
  - A connection is made at the first call. Nobody listens: Unreachable, at once. The way is cut: Unreachable, late.
  - Requests on their way overtake each other. Payload is copied at the sender's, and a reader's memory is written to
    only as the reply arrives.
  - A connection breaks when the other process dies, when it or the way is dead for KEEPALIVE_S, and when a fault says
    so. Every call in its air raises UpdateUnknown (Unreachable if it changes nothing); its requests may still arrive,
    even much later.
  - A doubled request is handled twice; the first reply counts.

Invariants: what is in the air belongs to nobody, so the death of the sender does not stop it. Only errors of ours
cross; anything else that a service raises fails the simulation.

Does not know: what the messages mean.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

import msgspec

from ... import messages
from ...errors import EmberError, Unanswered, Unavailable, Unreachable, UpdateUnknown
from ...messages import Message
from ...transport.types import Service
from ...waiting import first_of
from .loop import SimRuntime
from .process import SimProcess
from .traps import Passage, Trap

CONNECT_TIMEOUT_S = 1.0
KEEPALIVE_S = 2.0
"""A connection whose other end has been silent for so long is given up."""
RESEND_S = 0.2
"""How often a message is sent again while the way is cut."""
LATE_S_MAX = 8.0
"""How late a request may arrive that was given up or doubled."""


@dataclass(kw_only=True, slots=True)
class LinkFaults:
    """What goes wrong on every link, as probabilities per message. Change the fields at any time."""

    reset: float = 0.0
    """The connection breaks; this message may or may not arrive."""
    lost: float = 0.0
    """This message vanishes; the connection breaks KEEPALIVE_S later."""
    doubled: float = 0.0
    """This request arrives twice."""
    slow: float = 0.0
    """This message takes up to a second."""


@dataclass(slots=True, eq=False)
class _Exchange:
    """One call in the air."""

    connection: SimConnection
    message: Message
    request: bytes
    """The message as it travels."""
    payloads: list[bytes]
    reads: list[int] | None
    """Lengths of the buffers to fill, for a read."""
    buffers: Sequence[memoryview]
    reply: asyncio.Future[Message]
    is_answered: bool = False
    """The reply has set out."""


class SimFabric:
    """All links between all hosts."""

    def __init__(self, world: SimRuntime) -> None:
        self.world = world
        self.faults = LinkFaults()
        self.traps: list[Trap] = []
        self._random = world.random("network")
        self._cut: set[tuple[str, str]] = set()
        self._listening: dict[str, SimListener] = {}
        self._networks: dict[SimNetwork, None] = {}
        self._context = Context()
        self._ports = 0

    def network(self, process: SimProcess, host: str) -> SimNetwork:
        """The network as `process` on `host` sees it."""
        network = SimNetwork(self, process, host)
        self._networks[network] = None
        process.on_death(network.die)
        return network

    def cut(self, source: str, destination: str) -> None:
        """Nothing gets from one host to the other any more (the way back stays)."""
        self._cut.add((source, destination))
        ends = (source, destination)
        for network in self._networks:
            if network.host in ends:
                self._suspect(connection for connection in network.connections.values() if connection.peer_host in ends)

    def mend(self, source: str, destination: str) -> None:
        """Take `cut` back."""
        self._cut.discard((source, destination))

    def heal(self) -> None:
        """Every link works again."""
        self._cut.clear()

    def suspect(self, host: str) -> None:
        """A process was paused: connections to it break if it stays so."""
        for network in self._networks:
            self._suspect(connection for connection in network.connections.values() if connection.peer_host == host)

    @property
    def is_whole(self) -> bool:
        """Nothing is cut, and nothing goes wrong with messages."""
        return not self._cut and self.faults == LinkFaults()

    def is_cut(self, source: str, destination: str) -> bool:
        return (source, destination) in self._cut

    def trap(self, passage: Passage, go_on: Callable[[], None]) -> Trap | None:
        """The trap that holds a message which sets out, if one does."""
        return next((trap for trap in list(self.traps) if trap.takes(passage, go_on)), None)

    # ---- what the connections use

    def later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        """Call it in nobody's name."""
        loop = self.world.loop
        loop.set_off(loop.time() + delay_s, callback, args, self._context)

    def delay_s(self) -> float:
        """From 0.1 to 2 ms; seldom up to a second, when links are slow."""
        if self.faults.slow and self._random.random() < self.faults.slow:
            return self._random.uniform(0.0, 1.0)
        return float(1e-4 * 20.0 ** self._random.random())

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def late_s(self) -> float:
        return self._random.uniform(0.0, LATE_S_MAX)

    def forget(self, network: SimNetwork) -> None:
        self._networks.pop(network, None)

    def free_port(self) -> int:
        self._ports += 1
        return 50_000 + self._ports

    def _suspect(self, connections: Iterable[SimConnection]) -> None:
        """They may have got stuck just now."""
        for connection in connections:
            if connection.is_stuck():
                self.later(KEEPALIVE_S, connection.break_if_stuck)


class SimNetwork:
    """`transport.types.Network` of one process."""

    def __init__(self, fabric: SimFabric, process: SimProcess, host: str) -> None:
        self.fabric = fabric
        self.process = process
        self.host = host
        self.connections: dict[str, SimConnection] = {}
        self._listeners: list[SimListener] = []

    def connection(self, address: str) -> SimConnection:
        if address not in self.connections:
            self.connections[address] = SimConnection(self, address)
        return self.connections[address]

    async def serve(self, address: str, service: Service) -> SimListener:
        host, _, port = address.rpartition(":")
        if port == "0":
            address = f"{host}:{self.fabric.free_port()}"
        holder = self.fabric._listening.get(address)
        assert holder is None or not holder.is_open, f"{address} is taken"
        listener = SimListener(self, address, service)
        self.fabric._listening[address] = listener
        self._listeners.append(listener)
        return listener

    async def close(self) -> None:
        self.die()

    def die(self) -> None:
        """The process was killed: its listeners and connections are gone, and its peers get to know."""
        for listener in self._listeners:
            listener.end()
        for connection in self.connections.values():
            connection.lose("closed")
        self.fabric.forget(self)


class SimListener:
    """A service that listens."""

    def __init__(self, network: SimNetwork, address: str, service: Service) -> None:
        self.network = network
        self.address = address
        self.service = service
        self.is_open = True
        self._calls = 0
        self._drained: asyncio.Future[None] | None = None

    async def close(self, *, drain_s: float = 0.0) -> None:
        self.is_open = False
        if self._calls and drain_s:
            self._drained = self.network.process.future()
            self.network.fabric.later(drain_s, _finish, self._drained)
            await self._drained
        self.end()

    def end(self) -> None:
        """Break what is connected to it."""
        self.is_open = False
        fabric = self.network.fabric
        if fabric._listening.get(self.address) is self:
            del fabric._listening[self.address]
        for network in fabric._networks:
            connection = network.connections.get(self.address)
            if connection is not None and connection.peer is self:
                fabric.later(fabric.delay_s(), connection.break_if_peer, self)

    def take(self, exchange: _Exchange) -> None:
        """A request has arrived."""
        if not self.network.process.is_alive:
            return
        if not self.is_open:
            exchange.connection.send_reply(exchange, Unavailable(f"{self.address} is closing"), [], self)
        else:
            name = exchange.connection.network.process.name
            self.network.process.spawn(self._serve(exchange), f"for {name}")

    async def _serve(self, exchange: _Exchange) -> None:
        self._calls += 1
        request = _decoder.decode(exchange.request)
        if exchange.reads is not None:
            buffers = [memoryview(bytearray(length)) for length in exchange.reads]
        else:
            buffers = [memoryview(payload) for payload in exchange.payloads]
        try:
            reply: bytes | EmberError = _encoder.encode(await self.service.handle(request, buffers))
        except EmberError as error:
            reply = _copied(error)
        except Exception as error:
            self.network.fabric.world.loop.fail(error)
            return
        finally:
            self._calls -= 1
            if self._drained is not None and not self._calls:
                _finish(self._drained)
        filled = [bytes(buffer) for buffer in buffers] if exchange.reads is not None else []
        exchange.connection.send_reply(exchange, reply, filled, self)


class SimConnection:
    """The way from one process to one address. `call` as the contract of `transport.types` says."""

    def __init__(self, network: SimNetwork, address: str) -> None:
        self.network = network
        self.address = address
        self.peer: SimListener | None = None
        """Whom it is connected to."""
        self._air: dict[_Exchange, None] = {}

    async def call(
        self, request: Message, buffers: Sequence[memoryview] = (), /, *, timeout_s: float | None = None
    ) -> Message:
        process = self.network.process
        reads = [len(buffer) for buffer in buffers] if request.fills_buffers else None
        payloads = [bytes(buffer) for buffer in buffers] if reads is None else []
        encoded = _encoder.encode(request)
        timer = process.future() if timeout_s is None else process.timer(timeout_s)
        try:
            if self.peer is None:
                await self._connect(timer)
            return await self._exchange(
                _Exchange(self, request, encoded, payloads, reads, buffers, process.future()), timer
            )
        finally:
            timer.cancel()

    # ---- there

    async def _exchange(self, exchange: _Exchange, timer: asyncio.Future[None]) -> Message:
        self._air[exchange] = None
        timer.add_done_callback(partial(self._expire, exchange))
        self._send(exchange, self.network.fabric)
        try:
            return await exchange.reply
        finally:
            self._air.pop(exchange, None)
            del exchange  # An error of the reply knows this frame: together they would be garbage in a circle.

    async def _connect(self, timer: asyncio.Future[None]) -> None:
        """Raises Unreachable if nobody answers, Unanswered if `timer` is done before."""
        fabric, process = self.network.fabric, self.network.process
        self._check_network()
        listener = fabric._listening.get(self.address)
        host = listener.network.host if listener is not None else self.address.rpartition(":")[0]
        if fabric.is_cut(self.network.host, host) or fabric.is_cut(host, self.network.host):
            await self._or_expire(process.timer(CONNECT_TIMEOUT_S), timer)
            raise Unreachable(f"{self.address} does not answer")
        done = process.future()
        fabric.later(fabric.delay_s() + fabric.delay_s(), _finish, done)
        await self._or_expire(done, timer)
        self._check_network()
        if self.peer is None:
            listener = fabric._listening.get(self.address)
            if listener is None or not listener.is_open:
                raise Unreachable(f"nobody listens at {self.address}")
            self.peer = listener
            if self.is_stuck():
                fabric.later(KEEPALIVE_S, self.break_if_stuck)

    async def _or_expire(self, done: asyncio.Future[None], timer: asyncio.Future[None]) -> None:
        await first_of(self.network.process, done, timer)
        if not done.done():
            done.cancel()
            raise Unanswered(f"{self.address} did not answer in time")

    def _check_network(self) -> None:
        if not self.network.process.is_alive or self.network not in self.network.fabric._networks:
            raise Unreachable(f"{self.network.host} is off the network")

    def _send(self, exchange: _Exchange, fabric: SimFabric) -> None:
        faults, peer = fabric.faults, self.peer
        assert peer is not None
        if fabric.traps:
            passage = Passage(self.network.host, peer.network.host, exchange.message, is_reply=False)
            trap = fabric.trap(passage, lambda: fabric.later(fabric.delay_s(), self._arrive, exchange, peer))
            if trap is not None:
                if trap.breaks:
                    fabric.later(fabric.delay_s(), self._lose_if_waiting, exchange)
                return
        if faults.lost and fabric.chance(faults.lost):
            fabric.later(KEEPALIVE_S, self._lose_if_waiting, exchange)
            return
        if faults.reset and fabric.chance(faults.reset):
            fabric.later(fabric.delay_s(), self._lose_if_waiting, exchange)
            if fabric.chance(0.5):
                return
        if faults.doubled and fabric.chance(faults.doubled):
            fabric.later(fabric.late_s(), self._arrive, exchange, peer)
        fabric.later(fabric.delay_s(), self._arrive, exchange, peer)

    def _arrive(self, exchange: _Exchange, peer: SimListener) -> None:
        fabric = self.network.fabric
        if fabric.is_cut(self.network.host, peer.network.host):
            # It is sent again and again. Half of those that were given up arrive nevertheless, long after.
            if exchange in self._air:
                fabric.later(RESEND_S, self._arrive, exchange, peer)
            elif fabric.chance(0.5):
                fabric.later(fabric.late_s(), self._arrive, exchange, peer)
            return
        peer.take(exchange)

    # ---- and back

    def send_reply(
        self, exchange: _Exchange, reply: bytes | EmberError, filled: list[bytes], peer: SimListener
    ) -> None:
        """What the service answered sets out."""
        fabric = self.network.fabric
        exchange.is_answered = True
        if fabric.traps:
            passage = Passage(peer.network.host, self.network.host, exchange.message, is_reply=True)
            back = exchange, reply, filled, peer
            trap = fabric.trap(passage, lambda: fabric.later(fabric.delay_s(), self._return, *back))
            if trap is not None:
                if trap.breaks:
                    fabric.later(fabric.delay_s(), self._lose_if_waiting, exchange)
                return
        faults = fabric.faults
        if faults.lost and fabric.chance(faults.lost):
            fabric.later(KEEPALIVE_S, self._lose_if_waiting, exchange)
            return
        if faults.reset and fabric.chance(faults.reset):
            fabric.later(fabric.delay_s(), self._lose_if_waiting, exchange)
            return
        fabric.later(fabric.delay_s(), self._return, exchange, reply, filled, peer)

    def _return(self, exchange: _Exchange, reply: bytes | EmberError, filled: list[bytes], peer: SimListener) -> None:
        fabric = self.network.fabric
        if exchange not in self._air or exchange.reply.done():
            return
        if fabric.is_cut(peer.network.host, self.network.host):
            fabric.later(RESEND_S, self._return, exchange, reply, filled, peer)
            return
        if isinstance(reply, EmberError):
            exchange.reply.set_exception(reply)
            return
        message = _decoder.decode(reply)
        if exchange.reads is not None:
            for buffer, content, count in zip(exchange.buffers, filled, message.counts, strict=True):
                buffer[:count] = content[:count]
        exchange.reply.set_result(message)

    # ---- the end

    @property
    def peer_host(self) -> str | None:
        return None if self.peer is None else self.peer.network.host

    def is_stuck(self) -> bool:
        """The peer says nothing: it is paused, or the way there or back is cut."""
        if self.peer is None:
            return False
        fabric, here, there = self.network.fabric, self.network.host, self.peer.network.host
        return self.peer.network.process.is_paused or fabric.is_cut(here, there) or fabric.is_cut(there, here)

    def break_if_stuck(self) -> None:
        if self.is_stuck():
            self.lose("went silent")

    def break_if_peer(self, peer: SimListener) -> None:
        if self.peer is peer:
            self.lose("was reset", spare_answered=True)

    def _expire(self, exchange: _Exchange, timer: asyncio.Future[None]) -> None:
        """Nobody waits for it any more: what is on its way may arrive all the same, and what comes back is dropped."""
        if timer.cancelled():
            return
        if self._air.pop(exchange, exchange) is None and not exchange.reply.done():
            kind = Unanswered if exchange.message.changes_nothing else UpdateUnknown
            exchange.reply.set_exception(kind(f"{self.address} did not answer in time"))

    def _lose_if_waiting(self, exchange: _Exchange) -> None:
        if exchange in self._air and not exchange.reply.done():
            self.lose("was reset")

    def lose(self, how: str, *, spare_answered: bool = False) -> None:
        """The connection is no more: what is in its air is unknown. `spare_answered`: except for what was answered."""
        self.peer = None
        for exchange in list(self._air):
            if spare_answered and exchange.is_answered:
                continue
            del self._air[exchange]
            if not exchange.reply.done():
                kind = Unreachable if exchange.message.changes_nothing else UpdateUnknown
                exchange.reply.set_exception(kind(f"the connection to {self.address} {how}"))


_encoder = msgspec.msgpack.Encoder()
_kinds = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(reduce(or_, _kinds))


def _copied(error: EmberError) -> EmberError:
    """As it comes out of the wire: class and fields, no traceback, no cause."""
    copy: EmberError = pickle.loads(pickle.dumps(error))
    return copy


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
