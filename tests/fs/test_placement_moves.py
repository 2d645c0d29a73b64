"""Moves when a host comes or goes: only what must move does, and what hosts share stays even.

Run: pytest tests/fs/test_placement_moves.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from emberfs.manager.chains import DiskSlot, Group
from emberfs.manager.placement import place
from emberfs.manager.placement_moves import apply_shifts, shifts_to_empty, shifts_to_fill
from emberfs.manager.placement_report import PlacementReport, placement_report

SHAPES = {
    "5 x 16": ([16] * 6, 0),
    "20 x 16": ([16] * 21, 0),
    "200 x 16": ([16] * 201, 0),
    "50 x 8 in 10 racks": ([8] * 51, 10),
    "37 of 4 to 16": ([4 + host * 5 % 13 for host in range(38)], 6),
    "one disk each": ([1] * 12, 0),
}


def disks_of(sizes: Sequence[int], racks: int = 0) -> list[DiskSlot]:
    """`sizes[i]` disks on host i; the racks take turns."""
    return [
        DiskSlot(f"h{host:03}-{disk:02}", f"h{host:03}", f"r{host % racks}" if racks else "")
        for host, count in enumerate(sizes)
        for disk in range(count)
    ]


def check(groups: Sequence[Group], disks: Sequence[DiskSlot], before: PlacementReport) -> None:
    """What holds after one host came or went."""
    assert all(len({disk.host for disk in group}) == 3 for group in groups)
    report = placement_report(groups)
    assert report.rack_replicas_max <= before.rack_replicas_max
    assert all(spread.peer_load_max <= spread.bound + 2 for spread in report.hosts)
    used = Counter(disk for group in groups for disk in group)
    mean = used.total() / len(disks)
    assert set(used) <= set(disks)
    assert max(used.values()) <= -(-mean // 1) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_host_that_joins_gets_its_share_and_nothing_else_moves(shape: str) -> None:
    disks = disks_of(*SHAPES[shape])
    joining = {disk.node for disk in disks if disk.host == disks[-1].host}
    groups = place([disk for disk in disks if disk.node not in joining], 3, 6)
    shifts = list(shifts_to_fill(groups, disks, joining))
    fair = 3 * len(groups) * len(joining) / len(disks)
    assert fair - 1 < len(shifts) <= fair
    assert {shift.comes.node for shift in shifts} == joining
    assert not any(shift.leaves.node in joining for shift in shifts)
    grown = apply_shifts(groups, shifts)
    check(grown, disks, placement_report(groups))
    assert list(shifts_to_fill(grown, disks, joining)) == [], "it has its share now"
    levels = Counter(disk.node for group in grown for disk in group if disk.node in joining).values()
    assert max(levels) - min(levels) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_host_that_is_drained_loses_what_it_had_and_nothing_else_moves(shape: str) -> None:
    disks = disks_of(*SHAPES[shape])
    groups = place(disks, 3, 6)
    rest = [disk for disk in disks if disk.host != "h003"]
    shifts = list(shifts_to_empty(groups, rest))
    held = [(chain, disk) for chain, group in enumerate(groups) for disk in group if disk.host == "h003"]
    assert [(shift.chain, shift.leaves) for shift in shifts] == held
    check(apply_shifts(groups, shifts), rest, placement_report(groups))


def test_the_same_moves_each_time() -> None:
    disks = disks_of([4] * 9)
    groups = place(disks, 3, 6)
    rest = [disk for disk in disks if disk.host != "h003"]
    assert list(shifts_to_empty(groups, rest)) == list(shifts_to_empty(groups, rest[::-1]))


def test_what_has_no_place_to_go_stays() -> None:
    disks = disks_of([2] * 3)
    groups = place(disks, 3, 6)
    assert list(shifts_to_empty(groups, disks[:4])) == []


def test_two_disks_that_join_a_host_take_from_other_hosts() -> None:
    disks = disks_of([4] * 6)
    groups = place([disk for disk in disks if disk.node not in ("h002-02", "h002-03")], 3, 6)
    shifts = list(shifts_to_fill(groups, disks, {"h002-02", "h002-03"}))
    assert len(shifts) == 10, "the fair share of 4 disks is 22 of 132, and it has 12"
    assert not any(shift.leaves.host == "h002" for shift in shifts)
    check(apply_shifts(groups, shifts), disks, placement_report(groups))


def test_a_disk_on_one_of_as_many_hosts_as_replicas_takes_from_its_own_host() -> None:
    disks = disks_of([3] * 3)
    joining = disks[-1].node
    groups = place([disk for disk in disks if disk != disks[-1]], 3, 6)
    # Only as many chains as the smallest host had targets: 12 on each host.
    grown = apply_shifts(groups, shifts_to_fill(groups, disks, {joining}))
    assert sorted(Counter(disk.node for group in grown for disk in group if disk.host == "h002").values()) == [4, 4, 4]
    assert [{disk.host for disk in group} for group in grown] == [{"h000", "h001", "h002"}] * 12


def test_a_closed_disk_keeps_what_it_has_and_gets_nothing() -> None:
    disks = disks_of([4] * 8)
    groups = place(disks, 3, 6)
    rest = [disk for disk in disks if disk.host != "h003"]
    closed = {"h000-00", *(disk.node for disk in disks if disk.host == "h005")}
    shifts = list(shifts_to_empty(groups, rest, closed))
    assert {shift.leaves.host for shift in shifts} == {"h003"}
    assert not any(shift.comes.node in closed for shift in shifts)
    assert any(shift.comes.host == "h000" for shift in shifts)
