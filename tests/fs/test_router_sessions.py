"""The client's router and sessions: whose name an update bears from attempt to attempt.

Run: pytest tests/fs/test_router_sessions.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from emberfs.client.router import StorageRouter
from emberfs.errors import SessionExpired, Unavailable, UpdateUnknown
from emberfs.messages import Done, Message, WriteChunks
from emberfs.routing import Chain, ChainTarget, Routing, TargetState
from emberfs.testing.sim.loop import SimRuntime, run

TARGET = b"t" * 16
WRITE = WriteChunks(b"", 0, 0, [1], [b"c" * 16], [0], 1 << 16)


class Server:
    """Answers each call with the next of `outcomes`, and keeps who asked."""

    def __init__(self, *outcomes: Exception | Message) -> None:
        self.outcomes = list(outcomes)
        self.clients: list[bytes] = []

    def connection(self, address: str) -> Any:
        return self

    async def call(self, request: Any, buffers: Sequence[memoryview] = (), *, timeout_s: float) -> Message:
        self.clients.append(request.client)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class OneChain:
    """Routes to one server, whose session another task of the client renews whenever somebody waits for news."""

    routing = Routing(1)

    def __init__(self) -> None:
        self.client = b"1" * 16

    def chain(self, chain: int) -> Chain:
        return Chain(chain, 1, (ChainTarget(TARGET, TargetState.SERVING),), 1)

    def address(self, target: bytes) -> str:
        return "server:1"

    async def news(self, seen_version: int, wait_s: float) -> None:
        self.client = b"2" * 16

    async def renew(self, expired: bytes) -> None:
        self.client = b"2" * 16


def attempt(server: Server, check: Callable[[Server], None]) -> None:
    async def main(runtime: SimRuntime) -> None:
        network: Any = server
        routes: Any = OneChain()
        await StorageRouter(runtime, network, routes).call(WRITE, [memoryview(b"x")])

    try:
        run(0, main)
    finally:
        check(server)


def test_a_retry_keeps_its_client_after_another_task_renewed_the_session() -> None:
    def check(server: Server) -> None:
        assert server.clients == [b"1" * 16] * 2

    attempt(Server(UpdateUnknown("the connection broke"), Done()), check)


def test_what_may_have_happened_is_not_sent_again_under_a_new_session() -> None:
    def check(server: Server) -> None:
        assert server.clients == [b"1" * 16] * 2

    with pytest.raises(UpdateUnknown):
        attempt(Server(UpdateUnknown("the connection broke"), SessionExpired("over")), check)


def test_what_has_not_happened_is_sent_again_under_a_new_session() -> None:
    def check(server: Server) -> None:
        assert server.clients == [b"1" * 16, b"1" * 16, b"2" * 16]

    attempt(Server(Unavailable("nobody is there"), SessionExpired("over"), Done()), check)
