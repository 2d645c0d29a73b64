"""The network seam: one call, one reply, and memory the client handed over.

`buffers` belong to the caller. Until the call returned or raised, the server may write to them (a read) or read from
them (a write); afterwards it never touches them again. An error of the server arrives as the same exception class.
`UpdateUnknown` means that the request was sent and nothing is known about its outcome.
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
        """Serve one request."""


class Connection(Protocol):
    """What a client holds: a way to one service."""

    @property
    def call(self) -> Call:
        """`await connection.call(request, buffers)` sends one request and returns its reply."""
