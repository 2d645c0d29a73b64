"""The four roles, wired: from a `ServerConfig` to a service that can be served and closed.

Does not know: signals, logs, or the metrics page.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client.router import StorageRouter
from ..client.routes import Routes
from ..cluster.joining import JoinDesk
from ..cluster.store import EveryChain
from ..errors import StoreBusy
from ..kv import KvServer, LmdbKV, open_kv
from ..lane.server import LaneServer
from ..manager import ManagerService
from ..meta import ClientChunkOps, MetaConfig, MetaService
from ..routing import Node, Role, Routing
from ..runtime import AsyncioRuntime
from ..sharing.ownership import Mode, Ownership, read_owner
from ..storage import StorageNode
from ..transport.types import Network, Service
from .config import ServerConfig
from .heart import Heart
from .metrics import Gauges
from .targets import TargetDirectories

OWN_WAIT_S = 2.0
"""How long another process may still have the directory: one that was killed keeps it until its last write ends."""
OWN_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A role that runs."""

    service: Service
    start: Callable[[], Coroutine[Any, Any, None]]
    """What may only be done once others reach the service."""
    retire: Callable[[], Coroutine[Any, Any, None]]
    """Let others take over, while calls are still answered: a call in the air may wait for one that is yet to come."""
    close: Callable[[], Coroutine[Any, Any, None]]
    """Also of a role that was never started, or not retired."""
    gauges: Gauges
    must_stop: Callable[[], str | None] = lambda: None
    """Why the process has to end, if it has to."""


def node_of(config: ServerConfig, incarnation: bytes) -> Node:
    """How a server presents itself."""
    return Node(config.name, config.role, config.address, incarnation, config.rack, config.machine)


async def open_role(
    config: ServerConfig, runtime: AsyncioRuntime, network: Network, *, lanes: LaneServer | None = None
) -> Served:
    """Open what the role of `config` needs. `lanes`: those of a storage server. Raises what opening the role raises."""
    if config.role == Role.STORAGE:
        return await _open_storage(config, runtime, network, lanes)
    opener = {
        Role.KV: _open_kv_role,
        Role.MANAGER: _open_manager,
        Role.META: _open_meta,
    }[config.role]
    return await opener(config, runtime, network)


async def _nothing() -> None:
    """Of a role that nobody takes over."""


async def _own(directory: Path, runtime: AsyncioRuntime) -> None:
    """Make `directory` and lock it until this process ends: nobody else opens what is in it. Raises StoreBusy.

    The manager relies on it: a storage server that shows a disk's content is the only one that has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    deadline_s = runtime.now_s() + OWN_WAIT_S
    while True:
        ownership = Ownership.take(directory)
        if ownership is not None:
            ownership.declare(Mode.INLINE)
            return
        if runtime.now_s() > deadline_s:
            owner = read_owner(directory)
            pid = owner.pid if owner is not None else None
            raise StoreBusy(f"process {pid} has this directory open; stop it first", str(directory), pid=pid)
        await runtime.sleep(OWN_POLL_S)


def _ended(tasks: Sequence[asyncio.Task[None]]) -> str | None:
    """Says which one of `tasks`, that should go on until the role is closed, does not. From any thread."""
    for task in tasks:
        if task.done():
            error = "cancelled" if task.cancelled() else repr(task.exception())
            return f"the task {task.get_name()} has ended: {error}"
    return None


async def _open_kv_role(config: ServerConfig, runtime: AsyncioRuntime, network: Network) -> Served:
    directory = Path(config.directory)
    await _own(directory, runtime)
    kv = LmdbKV.open(directory, runtime)
    server = KvServer(kv, runtime)
    await server.start()
    heart = None
    if config.managers:
        heart = Heart(runtime, network, config.managers, node_of(config, runtime.random_bytes(8)))

    async def start() -> None:
        if heart is not None:
            heart.start()

    async def close() -> None:
        if heart is not None:
            await heart.close()
        await server.close()
        await kv.close()

    def must_stop() -> str | None:
        if kv.failure is not None:
            return f"the key-value store takes no more commits: {kv.failure}"
        return _ended(heart.tasks) if heart is not None else None

    return Served(service=server, start=start, retire=_nothing, close=close, gauges=dict, must_stop=must_stop)


async def _open_manager(config: ServerConfig, runtime: AsyncioRuntime, network: Network) -> Served:
    kv = await open_kv(config.kv, runtime, network=network)
    service = ManagerService(kv, runtime, address=config.address)
    desk = JoinDesk(service, Path(config.manager.authority)) if config.manager.authority else service

    # Managers are in the routing too, so that `cluster status` misses one that is gone.
    heart = Heart(runtime, network, config.managers, node_of(config, runtime.random_bytes(8)))

    async def start() -> None:
        await service.start()
        heart.start()

    async def retire() -> None:
        await heart.close()
        await service.close()

    async def close() -> None:
        await retire()
        await kv.close()

    return Served(
        service=desk,
        start=start,
        retire=retire,
        close=close,
        gauges=service.gauges,
        must_stop=lambda: _ended([*heart.tasks, *service.tasks]),
    )


async def _open_meta(config: ServerConfig, runtime: AsyncioRuntime, network: Network) -> Served:
    kv = await open_kv(config.kv, runtime, network=network)
    routes = Routes(runtime, network, config.managers, description=f"metadata server {config.name}")
    await routes.start()
    chains = EveryChain(routes, StorageRouter(runtime, network, routes))

    async def take_routing(routing: Routing) -> None:
        service.chains_changed([chain.id for chain in routing.chains])

    async def take_sessions(live: list[bytes]) -> None:
        await service.sessions_changed(set(live))

    node = node_of(config, runtime.random_bytes(8))
    heart = Heart(
        runtime,
        network,
        config.managers,
        node,
        on_routing=take_routing,
        on_sessions=take_sessions,
        on_config=lambda known: service.configure(known),
    )
    service = MetaService(kv, runtime, ClientChunkOps(chains), config=MetaConfig(shared=True), ask_sessions=heart.hurry)

    async def start() -> None:
        await take_routing(routes.routing)
        await service.start()
        heart.start()

    async def close() -> None:
        await heart.close()
        await service.close()
        await routes.close()
        await kv.close()

    return Served(
        service=service,
        start=start,
        retire=_nothing,
        close=close,
        gauges=dict,
        must_stop=lambda: _ended([*heart.tasks, *routes.tasks]),
    )


async def _open_storage(
    config: ServerConfig, runtime: AsyncioRuntime, network: Network, lanes: LaneServer | None
) -> Served:
    root = Path(config.directory)
    await _own(root, runtime)
    targets = TargetDirectories(root, runtime, reserve_bytes=config.storage.reserve_bytes)
    node = node_of(config, runtime.random_bytes(8))
    service = StorageNode(node, runtime, network, config.managers, targets.open, drop_target=targets.drop, lanes=lanes)

    async def close() -> None:
        try:
            await service.close()
        finally:
            await targets.close()

    def gauges() -> dict[str, float]:
        usage = shutil.disk_usage(root)
        return {"disk_free_bytes": usage.free, "disk_size_bytes": usage.total} | (
            service.gauges() | (lanes.gauges() if lanes is not None else {})
        )

    return Served(
        service=service,
        start=service.start,
        retire=service.retire,
        close=close,
        gauges=gauges,
        must_stop=lambda: service.stopped_because,
    )
