"""A cluster as one process uses it: one runtime, one network, one session, shared by all clients of the process.

Calls go through the same `Portal` and `Core` as on an embedded store; only the connections differ. After a fork the
child opens the cluster anew, with a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..client.core import Core
from ..client.meta_router import MetaRouter
from ..client.router import ReadFrom, RouterConfig, StorageRouter
from ..client.routes import Routes, RoutesConfig
from ..errors import LimitExceeded
from ..lane import native
from ..lane.client import LaneReader
from ..portal import Portal
from ..runtime import AsyncioRuntime
from ..transport import TcpConfig, TcpNetwork, TlsFiles
from ..transport.config import ucx_kinds
from ..transport.types import Connection
from ..urls import cluster_addresses
from .credentials import explained, find_credentials
from .space import space_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Settings of a client of a cluster."""

    credentials: str = ""
    """Directory with ca.pem, cert.pem and key.pem. Empty: EMBERLINE_CREDENTIALS, else what `cluster up` or
    `cluster join` left for this address under ~/.config/emberline."""
    connect_timeout_s: float = 10.0
    """How long to wait for a manager when the store is opened."""
    deadline_s: float = 30.0
    """An operation that could not be done by then ends with an error."""
    read_from: ReadFrom = ReadFrom.LOAD
    """Which replica a read asks first: load, round_robin, head or tail."""
    relaxed: bool = False
    """Reads may return what was true a moment ago, and never ask the tail."""
    uncommitted: bool = False
    """Reads may return what is being written and is not acknowledged yet, and may never be."""

    shares_memory: bool = True
    """Servers of this host read and write our memory in place. False: their bytes come over TCP as from elsewhere."""
    ucx: str = ""
    """Large buffers go by UCX, not encrypted, to and from storage servers that have it too: auto, or rdma, shm, tcp."""
    insecure: bool = False
    """Servers of other machines are spoken to in plain text: whoever is in that network can read it, and forge it."""

    def __post_init__(self) -> None:
        if min(self.connect_timeout_s, self.deadline_s) <= 0:
            raise LimitExceeded("connect_timeout_s and deadline_s must be more than 0")
        object.__setattr__(self, "read_from", ReadFrom(self.read_from))
        try:
            ucx_kinds(self.ucx)
        except ValueError as error:
            raise LimitExceeded(str(error)) from error


class ClusterStore:
    """A cluster that this process is connected to. Get one from `stores.acquire`."""

    def __init__(self, url: str, config: ClientConfig) -> None:
        self.url = url
        self.config = config
        self.forked = False
        self.closed = False
        managers = cluster_addresses(url)
        credentials = find_credentials(managers, config.credentials)
        self.runtime = AsyncioRuntime()
        self.portal = Portal(self.runtime)
        self.network = TcpNetwork(
            self.runtime,
            TcpConfig(
                tls=tls_files(credentials),
                shares_memory=config.shares_memory,
                insecure=config.insecure,
                ucx=config.ucx,
            ),
        )
        self.routes = Routes(
            self.runtime,
            self.network,
            managers,
            description=f"{socket.gethostname()} pid {os.getpid()} {Path(sys.argv[0]).name or 'python'}",
            config=RoutesConfig(connect_timeout_s=config.connect_timeout_s),
        )
        router_config = RouterConfig(
            deadline_s=config.deadline_s,
            read_from=config.read_from,
            relaxed=config.relaxed,
            uncommitted=config.uncommitted,
            host=socket.gethostname(),
        )
        self.storage = StorageRouter(self.runtime, self.network, self.routes, config=router_config)
        self.lanes: LaneReader | None = None
        if native is not None and config.read_from is ReadFrom.LOAD and not config.uncommitted:
            self.lanes = LaneReader(self.runtime, self.portal, self.network, self.routes, usual=self.storage.usual)
        self.meta = MetaRouter(self.runtime, self.network, self.routes)
        try:
            with explained(credentials):
                self.portal.run(self.routes.start())
        except BaseException:
            with contextlib.suppress(Exception):  # The first error is the one that says why.
                self.shut()
            raise
        self.portal.ledger.is_close = True  # From here on: what goes on in the background is no call's.

    @property
    def id(self) -> str:
        """The cluster, as its URL names it."""
        return self.url

    def core(self) -> Core:
        """A new client of the cluster."""
        return Core(self.runtime, self.meta, EveryChain(self.routes, self.storage), client=lambda: self.routes.client)

    async def space(self) -> dict[str, int]:
        """What the storage servers say that they hold and have left."""
        return space_of(await self.routes.status())

    def shut(self) -> None:
        """Let the calls end, then close the session and the connections."""
        self.closed = True
        self.portal.drain()
        if self.lanes is not None:
            self.lanes.close()
        try:
            self.portal.run_last(self.routes.close())
            self.portal.run_last(self.network.close())
        finally:
            self.runtime.stop()

    def forget_after_fork(self) -> None:
        """In the child: touch nothing. The parent goes on as if nothing was."""
        self.forked = True
        if self.lanes is not None:
            self.lanes.forget_after_fork()
            self.lanes = None
        _inherited.append(self)


def tls_files(directory: Path | None) -> TlsFiles | None:
    """The certificate in a directory of credentials."""
    if directory is None:
        return None
    return TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")


_inherited: list[ClusterStore] = []
"""Of our parent process. Kept, so that no finalizer touches the parent's connections or event loop."""


class EveryChain(Mapping[int, Connection]):
    """The way to each chain, of which there may be more tomorrow: always the router."""

    def __init__(self, routes: Routes, storage: StorageRouter) -> None:
        self._routes = routes
        self._storage = storage

    def __getitem__(self, chain: int) -> Connection:
        return self._storage

    def __iter__(self) -> Iterator[int]:
        return iter(self._routes.chain_ids)

    def __len__(self) -> int:
        return len(self._routes.chain_ids)
