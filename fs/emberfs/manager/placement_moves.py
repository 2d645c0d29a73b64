"""Moves of targets when disks come or go, so that what two hosts share stays even. Pure functions.

A disk that comes gets its fair share and nothing else moves. What was on a disk that goes moves, and nothing else.
After one host came or went, no two hosts share more than two chains over what `placement_report` calls the bound
(three with five hosts), and no disk has more than one target over the mean, rounded up: the tests hold it to that.
Invariants: as in `placement`: a chain is never twice on a host, nor more often in a rack than it was or must be.

Does not know: states, nor how many moves may be under way. Moves are found one by one as they are asked for: a caller
takes the first few, carries them out, and asks again later with the groups as they are then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .chains import DiskSlot, Group
from .placement import Host, hosts_of


@dataclass(frozen=True, slots=True)
class Shift:
    """In `groups[chain]`, `comes` takes the place of `leaves`."""

    chain: int
    leaves: DiskSlot
    comes: DiskSlot


def shifts_to_fill(groups: Sequence[Group], disks: Sequence[DiskSlot], joining: Collection[str]) -> Iterator[Shift]:
    """Moves that give the disks of the nodes in `joining` their fair share of the targets, rounded down per host.

    `disks` are all there are, the joining ones too. Where no other host can give, disks of one host share what it has.
    """
    holdings = _Holdings(groups, disks)
    for host in holdings.hosts:
        empty = [disk for disk in host.disks if disk.node in joining]
        share = holdings.share(len(empty))
        while empty and sum(holdings.targets[disk] for disk in empty) < share:
            disk = min(empty, key=lambda disk: holdings.targets[disk])
            found = holdings.find_donor(disk, joining) or holdings.find_neighbour(disk, host, joining)
            if found is None:
                break
            yield holdings.shift(*found, disk)


def shifts_to_empty(
    groups: Sequence[Group], disks: Sequence[DiskSlot], closed: Collection[str] = ()
) -> Iterator[Shift]:
    """Moves that put on `disks` all that is elsewhere. What has no place there, for want of hosts, stays.

    `closed`: nodes that keep what they have and get nothing.
    """
    holdings = _Holdings(groups, disks)
    staying = set(disks)
    for chain, group in enumerate(groups):
        for leaves in group:
            comes = None if leaves in staying else holdings.find_taker(chain, leaves, closed)
            if comes is not None:
                yield holdings.shift(chain, leaves, comes)


def apply_shifts(groups: Sequence[Group], shifts: Iterable[Shift]) -> list[Group]:
    """The groups as they are after the moves."""
    moved = [list(group) for group in groups]
    for shift in shifts:
        moved[shift.chain][moved[shift.chain].index(shift.leaves)] = shift.comes
    return [tuple(group) for group in moved]


class _Holdings:
    """Who holds what, as the moves go on."""

    def __init__(self, groups: Sequence[Group], disks: Sequence[DiskSlot]) -> None:
        self.hosts = hosts_of(disks)
        self.targets = Counter(disk for group in groups for disk in group)
        self._groups = [list(group) for group in groups]
        self._disk_count = len(disks)
        self._total = self.targets.total()
        self._on_host = Counter(disk.host for group in groups for disk in group)
        everybody = hosts_of({*disks, *self.targets})
        self._racks = {host.name: host.rack for host in everybody}
        self._sizes = {host.name: len(host.disks) for host in everybody}
        self._shared: dict[str, Counter[str]] = {host: Counter() for host in self._racks}
        self._held: dict[DiskSlot, dict[int, None]] = {disk: {} for disk in {*disks, *self.targets}}
        for chain, group in enumerate(self._groups):
            for disk in group:
                self._count(chain, disk, 1)

    def share(self, disks: int) -> int:
        """What so many disks should hold at least."""
        return self._total * disks // self._disk_count

    def find_donor(self, disk: DiskSlot, joining: Collection[str]) -> tuple[int, DiskSlot] | None:
        """A chain, and which of its disks to take out for `disk`: of a host with most, in a chain of those that share
        least with the host of `disk`."""
        best: tuple[float, float, int, int, DiskSlot] | None = None
        # Shared evenly, each of the others would have this much: no need to look for less.
        level = self._shared[disk.host].total() / self._sizes[disk.host] / self._disk_count
        for host in sorted(self.hosts, key=lambda host: -self._load(host)):
            if host.name == disk.host or self._load(host) <= self.share(len(host.disks)) / len(host.disks):
                continue
            for donor in host.disks:
                if donor.node in joining:
                    continue
                for chain in self._held[donor]:
                    if not self._fits(disk, chain, donor):
                        continue
                    key = (*self._sharing(disk.host, chain, donor), -self.targets[donor], chain, donor)
                    best = key if best is None or key[:4] < best[:4] else best
            if best is not None and best[0] <= level:
                break
        return None if best is None else best[3:]

    def find_neighbour(self, disk: DiskSlot, host: Host, joining: Collection[str]) -> tuple[int, DiskSlot] | None:
        """A chain of the fullest other disk of `host`, if that has at least two targets more than `disk`."""
        donors = [donor for donor in host.disks if donor.node not in joining]
        donor = max(donors, key=lambda donor: self.targets[donor], default=disk)
        if self.targets[donor] < self.targets[disk] + 2:
            return None
        return min(self._held[donor]), donor

    def find_taker(self, chain: int, leaving: DiskSlot, closed: Collection[str]) -> DiskSlot | None:
        """The disk to take the place of `leaving`: in another rack, on a host with room, that shares least."""
        best: tuple[tuple[bool, int, float, float, float], list[DiskSlot]] | None = None
        taken = {disk.host for disk in self._groups[chain] if disk != leaving}
        for host in self.hosts:
            able = [disk for disk in host.disks if disk.node not in closed]
            if not able or host.name in taken:
                continue
            over = self._on_host[host.name] + 1 - self.share(len(host.disks))
            over_per_disk = max(0, -(-over // len(host.disks)))
            crowds = not self._fits(able[0], chain, leaving)
            key = (crowds, over_per_disk, *self._sharing(host.name, chain, leaving), self._load(host))
            best = (key, able) if best is None or key < best[0] else best
        return None if best is None else min(best[1], key=lambda disk: self.targets[disk])

    def shift(self, chain: int, leaves: DiskSlot, comes: DiskSlot) -> Shift:
        """Make a move."""
        group = self._groups[chain]
        self._count(chain, leaves, -1)
        group[group.index(leaves)] = comes
        self._count(chain, comes, 1)
        self.targets[leaves] -= 1
        self.targets[comes] += 1
        self._on_host[leaves.host] -= 1
        self._on_host[comes.host] += 1
        return Shift(chain, leaves, comes)

    def _count(self, chain: int, disk: DiskSlot, sign: int) -> None:
        """Count `disk` in or out of its chain."""
        if sign > 0:
            self._held[disk][chain] = None
        else:
            del self._held[disk][chain]
        for other in self._groups[chain]:
            if other.host != disk.host:
                self._shared[disk.host][other.host] += sign
                self._shared[other.host][disk.host] += sign

    def _load(self, host: Host) -> float:
        """Targets per disk."""
        return self._on_host[host.name] / len(host.disks)

    def _fits(self, disk: DiskSlot, chain: int, leaving: DiskSlot) -> bool:
        """True if `disk` is on no host of the chain, and its rack is not more often there than a rack was."""
        group = self._groups[chain]
        others = [other for other in group if other != leaving]
        if any(other.host == disk.host for other in others):
            return False
        most = max(Counter(self._racks[other.host] for other in group).values())
        return sum(self._racks[other.host] == self._racks[disk.host] for other in others) < most

    def _sharing(self, host: str, chain: int, leaving: DiskSlot) -> tuple[float, float]:
        """What `host` shares with those of the chain that stay, per disk of both: the most now, the sum with it."""
        others = [other.host for other in self._groups[chain] if other != leaving]
        sizes = [self._sizes[host] * self._sizes[other] for other in others]
        counts = [self._shared[host][other] for other in others]
        most = max((count / size for count, size in zip(counts, sizes, strict=True)), default=0.0)
        return most, sum((count + 1) / size for count, size in zip(counts, sizes, strict=True))
