"""Who holds what: nodes, targets and versioned chains, as the cluster manager publishes them.

A chain is an ordered list of targets, head first. Its version grows with every change of its targets or their states;
requests name the version they go by. The order is: serving, lastsrv, syncing, waiting, offline.

Does not know: how states change (`manager.states`), or who asks.
"""

from __future__ import annotations

import enum

import msgspec


class TargetState(enum.IntEnum):
    """The public state of a target in its chain; in the chain's order."""

    SERVING = 1
    """Takes reads and writes."""
    LASTSRV = 2
    """Is down and was among the last that served: nobody else has every acknowledged write."""
    SYNCING = 3
    """Takes writes; its predecessor brings it what it missed."""
    WAITING = 4
    """Alive, and waits for its turn to sync."""
    OFFLINE = 5
    """Down; it will have missed writes."""


class LocalState(enum.IntEnum):
    """What a node says of its own target."""

    UP_TO_DATE = 1
    """Has served since it was made serving, or its resync ended."""
    ONLINE = 2
    """Has its old data, and cannot know what it missed."""
    FRESH = 3
    """Holds nothing, or something that is not this target."""
    OFFLINE = 4
    """Cannot be used: the disk failed, or the node is not heard of (the manager says so then)."""


class ChainTarget(msgspec.Struct, frozen=True, array_like=True):
    """A target's place in a chain."""

    target: bytes
    """16 bytes."""
    state: TargetState
    generation: bytes = b""
    """The disk content that was last trusted with data; empty: none yet."""
    leaving: bool = False
    """To be taken out once the chain has enough others serving."""
    foreign: bool = False
    """LASTSRV: its node has shown another disk content. The disk is not mounted, or it is gone for good."""


class Chain(msgspec.Struct, frozen=True, array_like=True):
    """One replica set."""

    id: int
    version: int
    """0: planned, and begins with version 1 once all its targets have reported."""
    targets: tuple[ChainTarget, ...]
    replicas: int = 1
    """How many serving targets it wants."""

    @property
    def serving(self) -> tuple[ChainTarget, ...]:
        """Those that serve, head first; the last of them is the tail."""
        return tuple(target for target in self.targets if target.state == TargetState.SERVING)

    @property
    def writing(self) -> tuple[ChainTarget, ...]:
        """Those that writes go through: serving ones, then the syncing one."""
        return tuple(target for target in self.targets if target.state in (TargetState.SERVING, TargetState.SYNCING))

    @property
    def is_lost(self) -> bool:
        """Nobody has the last committed version, nor is expected back with it: an operator must act."""
        last = (target for target in self.targets if target.state == TargetState.LASTSRV)
        return self.version > 0 and not self.serving and all(target.foreign for target in last)

    @property
    def is_short(self) -> bool:
        """Fewer targets serve than the chain wants, those that leave counted."""
        return len(self.serving) < self.replicas

    @property
    def has_enough(self) -> bool:
        """As many targets serve as the chain wants, not counting those that leave."""
        return sum(not target.leaving for target in self.serving) >= self.replicas

    def may_leave(self, target: bytes) -> bool:
        """True if `target` is leaving and is not needed any more.

        Its node then stops serving it for good and reports it `offline`: only after that is it taken out, because a
        reader that goes by the old chain version could be answered by it until its lease ends.
        """
        return self.has_enough and any(each.target == target and each.leaving for each in self.targets)


class Role(enum.StrEnum):
    """What a server is."""

    KV = "kv"
    MANAGER = "manager"
    META = "meta"
    STORAGE = "storage"


class Node(msgspec.Struct, frozen=True, array_like=True):
    """One server process."""

    name: str
    """Unique in the cluster, for ever the same for the same disk."""
    role: Role
    address: str
    """host:port"""
    incarnation: bytes
    """Random, drawn when the process started."""
    rack: str = ""
    host: str = ""
    draining: bool = False


class Target(msgspec.Struct, frozen=True, array_like=True):
    """Where a target is."""

    id: bytes
    node: str
    chain: int


class Routing(msgspec.Struct, frozen=True, array_like=True):
    """The whole table. Small: 1,000 chains are about 100 KB."""

    version: int
    nodes: tuple[Node, ...] = ()
    targets: tuple[Target, ...] = ()
    chains: tuple[Chain, ...] = ()
