"""Which nodes hold a chain: a simple first placement, and the moves that fill or empty a node. Pure functions.

A storage node is a disk: one process each. Invariants: no two targets of a chain on one node, nor on one host unless
the whole cluster is on one. A move adds a target on another node and marks the old one leaving; the chain keeps its
replicas meanwhile. Moves to a node that joins are no more than its fair share.

Does not know: states, rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Conflict, LimitExceeded
from ..routing import Chain, ChainTarget, Node, Role, Target
from .rows import NodeRow

REPLICAS_MAX = 8
TARGETS_PER_DISK_MAX = 256


@dataclass(frozen=True, slots=True)
class DiskSlot:
    """A disk, as a placement sees it."""

    node: str
    host: str
    """Two targets of a chain are never on one host."""
    rack: str
    """Nor in one rack, where that is possible."""


Group = tuple[DiskSlot, ...]
"""The disks of one chain, head first."""
Place = Callable[[Sequence[DiskSlot], int, int], Sequence[Group]]
"""(disks, replicas, targets_per_disk) -> a group per chain."""


@dataclass(frozen=True, slots=True)
class Move:
    """`target` of `chain` is to leave, for a new one on node `to`."""

    chain: int
    target: bytes
    to: str


def host_of(node: Node, *, same_host: bool) -> str:
    """What must differ within a chain."""
    return node.name if same_host else node.host or node.name


def disks_for(nodes: Iterable[Node], replicas: int, targets_per_disk: int) -> tuple[list[DiskSlot], bool]:
    """(the disks to place on, whether they are all on one host). Raises LimitExceeded and Conflict: it cannot be."""
    nodes = sorted(nodes, key=lambda node: node.name)
    if not 1 <= replicas <= REPLICAS_MAX:
        raise LimitExceeded(f"a chain has 1 to {REPLICAS_MAX} replicas, not {replicas}")
    if not 1 <= targets_per_disk <= TARGETS_PER_DISK_MAX:
        raise LimitExceeded(f"a disk has 1 to {TARGETS_PER_DISK_MAX} targets, not {targets_per_disk}")
    same_host = len({node.host for node in nodes}) == 1
    slots = [DiskSlot(node.name, host_of(node, same_host=same_host), node.rack) for node in nodes]
    hosts = len({slot.host for slot in slots})
    if hosts < replicas:
        raise Conflict(
            f"{replicas} replicas need {replicas} hosts with a storage node, and {hosts} are there "
            f"({len(slots)} nodes): start more, or ask for fewer replicas"
        )
    return slots, same_host


def place_round_robin(disks: Sequence[DiskSlot], replicas: int, targets_per_disk: int) -> list[Group]:
    """Chains over the hosts that have most room left, in turn; heads take turns too."""
    room = dict.fromkeys(disks, targets_per_disk)
    hosts: dict[str, list[DiskSlot]] = {}
    for disk in disks:
        hosts.setdefault(disk.host, []).append(disk)
    order = list(hosts)
    groups: list[Group] = []
    while True:
        # The host that is first among equals is another one each time.
        first = len(groups) % len(order)
        turn = order[first:] + order[:first]
        turn.sort(key=lambda host: -sum(room[disk] for disk in hosts[host]))
        group: list[DiskSlot] = []
        while len(group) < replicas:
            racks = {disk.rack for disk in group}
            taken = {disk.host for disk in group}
            best = [max(hosts[host], key=lambda disk: room[disk]) for host in turn if host not in taken]
            best = [disk for disk in best if room[disk]]
            if not best:
                return groups
            disk = min(best, key=lambda disk: bool(disk.rack) and disk.rack in racks)
            group.append(disk)
        for disk in group:
            room[disk] -= 1
        head = len(groups) % replicas
        groups.append((*group[head:], *group[:head]))


class Layout:
    """Who holds what, as a plan of moves goes through it."""

    def __init__(
        self,
        chains: Mapping[int, Chain],
        targets: Mapping[bytes, Target],
        nodes: Mapping[str, NodeRow],
        *,
        alive: Collection[str],
        same_host: bool,
    ) -> None:
        self.chains = chains
        self._targets = targets
        self._nodes = nodes
        self._alive = alive
        self._same_host = same_host
        self.load = Counter(self.node(each).name for chain in chains.values() for each in staying(chain))
        self.moving = {chain.id for chain in chains.values() if len(staying(chain)) < len(chain.targets)}

    def node(self, target: ChainTarget) -> Node:
        return self._nodes[self._targets[target.target].node].node

    def takers(self) -> list[NodeRow]:
        """Nodes that may hold targets, by name."""
        rows = [row for row in self._nodes.values() if row.member and not row.node.draining]
        return sorted(rows, key=lambda row: row.node.name)

    def share(self) -> int:
        """How many targets each of them should have at least."""
        takers = len(self.takers())
        return sum(self.load.values()) // takers if takers else 0

    def may_take(self, node: Node, chain: Chain, leaving: bytes) -> bool:
        """True if `node` lives and `chain` keeps its hosts apart when `node` comes for `leaving`."""
        if node.name not in self._alive or any(self.node(each).name == node.name for each in chain.targets):
            return False
        others = [self.node(each) for each in staying(chain) if each.target != leaving]
        return self._host(node) not in {self._host(other) for other in others}

    def taker(self, chain: Chain, leaving: bytes) -> str | None:
        """The best node for a new target of `chain` in the place of `leaving`: another rack, then the least loaded."""
        racks = {self.node(each).rack for each in staying(chain) if each.target != leaving} - {""}
        able = [row.node for row in self.takers() if self.may_take(row.node, chain, leaving)]
        best = min(able, key=lambda node: (node.rack in racks, self.load[node.name], node.name), default=None)
        return None if best is None else best.name

    def _host(self, node: Node) -> str:
        return host_of(node, same_host=self._same_host)


def staying(chain: Chain) -> list[ChainTarget]:
    """The targets that do not leave."""
    return [each for each in chain.targets if not each.leaving]


def plan_moves(layout: Layout, *, limit: int) -> list[Move]:
    """The moves to begin now, so that at most `limit` chains move: off draining nodes, then to joining ones.

    Changes `layout` to what will be.
    """
    moves: list[Move] = []
    for chain in sorted(layout.chains.values(), key=lambda chain: chain.id):
        if len(layout.moving) >= limit and chain.id not in layout.moving:
            continue
        for each in staying(chain):
            to = layout.taker(chain, each.target) if layout.node(each).draining else None
            if to is not None:
                moves.append(_begin(layout, Move(chain.id, each.target, to), each))
                break
    for row in layout.takers():
        while row.joining and layout.load[row.node.name] < layout.share() and len(layout.moving) < limit:
            found = _from_the_fullest(layout, row.node)
            if found is None:
                break
            chain_id, each = found
            moves.append(_begin(layout, Move(chain_id, each.target, row.node.name), each))
    return moves


def _begin(layout: Layout, move: Move, target: ChainTarget) -> Move:
    layout.load[layout.node(target).name] -= 1
    layout.load[move.to] += 1
    layout.moving.add(move.chain)
    return move


def _from_the_fullest(layout: Layout, to: Node) -> tuple[int, ChainTarget] | None:
    """A target that may move to `to`, of a node that has more than its share: the fullest such node."""
    share = layout.share()
    found = [
        (-layout.load[layout.node(each).name], chain.id, each)
        for chain in layout.chains.values()
        if chain.id not in layout.moving
        for each in staying(chain)
        if layout.load[layout.node(each).name] > share and layout.may_take(to, chain, each.target)
    ]
    if not found:
        return None
    _, chain_id, target = min(found, key=lambda each: (each[0], each[1], each[2].target))
    return chain_id, target


def check_drain(nodes: Iterable[Node], replicas: int, *, same_host: bool) -> None:
    """Raise Conflict if a chain cannot keep its replicas apart on `nodes`, those that would be left."""
    storage = [node for node in nodes if node.role == Role.STORAGE]
    hosts = {host_of(node, same_host=same_host) for node in storage}
    if len(hosts) < replicas:
        raise Conflict(f"{replicas} replicas need {replicas} hosts, and {len(hosts)} would be left: add a node first")
