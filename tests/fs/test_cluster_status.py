"""What `cluster status` makes of a manager's answer: problems, and hints at what could be better."""

from __future__ import annotations

import pytest
from emberfs.cluster.space import space_of
from emberfs.cluster.status import summarise
from emberfs.errors import Unavailable
from emberfs.messages import NodeStatus, StatusReply, TargetReport
from emberfs.room import room_per_target
from emberfs.routing import Chain, ChainTarget, LocalState, Node, Role, Routing, Target, TargetState
from msgspec.structs import replace

NAMES = "abcd"


def status(chains: list[str], *, same_host: bool = False, used_bytes: int = 10) -> StatusReply:
    """Chains that serve, each of a target on every node that it names, on disks of 100 MiB."""
    nodes = [Node(name, Role.STORAGE, f"{name}:1", b"", host="one" if same_host else f"host-{name}") for name in NAMES]
    targets, made = [], []
    for number, names in enumerate(chains, 1):
        ids = [f"{number}{name}".encode() for name in names]
        targets += [Target(target, name, number) for target, name in zip(ids, names, strict=True)]
        places = tuple(ChainTarget(target, TargetState.SERVING) for target in ids)
        made.append(Chain(number, 1, places, len(places)))
    routing = Routing(7, tuple(nodes), tuple(targets), tuple(made))
    report = TargetReport(b"", b"", LocalState.UP_TO_DATE, 0, used_bytes << 20, (100 - used_bytes) << 20)
    heard = [NodeStatus(node, True, 0.1, [report]) for node in nodes]
    return StatusReply("m:1", routing, heard, 0, same_host)


def test_an_even_cluster_has_nothing_to_say() -> None:
    facts = summarise(status(["ab", "cd", "ac", "bd", "ad", "bc"]))
    assert (facts["problems"], facts["hints"]) == ([], [])
    assert facts["placement"]["peer_load_max"] == facts["placement"]["bound"] == 1


def test_hosts_that_share_too_much_are_a_hint_and_no_problem() -> None:
    facts = summarise(status(["ab"] * 4 + ["cd"] * 4))
    assert facts["problems"] == []
    assert facts["placement"] == {"host": "host-a", "peer_load_max": 4, "bound": 2}
    (hint,) = facts["hints"]
    assert "if host-a is lost, one other machine has to bring back 4 chains" in hint


def test_one_over_the_bound_is_no_hint() -> None:
    facts = summarise(status(["ab", "ab", "cd", "cd"]))
    assert (facts["placement"]["peer_load_max"], facts["placement"]["bound"]) == (2, 1)
    assert facts["hints"] == []


def test_on_one_host_its_nodes_are_what_can_be_lost() -> None:
    facts = summarise(status(["ab"] * 4 + ["cd"] * 4, same_host=True))
    assert facts["placement"] == {"host": "a", "peer_load_max": 4, "bound": 2}


def test_a_lost_chain_names_the_node_whose_disk_would_bring_it_back() -> None:
    reply = status(["ab", "cd"])
    first, *others = reply.routing.chains
    a, b = first.targets
    targets = (replace(a, state=TargetState.LASTSRV, foreign=True), replace(b, state=TargetState.OFFLINE))
    reply.routing = replace(reply.routing, chains=(replace(first, targets=targets), *others))
    (problem,) = summarise(reply)["problems"]
    assert "LOST, unless a disk comes back: 3161 on a had every" in problem
    assert "mount it" in problem and "accept-loss" in problem


def test_no_chains_yet_is_a_problem_and_no_placement() -> None:
    facts = summarise(status([]))
    assert facts["placement"] is None
    assert facts["problems"] == ["there are no chains yet: nothing can be stored before `emberline cluster setup`"]


def test_a_disk_that_gets_full_is_a_hint() -> None:
    hints = summarise(status(["ab", "cd", "ac", "bd", "ad", "bc"], used_bytes=95))["hints"]
    assert hints == [f"the disk of {name} gets full: 5 MiB are left" for name in NAMES]


def test_damage_that_could_not_be_mended_is_a_problem() -> None:
    reply = status(["ab", "cd", "ac", "bd", "ad", "bc"])
    (report,) = reply.nodes[1].reports
    reply.nodes[1] = NodeStatus(reply.nodes[1].node, True, 0.1, [replace(report, unmended=3)])
    facts = summarise(reply)
    assert facts["problems"] == [
        "b holds 3 damaged chunks that no other replica could mend: `emberline fs scrub` names the files"
    ]
    assert [server["unmended_chunks"] for server in facts["servers"]] == [0, 3, 0, 0]


def of(reply: StatusReply, *reports: TargetReport, alive: bool = True, node: str = "b") -> StatusReply:
    """The same, but one node says this."""
    nodes = [replace(n, reports=list(reports), alive=alive) if n.node.name == node else n for n in reply.nodes]
    return replace(reply, nodes=nodes)


def report(free: int, idle: int = 0, state: LocalState = LocalState.UP_TO_DATE) -> TargetReport:
    return TargetReport(b"", b"", state, 0, 10 << 20, free << 20, idle_bytes=idle << 20)


def test_free_blocks_are_room_for_new_data_of_their_own_target() -> None:
    reply = status(["ab", "cd", "ac", "bd"], used_bytes=95)
    assert any("gets full: 5 MiB are left" in hint for hint in summarise(reply)["hints"])
    assert space_of(reply)["free_bytes"] == 4 * 5 << 20, "each report counts for one target"
    for name in NAMES:
        reply = of(reply, report(5, 20), report(5, 20), node=name)
    assert not any("full" in hint for hint in summarise(reply)["hints"])
    space = space_of(reply)
    assert (space["free_bytes"], space["disk_free_bytes"]) == (90 << 20, 4 * 5 << 20), "they share the disk"
    assert space_of(of(reply, report(5, 40), report(5, 0)))["free_bytes"] == 4 * 5 << 20, "the second is full first"
    assert space_of(of(reply, report(60, 40), report(60, 0)))["free_bytes"] == 90 << 20


def test_who_is_not_heard_of_says_nothing_of_the_room() -> None:
    reply = status(["ab", "cd"], used_bytes=50)
    expected = space_of(reply)["free_bytes"]
    assert expected == 2 * 50 << 20
    assert space_of(of(reply, report(50), report(0, state=LocalState.OFFLINE)))["free_bytes"] == expected
    assert space_of(of(reply, report(0), alive=False))["free_bytes"] == expected
    assert space_of(of(reply))["free_bytes"] == expected
    nobody = replace(reply, nodes=[replace(node, reports=[]) for node in reply.nodes])
    with pytest.raises(Unavailable, match="no storage server has told"):
        space_of(nobody)


@pytest.mark.parametrize(
    ("free", "idle", "room"),
    [(100, [0, 0], 50), (100, [50, 0], 75), (10, [50, 0], 10), (0, [50, 0], 0), (30, [10, 20, 90], 30),
     (100, [10, 20, 90], 65), (5, [7], 12), (0, [9, 9], 9)],
)  # fmt: skip
def test_what_each_target_of_a_disk_may_take(free: int, idle: list[int], room: int) -> None:
    assert room_per_target(free, idle) == room
    assert sum(max(room - each, 0) for each in idle) <= free
    assert sum(max(room + 1 - each, 0) for each in idle) > free
