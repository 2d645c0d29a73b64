"""How a cluster is, in plain words: from what the primary manager knows to what an operator should read."""

from __future__ import annotations

from typing import Any

from ..manager import describe
from ..manager.placement_report import groups_of, placement_report
from ..messages import StatusReply
from ..routing import Role, Routing, TargetState
from .space import free_bytes_of

PEER_LOAD_SLACK = 1
"""Chains over the bound that nobody needs to hear of."""
FULL_FRACTION = 0.9
"""Of a disk, from which on status says that it gets full."""


def summarise(reply: StatusReply) -> dict[str, Any]:
    """JSON-ready: servers, chains, the problems and the hints as sentences. No problem: all is well."""
    routing = reply.routing
    held: dict[str, int] = {}
    for target in routing.targets:
        held[target.node] = held.get(target.node, 0) + 1
    problems: list[str] = []
    placement, hints = _placement(reply)
    servers = []
    unheard: list[str] = []
    for status in sorted(reply.nodes, key=lambda status: (status.node.role, status.node.name)):
        node = status.node
        is_unheard = not status.alive and status.last_heard_s < 0 and node.address != reply.primary
        is_down = not status.alive and status.last_heard_s >= 0
        state = "DOWN" if is_down else "not heard of yet" if is_unheard else "alive"
        if node.draining:
            state += ", drains" if held.get(node.name) else ", empty"
            if not held.get(node.name):
                hints.append(f"{node.name} holds nothing any more: `emberline cluster remove-node {node.name}`")
        free_bytes = free_bytes_of(status)
        used_bytes = sum(report.used_bytes for report in status.reports) if status.reports else None
        unmended = sum(report.unmended for report in status.reports)
        if free_bytes is not None and used_bytes is not None and used_bytes > FULL_FRACTION * (used_bytes + free_bytes):
            hints.append(f"the disk of {node.name} gets full: {free_bytes >> 20:,} MiB are left")
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
                "free_bytes": free_bytes,
                "used_bytes": used_bytes,
                "unmended_chunks": unmended,
            }
        )
        if unmended:
            problems.append(_unmended(node.name, unmended))
        if is_unheard:
            unheard.append(node.name)
        if is_down:
            problems.append(_down(node.name, node.role, held.get(node.name, 0), status.last_heard_s))
    if unheard:
        problems.append(
            f"not heard of by the present primary manager: {', '.join(unheard)}; after a change of the primary that "
            "takes a second, else start them, or forget them with `emberline cluster remove-node`"
        )
    metas = [status for status in reply.nodes if status.node.role == Role.META]
    if metas and not any(status.alive for status in metas):
        names = " or ".join(status.node.name for status in metas)
        problems.append(f"no metadata server is left: nothing can be opened or listed; start {names}")
    chains = _chains(routing, problems)
    if not routing.chains:
        problems.append("there are no chains yet: nothing can be stored before `emberline cluster setup`")
    return {
        "primary": reply.primary,
        "routing_version": routing.version,
        "sessions": reply.sessions,
        "servers": servers,
        "chains_total": len(chains),
        "chains_serving": sum(len(chain.serving) >= chain.replicas for chain in routing.chains),
        "chains": chains,
        "placement": placement,
        "problems": problems,
        "hints": hints,
    }


def _chains(routing: Routing, problems: list[str]) -> list[dict[str, Any]]:
    """JSON-ready chains; adds what is wrong with them to `problems`."""
    homes = {target.id: target.node for target in routing.targets}
    chains = []
    for chain in routing.chains:
        words = describe(chain, homes)
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
    return chains


def _placement(reply: StatusReply) -> tuple[dict[str, Any] | None, list[str]]:
    """(whose loss would burden one other machine most beyond what is even, what to say of it)."""
    spreads = placement_report(groups_of(reply.routing, same_host=reply.same_host)).hosts
    if not spreads:
        return None, []
    worst = max(spreads, key=lambda spread: (spread.peer_load_max - spread.bound, spread.peer_load_max))
    facts = {"host": worst.host, "peer_load_max": worst.peer_load_max, "bound": worst.bound}
    if worst.peer_load_max <= worst.bound + PEER_LOAD_SLACK:
        return facts, []
    return facts, [
        f"if {worst.host} is lost, one other machine has to bring back {worst.peer_load_max} chains; "
        f"spread evenly, none would have more than {worst.bound}"
    ]


def _unmended(name: str, chunks: int) -> str:
    what = "a damaged chunk" if chunks == 1 else f"{chunks} damaged chunks"
    return f"{name} holds {what} that no other replica could mend: `emberline fs scrub` names the files"


def _down(name: str, role: Role, targets: int, last_heard_s: float) -> str:
    if role == Role.STORAGE:
        then = f"its {targets} replicas are brought up to date when it is back; start it, or replace its disk"
    elif role == Role.META:
        then = "clients use the other metadata servers, if there are any; start it"
    else:
        then = "start it"
    return f"{name} is down (not heard of for {last_heard_s:.0f} s): {then}"
