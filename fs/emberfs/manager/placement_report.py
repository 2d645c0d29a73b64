"""What a placement is worth: how unevenly the recovery of a lost host would load the others, against the bound.

The bound is that of `placement`, for the targets in use. Does not know: hosts that hold no chain, states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from ..routing import Routing
from .chains import DiskSlot, Group, host_of, staying
from .placement import Expected, hosts_of


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpread:
    """Who would help to recover one host, and how much."""

    host: str
    targets: int
    peers: int
    """Hosts that share a chain with it."""
    peer_load_max: int
    """The most chains that it shares with one other host."""
    bound: int
    """The same if all others took their part."""

    @property
    def ratio(self) -> float:
        """Of the most loaded peer to the bound; 1 is what can be had."""
        return self.peer_load_max / self.bound if self.bound else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementReport:
    """All hosts with a chain, and the worst of them."""

    chains: int
    disks: int
    disk_targets: tuple[int, int]
    """(fewest, most) targets on a disk in use."""
    rack_replicas_max: int
    """The most replicas of one chain in a rack; a host without a rack is a rack of its own."""
    peer_load_max: int
    """Of the host with the worst ratio, as `bound` and `ratio`."""
    bound: int
    ratio: float
    hosts: tuple[HostSpread, ...]
    """By name."""


def placement_report(chains: Iterable[Group]) -> PlacementReport:
    """Report on `chains`: the disks of each. Chains may have different lengths; the longest counts."""
    groups = [group for group in chains if group]
    disks = Counter(disk for group in groups for disk in group)
    hosts = sorted(hosts_of(disks), key=lambda host: host.name)
    racks = {host.name: host.rack for host in hosts}
    shared: dict[str, Counter[str]] = {host.name: Counter() for host in hosts}
    for group in groups:
        for one, other in permutations(group, 2):
            shared[one.host][other.host] += 1
    rack_replicas_max = max((max(Counter(racks[disk.host] for disk in group).values()) for group in groups), default=0)
    targets = [sum(disks[disk] for disk in host.disks) for host in hosts]
    numbers = {rack: number for number, rack in enumerate(racks.values())}
    expected = Expected(
        targets,
        [numbers[host.rack] for host in hosts],
        max((len(group) for group in groups), default=1),
        is_apart=rack_replicas_max == 1,
    )
    spreads = tuple(
        HostSpread(
            host=host.name,
            targets=targets[number],
            peers=len(shared[host.name]),
            peer_load_max=max(shared[host.name].values(), default=0),
            bound=expected.bound(number),
        )
        for number, host in enumerate(hosts)
    )
    worst = max(spreads, key=lambda each: (each.ratio, each.peer_load_max), default=None)
    return PlacementReport(
        chains=len(groups),
        disks=len(disks),
        disk_targets=(min(disks.values(), default=0), max(disks.values(), default=0)),
        rack_replicas_max=rack_replicas_max,
        peer_load_max=worst.peer_load_max if worst else 0,
        bound=worst.bound if worst else 0,
        ratio=worst.ratio if worst else 1.0,
        hosts=spreads,
    )


def groups_of(routing: Routing, *, same_host: bool) -> list[Group]:
    """The disks of each chain as it is to be: without targets that leave. `same_host` as the store was set up."""
    nodes = {node.name: node for node in routing.nodes}
    slots = {}
    for target in routing.targets:
        if (node := nodes.get(target.node)) is not None:
            slots[target.id] = DiskSlot(node.name, host_of(node, same_host=same_host), node.rack)
    return [tuple(slots[each.target] for each in staying(chain) if each.target in slots) for chain in routing.chains]
