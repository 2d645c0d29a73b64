"""Services for tests of what talks to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kvcache.serving import MIB, Server


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"ember://{tmp_path}/store"


@pytest.fixture
def serve(store: str) -> Iterator[Callable[..., Server]]:
    """Starts a service on `store`; all that were started end with the test."""
    servers: list[Server] = []

    def start(
        capacity_bytes: int = 64 * MIB, tenants: str = "", listen: str = "127.0.0.1:0", more: tuple[str, ...] = ()
    ) -> Server:
        servers.append(Server(store, capacity_bytes, tenants, listen, more))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.end()
