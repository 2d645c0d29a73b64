"""The state table of docs/replication.md: how a chain changes with what its targets' nodes say. Pure functions.

Invariants:
  - Every serving target has every acknowledged write. While none serves, the lastsrv targets have them all: on the disk
    content of their generation, which may come back although the node shows another one now.
  - At most one target of a chain is syncing.
  - The order is serving, lastsrv, syncing, waiting, offline; within a state the order of before.

Does not know: leases, time, where targets are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from msgspec.structs import replace

from ..errors import Conflict, NotFound
from ..messages import TargetReport
from ..routing import Chain, ChainTarget, LocalState, TargetState

ALIVE = (LocalState.UP_TO_DATE, LocalState.ONLINE)
"""What a target must count as to go on with the data it has."""


def next_chain(chain: Chain, reports: Mapping[bytes, TargetReport]) -> Chain:
    """The chain after one step on `reports` (target -> what its node says; absent: not heard of).

    The very same object if nothing changes; else the next version.
    """
    if chain.version == 0:
        return _begin(chain, reports)
    heard = {each.target: counts_as(chain, each, reports.get(each.target)) for each in chain.targets}
    targets = _keep_needed(chain, _order(_step(chain, heard, reports)))
    return chain if targets == chain.targets else replace(chain, version=chain.version + 1, targets=targets)


def counts_as(chain: Chain, target: ChainTarget, report: TargetReport | None) -> LocalState:
    """What a report means for the table: only the disk content that the chain trusted is more than `fresh`."""
    if report is None or report.state == LocalState.OFFLINE:
        return LocalState.OFFLINE
    if report.generation != target.generation:
        return LocalState.FRESH
    synced = target.state == TargetState.SYNCING and report.synced_version == chain.version
    if report.state == LocalState.UP_TO_DATE and (synced or target.state == TargetState.SERVING):
        return LocalState.UP_TO_DATE
    return LocalState.ONLINE


def accept_loss(chain: Chain, target: bytes, report: TargetReport | None) -> Chain:
    """Go on with what `target` has. Raises NotFound, or Conflict if another way is left or it is not there."""
    if all(each.target != target for each in chain.targets):
        raise NotFound(f"chain {chain.id} has no target {target.hex()}")
    if chain.version == 0 or chain.serving:
        raise Conflict(f"chain {chain.id} has lost nothing: {describe(chain)}")
    if report is None or report.state == LocalState.OFFLINE:
        raise Conflict(f"target {target.hex()} of chain {chain.id} is not there: start its node first")
    targets = [
        replace(each, state=TargetState.SERVING, generation=report.generation, foreign=False)
        if each.target == target
        else replace(each, state=TargetState.OFFLINE, foreign=False)
        for each in chain.targets
    ]
    return replace(chain, version=chain.version + 1, targets=_order(targets))


def describe(chain: Chain, homes: Mapping[bytes, str] | None = None) -> str:
    """In plain words: how it is, and what will happen. `homes`: the nodes of its targets, to be named."""
    serving, wanted = len(chain.serving), chain.replicas
    if chain.version == 0:
        return "new: it begins when all its targets have reported"
    if chain.is_lost:
        last = _named(chain.targets, TargetState.LASTSRV, homes)
        return (
            f"LOST, unless a disk comes back: {last} had every acknowledged write, and its node shows another disk "
            "content now. If the disk is not mounted, stop the node, mount it, start the node; if it is gone for good, "
            "`cluster accept-loss` goes on with what another replica has"
        )
    if not serving:
        last = _named([each for each in chain.targets if not each.foreign], TargetState.LASTSRV, homes)
        return f"DOWN: it serves again as soon as one of {last} is back; nothing is lost"
    parts = [f"{serving} of {wanted} replicas serve"]
    for state, text in (
        (TargetState.SYNCING, "is brought up to date and will serve then"),
        (TargetState.WAITING, "waits for its turn to be brought up to date"),
        (TargetState.OFFLINE, "is down and will be brought up to date when it is back"),
    ):
        if names := _named(chain.targets, state, homes):
            parts.append(f"{names} {text}")
    if names := ", ".join(_name(each, homes) for each in chain.targets if each.leaving):
        parts.append(f"{names} leaves when {wanted} others serve")
    return "; ".join(parts)


def _named(targets: Iterable[ChainTarget], state: TargetState, homes: Mapping[bytes, str] | None) -> str:
    return ", ".join(_name(each, homes) for each in targets if each.state == state)


def _name(target: ChainTarget, homes: Mapping[bytes, str] | None) -> str:
    short = target.target.hex()[:8]
    return f"{short} on {homes[target.target]}" if homes else short


def _begin(chain: Chain, reports: Mapping[bytes, TargetReport]) -> Chain:
    """Version 1 of a planned chain, if all its targets are there."""
    targets = []
    for each in chain.targets:
        report = reports.get(each.target)
        if report is None or report.state == LocalState.OFFLINE:
            return chain
        targets.append(replace(each, state=TargetState.SERVING, generation=report.generation))
    return replace(chain, version=1, targets=tuple(targets))


def _step(chain: Chain, heard: Mapping[bytes, LocalState], reports: Mapping[bytes, TargetReport]) -> list[ChainTarget]:
    """Every target's next state, each by the table, from the states of before."""
    staying = [each.target for each in chain.serving if heard[each.target] in ALIVE]
    returning = [
        each.target
        for each in chain.targets
        if each.state == TargetState.LASTSRV and heard[each.target] in ALIVE and not staying
    ]
    first = _first_to_sync(chain, heard) if staying else None
    targets = []
    for each in chain.targets:
        report = heard[each.target]
        if each.target == first:
            generation = reports[each.target].generation
            targets.append(replace(each, state=TargetState.SYNCING, generation=generation))
        else:
            state = _next_state(each, report, staying, returning)
            targets.append(replace(each, state=state, foreign=_is_foreign(each, state, report)))
    return targets


