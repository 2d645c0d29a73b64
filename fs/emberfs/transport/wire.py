"""A connected socket and its event loop: frames out, bytes in. Plain or TLS, TCP or unix.

It works on the non-blocking socket itself, not through an asyncio transport, because those keep copies of (or, from
Python 3.12 on, references to) what could not be sent at once. Here bytes go from the caller's memory to the kernel
and from the kernel to the caller's memory, and it is known at every moment which memory is still needed.

Invariants:
  - Everything happens in the loop's thread.
  - Frames leave in the order of `send`, each whole. A frame of which the kernel has no byte can be taken back.
  - `Peer.lost` is called once, however the connection ends; nothing is called afterwards.

Does not know: what frames are for, or how long silence may last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import ssl
import sys
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_CTRUNC, SCM_RIGHTS, SHUT_RDWR, SOL_SOCKET, socket
from typing import Protocol

from ..errors import ProtocolError
from .frame import FrameReader, Receiver

log = logging.getLogger("emberline.transport")

SEND_PARTS_MAX = 64
SEND_BYTES_MAX = 1 << 20
"""One system call takes about so much."""
TLS_BYTES_MAX = 64 << 10
"""Four records: OpenSSL wants the very same bytes again after it could not send them, so they are copied out."""
ROUNDS_MAX = 16
"""System calls in a row for one connection, before others have their turn."""


FDS_MAX = 16
"""File descriptors that came and were not asked for yet; one frame brings one."""


class Peer(Receiver, Protocol):
    """Who owns a wire."""

    def lost(self, error: Exception) -> None:
        """It is over. `error` says why."""


class Outgoing:
    """A frame on its way out."""

    __slots__ = ("began", "fd", "on_sent", "parts")

    def __init__(
        self,
        header: bytes,
        payload: Iterable[memoryview] = (),
        on_sent: Callable[[], None] | None = None,
        *,
        fd: int | None = None,
    ) -> None:
        self.parts = deque([memoryview(header), *(part for part in payload if len(part))])
        self.began = False
        """True once a byte of it may have left."""
        self.fd = fd
        """A file descriptor that goes along, over a unix socket."""
        self.on_sent = on_sent
        """Called when no byte of `payload` is needed any more."""

    def detach(self) -> None:
        """What has not left yet is copied: the payload's memory is its owner's again."""
        self.parts = deque(memoryview(bytes(part)) for part in self.parts)


class Wire:
    """One connection."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket, peer: Peer, *, takes_descriptors: bool = False
    ) -> None:
        """Takes `sock`, connected and non-blocking, as its own."""
        self.reader = FrameReader(peer)
        self.heard = True
        """Set when bytes come in; whoever watches for silence clears it."""
        self.moved = True
        """Set when bytes go out; whoever watches for a peer that does not read clears it."""
        self.reads = 0
        """So often bytes came in: frames that came at once find the same number."""
        self.is_closed = False
        self._loop = loop
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._peer = peer
        self._queue: deque[Outgoing] = deque()
        self._piece: memoryview | None = None
        """TLS: taken from the queue and not yet sent."""
        self._is_blocked = False
        """The kernel takes no more; the loop tells when it does."""
        self._closes_when_sent = False
        self._takes_descriptors = takes_descriptors
        self._descriptors: deque[int] = deque()
        """Came, and nobody has taken them yet."""
        loop.add_reader(sock, self._readable)

    @property
    def is_sending(self) -> bool:
        """True while the kernel has not taken everything."""
        return bool(self._queue) or self._piece is not None

    @property
    def is_encrypted(self) -> bool:
        """It goes over TLS."""
        return self._tls is not None

    def is_open(self) -> bool:
        """True unless the other side has closed the connection, even if there is more to read from before that."""
        if self.is_closed:
            return False
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return not poller.poll(0)

    def send(self, frame: Outgoing) -> None:
        """Send `frame` after those before it."""
        assert not self.is_closed
        self._queue.append(frame)
        if not self._is_blocked:
            self._flush()

    def take_back(self, frame: Outgoing) -> bool:
        """True if `frame` will not be sent: none of its bytes had left."""
        if frame.began:
            return False
        self._queue.remove(frame)
        return True

    def take_descriptor(self) -> int:
        """The file descriptor that came with the frame which is at hand. Raises ProtocolError."""
        if not self._descriptors:
            raise ProtocolError("a frame without the file descriptor that belongs to it")
        return self._descriptors.popleft()

    def close_when_sent(self) -> None:
        """End the connection once everything is sent."""
        self._closes_when_sent = True
        if not self.is_sending:
            self.lose(ConnectionError("closed"))

    def lose(self, error: Exception) -> None:
        """End the connection now."""
        if self.is_closed:
            return
        self.is_closed = True
        self.reader.stop()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        with contextlib.suppress(OSError):  # A child that is being forked has a copy, and `is_open` must see the end.
            self._sock.shutdown(SHUT_RDWR)
        self._sock.close()
        self._queue.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._peer.lost(error)

    def detach(self) -> socket:
        """The socket, which goes on as something else: nothing waits to be sent, and no frame will come.

        Raises ProtocolError if the other side has said more than it should.
        """
        assert not self.is_closed and not self.is_sending and self._tls is None
        self._loop.remove_reader(self._sock)
        if self.reader.has_rest:
            raise ProtocolError("more frames after the last one")
        self.is_closed = True
        self.reader.stop()
        self._peer.lost(ConnectionError("goes on as something else"))
        return self._sock

    def forget_after_fork(self) -> None:
        """In a forked child: the connection is the parent's, who goes on with it."""
        self._sock.close()

    # ---- in

    def _readable(self) -> None:
        try:
            self._read()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (ProtocolError, OSError) as error:
            self.lose(error)
        except Exception as error:
            log.exception("a connection is given up: a frame could not be handled")
            self.lose(error)
        if self._tls is not None and not self.is_closed:
            if self._is_blocked:
                self._flush()  # TLS may have had to read before it could write.
            if not self.is_closed and self._tls.pending():
                self._loop.call_soon(self._readable)  # Bytes inside OpenSSL, of which the selector knows nothing.

    def _read(self) -> None:
        for _ in range(ROUNDS_MAX):
            if self.is_closed:
                return
            buffer = self.reader.get_buffer()
            count = self._receive(buffer) if self._takes_descriptors else self._sock.recv_into(buffer)
            if not count:
                raise ConnectionError("the other side closed the connection")
            self.heard = True
            self.reads += 1
            self.reader.buffer_updated(count)
            if count < len(buffer) and self._tls is None:
                return

    def _receive(self, buffer: memoryview) -> int:
        count, ancillary, flags, _ = self._sock.recvmsg_into([buffer], CMSG_SPACE(FDS_MAX * 4), MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == SOL_SOCKET and kind == SCM_RIGHTS:
                self._descriptors.extend(memoryview(data[: len(data) // 4 * 4]).cast("i"))
        if flags & MSG_CTRUNC or len(self._descriptors) > FDS_MAX:
            raise ProtocolError("more file descriptors than frames that bring one")
        return count

    # ---- out

    def _flush(self) -> None:
        try:
            for _ in range(ROUNDS_MAX):
                if not self.is_sending:
                    self._unblock()
                    break
                if self._tls is None:
                    self._consume(self._send_parts())
                else:
                    self._send_piece(self._tls)
                self.moved = True
            else:
                self._block()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._block()
        except OSError as error:
            # The owner of the frame is in the middle of sending it: it learns of this a moment later.
            self._loop.call_soon(self._send_failed, error)
            self._is_blocked = True
        if self._closes_when_sent and not self.is_sending:
            self._loop.call_soon(self.lose, ConnectionError("closed"))

    def _send_failed(self, error: OSError) -> None:
        if not self.is_closed:
            self._readable()  # The other side may have said why before it left.
        self.lose(error)

    def _send_parts(self) -> int:
        first = self._queue[0]
        if first.fd is None:
            return self._sock.sendmsg(self._gather())
        first.began = True
        count = self._sock.sendmsg(first.parts, [(SOL_SOCKET, SCM_RIGHTS, first.fd.to_bytes(4, sys.byteorder))])
        first.fd = None
        return count

    def _gather(self) -> list[memoryview]:
        parts: list[memoryview] = []
        size = 0
        for frame in self._queue:
            if frame.fd is not None:
                break  # It begins a message of its own.
            frame.began = True
            for part in islice(frame.parts, SEND_PARTS_MAX - len(parts)):
                parts.append(part)
                size += len(part)
            if size >= SEND_BYTES_MAX or len(parts) >= SEND_PARTS_MAX:
                break
        return parts

    def _consume(self, count: int) -> None:
        """`count` bytes have left."""
        while count:
            frame = self._queue[0]
            part = frame.parts[0]
            if count < len(part):
                frame.parts[0] = part[count:]
                return
            count -= len(part)
            frame.parts.popleft()
            if not frame.parts:
                self._queue.popleft()
                if frame.on_sent is not None:
                    frame.on_sent()

    def _send_piece(self, sock: ssl.SSLSocket) -> None:
        if self._piece is None:
            self._piece = memoryview(b"".join(self._gather_piece()))
            self._consume(len(self._piece))
        count = sock.send(self._piece)
        self._piece = self._piece[count:] if count < len(self._piece) else None

    def _gather_piece(self) -> Iterable[memoryview]:
        left = TLS_BYTES_MAX
        for frame in self._queue:
            frame.began = True
            for part in frame.parts:
                yield part[:left]
                left -= min(left, len(part))
                if not left:
                    return

    def _block(self) -> None:
        if not self._is_blocked:
            self._is_blocked = True
            self._loop.add_writer(self._sock, self._flush)

    def _unblock(self) -> None:
        if self._is_blocked:
            self._is_blocked = False
            self._loop.remove_writer(self._sock)


async def start_tls(
    loop: asyncio.AbstractEventLoop, sock: socket, context: ssl.SSLContext, *, server_name: str | None
) -> ssl.SSLSocket:
    """The handshake on a connected socket, which the result takes over. `server_name`: whom to expect; None: we serve.

    Raises ssl.SSLError, OSError. Closes the socket if it fails.
    """
    is_server = server_name is None
    secured = context.wrap_socket(
        sock, server_side=is_server, server_hostname=server_name, do_handshake_on_connect=False
    )
    try:
        while True:
            try:
                secured.do_handshake()
                return secured
            except ssl.SSLWantReadError:
                await until_ready(loop, loop.add_reader, loop.remove_reader, secured)
            except ssl.SSLWantWriteError:
                await until_ready(loop, loop.add_writer, loop.remove_writer, secured)
    except BaseException:
        secured.close()
        raise


async def until_ready(
    loop: asyncio.AbstractEventLoop, add: Callable[..., object], remove: Callable[..., object], sock: socket
) -> None:
    """Return when the socket is ready for what `add` asks for."""
    ready = loop.create_future()
    add(sock, _wake, ready)
    try:
        await ready
    finally:
        remove(sock)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
