"""Who may speak as a node: a new name, a restart, or a second process that must not.

A restart makes a new version of every chain that the node serves in: what its old incarnation left half done is of an
older version then. It must prove that the old one is gone: by the disk, which only one process can have open, or by
the end of the old one's lease. And it must know the routing that names the old one: a heartbeat that a process sent
before it died, and that arrives when its successor is there, cannot take the name away from that.

Does not know: when a lease ends, or how changes are stored.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import AlreadyExists, Conflict, LimitExceeded, StaleRouting
from ..messages import Heartbeat
from ..routing import Chain, LocalState, TargetState
from .cluster import Change, Cluster
from .rows import RETIRED_MAX, NodeRow

NAME_BYTES_MAX = 128


def admit(cluster: Cluster, request: Heartbeat, *, lease_is_over: bool) -> Change | None:
    """What must change before this heartbeat counts; None if the sender is known.

    Raises AlreadyExists to a process that must stop: another one has its name. StaleRouting: not yet. Conflict: not
    before it knows a newer routing.
    """
    node = request.node
    row = cluster.nodes.get(node.name)
    if row is None:
        if not 1 <= len(node.name.encode()) <= NAME_BYTES_MAX:
            raise LimitExceeded(f"a node's name has 1 to {NAME_BYTES_MAX} bytes: {node.name!r}")
        row = NodeRow(replace(node, draining=False), known_from=cluster.routing.version + 1)
        return Change(nodes={node.name: row})
    node = replace(node, draining=row.node.draining)
    if node == row.node:
        return None
    if node.role != row.node.role:
        raise AlreadyExists(f"the name {node.name} belongs to a {row.node.role} server: choose another")
    if node.incarnation in row.retired:
        raise AlreadyExists(f"another process has taken over as {node.name}: this one must stop")
    if node.incarnation == row.node.incarnation:
        return Change(nodes={node.name: replace(row, node=node)})
    if request.routing_version < row.known_from:
        raise Conflict(f"node {node.name} has another process since routing version {row.known_from}: learn that first")
    chains = cluster.chains_of(node.name)
    if not lease_is_over and not all(_has_disk(cluster, request, chain) for chain in chains):
        raise StaleRouting(f"node {node.name} is taken: its last process may still serve, wait until its lease is over")
    retired = (*row.retired, row.node.incarnation)[-RETIRED_MAX:]
    row = replace(row, node=node, retired=retired, known_from=cluster.routing.version + 1)
    # What the old incarnation still says must not be answered meanwhile.
    change = Change(nodes={node.name: row}, takes_for_dead=frozenset([node.name]))
    for chain in chains:
        if any(cluster.targets[each.target].node == node.name for each in chain.writing):
            change.chains[chain.id] = replace(chain, version=chain.version + 1)
    return change


def _has_disk(cluster: Cluster, request: Heartbeat, chain: Chain) -> bool:
    """True unless the sender's target serves in `chain` and it does not report just this disk content."""
    opened = {each.target: each.generation for each in request.reports if each.state != LocalState.OFFLINE}
    return all(
        opened.get(each.target) == each.generation
        for each in chain.targets
        if each.state == TargetState.SERVING and cluster.targets[each.target].node == request.node.name
    )
