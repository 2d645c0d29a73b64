"""The network of a process: what it serves and whom it reaches, over TCP (with TLS) and unix sockets.

Both sides send a sign of life every `ping_s` while they have nothing else to say, and give up a peer that was silent
for `dead_s`. None is answered, so that a peer which is alive but reads slowly is not taken for dead; one that reads
nothing at all of what is there for it is given up after `stall_s`.

Does not know: what is said.
"""

from __future__ import annotations

import asyncio
import logging
from socket import socket

from ..errors import StoreClosed, Unreachable
from ..meter import Meter
from ..runtime import AsyncioRuntime
from .address import parse_address
from .config import TcpConfig
from .connection import TcpConnection
from .direct import DirectConnection
from .frame import Kind, encode_frame
from .grant_keys import GrantKeys
from .listener import TcpListener
from .region import Blocks
from .session import AdoptLane
from .tls import TlsContexts
from .types import Service
from .ucx_rail import Rails
from .wire import Outgoing, Wire

TICKS_PER_PING = 4
"""Silence is looked for this much more often than signs of life are sent."""

_PING = encode_frame(Kind.PING, 0)

log = logging.getLogger("emberline.transport")


class TcpNetwork:
    """See `types.Network`. Addresses are `host:port`, `[v6]:port` and `unix:/path`."""

    def __init__(
        self,
        runtime: AsyncioRuntime,
        config: TcpConfig | None = None,
        *,
        adopt_lane: AdoptLane | None = None,
        grant_keys: GrantKeys | None = None,
    ) -> None:
        """`adopt_lane`: who serves the lanes of our clients. `grant_keys`: those of the grants that readers come with.

        Raises Unavailable where UCX is asked for and not there.
        """
        self.meter = Meter(runtime.now_s)
        """What was served here."""
        self._runtime = runtime
        self._config = config or TcpConfig()
        self._contexts = TlsContexts(self._config.tls) if self._config.tls is not None else None
        self._connections: dict[str, TcpConnection] = {}
        self._directs: list[DirectConnection] = []
        self._listeners: list[TcpListener] = []
        self._adopt_lane = adopt_lane
        self._grant_keys = grant_keys
        self._wires: dict[Wire, _Still] = {}
        """Those that are watched."""
        self._blocks = Blocks() if self._config.shares_memory else None
        self._rails = Rails(self._config.ucx) if self._config.ucx else None
        self._watching: asyncio.Task[None] | None = None
        self._is_closed = False

    def connection(self, address: str) -> TcpConnection:
        """See `types.Network`. Raises InvalidPath, StoreClosed."""
        if self._is_closed:
            raise StoreClosed("the network was closed")
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = TcpConnection(
                self._runtime,
                address,
                config=self._config,
                contexts=self._contexts,
                watch=self._watch,
                blocks=self._blocks,
                rails=self._rails,
            )
        return connection

    async def serve(self, address: str, service: Service) -> TcpListener:
        """See `types.Network`. Raises InvalidPath, AccessDenied (TLS is missing), OSError (the address is taken)."""
        await self._runtime.enter_loop()
        if self._is_closed:
            raise StoreClosed("the network was closed")
        listener = TcpListener(
            self._runtime,
            service,
            config=self._config,
            contexts=self._contexts,
            meter=self.meter,
            watch=self._watch,
            adopt_lane=self._adopt_lane,
            rails=self._rails,
            grant_keys=self._grant_keys,
        )
        await listener.open(parse_address(address))
        self._listeners.append(listener)
        return listener

    async def open_lane(self, address: str) -> socket | None:
        """Our end of a new lane to a server that was called before; None: it serves none. Raises Unreachable."""
        await self._runtime.sleep(0)  # Goes on in the loop's thread.
        connection = self._connections.get(address)
        if connection is None or self._is_closed:
            raise Unreachable(f"there is no connection to {address}")
        return await connection.open_lane()

    async def open_direct(self, address: str) -> DirectConnection | None:
        """A further connection to a server, for a thread that waits itself; None: not with TLS.

        Raises EmberError, OSError (as TimeoutError), where there is none to be had.
        """
        await self._runtime.enter_loop()
        sock = await self.connection(address).open_direct()
        if sock is None:
            return None
        direct = DirectConnection(sock, address=address, dead_s=self._config.dead_s)
        self._directs.append(direct)
        self._start_watching()
        if self._is_closed:  # Meanwhile.
            direct.close()
        return direct

    async def close(self) -> None:
        """See `types.Network`."""
        await self._runtime.enter_loop()
        self._is_closed = True
        for connection in self._connections.values():
            await connection.close()
        for direct in self._directs:
            direct.close()
        for listener in self._listeners:
            await listener.close()
        for wire in list(self._wires):
            wire.lose(ConnectionError("this side closed it"))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._rails is not None:
            self._rails.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close our copies of the sockets, so that peers learn when the parent ends."""
        for wire in list(self._wires):
            wire.forget_after_fork()
        for direct in self._directs:
            direct.forget_after_fork()

    def _watch(self, wire: Wire) -> None:
        self._wires[wire] = _Still()
        self._start_watching()

    def _start_watching(self) -> None:
        if self._watching is None:
            self._watching = self._runtime.spawn(self._keep_watch(), "transport-watch")

    async def _keep_watch(self) -> None:
        config = self._config
        tick_s = config.ping_s / TICKS_PER_PING
        tick = 0
        while True:
            await self._runtime.sleep(tick_s)
            tick += 1
            if tick % TICKS_PER_PING == 0:
                self._keep_directs()
            for wire, still in list(self._wires.items()):
                if wire.is_closed:
                    del self._wires[wire]
                    continue
                still.silent_ticks = 0 if wire.heard else still.silent_ticks + 1
                still.stalled_ticks = 0 if wire.moved or not wire.is_sending else still.stalled_ticks + 1
                wire.heard = wire.moved = False
                if still.silent_ticks >= config.dead_s / tick_s:
                    wire.lose(ConnectionError(f"silent for {config.dead_s} s"))
                elif still.stalled_ticks >= config.stall_s / tick_s:
                    wire.lose(ConnectionError(f"has not read for {config.stall_s} s"))
                elif tick % TICKS_PER_PING == 0 and not wire.is_sending:
                    wire.send(Outgoing(_PING))

    def _keep_directs(self) -> None:
        for direct in self._directs:
            try:
                direct.keep_alive()
            except Exception:  # The others, and all wires, are watched on.
                log.exception("a direct connection to %s is given up", direct.address)
                direct.close()
        self._directs = [direct for direct in self._directs if not direct.is_closed]


class _Still:
    """For how many ticks a peer has said nothing, and has taken nothing of what is there for it."""

    __slots__ = ("silent_ticks", "stalled_ticks")

    def __init__(self) -> None:
        self.silent_ticks = 0
        self.stalled_ticks = 0