def _first_to_sync(chain: Chain, heard: Mapping[bytes, LocalState]) -> bytes | None:
    """The waiting target whose turn it is, None if another one is syncing already. Those that stay go first."""
    if any(each.state == TargetState.SYNCING for each in chain.targets):
        return None
    waiting = [
        each for each in chain.targets if each.state == TargetState.WAITING and heard[each.target] != LocalState.OFFLINE
    ]
    return min(waiting, key=lambda each: each.leaving).target if waiting else None


def _next_state(
    target: ChainTarget, report: LocalState, staying: Collection[bytes], returning: Collection[bytes]
) -> TargetState:
    """One cell of the table, but for the waiting target whose turn to sync has come."""
    others_serve = any(other != target.target for other in staying)
    match target.state, report:
        case TargetState.SERVING, LocalState.OFFLINE:
            return TargetState.OFFLINE if others_serve else TargetState.LASTSRV
        case TargetState.SERVING, LocalState.FRESH:
            return TargetState.WAITING if others_serve else TargetState.LASTSRV
        case TargetState.SERVING, _:
            return TargetState.SERVING
        case TargetState.LASTSRV, LocalState.OFFLINE | LocalState.FRESH:
            # One that returns takes writes from now on, which this one misses.
            return TargetState.OFFLINE if others_serve or returning else TargetState.LASTSRV
        case TargetState.LASTSRV, _:
            return TargetState.WAITING if others_serve else TargetState.SERVING
        case _, LocalState.OFFLINE:
            return TargetState.OFFLINE
        case TargetState.SYNCING, LocalState.UP_TO_DATE if others_serve:
            return TargetState.SERVING
        case TargetState.SYNCING, LocalState.ONLINE if others_serve:
            return TargetState.SYNCING
    return TargetState.WAITING


def _is_foreign(target: ChainTarget, after: TargetState, report: LocalState) -> bool:
    """See `ChainTarget.foreign`. A node that goes silent has not shown anything else."""
    if after != TargetState.LASTSRV:
        return False
    return report == LocalState.FRESH or (target.foreign and report == LocalState.OFFLINE)


def _order(targets: list[ChainTarget]) -> tuple[ChainTarget, ...]:
    return tuple(sorted(targets, key=lambda each: each.state))


def _keep_needed(chain: Chain, targets: tuple[ChainTarget, ...]) -> tuple[ChainTarget, ...]:
    """Without those that leave, if enough others serve and they have stopped (see `Chain.may_leave`)."""
    if not replace(chain, targets=targets).has_enough:
        return targets
    return tuple(each for each in targets if not each.leaving or each.state == TargetState.SERVING)
