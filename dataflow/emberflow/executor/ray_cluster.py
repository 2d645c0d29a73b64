"""This process's connection to Ray, of which Ray allows one, and what the cluster has.

Ray that the program itself has initialised is used and left alone. What we initialised serves every executor of this
process and is shut down with the last of them.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from ..errors import FlowError, InvalidArgument
from .base import Capacity

_lock = threading.Lock()
_users: set[object] = set()
"""Who uses the Ray that we initialised."""


def acquire(user: object, *, address: str | None, cpus: int | None, memory_bytes: int | None) -> Any:
    """The module `ray`, initialised; `user` keeps it so until `release`."""
    try:
        import ray
    except ImportError as error:
        raise InvalidArgument("Ray is not installed: pip install 'emberline[ray]'") from error
    with _lock:
        if _users or not ray.is_initialized():
            if not _users:
                _initialise(ray, address or os.environ.get("RAY_ADDRESS"), cpus, memory_bytes)
            _users.add(user)
    return ray


def release(user: object) -> None:
    """`user` needs Ray no more. Twice is allowed."""
    with _lock:
        if user not in _users:
            return
        _users.remove(user)
        if not _users:
            import ray

            ray.shutdown()


def capacity(ray: Any, *, cpus: int | None, memory_bytes: int | None) -> tuple[Capacity, Capacity]:
    """What the cluster has in all, within these limits, and what its largest node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(node.get("CPU", 0)), int(node.get("memory", 0))) for node in nodes]
    total = Capacity(
        cpus=min(sum(size[0] for size in sizes), cpus or 2**31),
        memory_bytes=min(sum(size[1] for size in sizes), memory_bytes or 2**63),
    )
    if total.cpus < 1:
        raise InvalidArgument("the Ray cluster has no node with a CPU")
    largest_cpus, largest_bytes = max(sizes)
    largest = Capacity(cpus=min(largest_cpus, total.cpus), memory_bytes=min(largest_bytes, total.memory_bytes))
    return total, largest


def _initialise(ray: Any, address: str | None, cpus: int | None, memory_bytes: int | None) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        settings |= {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_memory": memory_bytes}
    elif address.startswith("ray://"):
        raise InvalidArgument(f"{address}: Ray's client cannot stream what tasks return; give the cluster's address")
    else:
        settings |= {"address": address}
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FlowError(
            f"Ray {'does not start' if address is None else f'at {address} is not there'}: {error}"
        ) from error
