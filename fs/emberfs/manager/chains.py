"""What a chain may look like: the disks that a placement is of, and how far apart its targets must be. Pure functions.

A storage node is a disk: one process each. Invariants: no two targets of a chain on one node, nor on one host unless
the whole cluster is on one.

Does not know: where chains go (`placement`), what moves (`moves`), states, rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import Conflict, LimitExceeded
from ..routing import Chain, ChainTarget, Node, Role

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


def staying(chain: Chain) -> list[ChainTarget]:
    """The targets that do not leave."""
    return [each for each in chain.targets if not each.leaving]


def check_drain(nodes: Iterable[Node], replicas: int, *, same_host: bool) -> None:
    """Raise Conflict if a chain cannot keep its replicas apart on `nodes`, those that would be left."""
    storage = [node for node in nodes if node.role == Role.STORAGE]
    hosts = {host_of(node, same_host=same_host) for node in storage}
    if len(hosts) < replicas:
        raise Conflict(f"{replicas} replicas need {replicas} hosts, and {len(hosts)} would be left: add a node first")
