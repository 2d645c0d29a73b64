"""Placement: every chain on different hosts and racks, every disk with its targets, every pair of hosts with its share.

Run: pytest tests/fs/test_placement.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import pytest
from click.testing import CliRunner
from emberfs.cli.cluster import cluster
from emberfs.cli.placement import placement
from emberfs.errors import LimitExceeded
from emberfs.manager.chains import DiskSlot, Group
from emberfs.manager.placement import place
from emberfs.manager.placement_families import Shape, find_family
from emberfs.manager.placement_report import groups_of, placement_report
from emberfs.routing import Chain, ChainTarget, Node, Role, Routing, Target, TargetState
from hypothesis import given
from hypothesis import strategies as st


def disks_of(sizes: Sequence[int], racks: int = 0) -> list[DiskSlot]:
    """`sizes[i]` disks on host i; the racks take turns."""
    return [
        DiskSlot(f"h{host}-{disk}", f"h{host}", f"r{host % racks}" if racks else "")
        for host, count in enumerate(sizes)
        for disk in range(count)
    ]


def load_of(groups: Sequence[Group]) -> tuple[int, int]:
    report = placement_report(groups)
    return report.peer_load_max, report.bound


# ---- regular clusters


@pytest.mark.parametrize(
    ("hosts", "disks", "targets", "replicas", "load"),
    [
        (200, 16, 6, 3, 1),
        (193, 16, 6, 3, 1),  # A Steiner triple system: every pair exactly once.
        (5, 16, 6, 3, 48),
        (7, 1, 3, 3, 1),  # The Fano plane.
        (13, 1, 4, 4, 1),  # The projective plane of order 3.
        (100, 16, 6, 2, 1),
        (60, 16, 6, 4, 5),
        (3, 1, 6, 3, 6),
        (2, 4, 6, 1, 0),
        (1, 3, 6, 1, 0),
    ],
)
def test_a_regular_cluster_reaches_the_bound(hosts: int, disks: int, targets: int, replicas: int, load: int) -> None:
    groups = place(disks_of([disks] * hosts), replicas, targets)
    bound = -(-disks * targets * (replicas - 1) // (hosts - 1)) if hosts > 1 else 0
    assert load_of(groups) == (load, bound)
    assert load == bound
    assert set(Counter(disk for group in groups for disk in group).values()) == {targets}


def test_racks_are_kept_apart_at_the_bound_of_the_other_racks() -> None:
    report = placement_report(place(disks_of([16] * 60, racks=6), 3, 6))
    assert report.rack_replicas_max == 1
    assert (report.peer_load_max, report.bound) == (4, 4), "96 x 2 / 50, rounded up"


def test_two_racks_hold_three_replicas_two_and_one() -> None:
    assert placement_report(place(disks_of([4] * 8, racks=2), 3, 6)).rack_replicas_max == 2


def test_targets_that_make_no_whole_chain_stay_unused() -> None:
    report = placement_report(place(disks_of([1] * 7), 3, 4))
    assert (report.chains, report.disk_targets) == (9, (3, 4)), "28 targets are 9 chains of 3 and one more"


def test_heads_and_tails_are_spread_over_the_disks() -> None:
    groups = place(disks_of([16] * 20), 3, 6)
    for end in (0, -1):
        ends = Counter(group[end] for group in groups)
        assert len(ends) == 320
        assert max(ends.values()) <= 4, "2 each on average"


# ---- irregular clusters


@pytest.mark.parametrize(("racks", "replicas"), [(0, 3), (6, 3), (6, 2), (9, 4)])
def test_an_irregular_cluster_comes_near_its_bound(racks: int, replicas: int) -> None:
    report = placement_report(place(disks_of([4 + host * 5 % 13 for host in range(37)], racks), replicas, 6))
    assert report.ratio <= 1.2
    assert report.rack_replicas_max == 1


def test_uneven_racks_share_chains_where_keeping_them_apart_would_waste_targets() -> None:
    uneven = [DiskSlot(f"h{host}", f"h{host}", "big" if host < 20 else f"small{host % 2}") for host in range(24)]
    report = placement_report(place(uneven, 3, 6))
    assert report.rack_replicas_max > 1
    assert report.chains == 24 * 6 // 3


def test_a_host_that_is_larger_than_all_others_is_not_filled() -> None:
    groups = place(disks_of([100, 1, 1, 1]), 2, 6)
    assert len(groups) == 18, "each of the 18 targets elsewhere has a partner there"


@pytest.mark.parametrize(("replicas", "targets"), [(0, 6), (3, 0)])
def test_counts_below_one_are_refused(replicas: int, targets: int) -> None:
    with pytest.raises(LimitExceeded, match="at least 1"):
        place(disks_of([1] * 5), replicas, targets)


def test_too_few_hosts_are_refused_with_what_to_change() -> None:
    with pytest.raises(LimitExceeded, match="2 are there: add 1, or ask for 2 replicas"):
        place(disks_of([16, 16]), 3, 6)
    with pytest.raises(LimitExceeded, match="0 are there"):
        place([], 3, 6)


# ---- every shape


@given(st.lists(st.integers(1, 5), min_size=1, max_size=14), st.integers(0, 5), st.integers(1, 5), st.integers(1, 7))
def test_whatever_the_shape(sizes: list[int], racks: int, replicas: int, targets: int) -> None:
    disks = disks_of(sizes, racks)
    if len(sizes) < replicas:
        with pytest.raises(LimitExceeded):
            place(disks, replicas, targets)
        return
    groups = place(disks, replicas, targets)
    assert all(len({disk.host for disk in group}) == len(group) == replicas for group in groups)
    used = Counter(disk for group in groups for disk in group)
    assert set(used) <= set(disks)
    assert max(used.values()) <= targets
    for host in {disk.host for disk in disks}:
        levels = [used[disk] for disk in disks if disk.host == host]
        assert max(levels) - min(levels) <= 1, "a host's disks are filled alike"
    if len(set(sizes)) == 1 and not racks:
        assert len(disks) * targets - len(groups) * replicas < replicas
        assert max(used.values()) - min(used[disk] for disk in disks) <= 1
    report = placement_report(groups)
    assert report.peer_load_max <= max(2 * report.bound, report.bound + 2)
    assert place(disks[::-1], replicas, targets) == groups, "the same, in whatever order the disks are named"


@given(st.integers(3, 30), st.integers(1, 4), st.integers(1, 6))
def test_racks_of_equal_size_are_always_kept_apart(per_rack: int, disks: int, targets: int) -> None:
    report = placement_report(place(disks_of([disks] * per_rack * 4, racks=4), 3, targets))
    assert report.rack_replicas_max == 1


# ---- parts


def test_the_blocks_of_a_family_hold_each_difference_equally_often() -> None:
    family = find_family(Shape(hosts=13, replicas=4, blocks=1, load_max=1), steps_max=1000)
    assert family is not None
    (block,) = family
    assert sorted((one - other) % 13 for one in block for other in block if one != other) == list(range(1, 13))


def test_there_is_no_family_where_the_differences_do_not_suffice() -> None:
    assert find_family(Shape(hosts=13, replicas=4, blocks=2, load_max=1), steps_max=1000) is None


def test_a_report_names_who_would_suffer_most() -> None:
    a, b, c, d = disks_of([1] * 4)
    report = placement_report([(a, b), (b, a), (c, d), (a, b), (d, c)])
    assert (report.peer_load_max, report.bound, report.chains, report.disk_targets) == (2, 1, 5, (2, 3)), "c and d"
    assert {spread.host: (spread.targets, spread.peers, spread.peer_load_max) for spread in report.hosts} == {
        **dict.fromkeys(("h0", "h1"), (3, 1, 3)),
        **dict.fromkeys(("h2", "h3"), (2, 1, 2)),
    }


def test_a_report_on_nothing() -> None:
    report = placement_report([])
    assert (report.chains, report.ratio, report.hosts) == (0, 1.0, ())


def test_the_groups_of_a_routing_leave_out_what_leaves() -> None:
    nodes = tuple(Node(name, Role.STORAGE, "", b"", host=f"host of {name}", rack="r") for name in "abc")
    targets = tuple(Target(node.name.encode() * 16, node.name, 1) for node in nodes)
    places = tuple(
        ChainTarget(target.id, TargetState.SERVING, leaving=number == 1) for number, target in enumerate(targets)
    )
    groups = groups_of(Routing(1, nodes, targets, (Chain(1, 1, places, 2),)), same_host=False)
    assert groups == [(DiskSlot("a", "host of a", "r"), DiskSlot("c", "host of c", "r"))]


# ---- the command


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(placement, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_a_shape_can_be_tried_from_the_command_line() -> None:
    output = run("--nodes", "20", "--disks", "16", "--racks", "4")
    assert "640 of 3 replicas, at most 1 of a chain in a rack" in output
    assert "6 to 6 on a disk, 0 unused" in output


def test_the_command_prints_json() -> None:
    row = json.loads(run("--nodes", "200", "--disks", "16", "--targets", "6", "--replicas", "3", "--json"))
    assert row == {
        "chains": 6400,
        "disks": 3200,
        "disk_targets": [6, 6],
        "rack_replicas_max": 1,
        "peer_load_max": 1,
        "bound": 1,
        "ratio": 1.0,
        "unused_targets": 0,
    }


def test_the_command_says_what_to_change() -> None:
    assert "add 1, or ask for 2 replicas" in run("--nodes", "2", code=2)
    assert "at most 8 replicas" in run("--nodes", "20", "--replicas", "9", code=2)


def test_it_is_a_command_of_cluster() -> None:
    assert cluster.commands["placement"] is placement
