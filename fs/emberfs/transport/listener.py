"""A service that listens on an address: accepts connections, lets them in, and ends them.

Does not know: what is said on a connection (`session`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

from ..errors import AccessDenied
from ..meter import Meter
from ..runtime import AsyncioRuntime
from .address import Address, is_loopback, parse_address
from .blocks import BlockPool
from .config import CONNECT_PATIENCE_MAX, TcpConfig
from .door import Door
from .grant_keys import GrantKeys
from .handshake import certificate_of, this_host
from .session import AdoptLane, Session
from .tls import TlsContexts
from .turns import Turns
from .types import Service
from .ucx_rail import Rails
from .wire import Wire, start_tls, until_ready

log = logging.getLogger("emberline.transport")

BACKLOG = 512
CONNECTIONS_MAX = 4096
ACCEPT_PAUSE_S = 0.1
"""When the process has run out of file descriptors."""


class TcpListener:
    """See `types.Listener`. Made by `TcpNetwork.serve`."""

    def __init__(
        self,
        runtime: AsyncioRuntime,
        service: Service,
        *,
        config: TcpConfig,
        contexts: TlsContexts | None,
        meter: Meter,
        watch: Callable[[Wire], None],
        adopt_lane: AdoptLane | None = None,
        rails: Rails | None = None,
        grant_keys: GrantKeys | None = None,
    ) -> None:
        """`watch` is told each new wire, to keep it alive and to notice its silence; `meter` what was served. `rails`:
        large buffers may go by UCX. `grant_keys`: those of the grants that readers come with.
        """
        self._adopt_lane = adopt_lane
        self.sessions: dict[Session, None] = {}
        """Those that are connected, or have calls that have not ended."""
        self._runtime = runtime
        self._service = service
        self._config = config
        self._contexts = contexts
        self._meter = meter
        self._watch = watch
        self._rails = rails
        self._grant_keys = grant_keys
        self._pool = BlockPool()
        self._turns = Turns(runtime, config.load)
        self._address = Address()
        self._place: tuple[int, int] | None = None
        """Of the socket's file."""
        self._sock: socket.socket | None = None
        self._door: Door | None = None
        self._behind: socket.socket | None = None
        """Listens at the door."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle: asyncio.Future[None] | None = None

    @property
    def address(self) -> str:
        return str(self._address)

    async def open(self, address: Address) -> None:
        """Begin to listen. Raises OSError, AccessDenied, ssl.SSLError. In the loop's thread."""
        if self._contexts is not None and not address.path:
            await self._runtime.offload(self._contexts.server)  # What is wrong with the files is said now.
        if address.path:
            self._sock = _bind_unix(address.path)
            self._address, self._place = address, _place_of(address.path)
        else:
            self._sock, port = await self._bind(address)
            self._address = Address(address.host, port)
        self._sock.listen(BACKLOG)
        self._spawn(self._accept(self._sock), "transport-accept")
        if self._config.shares_memory and not address.path and this_host():
            self._open_door()

    def _open_door(self) -> None:
        """Listen where clients of this host come with their memory."""
        address = parse_address(f"unix:@emberline-{self._runtime.random_bytes(12).hex()}")
        self._behind = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._behind.setblocking(False)
        self._behind.bind(address.path)
        self._behind.listen(BACKLOG)
        self._door = Door(str(address), self._runtime.random_bytes)
        self._spawn(self._accept(self._behind), "transport-door")

    async def close(self, *, drain_s: float = 0.0) -> None:
        """See `types.Listener`."""
        await self._runtime.enter_loop()
        if self._sock is None:
            return
        sock, self._sock = self._sock, None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # The socket is theirs until then.
        sock.close()
        if self._behind is not None:
            self._behind.close()
        if self._address.path and self._place is not None and _place_of(self._address.path) == self._place:
            os.unlink(self._address.path)
        for session in list(self.sessions):
            session.drain()
        await self._drained(drain_s)
        for session in list(self.sessions):
            for task in session.stop():
                await asyncio.wait([task])
        self.sessions.clear()

    async def _drained(self, drain_s: float) -> None:
        """Until no call is under way, or `drain_s` are over."""
        if drain_s <= 0:
            return
        self._idle = self._runtime.future()
        timer = self._runtime.loop.call_later(drain_s, self._wake)
        self._look_idle()
        await self._idle
        timer.cancel()

    def _look_idle(self) -> None:
        if self._idle is not None and not any(session.is_busy for session in self.sessions):
            self._wake()

    def _wake(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _changed(self, session: Session) -> None:
        if session.wire.is_closed and not session.is_busy:
            self.sessions.pop(session, None)
        self._look_idle()

    def _spawn(self, work: Any, name: str) -> None:
        task = self._runtime.spawn(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bind(self, address: Address) -> tuple[socket.socket, int]:
        infos = await self._runtime.loop.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, where = infos[0]
        if self._contexts is None and not self._config.insecure and not is_loopback(str(where[0])):
            raise AccessDenied(f"{address} is open to other machines: it needs TLS, or insecure=True")
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        except BaseException:
            sock.close()
            raise
        return sock, sock.getsockname()[1]

    async def _accept(self, listening: socket.socket) -> None:
        loop = self._runtime.loop
        while True:
            try:
                # Not by `sock_accept`: cancelled as a connection comes, it would lose it.
                await until_ready(loop, loop.add_reader, loop.remove_reader, listening)
                sock, where = listening.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    raise
                log.error("cannot accept a connection: %s", error)
                await self._runtime.sleep(ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            if len(self.sessions) + len(self._tasks) > CONNECTIONS_MAX:
                log.error("a connection is refused: there are %d already", CONNECTIONS_MAX)
                sock.close()
                continue
            name = str(Address(*where[:2])) if isinstance(where, tuple) else self.address
            self._spawn(self._admit(sock, name), "transport-admit")

    async def _admit(self, sock: socket.socket, name: str) -> None:
        """From a connection to a session that has greeted, in time."""
        session = None
        try:
            async with asyncio.timeout(self._config.connect_timeout_s * CONNECT_PATIENCE_MAX):
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self._contexts is not None:
                        context = await self._runtime.offload(self._contexts.server)
                        sock = await start_tls(self._runtime.loop, sock, context, server_name=None)
                session = self._session(sock, name)
                await session.greeted
            if not session.wire.is_closed:
                self._watch(session.wire)
        except (TimeoutError, OSError) as error:
            log.warning("connection from %s given up before it greeted: %s", name, error or "no greeting in time")
            sock.close() if session is None else session.wire.lose(error)
        except asyncio.CancelledError:
            sock.close() if session is None else session.wire.lose(ConnectionError("closed"))
            raise

    def _session(self, sock: socket.socket, name: str) -> Session:
        session = Session(
            self._runtime,
            sock,
            self._service,
            config=self._config,
            pool=self._pool,
            meter=self._meter,
            turns=self._turns,
            name=name,
            is_stranger=isinstance(sock, ssl.SSLSocket) and certificate_of(sock) is None,
            on_change=self._changed,
            door=self._door,
            is_local=sock.family == socket.AF_UNIX and self._config.shares_memory,
            adopt_lane=self._adopt_lane,
            rails=self._rails,
            grant_keys=self._grant_keys,
        )
        self.sessions[session] = None
        return session


def _place_of(path: str) -> tuple[int, int] | None:
    """Which file that is, if there is one: another socket may have taken the path."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _bind_unix(path: str) -> socket.socket:
    """A socket at `path` that only its owner may connect to. One that nobody listens on any more is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _is_listening(path):
                raise
            os.unlink(path)
            sock.bind(path)
        os.chmod(path, 0o600)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True
