"""Where a client's requests go: the newest routing it knows, kept fresh, and its session with the cluster.

One task follows the managers: it asks for a newer routing and the answer waits until there is one, so a chain change
reaches an idle client in a round trip. Another keeps the session alive. Managers are tried in turn until one of them
is the primary.

Does not know: requests, or how often one is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AccessDenied, DataLost, EmberError, LimitExceeded, SessionExpired, StoreClosed, Unavailable
from ..messages import (
    CloseClient,
    ClusterStatus,
    Done,
    ExtendSession,
    GetRouting,
    OpenSession,
    RoutingReply,
    StatusReply,
)
from ..routing import Chain, ChainTarget, Role, Routing
from ..runtime import Runtime
from ..transport.types import Network
from ..waiting import finish, pause
from .managers import Managers

FOLLOW_RETRY_S = 0.1
"""Pause after the managers refused to say what the routing is, or said nothing newer without holding the question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutesConfig:
    """How a client keeps in touch with the cluster."""

    connect_timeout_s: float = 10.0
    """How long the first routing may take."""
    follow_wait_s: float = 10.0
    """How long a manager holds a question for a newer routing."""
    session_extend_s: float = 5.0
    """How often the session is extended."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "follow_wait_s", "session_extend_s"):
            if getattr(self, name) <= 0:
                raise LimitExceeded(f"{name} must be more than 0: {getattr(self, name)}")


class Routes:
    """The routing as this client knows it. `start` before use, `close` after."""

    def __init__(
        self,
        runtime: Runtime,
        network: Network,
        managers: Sequence[str],
        *,
        description: str = "",
        config: RoutesConfig | None = None,
    ) -> None:
        self.routing = Routing(0)
        self.client = b""
        """The id our storage requests carry; a new one with each session."""
        self._runtime = runtime
        self._managers = Managers(runtime, network, managers)
        self._description = description
        self._config = config or RoutesConfig()
        self._taste = int.from_bytes(runtime.random_bytes(2))
        self._chains: dict[int, Chain] = {}
        self._addresses: dict[bytes, str] = {}
        self._hosts: dict[str, str] = {}
        self._metas: list[str] = []
        self._news: asyncio.Future[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self.tasks: list[asyncio.Task[None]] = []
        """What goes on until `close`, or until the network is closed."""

    async def start(self) -> None:
        """Get the first routing and open a session, which a reader does without: it changes nothing.

        Raises Unavailable when no manager answers in time.
        """
        reply = await self._managers.ask(GetRouting(), RoutingReply, timeout_s=self._config.connect_timeout_s)
        assert reply.routing is not None
        self._adopt(reply.routing)
        self.tasks = [self._runtime.spawn(self._follow(), "client-routing")]
        try:
            await self._open_session(self._config.connect_timeout_s)
        except AccessDenied:  # To us who were just told the routing: the credentials are a reader's.
            return
        self.tasks.append(self._runtime.spawn(self._extend(), "client-session"))

    async def close(self) -> None:
        """End the session. What the cluster cannot be told now it will find out."""
        tasks = self.tasks + ([self._opening] if self._opening is not None else [])
        for task in tasks:
            task.cancel()
        for task in tasks:
            try:
                await task
            except (asyncio.CancelledError, EmberError):
                pass
        self.tasks = []
        if self.client:
            try:
                await self._managers.ask(CloseClient(self.client), Done, timeout_s=1.0)
            except EmberError:
                pass

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def chain_ids(self) -> list[int]:
        """Every chain, in order."""
        return list(self._chains)

    def chain(self, chain: int) -> Chain:
        """The chain as we know it. Raises Unavailable for one we do not know, DataLost for one that is lost."""
        found = self._chains.get(chain)
        if found is None:
            raise Unavailable(f"chain {chain} is not in the routing (version {self.routing.version})")
        if found.is_lost:
            raise DataLost(
                f"no replica is left that has all of chain {chain}: `emberline cluster status` says which disk would "
                "bring it back, `emberline cluster accept-loss` goes on without"
            )
        return found

    def preferred(self, chain: Chain, targets: Sequence[ChainTarget]) -> list[ChainTarget]:
        """`targets` of a chain in the order in which this client turns to them: another one than its neighbours'."""
        first = (chain.id + self._taste) % len(targets) if targets else 0
        return [*targets[first:], *targets[:first]]

    def address(self, target: bytes) -> str:
        """The storage server of a target."""
        return self._addresses[target]

    def host(self, address: str) -> str:
        """The machine of a server."""
        return self._hosts.get(address, "")

    async def status(self) -> StatusReply:
        """What the primary manager knows of the cluster. Raises Unavailable."""
        return await self._managers.ask(ClusterStatus(), StatusReply, timeout_s=self._config.connect_timeout_s)

    @property
    def metas(self) -> list[str]:
        """The metadata servers."""
        return self._metas

    async def news(self, than: int, wait_s: float) -> None:
        """Return once the routing is newer than version `than`, or after `wait_s`."""
        if self.routing.version > than:
            return
        if self._news is None:
            self._news = self._runtime.future()
        await pause(self._runtime, wait_s, self._news)

    def _adopt(self, routing: Routing) -> None:
        if routing.version <= self.routing.version:
            return
        self.routing = routing
        addresses = {node.name: node.address for node in routing.nodes}
        self._chains = {chain.id: chain for chain in routing.chains}
        self._addresses = {target.id: addresses.get(target.node, "") for target in routing.targets}
        self._hosts = {node.address: node.host for node in routing.nodes}
        self._metas = [node.address for node in routing.nodes if node.role == Role.META]
        if self._news is not None:
            finish(self._news)
            self._news = None

    # --- the managers ----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            asked_s, version = self._runtime.now_s(), self.routing.version
            try:
                wait_s = self._config.follow_wait_s
                reply = await self._managers.ask(GetRouting(version, wait_s), RoutingReply, timeout_s=wait_s)
            except StoreClosed:
                return
            except EmberError:
                await self._runtime.sleep(FOLLOW_RETRY_S)
                continue
            if reply.routing is not None:
                self._adopt(reply.routing)
            if self.routing.version == version and self._runtime.now_s() - asked_s < FOLLOW_RETRY_S:
                await self._runtime.sleep(FOLLOW_RETRY_S)

    async def _extend(self) -> None:
        while True:
            await self._runtime.sleep(self._config.session_extend_s)
            try:
                await self._extend_once()
            except StoreClosed:
                return
            except EmberError:
                pass

    async def _extend_once(self) -> None:
        try:
            await self._managers.ask(ExtendSession(self.client), Done, timeout_s=self._config.session_extend_s)
        except SessionExpired:
            await self.renew(self.client)

    async def _open_session(self, timeout_s: float) -> None:
        client = self._runtime.random_bytes(16)
        await self._managers.ask(OpenSession(client, self._description), Done, timeout_s=timeout_s)
        self.client = client

    async def renew(self, expired: bytes) -> None:
        """A session in place of the expired one, whoever else asks for it. Raises Unavailable."""
        if self.client != expired:
            return
        if self._opening is None:
            self._opening = self._runtime.spawn(self._open_session(self._config.connect_timeout_s), "client-session")
        opening = self._opening
        try:
            await asyncio.shield(opening)
        finally:
            if self._opening is opening and opening.done():
                self._opening = None
