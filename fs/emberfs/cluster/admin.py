"""What an operator asks of a cluster: the questions of `messages.manager`, put to whichever manager is the primary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from ..client.managers import Managers
from ..messages import (
    AcceptLoss,
    AddNode,
    ClusterStatus,
    ConfigReply,
    Done,
    DrainNode,
    GetConfig,
    GetRouting,
    Message,
    RemoveNode,
    RoutingReply,
    SetConfig,
    SetupChains,
    StatusReply,
)
from ..portal import Portal
from ..routing import Routing
from ..runtime import AsyncioRuntime
from ..settings import Config, Value
from ..transport import TcpConfig, TcpNetwork
from ..urls import cluster_addresses
from .credentials import explained, find_credentials
from .store import tls_files

Reply = TypeVar("Reply", bound=Message)


class Admin:
    """Blocking; close it, or use it in a `with` block. Opens no client session.

    With the credentials of a client only `status` and `routing` are answered: the rest raises AccessDenied.
    """

    def __init__(self, url: str, *, credentials: str = "", timeout_s: float = 10.0) -> None:
        managers = cluster_addresses(url)
        self._credentials = find_credentials(managers, credentials)
        files = tls_files(self._credentials)
        self._runtime = AsyncioRuntime("emberfs-admin")
        self._portal = Portal(self._runtime)
        self._network = TcpNetwork(self._runtime, TcpConfig(tls=files))
        self._managers = Managers(self._runtime, self._network, managers)
        self._timeout_s = timeout_s

    def ask(self, request: Message, reply: type[Reply]) -> Reply:
        """Raises Unavailable when no manager answers in time, and what the primary raises."""
        with explained(self._credentials):
            return self._portal.run(self._managers.ask(request, reply, timeout_s=self._timeout_s))

    def status(self) -> StatusReply:
        """What the primary knows."""
        return self.ask(ClusterStatus(), StatusReply)

    def routing(self) -> Routing:
        """Who holds what."""
        routing = self.ask(GetRouting(), RoutingReply).routing
        assert routing is not None
        return routing

    def setup_chains(self, *, replicas: int, targets_per_disk: int) -> None:
        """Make the chains, once."""
        self.ask(SetupChains(replicas, targets_per_disk), Done)

    def add_node(self, node: str) -> None:
        """Let chains move to a storage node."""
        self.ask(AddNode(node), Done)

    def drain_node(self, node: str) -> None:
        """Let chains move off a storage node."""
        self.ask(DrainNode(node), Done)

    def remove_node(self, node: str) -> None:
        """Forget a node that holds nothing. Raises Conflict."""
        self.ask(RemoveNode(node), Done)

    def accept_loss(self, chain: int, target: bytes) -> None:
        """Go on with what a target has of a lost chain."""
        self.ask(AcceptLoss(chain, target), Done)

    def config(self) -> Config:
        """What holds on all nodes."""
        return self.ask(GetConfig(), ConfigReply).config

    def set_config(self, version: int, values: Mapping[str, Value], *, unset: Sequence[str] = ()) -> Config:
        """Change it. Raises Conflict if it is at another version by now, NotFound, LimitExceeded."""
        return self.ask(SetConfig(version, dict(values), list(unset)), ConfigReply).config

    def close(self) -> None:
        """End the connections."""
        self._portal.drain()
        self._portal.run_last(self._network.close())
        self._runtime.stop()

    def __enter__(self) -> Admin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
