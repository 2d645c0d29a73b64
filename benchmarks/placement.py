"""How evenly a lost node is recovered: the worst peer load against the bound, and what it takes to place the chains.

Nothing here depends on the disk; only the rows in seconds depend on the machine. There is no peer: 3FS's solver, an
integer program, is told to take hours at 127 nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emberfs.manager.chains import DiskSlot, Group
from emberfs.manager.placement import place
from emberfs.manager.placement_moves import apply_shifts, shifts_to_empty, shifts_to_fill
from emberfs.manager.placement_report import placement_report

from .runner import Row, verify

REPLICAS = 3
TARGETS = 6
"""On a disk."""
REGULAR_GOAL = 1.0
REGULAR_S_GOAL = 10.0
IRREGULAR_GOAL = 1.2
MOVED_GOAL = 1.2
BOUND = "bound"
FAIR = "fair share"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Which clusters."""

    regular: tuple[int, int] = (200, 16)
    """(nodes, disks of each): the one with goals."""
    larger: tuple[int, ...] = (500, 1000)
    """Nodes of clusters that are for information."""
    irregular: tuple[int, int] = (37, 6)
    """(nodes, racks); they have 4 to 16 disks."""


FULL = Size()
QUICK = Size(larger=(500,))


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    nodes, disks = size.regular
    rows = _placed(f"{nodes} nodes x {disks} disks", _disks([disks] * nodes), REGULAR_GOAL, REGULAR_S_GOAL)
    for larger in size.larger:
        rows += _placed(f"{larger:,} nodes x {disks} disks", _disks([disks] * larger), None, None)
    nodes, racks = size.irregular
    sizes = [4 + node * 5 % 13 for node in range(nodes)]
    irregular = _disks(sizes, racks)
    rows += _placed(f"{nodes} nodes of 4 to 16 disks, {racks} racks", irregular, IRREGULAR_GOAL, None)
    rows += _placed(f"{nodes} nodes of 4 to 16 disks, no racks", _disks(sizes), IRREGULAR_GOAL, None)
    rows += _changed("regular", _disks([size.regular[1]] * (size.regular[0] + 1)))
    return rows + _changed("irregular", irregular)


def _disks(sizes: Sequence[int], racks: int = 0) -> list[DiskSlot]:
    """`sizes[i]` disks on node i; the racks take turns."""
    return [
        DiskSlot(f"{node:04}-{disk:02}", f"{node:04}", f"{node % racks}" if racks else "")
        for node, count in enumerate(sizes)
        for disk in range(count)
    ]


def _placed(name: str, disks: Sequence[DiskSlot], goal: float | None, goal_s: float | None) -> list[Row]:
    start_s = time.perf_counter()
    groups = place(disks, REPLICAS, TARGETS)
    took_s = time.perf_counter() - start_s
    _verify_apart(groups)
    return [
        _load_row(f"{name}: worst peer load, chains", groups, goal),
        Row(row=f"{name}: to place, s", ours=took_s, goal=goal_s, at_most=True),
    ]


def _changed(name: str, disks: Sequence[DiskSlot]) -> list[Row]:
    """The last node joins the others; then another one is drained."""
    newcomer, leaver = disks[-1].host, disks[0].host
    joining = {disk.node for disk in disks if disk.host == newcomer}
    groups = place([disk for disk in disks if disk.host != newcomer], REPLICAS, TARGETS)
    shifts = list(shifts_to_fill(groups, disks, joining))
    grown = apply_shifts(groups, shifts)
    fair = len(groups) * REPLICAS * len(joining) / len(disks)
    drains = list(shifts_to_empty(grown, [disk for disk in disks if disk.host != leaver]))
    drained = apply_shifts(grown, drains)
    held = sum(disk.host == leaver for group in grown for disk in group)
    for after in (grown, drained):
        _verify_apart(after)
    verify(not any(disk.host == leaver for group in drained for disk in group), "a drained node still has targets")
    return [
        _ratio_row(f"{name}, a node joins: targets moved", len(shifts), FAIR, fair, MOVED_GOAL),
        _load_row(f"{name}, a node joins: worst peer load, chains", grown, None),
        _ratio_row(f"{name}, a node is drained: targets moved", len(drains), "its own", held, 1.0),
        _load_row(f"{name}, a node is drained: worst peer load, chains", drained, None),
    ]


def _load_row(name: str, groups: Sequence[Group], goal: float | None) -> Row:
    report = placement_report(groups)
    return _ratio_row(name, report.peer_load_max, BOUND, report.bound, goal)


def _ratio_row(name: str, ours: float, baseline: str, other: float, goal: float | None) -> Row:
    return Row(
        row=name,
        ours=ours,
        peers={baseline: other},
        ratio=ours / other,
        baseline=baseline,
        goal=goal,
        at_most=True,
    )


def _verify_apart(groups: Sequence[Group]) -> None:
    verify(all(len({disk.host for disk in group}) == REPLICAS for group in groups), "two replicas on one node")
