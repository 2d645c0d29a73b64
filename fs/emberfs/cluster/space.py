"""How much a cluster holds, and how much more it takes: from the targets' last reports."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import StatusReply, TargetReport


def free_bytes_of(reports: Sequence[TargetReport]) -> int:
    """What new data may take on a node: its targets share the disk, and each has what its free blocks take of it."""
    return min(report.free_bytes for report in reports) + sum(report.idle_bytes for report in reports)


def space_of(reply: StatusReply) -> dict[str, int]:
    """What `Client.space` says.

    New data spreads evenly over the chains, so it is the disk that fills first that says when there is no more room.
    Targets that nobody has heard of count nothing.
    """
    reports = {report.target: report for node in reply.nodes for report in node.reports}
    heard = [node for node in reply.nodes if node.reports]
    free_bytes = {node.node.name: free_bytes_of(node.reports) for node in heard}
    held: dict[str, int] = {}
    for target in reply.routing.targets:
        held[target.node] = held.get(target.node, 0) + 1
    chains = reply.routing.chains
    used_bytes = [
        [reports[each.target].used_bytes for each in chain.targets if each.target in reports] for chain in chains
    ]
    return {
        # A replica that is being brought up to date has less than the others.
        "used_bytes": sum(max(each, default=0) for each in used_bytes),
        "free_bytes": min(
            (free * len(chains) // held[name] for name, free in free_bytes.items() if name in held), default=0
        ),
        "replicas": max((chain.replicas for chain in chains), default=0),
        "disk_used_bytes": sum(map(sum, used_bytes)),
        "disk_free_bytes": sum(min(report.free_bytes for report in node.reports) for node in heard),
    }
