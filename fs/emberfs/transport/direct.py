"""A connection for a thread that waits for its answers itself, without an event loop.

What a thread asks through a loop costs two hand-overs between threads, which take longer than a small request itself.
Here the thread that asks writes to the socket and reads from it. For requests that change nothing: one that is lost
may be sent again, by whichever way.

Invariants:
  - It is one thread's at a time, from `try_begin` to `end`; another one finds it busy, and goes another way.
  - Whatever goes wrong ends it: an answer that was not waited for is never taken for that to another request.
  - Signs of life go out from the loop's thread, during a call too, and never in the middle of a frame.
  - A call takes `ping_s` longer than its time at most. A signal gives a system call its time anew, and so does each
    piece of a request that leaves: what is late is ended from the loop's thread.
  - The socket is closed by whoever uses it last, so that nobody meets another one under its number.

Does not know: how to connect (`connection`); TLS.
"""

from __future__ import annotations

import contextlib
import math
import struct
import threading
from collections.abc import Iterable
from select import POLLIN, poll
from socket import MSG_DONTWAIT, SHUT_RDWR, SO_RCVTIMEO, SO_SNDTIMEO, SOL_SOCKET, socket
from time import monotonic

from ..errors import LimitExceeded, ProtocolError, Unanswered, Unreachable
from ..messages import Message
from .codec import decode_failure, decode_message, encode_message
from .frame import HEADER_BYTES_MAX, Frame, FrameReader, Kind, encode_frame

IDLE_S = 10.0
"""A server takes so many connections: one that was not used for so long ends, and whoever needs one opens another."""

_PING = encode_frame(Kind.PING, 0)
_TIME = struct.Struct("@ll")
"""A `timeval`."""


