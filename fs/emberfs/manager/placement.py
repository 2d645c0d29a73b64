"""Placement: which disks hold a chain, so that what a lost host held is read back from all others evenly.

Two hosts *share* a chain that has a replica on each. When a host is lost, every chain it held is copied again from
hosts that shared it, so the recovery is as fast as the host it shares most with is slow. Evenly shared is a balanced
incomplete block design. Where every host has as many disks as the others, and every rack as many hosts, it is built
from a cyclic difference family (`placement_families`). Elsewhere, and for what is left over, a local search exchanges
members of chains (`placement_search`).

The bound. A host with T targets in chains of k has T x (k-1) partners. Spread over the other hosts in proportion to
their targets, ceil(T x (k-1) x largest / sum) is the most that one of them gets, where `largest` and `sum` are of the
targets of the others: ceil(disks x targets x (k-1) / (hosts-1)) in a cluster of equals. Where chains keep racks apart
the others are the hosts of other racks.

Invariants: a chain is never twice on a host. It has as few replicas in a rack as can be without leaving more than a
tenth of the targets unused. Disks have no more than `targets_per_disk` targets, and less where hosts x targets is no
multiple of `replicas` (at most k-1 in all), or where one host or rack has so much that the others cannot keep up. The
same disks, in whatever order, give the same chains.

Does not know: states, rows, or chains that exist already (`placement_moves`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from ..errors import LimitExceeded
from .chains import DiskSlot, Group
from .placement_families import Shape, find_family
from .placement_search import Spread, deal

UNUSED_MAX = 0.1
"""The part of the targets that may stay unused for keeping racks apart."""
FAMILY_STEPS_MAX = 3000
"""Blocks tried for one difference family: those that are found are found sooner, or hardly ever."""
SEARCH_STEPS_MAX = 10
"""Exchanges tried per target."""
ROUNDING = 1e-9
"""A quotient this little above a whole number is that number."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its disks, as a placement sees it."""

    name: str
    rack: str
    disks: tuple[DiskSlot, ...]


def place(disks: Sequence[DiskSlot], replicas: int, targets_per_disk: int) -> list[Group]:
    """A group of disks per chain, head first. Heads and tails are spread over the disks too.

    Raises LimitExceeded: a count is below 1, or there are fewer hosts than replicas.
    """
    if replicas < 1 or targets_per_disk < 1:
        raise LimitExceeded(f"{replicas} replicas and {targets_per_disk} targets on a disk: give at least 1 of each")
    hosts = hosts_of(disks)
    if len(hosts) < replicas:
        raise LimitExceeded(
            f"{replicas} replicas need as many hosts with a disk, and {len(hosts)} are there: "
            f"add {replicas - len(hosts)}, or ask for {max(len(hosts), 1)} replicas"
        )
    plan = _Plan(hosts, replicas, targets_per_disk)
    chains = plan.regular() if plan.is_regular else None
    return _onto_disks(hosts, chains if chains is not None else plan.irregular())


def hosts_of(disks: Iterable[DiskSlot]) -> list[Host]:
    """The hosts in an order that takes racks in turn; one without a rack is a rack of its own."""
    by_host: dict[str, list[DiskSlot]] = {}
    for disk in sorted(disks, key=lambda disk: (disk.host, disk.node)):
        by_host.setdefault(disk.host, []).append(disk)
    turns: Counter[str] = Counter()
    order: list[tuple[int, str, Host]] = []
    for name, held in by_host.items():
        rack = f"rack {held[0].rack}" if held[0].rack else f"host {name}"
        order.append((turns[rack], rack, Host(name, rack, tuple(held))))
        turns[rack] += 1
    return [host for _, _, host in sorted(order, key=lambda each: each[:2])]


