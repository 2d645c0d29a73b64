"""The way to one address over TCP or a unix socket: connects when it is needed, and again after a loss.

Invariants:
  - A call that was not sent is sent over the next connection; if there is none to be had it raises, and so does every
    call that waited with it. A call that was sent is never sent again: that is its caller's to decide.
  - Small calls never wait behind large ones. There is no other order among calls.
  - When `call` returns or raises, nothing here refers to the caller's memory any more, and no server writes to it.

Does not know: frames (`link`), or what a call means.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import (
    AccessDenied,
    EmberError,
    LimitExceeded,
    StoreClosed,
    Unanswered,
    Unavailable,
    Unreachable,
    UpdateUnknown,
)
from ..messages import Message
from ..runtime import AsyncioRuntime
from ..stopwatch import current
from ..types import BATCH_ITEMS_MAX
from .address import is_loopback, parse_address
from .codec import encode_message
from .config import CONNECT_PATIENCE_MAX, TcpConfig
from .frame import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX
from .handshake import this_host
from .link import Call, Link
from .region import Blocks
from .tls import TlsContexts, is_tls_refusal
from .ucx_rail import Rails
from .watched import watched
from .window import SMALL_BYTES_MAX
from .wire import Wire, start_tls

BACKOFF_S_MIN = 0.02
LET_GO_S = 0.25
"""How long a server may take to let go of memory after a call that it did not answer in time: some turns of a disk."""

log = logging.getLogger("emberline.transport")


class TcpConnection:
    """See `types.Connection`. Made by `TcpNetwork.connection`."""

    def __init__(
        self,
        runtime: AsyncioRuntime,
        address: str,
        *,
        config: TcpConfig,
        contexts: TlsContexts | None,
        watch: Callable[[Wire], None],
        blocks: Blocks | None = None,
        rails: Rails | None = None,
    ) -> None:
        """`watch` is told each new wire, to keep it alive and to notice its silence. `blocks`: hand memory to a server
        of this host. `rails`: let large buffers go to others by UCX. Raises InvalidPath.
        """
        self._runtime = runtime
        self._address = parse_address(address)
        self._config = config
        self._contexts = contexts
        self._watch = watch
        self._blocks = blocks
        self._rails = rails
        self._link: Link | None = None
        """The connection that takes new calls. One that is draining may live on beside it."""
        self._connecting: asyncio.Task[None] | None = None
        self._small: deque[Call] = deque()
        self._large: deque[Call] = deque()
        """Calls that wait: for a connection, or for room on it."""
        self._backoff_s = 0.0
        self._not_before_s = 0.0
        self._patience = 1
        """So many times `connect_timeout_s`: a server that greets hundreds at once is slow, and is not helped by those
        who leave in the middle and come again."""
        self._is_closed = False

    async def call(
        self, request: Message, buffers: Sequence[memoryview] = (), /, *, timeout_s: float | None = None
    ) -> Message:
        """See `types.RemoteCall`, and `_call`. The stopwatch of the caller is told."""
        watch = current.get()
        if watch is None:
            return await self._call(request, buffers, timeout_s)
        return await watched(watch, self._runtime, request, buffers, self._call(request, buffers, timeout_s))

    async def _call(self, request: Message, buffers: Sequence[memoryview], timeout_s: float | None) -> Message:
        """Raises what the server raised, and Unavailable, Unanswered, UpdateUnknown,
        AccessDenied, ProtocolError, LimitExceeded, StoreClosed. Unreachable where there is no connection.
        """
        runtime = self._runtime
        await runtime.enter_loop()
        if self._is_closed:
            raise StoreClosed("the network was closed")
        call = Call(request, encode_message(request), buffers, runtime.future())
        _check_size(call)
        timer = None if timeout_s is None else runtime.loop.call_later(timeout_s, self._expire, call)
        (self._small if call.weight <= SMALL_BYTES_MAX else self._large).append(call)
        self._pump()
        try:
            return await call.future
        except asyncio.CancelledError:
            self._give_up(call)
            await self._let_go(call, patience_s=None)
            raise
        except (Unanswered, UpdateUnknown):
            await self._let_go(call, patience_s=LET_GO_S)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    @property
    def has_rail(self) -> bool:
        """True if there is a connection now and large buffers go over it by UCX, both ways."""
        return self._link is not None and self._link.has_rail

    async def open_lane(self) -> socket.socket | None:
        """Our end of a new lane; None: the server serves none, or reads go by UCX. In the loop's thread.

        Raises Unreachable.
        """
        if self._link is None:
            raise Unreachable(f"there is no connection to {self._address}")
        if self._link.is_local:
            return self._link.open_lane()
        if self._link.answer is None or not self._link.answer.lanes or self._link.wants_rail:
            return None  # Who asks for UCX wants the reads to go there.
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                link = await self._greet(await self._connected_socket(), None)
                return await link.become_lane()
        except (EmberError, OSError) as error:
            log.debug("no lane to %s: %s", self._address, error)
            return None

    async def open_direct(self) -> socket.socket | None:
        """The socket of a further connection, for a `DirectConnection`. In the loop's thread.

        None: not with TLS, where no two threads may read and write at the same time.
        Raises EmberError, OSError (as TimeoutError), where there is none to be had.
        """
        async with asyncio.timeout(self._config.connect_timeout_s):
            link = await self._let_in()
        wire = link.wire
        try:
            if link.is_draining or wire.is_closed:
                raise Unreachable(f"{self._address} takes no more calls")
            return None if wire.is_encrypted else wire.detach()
        finally:
            wire.lose(ConnectionError("there is no direct connection"))  # Nothing happens to one that was detached.

    async def close(self) -> None:
        """End the connection; calls in the air raise. In the loop's thread."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._link is not None:
            self._link.wire.lose(ConnectionError("this side closed it"))
        self._fail_waiting(lambda: Unavailable("the network was closed"))

    # ---- calls

    def _pump(self) -> None:
        """Send what waits, as far as there is room."""
        link = self._link
        if link is None:
            if (self._small or self._large) and self._connecting is None and not self._is_closed:
                self._connecting = self._runtime.spawn(self._connect(), "transport-connect")
            return
        for waiting in (self._small, self._large):
            while waiting and link.has_room(waiting[0].weight):
                call = waiting.popleft()
                if not call.future.done():
                    link.send(call)

    def _changed(self, link: Link) -> None:
        if link is self._link and (link.is_draining or link.wire.is_closed):
            self._link = None
        self._pump()

    def _give_up(self, call: Call) -> None:
        if call.outgoing is not None:
            assert call.link is not None
            call.link.give_up(call)
            return
        waiting = self._small if call in self._small else self._large
        if call in waiting:
            waiting.remove(call)

    def _expire(self, call: Call) -> None:
        if call.future.done():
            return
        kind = UpdateUnknown if call.may_have_happened else Unanswered
        call.fail(kind(f"{call.name}: {self._address} did not answer in time"))
        self._give_up(call)

    async def _let_go(self, call: Call, *, patience_s: float | None) -> None:
        """Return when no server uses the caller's memory any more: it ends soon, or is lost.

        `patience_s`: later than that the memory is renewed, as it is after a loss. What UCX is moving is waited for.
        """
        if call.released is None or call.released.done():
            return
        timer = None
        if patience_s is not None:
            assert call.link is not None
            timer = self._runtime.loop.call_later(patience_s, call.link.disown, call)
        cancelled = None
        while not call.released.done():
            try:
                await asyncio.shield(call.released)
            except asyncio.CancelledError as error:
                cancelled = error
        if timer is not None:
            timer.cancel()
        if cancelled is not None:
            raise cancelled

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        for waiting in (self._small, self._large):
            while waiting:
                waiting.popleft().fail(error())

    # ---- connections

    async def _connect(self) -> None:
        try:
            pause_s = self._not_before_s - self._runtime.now_s()
            if pause_s > 0:
                await self._runtime.sleep(pause_s)
            async with asyncio.timeout(self._config.connect_timeout_s * self._patience):
                self._link = await self._open()
        # TimeoutError is an OSError, and so are those of ssl. RuntimeError: the interpreter ends, and starts no thread.
        except (EmberError, OSError, RuntimeError) as error:
            self._backoff_s = min(max(2 * self._backoff_s, BACKOFF_S_MIN), self._config.backoff_s_max)
            self._not_before_s = self._runtime.now_s() + self._backoff_s
            if isinstance(error, TimeoutError):
                self._patience = min(2 * self._patience, CONNECT_PATIENCE_MAX)
            self._fail_waiting(_refusal(error, str(self._address)))
        else:
            self._backoff_s, self._patience = 0.0, 1
        finally:
            self._connecting = None
        if self._link is not None:
            self._changed(self._link)  # It may be gone again.

    async def _open(self) -> Link:
        """A connection that takes calls."""
        link = await self._let_in()
        if self._rails is not None and not link.is_local:
            link.open_rail(self._rails)
        self._watch(link.wire)
        return link

    async def _let_in(self) -> Link:
        """A connection that was let in: through the server's door, if that is on this host."""
        sock = await self._connected_socket()
        is_local = bool(self._address.path) and self._blocks is not None
        link = await self._greet(sock, self._blocks if is_local else None)
        answer = link.answer
        if self._blocks is not None and answer is not None and answer.door and answer.host == this_host():
            try:
                sock = await self._try(socket.AF_UNIX, parse_address(answer.door).path)
                local = await self._greet(sock, self._blocks, key=answer.key)
            except (EmberError, OSError) as error:
                log.debug("no shared memory with %s: %s", self._address, error)
            else:
                link.wire.lose(ConnectionError("goes on through the door"))
                link = local
        return link

    async def _greet(self, sock: socket.socket, blocks: Blocks | None, *, key: str = "") -> Link:
        link = Link(
            self._runtime,
            sock,
            config=self._config,
            address=str(self._address),
            on_change=self._changed,
            blocks=blocks,
            key=key,
        )
        try:
            await link.welcome
        except BaseException:
            link.wire.lose(ConnectionError("not let in"))
            raise
        return link

    async def _connected_socket(self) -> socket.socket:
        loop, address = self._runtime.loop, self._address
        if address.path:
            return await self._try(socket.AF_UNIX, address.path)
        infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        if self._contexts is None and not self._config.insecure:
            infos = [info for info in infos if is_loopback(str(info[4][0]))]
            if not infos:
                raise AccessDenied("another machine is spoken to with TLS only, or with insecure=True")
        sock = None
        for family, _, _, _, where in infos:
            try:
                sock = await self._try(family, where)
                break
            except OSError as error:
                failure = error
        if sock is None:
            raise failure
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._contexts is None:
            return sock
        try:
            context = await self._runtime.offload(self._contexts.client)
        except BaseException:
            sock.close()
            raise
        return await start_tls(loop, sock, context, server_name=address.host)

    async def _try(self, family: int, where: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._runtime.loop.sock_connect(sock, where)
        except BaseException:
            sock.close()
            raise
        return sock


def _check_size(call: Call) -> None:
    if len(call.body) + 4 * len(call.buffers) > HEADER_BYTES_MAX:
        raise LimitExceeded(f"{call.name}: a message of {len(call.body)} bytes is over the limit of {HEADER_BYTES_MAX}")
    if len(call.buffers) > BATCH_ITEMS_MAX:
        raise LimitExceeded(f"{call.name}: a batch of {len(call.buffers)} is over the limit of {BATCH_ITEMS_MAX}")
    payload = call.weight - len(call.body)
    if payload > PAYLOAD_BYTES_MAX:
        raise LimitExceeded(f"{call.name}: buffers of {payload} bytes are over the limit of {PAYLOAD_BYTES_MAX}")


def _refusal(error: Exception, address: str) -> Callable[[], Exception]:
    """What every call that waited for a connection is told, each with an exception of its own."""
    kind: type[Exception]
    if isinstance(error, EmberError):
        kind = type(error)
    elif is_tls_refusal(error):
        kind = AccessDenied
    else:
        kind = Unreachable
    text = _words(error) or "no answer in time"
    return lambda: kind(f"{address}: {text}")


def _words(error: Exception) -> str:
    """asyncio says "[Errno 111] Connect call failed ('127.0.0.1', 7301)" where the address is said already."""
    if isinstance(error, socket.gaierror):
        return error.strerror or ""
    if isinstance(error, OSError) and not isinstance(error, EmberError | ssl.SSLError) and error.errno:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    return str(error)
