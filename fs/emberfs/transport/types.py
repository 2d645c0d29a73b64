"""The network seam: one call, one reply, and memory the client handed over.

`buffers` belong to the caller. Until the call returned or raised, the server may write to them (a read) or read from
them (a write); afterwards it never touches them again. An error of the server arrives as the same exception class.

What can go wrong between the two is told by class:
  Unreachable       the request did not leave, or it changes nothing and was not answered: nothing happened
  Unanswered        the same, because the time was over that the call was given
  Unavailable       the server refused to take it: nothing happened
  UpdateUnknown     the request was sent and nothing is known about its outcome
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from ..messages import Message


class Call(Protocol):
    """A request, and the memory that goes with it, to its reply."""

    def __call__(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Awaitable[Message]: ...


class Service(Protocol):
    """What listens: one awaitable per request."""

    def handle(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Awaitable[Message]:
        """Serve one request. Until it waits for something it may run outside any task: no `asyncio.timeout` there."""


class RemoteCall(Protocol):
    """A `Call` to another process, which may take a request and never answer."""

    def __call__(
        self, request: Message, buffers: Sequence[memoryview] = (), /, *, timeout_s: float | None = None
    ) -> Awaitable[Message]:
        """`timeout_s`: how long it may take, from connecting to the answer. None: as long as the server lives.

        After that Unanswered, or UpdateUnknown if it may have happened; `buffers` are the caller's again as ever.
        """


class Connection(Protocol):
    """What a client holds: a way to one service."""

    @property
    def call(self) -> Call:
        """`await connection.call(request, buffers)` sends one request and returns its reply."""


class RemoteConnection(Protocol):
    """A `Connection` to another process."""

    @property
    def call(self) -> RemoteCall:
        """`await connection.call(request, buffers, timeout_s=1.0)`."""


class Network(Protocol):
    """What a server or a client of a cluster is handed to reach others by address."""

    def connection(self, address: str) -> RemoteConnection:
        """The way to `address`, the same object each time. Connects at the first call and again after a loss."""

    async def serve(self, address: str, service: Service) -> Listener:
        """Listen. Of `host:0` the system chooses a port: see `Listener.address`."""

    async def close(self) -> None:
        """End every connection of this network; calls in the air raise."""


class Listener(Protocol):
    """A service that listens."""

    @property
    def address(self) -> str:
        """Where others reach it."""

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Take no new call; give those in the air up to `drain_s` seconds to end, then end the connections."""