class _Plan:
    """How many targets each host uses, how often a chain may be in a rack, and the chains over hosts by number."""

    def __init__(self, hosts: Sequence[Host], replicas: int, targets_per_disk: int) -> None:
        self._replicas = replicas
        self._rooms = [len(host.disks) * targets_per_disk for host in hosts]
        names = {rack: number for number, rack in enumerate(dict.fromkeys(host.rack for host in hosts))}
        self._racks = [names[host.rack] for host in hosts]
        sizes = Counter(self._racks)
        self.is_regular = len(set(self._rooms)) == 1 and len(set(sizes.values())) == 1
        most = self._chain_count(replicas)
        limit = -(-replicas // len(sizes))
        while self._chain_count(limit) < (1 - UNUSED_MAX) * most:
            limit += 1
        self._rack_limit = limit
        self._quotas = self._trim(self._chain_count(limit))

    def regular(self) -> list[list[int]] | None:
        """Chains of a difference family; what it leaves is dealt out and exchanged. None: no family was found."""
        hosts, replicas, racks = len(self._rooms), self._replicas, max(self._racks) + 1
        peers = hosts - hosts // racks if self._rack_limit == 1 else hosts - 1
        bound = -(-self._rooms[0] * (replicas - 1) // peers) if peers else 0
        blocks = self._rooms[0] // replicas
        while blocks and not self._can_deal(self._after(blocks)):
            blocks -= 1
        for load_max in range(bound, 2 * bound + 2):
            shape = Shape(
                hosts=hosts,
                replicas=replicas,
                blocks=blocks,
                load_max=load_max,
                racks=racks,
                rack_limit=self._rack_limit,
            )
            family = find_family(shape, steps_max=FAMILY_STEPS_MAX)
            if family is not None:
                break
        else:
            return None
        chains = [[(number + shift) % hosts for number in block] for block in family for shift in range(hosts)]
        rest = deal(self._after(blocks), self._racks, replicas)
        return self._search(chains + rest, len(chains), [[load_max] * hosts] * hosts) if rest else chains

    def irregular(self) -> list[list[int]]:
        """Chains dealt out and exchanged until each pair of hosts shares what its bound allows, or for so long."""
        expected = Expected(self._quotas, self._racks, self._replicas, is_apart=self._rack_limit == 1)
        hosts = range(len(self._quotas))
        bounds = [expected.bound(host) for host in hosts]
        caps = [
            [
                min(bounds[one], bounds[other], ceil((expected(one, other) + expected(other, one)) / 2 - ROUNDING))
                for other in hosts
            ]
            for one in hosts
        ]
        return self._search(deal(self._quotas, self._racks, self._replicas), 0, caps)

    def _search(self, chains: list[list[int]], first: int, caps: Sequence[Sequence[int]]) -> list[list[int]]:
        """Shuffle the chains from `first` on, then exchange among all."""
        spread = Spread(chains, caps=caps, racks=self._racks, rack_limit=self._rack_limit)
        spread.shuffle(first)
        if not spread.improve(steps_max=SEARCH_STEPS_MAX * sum(self._quotas)):
            # Some pairs cannot be helped; that they are one over is better than that one of them is two over.
            spread.allow_more()
            spread.improve(steps_max=SEARCH_STEPS_MAX * sum(self._quotas))
        return spread.chains

    def _after(self, blocks: int) -> list[int]:
        """What each host has left after so many base blocks."""
        return [quota - blocks * self._replicas for quota in self._quotas]

    def _can_deal(self, quotas: Sequence[int]) -> bool:
        chains = sum(quotas) // self._replicas
        racks: Counter[int] = Counter()
        for quota, rack in zip(quotas, self._racks, strict=True):
            racks[rack] += quota
        return min(quotas) >= 0 and max(quotas) <= chains and max(racks.values()) <= chains * self._rack_limit

    def _chain_count(self, limit: int) -> int:
        """The most chains with at most `limit` replicas in a rack: a host gives each of them one, a rack `limit`."""
        low, high = 0, sum(self._rooms) // self._replicas
        while low < high:
            chains = (low + high + 1) // 2
            racks: Counter[int] = Counter()
            for room, rack in zip(self._rooms, self._racks, strict=True):
                racks[rack] += min(room, chains)
            if sum(min(held, limit * chains) for held in racks.values()) >= chains * self._replicas:
                low = chains
            else:
                high = chains - 1
        return low

    def _trim(self, chains: int) -> list[int]:
        """Targets to use per host: all that fit, less from the largest of a rack that has too many, then of all."""
        quotas = [min(room, chains) for room in self._rooms]
        everybody = range(len(quotas))
        for rack in range(max(self._racks) + 1):
            members = [host for host in everybody if self._racks[host] == rack]
            _take(quotas, members, sum(quotas[host] for host in members) - chains * self._rack_limit)
        _take(quotas, everybody, sum(quotas) - chains * self._replicas)
        return quotas


def _take(quotas: list[int], hosts: Sequence[int], count: int) -> None:
    """Take `count` from the quotas of `hosts`, one at a time from the largest."""
    heap = [(-quotas[host], host) for host in hosts]
    heapq.heapify(heap)
    for _ in range(count):
        less, host = heap[0]
        heapq.heapreplace(heap, (less + 1, host))
        quotas[host] -= 1


class Expected:
    """How many chains two hosts would share if all did in proportion to their targets."""

    def __init__(self, targets: Sequence[int], racks: Sequence[int], replicas: int, *, is_apart: bool) -> None:
        """`is_apart`: hosts of one rack share none."""
        held: Counter[int] = Counter()
        for count, rack in zip(targets, racks, strict=True):
            held[rack] += count
        self._targets = targets
        self._racks = racks
        self._partners = replicas - 1
        self._is_apart = is_apart
        self._others = [
            sum(targets) - (held[rack] if is_apart else count) for count, rack in zip(targets, racks, strict=True)
        ]

    def __call__(self, one: int, other: int) -> float:
        if one == other or (self._is_apart and self._racks[one] == self._racks[other]) or not self._others[one]:
            return 0.0
        return self._targets[one] * self._partners * self._targets[other] / self._others[one]

    def bound(self, host: int) -> int:
        """What the largest of the others gets of what `host` held."""
        return ceil(max(self(host, other) for other in range(len(self._targets))) - ROUNDING)


def _onto_disks(hosts: Sequence[Host], chains: Sequence[Sequence[int]]) -> list[Group]:
    """On each host the emptiest disk that shares least with the others; then the head and the tail."""
    used = [[0] * len(host.disks) for host in hosts]
    shared: Counter[tuple[int, int, int]] = Counter()
    heads: Counter[DiskSlot] = Counter()
    tails: Counter[DiskSlot] = Counter()
    groups: list[Group] = []
    for chain in chains:
        group = []
        for host in chain:
            level = min(used[host])
            free = [disk for disk, count in enumerate(used[host]) if count == level]
            best = min(free, key=lambda disk: sum(shared[host, disk, other] for other in chain))
            used[host][best] += 1
            for other in chain:
                shared[host, best, other] += other != host
            group.append(hosts[host].disks[best])
        head = min(group, key=lambda disk: (heads[disk], -tails[disk]))
        tail = min((disk for disk in group if disk != head), key=lambda disk: tails[disk], default=head)
        heads[head] += 1
        tails[tail] += 1
        middle = [disk for disk in group if disk not in (head, tail)]
        groups.append((head, *middle, tail) if tail != head else (head,))
    return groups