class DirectConnection:
    """See the module. Made by `TcpNetwork.open_direct`."""

    def __init__(self, sock: socket, *, address: str, dead_s: float) -> None:
        """Takes `sock`, on which the server has let us in and nothing else was said. `address`: for errors. A server
        that is silent for `dead_s` is dead."""
        self.address = address
        self.is_closed = False
        """It takes no more calls."""
        sock.setblocking(True)
        self._sock, self._dead_s = sock, dead_s
        self._patience_s = 0.0
        """Of a system call, as the socket was told."""
        self._poll = poll()
        self._poll.register(sock, POLLIN)
        self._using, self._sending, self._ending = threading.Lock(), threading.Lock(), threading.Lock()
        self._answers = _Answers()
        self._reader = FrameReader(self._answers)
        self._reader.header_bytes_max = HEADER_BYTES_MAX
        self._count = 0
        self._ends_s = math.inf
        """The time of the call that is under way."""
        self._used_s = monotonic()

    def try_begin(self) -> bool:
        """True: it is the calling thread's until `end`. False: another thread has it, or it is closed."""
        if self.is_closed or not self._using.acquire(blocking=False):
            return False
        try:
            while not self.is_closed and self._poll.poll(0):
                self._receive()
        except (OSError, ProtocolError):
            self._fail()
        except BaseException:
            self._fail()
            self.end()
            raise
        if self.is_closed or self._answers.is_draining:
            self.end()
            return False
        return True

    def end(self) -> None:
        """Others may have it."""
        if self._answers.is_draining:
            self._fail()
        self._using.release()
        self._let_go()

    def call(self, request: Message, *, timeout_s: float) -> Message:
        """Send one, which must change nothing, and return the answer. Between `try_begin` and `end`.

        Raises what the server raised, Unreachable (it was lost), Unanswered (it took too long), LimitExceeded,
        ProtocolError.
        """
        assert request.changes_nothing
        body = encode_message(request)
        if len(body) > HEADER_BYTES_MAX:
            raise LimitExceeded(f"a message of {len(body)} bytes is over the limit of {HEADER_BYTES_MAX}")
        ends_s = monotonic() + timeout_s
        self._count += 1
        self._ends_s = ends_s
        try:
            self._wait_at_most(timeout_s)
            with self._sending:
                self._sock.sendall(encode_frame(Kind.REQUEST, self._count, body))
            outcome = self._answer(self._count, ends_s)
        except OSError as error:
            self._fail()
            if monotonic() >= ends_s:
                raise Unanswered(f"{self.address} did not answer in time") from error
            if isinstance(error, BlockingIOError):
                raise Unreachable(f"{self.address} was silent for {self._dead_s:g} s") from error
            raise Unreachable(f"the connection to {self.address} was lost ({error})") from error
        except BaseException:
            self._fail()
            raise
        finally:
            self._ends_s = math.inf
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def keep_alive(self) -> None:
        """Take what came while nobody asked, and say that we live; end it if nobody asks any more, or a call is late.

        In the loop's thread, as often as a sign of life is due.
        """
        if self.try_begin():
            if monotonic() - self._used_s > IDLE_S:
                self._fail()
            self.end()
        if monotonic() > self._ends_s:
            self._fail()
        if not self.is_closed and self._sending.acquire(blocking=False):  # Else it says something just now.
            try:
                self._ping()
            finally:
                self._sending.release()
        self._let_go()

    def drain(self, timeout_s: float) -> None:
        """Take no more calls, and end it when the one that is under way has ended, or after `timeout_s`."""
        self._answers.is_draining = True
        if self._using.acquire(timeout=timeout_s):
            self.end()
        else:
            self.close()

    def close(self) -> None:
        """End it; who waits for an answer does so no longer. From any thread."""
        self._fail()
        self._let_go()

    def forget_after_fork(self) -> None:
        """In a forked child: the connection is the parent's, who goes on with it."""
        self._sock.close()

    def _answer(self, number: int, ends_s: float) -> Message | Exception:
        answers = self._answers
        answers.number, answers.outcome = number, None
        self._receive()
        while answers.outcome is None:
            self._wait_at_most(ends_s - monotonic())
            self._receive()
        outcome, answers.outcome, answers.number = answers.outcome, None, 0
        self._used_s = monotonic()
        return outcome

    def _receive(self) -> None:
        count = self._sock.recv_into(self._reader.get_buffer())
        if not count:
            raise ConnectionError("the other side closed the connection")
        self._reader.buffer_updated(count)

    def _wait_at_most(self, seconds: float) -> None:
        """Of each system call, which raises BlockingIOError then. A server that lives is not silent for `dead_s`."""
        if seconds <= 0:
            raise BlockingIOError
        seconds = min(seconds, self._dead_s)
        if seconds != self._patience_s:
            self._patience_s = seconds
            time = _TIME.pack(int(seconds), max(int(seconds % 1 * 1e6), 1))  # Of zeros it would wait for ever.
            self._sock.setsockopt(SOL_SOCKET, SO_RCVTIMEO, time)
            self._sock.setsockopt(SOL_SOCKET, SO_SNDTIMEO, time)

    def _ping(self) -> None:
        try:
            if self._sock.send(_PING, MSG_DONTWAIT) < len(_PING):
                self._fail()
        except BlockingIOError:
            pass  # There is enough that the server has not read yet.
        except OSError:
            self._fail()

    def _fail(self) -> None:
        self.is_closed = True
        with self._ending, contextlib.suppress(OSError):
            self._sock.shutdown(SHUT_RDWR)

    def _let_go(self) -> None:
        """Of the socket, if it is over and nobody uses it: else whoever does comes here next."""
        if self.is_closed and self._using.acquire(blocking=False):
            with self._sending, self._ending:  # Nobody is about to send a sign of life, or to shut it down.
                self._sock.close()
            self._using.release()


class _Answers:
    """Takes the frames that come."""

    def __init__(self) -> None:
        self.number = 0
        """Of the call that waits; 0: none does."""
        self.outcome: Message | Exception | None = None
        self.is_draining = False
        """There are no more calls: the server takes none, or this side makes none."""

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        kind = frame.kind
        if kind in (Kind.REPLY, Kind.ERROR) and frame.call:
            if frame.call != self.number or self.outcome is not None or frame.lengths:
                raise ProtocolError(f"an answer to call {frame.call}, which nobody made")
            self.outcome = decode_message(frame.body) if kind == Kind.REPLY else decode_failure(frame.body)
        elif kind == Kind.GOODBYE:
            self.is_draining = True
        elif kind not in (Kind.PING, Kind.ERROR):
            raise ProtocolError(f"a server does not send {kind.name} here")
        return ()

    def end(self) -> None:
        """There is no payload."""
