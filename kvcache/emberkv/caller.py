"""A client's requests to the service, from whichever thread: its seat there, and which of several addresses serves.

A *seat* is what the service knows a client by. One that it has forgotten is asked for again; an address that does not
answer has the next one's turn follow. A service that does not answer several times in a row is left alone for a while.

After some requests to an address a *direct* connection goes there (`direct_way`), without an event loop; while another
thread has it, or a request is large, requests go over the one that all threads share.

Does not know: pages, or what is asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from emberfs import StoreClosed
from emberfs.errors import DeadlineExceeded, EmberError, Unavailable
from emberfs.messages import Foreign, Message
from emberfs.portal import Portal, hold_interrupts, release_interrupts
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpConfig, TcpNetwork

from . import messages
from .breaker import Breaker, BreakerConfig
from .direct_way import DirectWay
from .errors import BreakerOpen, SeatGone
from .messages import A
from .namespace import Namespace

RETRY_S = 0.05
CLOSE_S = 1.0
"""So long the service is given to hear that we end."""
TURN_S = 2.0
"""Of several addresses one is given so long to give us a seat before the next has its turn. Who gave it is asked for as
long as it lives: only there our seat is known, and a put that has to be durable takes as long as the store does. The
transport finds out who is dead."""
DIRECT_BYTES_MAX = 64 << 10
"""Of a request. More than a socket takes at once makes the sender wait for the service to read, piece by piece."""


class Caller:
    """See the module. `address`: one, or several with commas."""

    def __init__(
        self,
        address: str,
        namespace: Namespace,
        *,
        tenant: str,
        token: str,
        policy: str,
        timeout_s: float,
        tcp: TcpConfig,
        breaker: BreakerConfig,
    ) -> None:
        self.addresses = [each.strip() for each in address.split(",") if each.strip()]
        """The first one is asked first."""
        self.timeout_s = timeout_s
        self.is_closed = False
        self.runtime = AsyncioRuntime("emberkv")
        self._open = messages.Open(namespace, tenant, token, policy)
        self._portal = Portal(self.runtime)
        self._network = TcpNetwork(self.runtime, tcp)
        self.breaker = Breaker(breaker, now_s=self.runtime.now_s, random=self._random)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        """Of who asks for a seat."""
        self._seat: messages.Opened | None = None
        self._ways = {each: DirectWay(each, self._network, self._portal, self.runtime) for each in self.addresses}

    def seated(self) -> messages.Opened:
        """Our seat, asked for if there is none."""
        if (seat := self._seat) is not None and not self.is_closed:
            return seat
        if not self._opening.acquire(timeout=self.timeout_s):
            raise DeadlineExceeded(f"no seat within {self.timeout_s:g} s: another thread asks for one")
        try:
            if self.is_closed:
                raise StoreClosed("this KVCache was closed")
            if self._seat is None:
                self._seat = self.call(self._open, messages.Opened)
            return self._seat
        finally:
            self._opening.release()

    def ask(self, make: Callable[[int], messages.Ask], answer: type[A]) -> A:
        """One request of our seat; once more if the service has forgotten it."""
        seat = self.seated()
        try:
            return self.call(make(seat.seat), answer)
        except SeatGone:
            with self._lock:
                if self._seat is seat:
                    self._seat = None
        return self.call(make(self.seated().seat), answer)

    def call(self, ask: messages.Ask, answer: type[A]) -> A:
        """One request, of whichever address serves it. Raises BreakerOpen, and then nothing was sent."""
        if not self.breaker.admit():
            raise BreakerOpen(f"{', '.join(self.addresses)} did not answer before, and is not asked now")
        try:
            told = self._call(ask, answer)
        except (Unavailable, DeadlineExceeded):
            self.breaker.failed()
            raise
        except (EmberError, OSError):
            self.breaker.succeeded()
            raise
        except BaseException:
            self.breaker.abandoned()
            raise
        self.breaker.succeeded()
        return told

    def _call(self, ask: messages.Ask, answer: type[A]) -> A:
        ends_s = self.runtime.now_s() + self.timeout_s
        request = messages.encode_ask(ask)
        error: EmberError | None = None
        while (left_s := ends_s - self.runtime.now_s()) > 0:
            address = self.addresses[0]
            try:
                has_turns = len(self.addresses) > 1 and isinstance(ask, messages.Open)
                wait_s = min(left_s, TURN_S) if has_turns else left_s
                reply = self._reply(address, request, wait_s)
                return messages.decode_answer(reply, ask, answer)
            except Unavailable as refused:
                error = refused
                with self._lock:
                    if self.addresses[0] == address:  # Else another thread has gone on to the next.
                        self.addresses = [*self.addresses[1:], address]
                self._portal.run(self.runtime.sleep(min(RETRY_S, left_s)))
        raise DeadlineExceeded(f"no answer within {self.timeout_s:g} s: {error}") from error

    def _reply(self, address: str, request: Foreign, timeout_s: float) -> Message:
        """By a direct connection if one is free, else by the connection that all threads share."""
        connection = self._connection(address)
        held = hold_interrupts()
        try:
            direct = self._ways[address].take() if len(request.body) <= DIRECT_BYTES_MAX else None
            if direct is None:
                return self._portal.run(connection.call(request, timeout_s=timeout_s))  # type: ignore[no-any-return]
            try:
                return direct.call(request, timeout_s=timeout_s)
            finally:
                direct.end()
        finally:
            if held is not None:
                release_interrupts(held)

    def post(self, make: Callable[[int], messages.Ask], *, is_over: Callable[[], None]) -> None:
        """One request of our seat, of which nobody waits for the answer; then `is_over` is called."""
        seat, connection = self._seat, self._connection(self.addresses[0])
        if seat is None:
            is_over()
            return

        async def tell() -> None:
            try:
                await messages.send(connection.call, make(seat.seat), messages.Okay, timeout_s=self.timeout_s)
            finally:
                is_over()

        self._portal.post(tell())

    @property
    def is_ours(self) -> bool:
        """Not in a process that was forked from ours."""
        return os.getpid() == self._pid

    def forget_after_fork(self) -> None:
        """In such a process: close its copies of the connections, so that the service learns when ours ends."""
        self.is_closed = True
        self._network.forget_after_fork()

    def check_process(self) -> None:
        """Raises StoreClosed in a process that was forked from ours."""
        if not self.is_ours:
            raise StoreClosed("this KVCache belongs to the process that made it: connect again after a fork")

    def leave(self) -> None:
        """Tell the service that we end."""
        if self._seat is not None:
            ask, call = messages.Close(self._seat.seat), self._connection(self.addresses[0]).call
            self._portal.run(messages.send(call, ask, messages.Okay, timeout_s=CLOSE_S))

    def close(self) -> None:
        """End the connections, once the calls that have begun have ended."""
        self._portal.drain()
        ends_s = self.runtime.now_s() + self.timeout_s
        for way in self._ways.values():
            way.drain(max(ends_s - self.runtime.now_s(), 0.0))
        try:
            self._portal.run_last(self._network.close())
        finally:
            self.runtime.stop()

    def _random(self) -> float:
        return int.from_bytes(self.runtime.random_bytes(4)) / (1 << 32)

    def _connection(self, address: str) -> Any:
        self.check_process()
        return self._network.connection(address)
