"""The state table of docs/replication.md, cell by cell, and what it must guarantee along every history."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from emberfs.errors import Conflict, NotFound
from emberfs.manager.states import accept_loss, counts_as, describe, next_chain
from emberfs.messages import TargetReport
from emberfs.routing import Chain, ChainTarget, LocalState, TargetState
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

PAGE = Path(__file__).parents[2] / "docs" / "replication.md"
VERSION = 7
REPORTS = {
    "up-to-date": LocalState.UP_TO_DATE,
    "online": LocalState.ONLINE,
    "fresh": LocalState.FRESH,
    "offline": LocalState.OFFLINE,
}


def target(name: str, state: TargetState, *, leaving: bool = False) -> ChainTarget:
    return ChainTarget(name.encode() * 16, state, b"g" + name.encode(), leaving)


def report(of: ChainTarget, state: LocalState) -> TargetReport:
    generation = b"another" if state == LocalState.FRESH else of.generation
    return TargetReport(of.target, generation, state, VERSION)


def chain(*targets: ChainTarget, replicas: int = 3) -> Chain:
    return Chain(1, VERSION, tuple(sorted(targets, key=lambda each: each.state)), replicas)


def state_after(after: Chain, of: ChainTarget) -> TargetState:
    return next(each.state for each in after.targets if each.target == of.target)


# ---- the table


def table() -> dict[tuple[TargetState, LocalState], str]:
    """The page's table: (public, report) -> the text of the cell."""
    cells = {}
    lines = iter(PAGE.read_text().split("## The state table")[1].splitlines())
    header = next(line for line in lines if line.startswith("| public"))
    columns = [REPORTS[name.strip()] for name in header.split("|")[2:-1]]
    next(lines)
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        public, *texts = [text.strip() for text in line.split("|")[1:-1]]
        texts = [texts[index - 1] if text == "the same" else text for index, text in enumerate(texts)]
        texts = [texts[index - 1] if text == "the same" else text for index, text in enumerate(texts)]
        cells.update({(TargetState[public.upper()], column): text for column, text in zip(columns, texts, strict=True)})
    return cells


def expected(cell: str, *, stays: bool, syncing: bool) -> TargetState:
    """Read a cell: rules "condition: state" before "else: state", the first that holds."""
    holds = {"S": stays, "S and not Y": stays and not syncing, "else": True}
    cell = re.sub(r" \(.*?\)", "", cell)
    for rule in cell.split(" · "):
        condition, _, state = rule.rpartition(": ")
        if not condition or holds[condition]:
            return TargetState[state.upper()]
    raise AssertionError(cell)


@pytest.mark.parametrize(("public", "heard"), list(itertools.product(TargetState, LocalState)))
def test_every_cell_of_the_page_is_what_the_code_does(public: TargetState, heard: LocalState) -> None:
    cell = table()[public, heard]
    me = target("m", public)
    for states in itertools.product(TargetState, repeat=2):
        for reports in itertools.product(LocalState, repeat=2):
            others = [target(name, state) for name, state in zip("ab", states, strict=True)]
            neighbours = list(zip(others, reports, strict=True))
            if any(other.state == TargetState.WAITING for other in others) and public == TargetState.WAITING:
                continue  # Which of several waiting targets syncs is a rule of its own, below.
            returns = any(
                other.state == TargetState.LASTSRV and heard_other in (LocalState.UP_TO_DATE, LocalState.ONLINE)
                for other, heard_other in neighbours
            )
            if public == TargetState.LASTSRV and heard in (LocalState.OFFLINE, LocalState.FRESH) and returns:
                continue  # So is this.
            stays = any(
                other.state == TargetState.SERVING and heard_other in (LocalState.UP_TO_DATE, LocalState.ONLINE)
                for other, heard_other in neighbours
            )
            syncing = any(other.state == TargetState.SYNCING for other in others)
            before = chain(me, *others)
            said = {me.target: report(me, heard)} | {each.target: report(each, what) for each, what in neighbours}
            after = next_chain(before, said)
            assert state_after(after, me) == expected(cell, stays=stays, syncing=syncing), (before, said)
            assert [each.state for each in after.targets] == sorted(each.state for each in after.targets)
            (mine,) = [each for each in after.targets if each.target == me.target]
            assert mine.foreign == (mine.state == TargetState.LASTSRV and heard == LocalState.FRESH)


def test_every_cell_of_the_page_was_read() -> None:
    assert set(table()) == set(itertools.product(TargetState, LocalState))


