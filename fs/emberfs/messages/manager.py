"""What nodes and clients ask of the cluster manager."""

from __future__ import annotations

import msgspec

from ..routing import LocalState, Node, Routing
from ..settings import Config, Settings, Value
from .base import EVERYBODY, OPERATORS, READERS, WRITERS, Message


class TargetReport(msgspec.Struct, frozen=True, array_like=True):
    """What a storage node says of one of its targets."""

    target: bytes
    generation: bytes
    """Random, drawn when the target's index was made: another one means another disk content."""
    state: LocalState
    synced_version: int = 0
    """UP_TO_DATE: the chain version under which the resync ended (for a syncing target)."""
    used_bytes: int = 0
    free_bytes: int = 0
    """Of the disk, above the reserve; the targets of a node share it."""
    unmended: int = 0
    """Damaged chunks that no other replica could help with."""
    idle_bytes: int = 0
    """What its free blocks take of the disk: new data has it, too."""


class Heartbeat(Message):
    """Sent every `heartbeat_s` by each server. The reply renews the sender's lease from the time of *sending* on."""

    node: Node
    reports: list[TargetReport]
    routing_version: int
    """What the sender has: the reply carries a newer one, if there is one."""
    sessions_version: int = 0
    config_version: int = 0

    @property
    def speaks_as(self) -> Node:
        return self.node


class HeartbeatReply(Message):
    routing: Routing | None
    """None: yours is the newest."""
    sessions_version: int = 0
    sessions: list[bytes] | None = None
    """Client ids with a live session; None: unchanged."""
    lease_s: float = Settings().lease_s
    """The sender serves for so long from the time of sending on, by its own clock."""
    config: Config | None = None
    """None: yours is the newest."""


class GetRouting(Message):
    """The routing if it is newer than `version`; waits up to `wait_s` for one."""

    may_send = READERS
    changes_nothing = True

    version: int = 0
    wait_s: float = 0.0


class RoutingReply(Message):
    routing: Routing | None


class OpenSession(Message):
    """A client begins: storage nodes take its requests from now on."""

    may_send = WRITERS

    client: bytes
    description: str = ""
    """Host, pid and program, for people."""


class ExtendSession(Message):
    """The client is alive. Raises SessionExpired if it was given up meanwhile."""

    may_send = WRITERS

    client: bytes


class CloseClient(Message):
    """The client ends: its session and what hangs on it may go."""

    may_send = WRITERS

    client: bytes


class SetupChains(Message):
    """Make the chain table, once: `replicas` targets a chain, `targets_per_disk` targets a disk."""

    may_send = OPERATORS

    replicas: int
    targets_per_disk: int


class AddNode(Message):
    """Let chains move to this storage node, until it has its share."""

    may_send = OPERATORS

    node: str


class DrainNode(Message):
    """Move every target off this storage node; `GetRouting` shows when it holds none."""

    may_send = OPERATORS

    node: str


class RemoveNode(Message):
    """Forget a node that holds no target. Raises Conflict if it does."""

    may_send = OPERATORS

    node: str


class AcceptLoss(Message):
    """A chain has no replica left with the last committed version: go on with what `target` has."""

    may_send = OPERATORS

    chain: int
    target: bytes


class GetConfig(Message):
    """The configuration of the cluster. -> ConfigReply"""

    may_send = EVERYBODY
    changes_nothing = True


class SetConfig(Message):
    """Change the configuration, all of it at once or nothing. -> ConfigReply

    Raises Conflict if it is at another version than `version` by now, unless nothing would change; NotFound,
    LimitExceeded.
    """

    may_send = OPERATORS

    version: int
    """What the sender has seen."""
    values: dict[str, Value]
    unset: list[str] = msgspec.field(default_factory=list)
    """These get their defaults."""


class ConfigReply(Message):
    config: Config


class ClusterStatus(Message):
    """What the primary knows. -> StatusReply"""

    may_send = EVERYBODY
    changes_nothing = True


class NodeStatus(msgspec.Struct, frozen=True, array_like=True):
    node: Node
    alive: bool
    last_heard_s: float
    """Seconds since the last heartbeat; -1: never by this primary."""
    reports: list[TargetReport] = msgspec.field(default_factory=list)


class StatusReply(Message):
    primary: str
    routing: Routing
    nodes: list[NodeStatus]
    sessions: int
    same_host: bool = False
    """All nodes were on one host when the chains were made: replicas may share it."""


class Join(Message):
    """A machine without a certificate asks for one: the only request that is taken from it. -> Joined

    Raises AccessDenied if the token is not of this cluster or has expired.
    """

    may_send = EVERYBODY

    token: str
    """What the operator was given: see `transport.certificates`."""
    csr: bytes
    """A PEM certificate signing request; the private key stays where it was made."""


class Joined(Message):
    cert: bytes
    """PEM."""
    ca: bytes
    """PEM of the authorities to trust; several while they are being changed."""
