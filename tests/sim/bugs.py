"""Protocol bugs, planted by patching the product's classes, that the simulation must find.

`BUGS` maps a sentence to a function that returns the patches, and to the faults that expose it. Product code has no
switch for any of them. Each is something that a hurried reader of docs/replication.md might write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import PropertyMock, patch

from emberfs.engine import ChunkEngine, extents
from emberfs.engine import engine as engine_module
from emberfs.errors import StaleRouting, UpdateUnknown
from emberfs.locks import KeyedLocks
from emberfs.manager import admission, election, members, settings, states
from emberfs.manager import service as manager_service
from emberfs.routing import LocalState, TargetState
from emberfs.settings import Settings
from emberfs.storage import forward, lease, node, passing, replica, resync, service, settle
from emberfs.testing.sim import lanes
from emberfs.testing.sim.directed import DirectedFaults
from emberfs.testing.sim.faults import Fault
from emberfs.testing.sim.simulation import DIRECTED, SimConfig
from msgspec import structs

from tests.sim.plays import island_under_a_shorter_lease, readers_hurry_over_slow_disks

Patch = AbstractContextManager[Any]


def _all(*patches: Patch) -> Patch:
    stack = ExitStack()
    for each in patches:
        stack.enter_context(each)
    return stack


async def _nothing(*_: Any, **__: Any) -> None:
    return None


# ---- versions and leases


def _serves_without_a_lease() -> Patch:
    return _all(
        patch.object(lease.Lease, "check", lambda self: None),
        patch.object(lease.Lease, "is_valid", PropertyMock(return_value=True)),
    )


def _counts_its_lease_from_the_answer() -> Patch:
    take = node.StorageNode._take

    async def late(self: node.StorageNode, reply: Any, sent_s: float) -> None:
        await take(self, reply, self._runtime.now_s())

    return patch.object(node.StorageNode, "_take", late)


def _takes_the_primary_lease_over_too_soon() -> Patch:
    look = election.Election._look

    async def hasty(self: election.Election) -> None:
        self._seen_s -= 0.6
        await look(self)

    return patch.object(election.Election, "_look", hasty)


def _declares_nodes_dead_too_early() -> Patch:
    def is_dead(self: members.Members, node: str, *, now_s: float, since_s: float) -> bool:
        heard = self._heard.get(node)
        return now_s - (since_s if heard is None else max(heard.at_s, since_s)) >= 1.0

    return patch.object(members.Members, "is_dead", is_dead)


def _shortens_the_wait_with_the_lease() -> Patch:
    """As if nobody could still have a longer one."""

    def hasty(row: Any, request: Any) -> Any:
        after = settings.after_request(row, request)
        return None if after is None else structs.replace(after, waits_s=Settings.of(after.values).dead_after_s)

    return patch.object(manager_service, "after_request", hasty)


def _a_new_primary_calls_silent_nodes_dead() -> Patch:
    is_dead = members.Members.is_dead

    def hasty(self: members.Members, node: str, *, now_s: float, since_s: float) -> bool:
        return node not in self._heard or is_dead(self, node, now_s=now_s, since_s=since_s)

    return patch.object(members.Members, "is_dead", hasty)


def _makes_no_new_version_after_a_restart() -> Patch:
    admit = admission.admit

    def quiet(*args: Any, **options: Any) -> Any:
        change = admit(*args, **options)
        if change is not None:
            change.chains.clear()
        return change

    return patch.object(manager_service, "admit", quiet)


def _accepts_any_chain_version() -> Patch:
    def view(self: replica.Replica, version: int) -> Any:
        if self.view is None:
            raise StaleRouting("no chain is known here")
        return self.view

    return patch.object(replica.Replica, "_view", view)


# ---- updates


def _skips_the_second_version_check() -> Patch:
    """What the first look allowed is done once the lock is had, whatever the chain is then and whatever is pending.

    One of the two alone harms nobody: who held the lock when we were taken out of the chain has left a version pending,
    and only a head may settle that.
    """
    settle = replica.Replica.settle

    async def settle_own(self: replica.Replica, versions: dict[bytes, int], *, given_up_as: Any) -> None:
        if given_up_as is UpdateUnknown:
            await settle(self, versions, given_up_as=given_up_as)

    async def update(self: replica.Replica, version: int, updates: Any, *, expected: Any = None) -> None:
        self.head_view(version, updates[0].request.client)
        chunks = list({each.chunk: None for each in updates})
        await self.locks.acquire(chunks)
        try:
            for batch in service.rounds(updates):
                await self._update_round(present(self), batch, expected or {})
        finally:
            self.locks.release(chunks)

    def present(self: replica.Replica, view: Any = None) -> Any:
        if self.view is None:
            raise StaleRouting("no chain is known here")
        return self.view

    return _all(
        patch.object(replica.Replica, "update", update),
        patch.object(replica.Replica, "_same_head", present),
        patch.object(replica.Replica, "settle", settle_own),
    )


def _commits_without_a_vouch() -> Patch:
    return _all(
        patch.object(forward.Passing, "vouched", _nothing),
        patch.object(forward.Passing, "is_vouched", PropertyMock(return_value=True)),
    )


def _acknowledges_before_the_tail() -> Patch:
    return patch.object(passing.Passer, "_confirm", _nothing)


def _forgets_requests() -> Patch:
    async def none(self: ChunkEngine, requests: Any) -> list[None]:
        return [None] * len(requests)

    return patch.object(ChunkEngine, "last_sequences", none)


def _leaves_pending_versions_alone() -> Patch:
    return patch.object(settle.Settler, "_lead", _nothing)


def _rolls_back_what_is_in_doubt() -> Patch:
    """A head that heard nothing from its successor drops the update instead of settling it."""

    async def drop(self: replica.Replica, versions: dict[bytes, int], *, given_up_as: Any) -> None:
        found = await self.engine.states(list(versions))
        held = [
            (chunk, state.pending_version)
            for chunk, state in zip(versions, found, strict=True)
            if state is not None and state.pending_version
        ]
        await self.engine.discard([chunk for chunk, _ in held], [version for _, version in held])
        raise given_up_as("rolled back")

    return patch.object(replica.Replica, "settle", drop)


# ---- reads


def _serves_dirty_reads() -> Patch:
    async def dirty(self: replica.Replica, view: Any, chunk: bytes, offset: int, destination: memoryview) -> Any:
        (result,) = await self.engine.read([chunk], [offset], [destination], pending=[True])
        return result

    return patch.object(replica.Replica, "_read_dirty", dirty)


def _answers_a_dirty_read_without_the_tail() -> Patch:
    """With what is committed here."""

    async def local(self: replica.Replica, view: Any, chunk: bytes, offset: int, destination: memoryview) -> Any:
        (result,) = await self.engine.read([chunk], [offset], [destination])
        return result

    return patch.object(replica.Replica, "_read_dirty", local)


# ---- resync and states


def _resyncs_without_a_chain_version() -> Patch:
    """Whatever a predecessor ever sent is installed when it comes."""

    async def trusting(self: replica.Replica, request: Any, chunks: Any, work: Any) -> None:
        if self.view is None:
            raise StaleRouting("no chain is known here")
        await self.locks.acquire(chunks)
        try:
            await work()
        finally:
            self.locks.release(chunks)

    return patch.object(replica.Replica, "_while_syncing", trusting)


class _WithoutLocks:
    """A replica whose locks keep nobody out."""

    def __init__(self, real: replica.Replica) -> None:
        self._real = real
        self.locks = KeyedLocks(real._runtime)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _resyncs_without_the_lock() -> Patch:
    bring = resync.Resync._bring

    async def unlocked(self: resync.Resync, *args: Any) -> bool:
        twin = copy.copy(self)
        twin._replica = _WithoutLocks(self._replica)  # type: ignore[assignment]
        return await bring(twin, *args)

    return patch.object(resync.Resync, "_bring", unlocked)


def _resyncs_beside_updates_that_began_alone() -> Patch:
    return patch.object(KeyedLocks, "drain", _nothing)


def _is_up_to_date_before_the_resync() -> Patch:
    local_state = replica.Replica.local_state

    def hasty(self: replica.Replica) -> tuple[LocalState, int]:
        view = self.view
        if view is not None and view.is_syncing:
            return LocalState.UP_TO_DATE, view.version
        return local_state(self)

    return patch.object(replica.Replica, "local_state", hasty)


def _resyncs_without_comparing_versions() -> Patch:
    """Same length is good enough."""

    def is_same(ours: Any, theirs: Any) -> bool:
        return ours is not None and theirs is not None and ours.length == theirs.length

    return patch.object(resync, "_is_same", is_same)


def _resync_overlooks_removed_chunks() -> Patch:
    """A removed chunk comes back with a replica that was away.

    To purge tombstones while a replica is away is not enough for that: the resync drops what it has no row of, and the
    floor keeps the next version above all before.
    """
    bring = resync.Resync._bring

    async def only_present(self: resync.Resync, view: Any, link: Any, chunk: bytes, progress: Any) -> bool:
        (state,) = await self._replica.engine.states([chunk])
        if state is None or state.removed:
            return True
        return await bring(self, view, link, chunk, progress)

    return patch.object(resync.Resync, "_bring", only_present)


def _serves_a_wiped_disk() -> Patch:
    """Whoever answers by that name is taken for the target that it was."""

    def trusting(chain: Any, target: Any, report: Any) -> LocalState:
        if report is None or report.state == LocalState.OFFLINE:
            return LocalState.OFFLINE
        synced = target.state == TargetState.SYNCING and report.synced_version == chain.version
        is_fresh = target.state == TargetState.SERVING or (report.state == LocalState.UP_TO_DATE and synced)
        return LocalState.UP_TO_DATE if is_fresh else LocalState.ONLINE

    view = replica.Replica._view

    def believing(self: replica.Replica, version: int) -> Any:
        try:
            return view(self, version)
        except replica.StaleRouting:
            if self.view is not None and version == self.view.version:
                return self.view
            raise

    return _all(patch.object(states, "counts_as", trusting), patch.object(replica.Replica, "_view", believing))


def _the_first_that_returns_serves() -> Patch:
    """Whoever comes back first, when nobody serves, is trusted."""
    next_state = states._next_state

    def trusting(target: Any, report: LocalState, staying: Any, returning: Any) -> TargetState:
        is_back = report in (LocalState.ONLINE, LocalState.UP_TO_DATE)
        if is_back and not staying and not returning and target.state in (TargetState.OFFLINE, TargetState.WAITING):
            return TargetState.SERVING
        return next_state(target, report, staying, returning)

    return patch.object(states, "_next_state", trusting)


Play = Callable[[DirectedFaults, float], Coroutine[Any, Any, None]]


class Bug(NamedTuple):
    """How to plant it, and under which faults it is found."""

    plant: Callable[[], Patch]
    play: Play | None = None
    """A directed play, again and again; None: faults by chance."""
    chunks: int = DIRECTED.chunks
    """Of a play: what is left pending in one of many may stay unseen by clients."""

    first: int = 0
    """Where to begin: a seed that found it when this was written."""
    seeds: int = 40
    """One of so many from there finds it."""

    def config(self) -> SimConfig:
        """What to simulate."""
        play = self.play
        if play is None:
            return SimConfig()

        class OnePlay(DirectedFaults):
            def kinds(self) -> list[tuple[Fault, int]]:
                return [(partial(play, self), 1)]

        return replace(DIRECTED, faults=OnePlay, chunks=self.chunks)


# ---- lanes


def _a_lane_serves_what_has_changed() -> Patch:
    def begin(self: extents.Extents, chunks: Any) -> None:
        mirror, self.mirror = self.mirror, None
        begin_change(self, chunks)
        self.mirror = mirror

    begin_change = extents.Extents.begin_change
    return patch.object(extents.Extents, "begin_change", begin)


def _a_lane_serves_what_is_pending() -> Patch:
    return patch.object(engine_module, "is_clean", lambda row: True)


def _a_lane_is_told_what_a_read_saw_before_a_change() -> Patch:
    note = extents.Extents.note

    def late(self: extents.Extents, chunk: bytes, known: Any, *, changes: int) -> None:
        self._changing = frozenset()
        note(self, chunk, known, changes=self.changes)

    return patch.object(extents.Extents, "note", late)


def _lanes_go_on_without_a_lease() -> Patch:
    def lease(self: lanes.SimLanes, until_s: float) -> None:
        self._until_s = float("inf")

    return patch.object(lanes.SimLanes, "lease", lease)


def _lanes_go_on_in_an_old_view() -> Patch:
    return patch.object(lanes.SimLanes, "_may_serve", lambda self, chain, version: True)


BUGS: dict[str, Bug] = {
    "serves without a lease": Bug(_serves_without_a_lease, DirectedFaults.island_under_a_new_primary, first=3),
    "counts its lease from the answer": Bug(
        _counts_its_lease_from_the_answer, DirectedFaults.last_answer_comes_late, first=1
    ),
    "declares nodes dead too early": Bug(_declares_nodes_dead_too_early, DirectedFaults.island_under_a_new_primary),
    "shortens the wait with the lease": Bug(_shortens_the_wait_with_the_lease, island_under_a_shorter_lease),
    "a new primary calls silent nodes dead": Bug(
        _a_new_primary_calls_silent_nodes_dead, DirectedFaults.island_under_a_new_primary, first=1
    ),
    "takes the primary's lease over too soon": Bug(_takes_the_primary_lease_over_too_soon, first=1),
    "makes no new version after a restart": Bug(
        _makes_no_new_version_after_a_restart, DirectedFaults.dies_half_way, chunks=150, seeds=100, first=16
    ),
    "accepts any chain version": Bug(_accepts_any_chain_version, first=7),
    "skips the second version check": Bug(
        _skips_the_second_version_check, DirectedFaults.island_under_a_new_primary, first=5
    ),
    "acknowledges before the tail": Bug(_acknowledges_before_the_tail),
    "commits without a vouch": Bug(_commits_without_a_vouch, DirectedFaults.dies_half_way, first=6),
    "forgets requests, so a retry is applied twice": Bug(_forgets_requests, first=1),
    "leaves pending versions alone when the chain changes": Bug(_leaves_pending_versions_alone),
    "rolls back what is in doubt": Bug(_rolls_back_what_is_in_doubt, first=2),
    "serves dirty reads": Bug(_serves_dirty_reads, first=2),
    "answers a dirty read without the tail": Bug(
        _answers_a_dirty_read_without_the_tail, DirectedFaults.answers_come_late
    ),
    "is up to date before the resync": Bug(_is_up_to_date_before_the_resync, first=4),
    "resyncs by length alone": Bug(_resyncs_without_comparing_versions, first=2),
    "resyncs without a chain version": Bug(_resyncs_without_a_chain_version, DirectedFaults.resync_is_overtaken),
    "resyncs without the lock": Bug(_resyncs_without_the_lock, DirectedFaults.resync_is_overtaken),
    "resyncs beside updates that began alone": Bug(
        _resyncs_beside_updates_that_began_alone, DirectedFaults.alone_and_slow, first=5
    ),
    "a lane serves what has changed": Bug(_a_lane_serves_what_has_changed),
    "a lane serves what is pending": Bug(_a_lane_serves_what_is_pending, DirectedFaults.answers_come_late, first=20),
    "a lane is told what a read saw before a change": Bug(
        _a_lane_is_told_what_a_read_saw_before_a_change, readers_hurry_over_slow_disks
    ),
    "lanes go on without a lease": Bug(
        _lanes_go_on_without_a_lease, DirectedFaults.island_under_a_new_primary, first=1
    ),
    "lanes go on in an old view": Bug(_lanes_go_on_in_an_old_view, DirectedFaults.island_under_a_new_primary, first=1),
    "resync overlooks removed chunks": Bug(
        _resync_overlooks_removed_chunks, DirectedFaults.resync_is_overtaken, first=1
    ),
    "serves a wiped disk": Bug(_serves_a_wiped_disk, first=7),
    "the first that returns serves": Bug(_the_first_that_returns_serves, first=6),
}
"""What is wrong -> how to plant it, and what finds it."""
