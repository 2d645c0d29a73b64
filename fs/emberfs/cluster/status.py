"""How a cluster is, in plain words: from what the primary manager knows to what an operator should read."""

from __future__ import annotations

from typing import Any

from ..manager import describe
from ..messages import StatusReply
from ..routing import Role, TargetState

FULL_FRACTION = 0.9
"""Of a disk, from which on status says that it gets full."""


def summarise(reply: StatusReply) -> dict[str, Any]:
    """JSON-ready: servers, chains, and the problems as sentences. No problem: all is well."""
    routing = reply.routing
    held: dict[str, int] = {}
    for target in routing.targets:
        held[target.node] = held.get(target.node, 0) + 1
    problems: list[str] = []
    servers = []
    for status in sorted(reply.nodes, key=lambda status: (status.node.role, status.node.name)):
        node = status.node
        state = "alive" if status.alive else "DOWN"
        if node.draining:
            state += ", drains"
        servers.append(
            {
                "name": node.name,
                "role": str(node.role),
                "address": node.address,
                "host": node.host,
                "rack": node.rack,
                "state": state,
                "last_heard_s": round(status.last_heard_s, 1),
                "targets": held.get(node.name, 0),
                "free_bytes": min((report.free_bytes for report in status.reports), default=None),
                "used_bytes": sum(report.used_bytes for report in status.reports) if status.reports else None,
            }
        )
        if not status.alive:
            problems.append(_down(node.name, node.role, held.get(node.name, 0), status.last_heard_s))
    chains = []
    for chain in routing.chains:
        words = describe(chain)
        chains.append(
            {
                "chain": chain.id,
                "version": chain.version,
                "replicas": chain.replicas,
                "serving": len(chain.serving),
                "targets": {each.target.hex(): each.state.name.lower() for each in chain.targets},
                "state": words,
            }
        )
        if len(chain.serving) < chain.replicas or any(each.state != TargetState.SERVING for each in chain.targets):
            problems.append(f"chain {chain.id}: {words}")
    if not routing.chains:
        problems.append("there are no chains yet: nothing can be stored")
    return {
        "primary": reply.primary,
        "routing_version": routing.version,
        "sessions": reply.sessions,
        "servers": servers,
        "chains_total": len(chains),
        "chains_serving": sum(len(chain.serving) >= chain.replicas for chain in routing.chains),
        "chains": chains,
        "problems": problems,
    }


def _down(name: str, role: Role, targets: int, last_heard_s: float) -> str:
    since = f"not heard of for {last_heard_s:.0f} s" if last_heard_s >= 0 else "never heard of by this manager"
    if role == Role.STORAGE:
        then = f"its {targets} replicas are brought up to date when it is back; start it, or replace its disk"
    elif role == Role.META:
        then = "clients use the other metadata servers"
    else:
        then = "start it"
    return f"{name} is down ({since}): {then}"