def test_a_chain_that_does_not_change_is_the_same_object() -> None:
    a, b = target("a", TargetState.SERVING), target("b", TargetState.OFFLINE)
    before = chain(a, b)
    assert next_chain(before, {a.target: report(a, LocalState.UP_TO_DATE)}) is before


# ---- reports


def test_a_report_is_worth_what_the_chain_trusted() -> None:
    me = target("m", TargetState.SYNCING)
    before = chain(me, target("a", TargetState.SERVING))

    def says(state: LocalState, *, generation: bytes = me.generation, synced: int = 0) -> LocalState:
        return counts_as(before, me, TargetReport(me.target, generation, state, synced))

    assert counts_as(before, me, None) == LocalState.OFFLINE
    assert says(LocalState.OFFLINE) == LocalState.OFFLINE
    assert says(LocalState.UP_TO_DATE, synced=VERSION) == LocalState.UP_TO_DATE
    assert says(LocalState.UP_TO_DATE, synced=VERSION - 1) == LocalState.ONLINE
    assert says(LocalState.UP_TO_DATE, synced=VERSION, generation=b"other") == LocalState.FRESH
    assert says(LocalState.FRESH) == LocalState.ONLINE, "it became trusted and does not know yet"
    waiting = replace(me, state=TargetState.WAITING)
    claim = TargetReport(me.target, me.generation, LocalState.UP_TO_DATE, VERSION)
    assert counts_as(chain(waiting), waiting, claim) == LocalState.ONLINE


def test_the_generation_is_taken_when_a_target_begins_to_sync() -> None:
    a, b = target("a", TargetState.SERVING), target("b", TargetState.WAITING)
    after = next_chain(chain(a, b), {each.target: report(each, LocalState.FRESH) for each in (b,)} | online(a))
    assert [(each.state, each.generation) for each in after.targets] == [
        (TargetState.SERVING, a.generation),
        (TargetState.SYNCING, b"another"),
    ]


def online(*targets: ChainTarget) -> dict[bytes, TargetReport]:
    return {each.target: report(each, LocalState.ONLINE) for each in targets}


# ---- several at once


def test_all_that_go_down_together_are_last_and_return_together_in_their_order() -> None:
    serving = [target(name, TargetState.SERVING) for name in "abc"]
    down = next_chain(chain(*serving), {})
    assert [each.state for each in down.targets] == [TargetState.LASTSRV] * 3
    up = next_chain(down, online(serving[2], serving[0]))
    assert [(each.target[:1], each.state) for each in up.targets] == [
        (b"a", TargetState.SERVING),
        (b"c", TargetState.SERVING),
        (b"b", TargetState.OFFLINE),
    ]


def test_one_target_syncs_at_a_time_and_those_that_leave_come_last() -> None:
    a = target("a", TargetState.SERVING)
    leaver = target("b", TargetState.WAITING, leaving=True)
    others = [target(name, TargetState.WAITING) for name in "cd"]
    after = next_chain(chain(a, leaver, *others), online(a, leaver, *others))
    assert [(each.target[:1], each.state) for each in after.targets] == [
        (b"a", TargetState.SERVING),
        (b"c", TargetState.SYNCING),
        (b"b", TargetState.WAITING),
        (b"d", TargetState.WAITING),
    ]
    assert next_chain(after, online(a, leaver, *others)) is after


# ---- new, leaving and lost chains


def test_a_new_chain_begins_when_all_its_targets_have_reported() -> None:
    targets = [replace(target(name, TargetState.OFFLINE), generation=b"") for name in "ab"]
    planned = Chain(1, 0, tuple(targets), 2)
    fresh = {each.target: TargetReport(each.target, b"new" + each.target, LocalState.FRESH) for each in targets}
    assert not planned.is_lost
    assert next_chain(planned, dict(list(fresh.items())[:1])) is planned
    begun = next_chain(planned, fresh)
    assert (begun.version, len(begun.serving)) == (1, 2)
    assert [each.generation for each in begun.targets] == [b"new" + each.target for each in targets]
    assert next_chain(begun, fresh) is begun, "the nodes have not heard of it yet"


def test_a_leaving_target_goes_when_enough_others_serve_and_it_has_stopped() -> None:
    a, b = target("a", TargetState.SERVING), target("b", TargetState.SERVING)
    leaver = target("c", TargetState.SERVING, leaving=True)
    ready = chain(leaver, a, b, replicas=2)
    assert ready.may_leave(leaver.target) and not ready.may_leave(a.target)
    assert next_chain(ready, online(leaver, a, b)) is ready, "its lease may be valid: it must stop first"
    assert next_chain(ready, online(a, b)).targets == (a, b)
    needed = chain(leaver, a, replicas=2)
    assert not needed.may_leave(leaver.target)
    assert len(next_chain(needed, online(a)).targets) == 2


