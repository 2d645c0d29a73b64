"""Protocol bugs, planted by patching the product's classes, that the simulation must find.

`BUGS` maps a sentence to a function that returns the patches. Product code has no switch for any of them. Each is
something that a hurried reader of docs/replication.md might write.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import PropertyMock, patch

from emberfs.engine import ChunkEngine
from emberfs.manager import election, states
from emberfs.routing import LocalState, TargetState
from emberfs.storage import lease, passing, replica, resync, settle

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


def _takes_the_primary_lease_over_too_soon() -> Patch:
    look = election.Election._look

    async def hasty(self: election.Election) -> None:
        self._seen_s -= 0.6
        await look(self)

    return patch.object(election.Election, "_look", hasty)


# ---- updates


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


# ---- resync and states


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


BUGS: dict[str, tuple[Callable[[], Patch], int]] = {
    "serves without a lease": (_serves_without_a_lease, 60),
    "takes the primary's lease over too soon": (_takes_the_primary_lease_over_too_soon, 60),
    "acknowledges before the tail": (_acknowledges_before_the_tail, 60),
    "forgets requests, so a retry is applied twice": (_forgets_requests, 60),
    "leaves pending versions alone when the chain changes": (_leaves_pending_versions_alone, 60),
    "rolls back what is in doubt": (_rolls_back_what_is_in_doubt, 60),
    "serves dirty reads": (_serves_dirty_reads, 60),
    "is up to date before the resync": (_is_up_to_date_before_the_resync, 60),
    "resyncs by length alone": (_resyncs_without_comparing_versions, 60),
    "resync overlooks removed chunks": (_resync_overlooks_removed_chunks, 60),
    "serves a wiped disk": (_serves_a_wiped_disk, 60),
    "the first that returns serves": (_the_first_that_returns_serves, 60),
}
"""What is wrong -> (how to plant it, within how many seeds it is found)."""
