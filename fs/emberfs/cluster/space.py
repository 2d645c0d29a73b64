"""How much a cluster holds, and how much more it takes: from the targets' last reports."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Unavailable
from ..messages import NodeStatus, StatusReply, TargetReport
from ..room import room_per_target
from ..routing import LocalState


def free_bytes_of(node: NodeStatus) -> int | None:
    """What a node may take of new data. None: it has not said so."""
    reports = _reports(node)
    return _room_per_target(reports) * len(reports) if reports else None


def space_of(reply: StatusReply) -> dict[str, int]:
    """What `Client.space` says. Raises Unavailable while the manager has heard of no storage server.

    New data spreads evenly over the chains, so it is the target that fills first that says when there is no more room.
    Nodes that are away have no say in that.
    """
    held = {target.node for target in reply.routing.targets}
    heard = [found for node in reply.nodes if node.alive and node.node.name in held and (found := _reports(node))]
    if not heard:
        raise Unavailable("no storage server has told the manager how much room there is: try again in a moment")
    nodes = sorted(reply.nodes, key=lambda node: node.alive)  # Who is there has the last word.
    reports = {report.target: report for node in nodes for report in _reports(node)}
    chains = reply.routing.chains
    used_bytes = [
        [reports[each.target].used_bytes for each in chain.targets if each.target in reports] for chain in chains
    ]
    return {
        # A replica that is being brought up to date has less than the others.
        "used_bytes": sum(max(each, default=0) for each in used_bytes),
        "free_bytes": min(map(_room_per_target, heard)) * len(chains),
        "replicas": max((chain.replicas for chain in chains), default=0),
        "disk_used_bytes": sum(map(sum, used_bytes)),
        "disk_free_bytes": sum(min(report.free_bytes for report in each) for each in heard),
    }


def _reports(node: NodeStatus) -> Sequence[TargetReport]:
    """Of the targets that it has open: of the others it knows nothing but that they are there."""
    return [report for report in node.reports if report.state is not LocalState.OFFLINE]


def _room_per_target(reports: Sequence[TargetReport]) -> int:
    """The targets of a node share its disk."""
    return room_per_target(min(report.free_bytes for report in reports), [report.idle_bytes for report in reports])