@pytest.mark.parametrize("before", [TargetState.SERVING, TargetState.LASTSRV])
def test_a_last_server_with_another_disk_loses_the_chain_until_the_loss_is_accepted(before: TargetState) -> None:
    a, b = target("a", before), target("b", TargetState.OFFLINE)
    lost = next_chain(chain(a, b), {a.target: report(a, LocalState.FRESH)} | online(b))
    assert lost.is_lost and "LOST" in describe(lost) and "mount it" in describe(lost)
    assert next_chain(next_chain(lost, online(b)), online(b)).is_lost, "it waits, whoever is back"
    with pytest.raises(Conflict, match="is not there"):
        accept_loss(lost, b.target, None)
    with pytest.raises(NotFound):
        accept_loss(lost, b"?", None)
    found = accept_loss(lost, b.target, report(b, LocalState.ONLINE))
    assert [each.target for each in found.serving] == [b.target] and found.version == lost.version + 1
    with pytest.raises(Conflict, match="has lost nothing"):
        accept_loss(found, a.target, report(a, LocalState.ONLINE))


def test_a_disk_that_was_not_mounted_brings_its_chain_back_when_it_is() -> None:
    a, b = target("a", TargetState.LASTSRV), target("b", TargetState.OFFLINE)
    unmounted = {a.target: report(a, LocalState.FRESH)} | online(b)
    lost = next_chain(chain(a, b), unmounted)
    waiting = next_chain(lost, unmounted)
    assert next_chain(waiting, unmounted) is waiting and waiting.is_lost
    restarting = next_chain(waiting, online(b))
    assert restarting.is_lost, "a node that is silent has not shown the disk again"
    back = next_chain(restarting, online(a, b))
    assert [each.target for each in back.serving] == [a.target] and not back.is_lost
    assert state_after(back, b) == TargetState.WAITING


def test_one_of_several_last_servers_with_another_disk_is_filled_again_once_another_serves() -> None:
    a, b = target("a", TargetState.LASTSRV), target("b", TargetState.LASTSRV)
    down = next_chain(chain(a, b), {a.target: report(a, LocalState.FRESH)})
    assert not down.is_lost and "as soon as one of 62626262 is back" in describe(down)
    said = {a.target: report(a, LocalState.FRESH)} | online(b)
    up = next_chain(down, said)
    assert [(each.target[:1], each.state, each.foreign) for each in up.targets] == [
        (b"b", TargetState.SERVING, False),
        (b"a", TargetState.OFFLINE, False),
    ]
    syncing = next_chain(next_chain(up, said), said)
    assert state_after(syncing, a) == TargetState.SYNCING


def test_accepting_a_loss_frees_a_chain_whose_last_servers_will_never_return() -> None:
    gone, b = target("a", TargetState.LASTSRV), target("b", TargetState.WAITING)
    found = accept_loss(chain(gone, b), b.target, report(b, LocalState.ONLINE))
    assert [each.state for each in found.targets] == [TargetState.SERVING, TargetState.OFFLINE]
    back = next_chain(found, online(gone, b))
    assert state_after(back, gone) == TargetState.WAITING, "what it has is old now"


def test_a_survivor_that_was_leaving_still_leaves() -> None:
    survivor, new = target("a", TargetState.OFFLINE, leaving=True), target("b", TargetState.OFFLINE)
    found = accept_loss(chain(survivor, new, replicas=1), survivor.target, report(survivor, LocalState.ONLINE))
    assert [each.leaving for each in found.serving] == [True], "else the chain would have one target too many for ever"


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ("SERVING SERVING", "2 of 3 replicas serve"),
        ("SERVING SYNCING", "1 of 3 replicas serve; 62626262 is brought up to date and will serve then"),
        ("SERVING WAITING", "62626262 waits for its turn"),
        ("SERVING OFFLINE", "62626262 is down"),
        ("LASTSRV OFFLINE", "serves again as soon as one of 61616161 is back"),
    ],
)
def test_a_chain_says_how_it_is(states: str, words: str) -> None:
    targets = [target(name, TargetState[state]) for name, state in zip("ab", states.split(), strict=True)]
    assert words in describe(chain(*targets))


# ---- along every history


