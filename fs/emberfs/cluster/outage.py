"""A cluster on this host of which no manager answers: what runs, by the pid files, and what that means.

Does not know: what the managers would say (`status`).
"""

from __future__ import annotations

from typing import Any

from ..routing import Role
from .local import LocalCluster, role_of


def summarise_outage(local: LocalCluster, reason: str) -> dict[str, Any]:
    """What `status.summarise` gives, as far as it can be known; `reason` is why nobody answered."""
    running = {server.name: server.pid() for server in local.servers()}
    kvs, managers = ([name for name in running if role_of(name) == role] for role in (Role.KV, Role.MANAGER))
    stopped = [name for name, pid in running.items() if pid is None]
    problems = [f"no manager says how the cluster is: {reason}"]
    if kvs and not any(map(running.get, kvs)):
        problems.append(
            f"without {kvs[0]} no name is opened, listed or made, and chains do not change; within 4 s storage nodes "
            "stop serving open files too. Nothing is lost: calls wait for up to 30 s, and all goes on once it is back"
        )
    elif not any(map(running.get, managers)):
        problems.append(
            "without a manager nobody connects, and chains do not change; within 3 s storage nodes stop serving open "
            "files too. Nothing is lost: calls wait for up to 30 s, and all goes on once one is back"
        )
    if stopped:
        hints = [
            f"`emberline cluster up` starts what does not run: {', '.join(stopped)}",
            f"why it ended: `emberline cluster logs {stopped[0]}`",
        ]
    else:
        hints = [f"all servers run; what they complain of: `emberline cluster logs {(kvs or managers)[0]}`"]
    return {
        "primary": "",
        "routing_version": None,
        "sessions": None,
        "servers": [
            {
                "name": name,
                "role": role_of(name),
                "address": local.address(name),
                "state": f"runs as process {pid}" if pid is not None else "DOES NOT RUN",
                "targets": None,
            }
            for name, pid in running.items()
        ],
        "chains_total": None,
        "chains_serving": None,
        "chains": [],
        "placement": None,
        "problems": problems,
        "hints": hints,
    }