class Replica:
    """A disk and the node in front of it."""

    def __init__(self, number: int) -> None:
        self.id = bytes([number]) * 16
        self.generation = b"0-%d" % number
        self.wipes = 0
        self.is_alive = True
        self.said: TargetReport | None = None
        self.writes: set[int] = set()
        """Acknowledged writes it has."""
        self.shelf: list[tuple[bytes, set[int]]] = []
        """Disks that were taken out, or are not mounted: (generation, writes)."""


class History:
    """A chain, its replicas, and all acknowledged writes."""

    def __init__(self, count: int, replicas: int) -> None:
        self.all = {replica.id: replica for replica in map(Replica, range(1, count + 1))}
        serving = list(self.all.values())[:replicas]
        targets = [ChainTarget(each.id, TargetState.SERVING, each.generation) for each in serving]
        targets += [ChainTarget(each.id, TargetState.OFFLINE) for each in self.all.values() if each not in serving]
        self.chain = Chain(1, 1, tuple(targets), replicas)
        self.written: set[int] = set()

    def truth(self, replica: Replica) -> TargetReport:
        place = next(each for each in self.chain.targets if each.target == replica.id)
        state, synced = LocalState.ONLINE, 0
        if place.generation == replica.generation and place.state == TargetState.SERVING:
            state = LocalState.UP_TO_DATE
        elif place.generation == replica.generation and place.state == TargetState.SYNCING:
            state, synced = LocalState.UP_TO_DATE, self.chain.version
        elif not replica.writes:
            state = LocalState.FRESH
        return TargetReport(replica.id, replica.generation, state, synced)

    def write(self) -> None:
        """A write is acknowledged if everybody it goes through is there; a syncing target syncs first."""
        members = [self.all[each.target] for each in self.chain.writing]
        trusted = all(self.all[each.target].generation == each.generation for each in self.chain.writing)
        if self.chain.serving and trusted and all(member.is_alive for member in members):
            self.written.add(len(self.written))
            for member in members:
                member.writes |= self.written

    def step(self) -> None:
        said = {replica.id: replica.said for replica in self.all.values() if replica.said is not None}
        before = self.chain
        self.chain = next_chain(before, said)
        assert self.chain.version == before.version + (self.chain is not before)
        states = [each.state for each in self.chain.targets]
        assert states == sorted(states)
        assert states.count(TargetState.SYNCING) <= 1
        for each in self.chain.targets:
            if each.state == TargetState.SERVING and self.all[each.target].generation == each.generation:
                # Those that sync hold everything before they say so.
                if any(old.target == each.target and old.state == TargetState.SYNCING for old in before.targets):
                    self.all[each.target].writes |= self.written
                assert self.all[each.target].writes >= self.written, "it serves without an acknowledged write"

    def events(self, replica: Replica, event: str) -> None:
        if event == "dies":
            replica.is_alive = False
        elif (event == "is expired" and not replica.is_alive) or event == "is cut off":
            replica.said = None
        elif event == "reports" and replica.is_alive:
            replica.said = self.truth(replica)
        elif event == "returns":
            replica.is_alive, replica.said = True, self.truth(replica)
        elif event == "returns with another disk" and replica.said is None and replica.shelf:
            replica.shelf.append((replica.generation, replica.writes))
            replica.generation, replica.writes = replica.shelf.pop(0)
            replica.is_alive, replica.said = True, self.truth(replica)
        elif event == "returns wiped" and replica.said is None:
            replica.wipes += 1
            replica.shelf.append((replica.generation, replica.writes))
            replica.generation = b"%d-%s" % (replica.wipes, replica.id)
            replica.writes = set()
            replica.is_alive, replica.said = True, self.truth(replica)


EVENTS = [
    "dies",
    "is expired",
    "is cut off",
    "reports",
    "reports",
    "returns",
    "returns wiped",
    "returns with another disk",
]


@settings(max_examples=400, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 3)]),
    history=st.lists(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(EVENTS)), max_size=3), max_size=25),
)
def test_no_history_loses_a_write_and_every_one_ends_all_serving_or_lost(
    shape: tuple[int, int], history: list[list[tuple[int, str]]]
) -> None:
    run = History(*shape)
    replicas = list(run.all.values())
    for events in history:
        for index, event in events:
            run.events(replicas[index % len(replicas)], event)
        run.step()
        run.write()
    for replica in replicas:
        replica.is_alive = True
    for _ in range(4 * len(replicas) + 2):
        for replica in replicas:
            replica.said = run.truth(replica)
        run.step()
        run.write()
    assert run.chain.is_lost or len(run.chain.serving) == len(replicas), describe(run.chain)
    assert run.chain.is_lost or run.written, "writes go on"
