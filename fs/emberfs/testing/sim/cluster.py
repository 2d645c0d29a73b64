"""A whole cluster in one simulation: every server and every client a process of its own.

    cluster = SimCluster(runtime)
    await cluster.start()
    cluster.storage[0].kill(power=True)
    ...
    cluster.storage[0].start()

The code of every role is the product's; here is what a service manager and a machine do for it: start it, kill it,
keep its disk. A machine has a disk per target: its files, and the rows of
its index as they were durable.

Does not know: workloads, faults by plan, or what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...client.core import Core
from ...client.meta_router import MetaRouter, MetaRouterConfig
from ...client.router import ReadFrom, RouterConfig, StorageRouter
from ...client.routes import Routes, RoutesConfig
from ...cluster.store import EveryChain
from ...engine import ChunkEngine, EngineConfig
from ...errors import EmberError
from ...kv.memory import MemoryKV
from ...kv.remote import RemoteKV
from ...kv.server import KvServer
from ...manager import ManagerService
from ...messages import ConfigReply, Done, SetConfig, SetupChains
from ...meta import ClientChunkOps, MetaConfig, MetaService
from ...routing import Node, Role, Routing
from ...server.heart import Heart
from ...storage import StorageNode
from .disk import SimDisk
from .lanes import LanedService, SimLanes
from .loop import SimRuntime
from .network import SimFabric, SimNetwork
from .process import SimProcess
from .volume import Image

DRIFT_MAX = 0.02
READ_FROM = (ReadFrom.LOAD, ReadFrom.ROUND_ROBIN, ReadFrom.LOAD, ReadFrom.TAIL, ReadFrom.HEAD)
"""What the clients go by, in turn."""
SESSION_EXTEND_S = 2.0
RESTART_S = 0.5
"""A service manager waits for so long before it starts a server again that could not start."""
LOOK_S = 1.0
"""How often a server process looks whether its role must stop."""
KV_ADDRESS = "kv:1"
ENGINE_RESERVE_BYTES = 0
SETTINGS: dict[str, float] = {"gc_delay_s": 5.0, "gc_interval_s": 6.0, "trash_s": 30.0}
"""Of every simulated cluster: what takes minutes and days elsewhere happens in a simulation, too."""


class SimMachine:
    """A host that runs one server: `start`, `kill`, `pause`, any number of times."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.address = f"{name}:1"
        self.process: SimProcess | None = None
        self._starts = 0
        rng = cluster.world.random(f"clock of {name}")
        self._drift = rng.uniform(-DRIFT_MAX, DRIFT_MAX)
        self._origin_s = rng.uniform(0, 1e5)

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.is_alive

    def start(self) -> None:
        """Boot the server. It serves some time later."""
        assert not self.is_up
        self._starts += 1
        name = f"{self.name}.{self._starts}"
        process = SimProcess(self.cluster.world, name, drift=self._drift, origin_s=self._origin_s)
        self.process = process
        process.spawn(self._boot(process, self.cluster.fabric.network(process, self.name)), "boot")

    def kill(self, *, power: bool = False) -> None:
        """kill -9; with `power` the machine loses what was not synced, too."""
        if self.process is not None and self.process.is_alive:
            self.process.kill()
            self._died(power=power)

    def pause(self) -> None:
        """SIGSTOP."""
        assert self.process is not None
        self.process.pause()
        self.cluster.fabric.suspect(self.name)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.resume()

    async def _boot(self, process: SimProcess, network: SimNetwork) -> None:
        raise NotImplementedError

    async def _watch(self, process: SimProcess, must_stop: Callable[[], str | None]) -> None:
        """A server process ends when its role says so. No fault here is a reason."""
        while (reason := must_stop()) is None:
            await process.sleep(LOOK_S)
        self.cluster.world.loop.fail(AssertionError(f"{self.name} must stop: {reason}"))

    def _died(self, *, power: bool) -> None:
        """Keep what outlives the process."""


class KvMachine(SimMachine):
    """The key-value server. Its engine is durable with each commit."""

    def __init__(self, cluster: SimCluster) -> None:
        super().__init__(cluster, "kv")
        self.kv: MemoryKV | None = None
        self._rows: dict[bytes, bytes] = {}

    async def _boot(self, process: SimProcess, network: SimNetwork) -> None:
        self.kv = MemoryKV(process, rows=self._rows, persist=lambda: process.offload(_fsync))
        server = KvServer(self.kv, process)
        await server.start()
        await network.serve(KV_ADDRESS, server)

    def _died(self, *, power: bool) -> None:
        if self.kv is not None:
            self._rows = self.kv.snapshot()


class ManagerMachine(SimMachine):
    """A cluster manager."""

    service: ManagerService | None = None

    @property
    def is_primary(self) -> bool:
        return self.service is not None and self.service.is_primary and self.is_up

    async def _boot(self, process: SimProcess, network: SimNetwork) -> None:
        kv = RemoteKV(network.connection(KV_ADDRESS), process)
        service = ManagerService(kv, process, address=self.address)
        self.service = service
        await network.serve(self.address, service)
        await service.start()


class MetaMachine(SimMachine):
    """A metadata server, wired as the role of that name is."""

    service: MetaService | None = None

    async def _boot(self, process: SimProcess, network: SimNetwork) -> None:
        cluster = self.cluster
        kv = RemoteKV(network.connection(KV_ADDRESS), process)
        routes = cluster.routes(process, network, self.name)
        storage = StorageRouter(process, network, routes, config=RouterConfig(deadline_s=cluster.config.deadline_s))

        async def take_routing(routing: Routing) -> None:
            service.chains_changed([chain.id for chain in routing.chains])

        async def take_sessions(live: list[bytes]) -> None:
            await service.sessions_changed(set(live))

        node = Node(self.name, Role.META, self.address, process.random_bytes(8), host=self.name)
        heart = Heart(
            process,
            network,
            cluster.manager_addresses,
            node,
            on_routing=take_routing,
            on_sessions=take_sessions,
            on_config=lambda known: service.configure(known),
        )
        service = MetaService(
            kv,
            process,
            ClientChunkOps(EveryChain(routes, storage)),
            config=MetaConfig(shared=True),
            ask_sessions=heart.hurry,
        )
        await _until_done(process, routes.start)
        await network.serve(self.address, service)
        await take_routing(routes.routing)
        await _until_done(process, service.start)
        heart.start()
        self.service = service
        (beating,) = heart.tasks
        await self._watch(process, lambda: str(beating.exception()) if beating.done() else None)


@dataclass(slots=True)
class StoredTarget:
    """What is on the disk of a target."""

    image: Image = field(default_factory=dict)
    rows: dict[bytes, bytes] = field(default_factory=dict)
    disk: SimDisk | None = None
    index: MemoryKV | None = None
    """Both while a process has it open."""
    engine: ChunkEngine | None = None


class StorageMachine(SimMachine):
    """A storage node and its disks."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        super().__init__(cluster, name)
        self.targets: dict[bytes, StoredTarget] = {}
        self.node: StorageNode | None = None
        self.lanes: SimLanes | None = None
        self._crashes = cluster.world.random(f"crashes of {name}")

    async def _boot(self, process: SimProcess, network: SimNetwork) -> None:
        self.node = None

        async def open_target(target: bytes) -> ChunkEngine:
            stored = self.targets.setdefault(target, StoredTarget())
            stored.disk = SimDisk.from_image(process, stored.image)
            stored.index = MemoryKV(process, rows=stored.rows, persist=lambda: process.offload(_fsync))
            settings = EngineConfig(reserve_bytes=ENGINE_RESERVE_BYTES, keeps_tombstones=True, target=target)
            stored.engine = await ChunkEngine.open(stored.disk, stored.index, process, config=settings)
            return stored.engine

        me = Node(self.name, Role.STORAGE, self.address, process.random_bytes(8), host=self.name)
        self.lanes = SimLanes(process, self._disk_of)
        node = self.cluster.make_node(
            me, process, network, self.cluster.manager_addresses, open_target, lanes=self.lanes
        )
        self.node = node
        rng = self.cluster.world.random(f"lanes of {self.name}")
        await network.serve(self.address, LanedService(node, self.lanes, rng))
        await node.start()
        await self._watch(process, lambda: node.stopped_because)

    def _disk_of(self, chain: int) -> SimDisk | None:
        replica = self.node.replicas.get(chain) if self.node is not None else None
        return None if replica is None else self.targets[replica.engine.identity.target].disk

    def _died(self, *, power: bool) -> None:
        for stored in self.targets.values():
            if stored.disk is not None and stored.index is not None:
                stored.image = stored.disk.crash(self._crashes) if power else stored.disk.die()
                stored.rows = stored.index.snapshot()
            stored.disk = stored.index = stored.engine = None

    def wipe(self) -> None:
        """Somebody put new disks in while it was down."""
        assert not self.is_up
        self.targets.clear()


class SimClient:
    """A client process: its way to the chunks, and to the files if the cluster has metadata servers."""

    def __init__(self, cluster: SimCluster, name: str, *, read_from: ReadFrom = ReadFrom.LOAD) -> None:
        self.name = name
        rng = cluster.world.random(f"clock of {name}")
        self.process = SimProcess(cluster.world, name, drift=rng.uniform(-DRIFT_MAX, DRIFT_MAX))
        self.network = network = cluster.fabric.network(self.process, name)
        config = cluster.config
        self.routes = cluster.routes(self.process, network, name)
        self.router = StorageRouter(
            self.process,
            network,
            self.routes,
            config=RouterConfig(deadline_s=config.deadline_s, read_from=read_from),
        )
        if config.metas:
            meta_config = MetaRouterConfig(deadline_s=config.deadline_s)
            self.meta = MetaRouter(self.process, network, self.routes, config=meta_config)
            self.core = Core(
                self.process,
                self.meta,
                EveryChain(self.routes, self.router),
                client=lambda: self.routes.client,
            )

    def kill(self) -> None:
        self.process.kill()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The shape of a simulated cluster."""

    managers: int = 3
    storage_nodes: int = 5
    metas: int = 0
    """Metadata servers; 0: the clients know chunks only."""
    replicas: int = 3
    targets_per_disk: int = 2
    deadline_s: float = 8.0
    """Of a client's operation."""
    session_timeout_s: float = 15.0
    tombstone_s: float = 20.0
    scrub_interval_s: float = 0.0
    """Nothing is scrubbed, unless a test wants it."""


class SimCluster:
    """All machines."""

    def __init__(
        self,
        world: SimRuntime,
        *,
        config: ClusterConfig | None = None,
        make_node: Callable[..., StorageNode] = StorageNode,
    ) -> None:
        """`make_node`: what a storage machine runs (a planted bug is another class)."""
        self.world = world
        self.config = config or ClusterConfig()
        self.make_node = make_node
        self.fabric = SimFabric(world)
        self.manager_addresses = [f"m{number + 1}:1" for number in range(self.config.managers)]
        self.kv = KvMachine(self)
        self.managers = [ManagerMachine(self, f"m{number + 1}") for number in range(self.config.managers)]
        self.storage = [StorageMachine(self, f"s{number + 1}") for number in range(self.config.storage_nodes)]
        self.metas = [MetaMachine(self, f"d{number + 1}") for number in range(self.config.metas)]
        self.clients: list[SimClient] = []

    @property
    def machines(self) -> Sequence[SimMachine]:
        return [self.kv, *self.managers, *self.storage, *self.metas]

    def routes(self, process: SimProcess, network: SimNetwork, name: str) -> Routes:
        """What a process that uses the cluster knows of it."""
        config = RoutesConfig(session_extend_s=SESSION_EXTEND_S)
        return Routes(process, network, self.manager_addresses, description=name, config=config)

    @property
    def primary(self) -> ManagerMachine | None:
        """The manager that acts as primary; None if there is none now."""
        acting = [manager for manager in self.managers if manager.is_primary]
        assert len(acting) <= 1, f"{len(acting)} managers act as primary"
        return acting[0] if acting else None

    async def start(self) -> None:
        """Boot everything and make the chain table; returns when all chains serve."""
        for machine in self.machines:
            machine.start()
        console = SimClient(self, "console")
        await console.process.spawn(self._set_up(console), "setup")
        console.kill()

    async def _set_up(self, console: SimClient) -> None:
        await console.process.sleep(3.0)  # All nodes have sent a heartbeat: the table is made over those that have.
        own = {name: getattr(self.config, name) for name in ("session_timeout_s", "tombstone_s", "scrub_interval_s")}
        await console.routes._managers.ask(SetConfig(1, SETTINGS | own), ConfigReply, timeout_s=30.0)
        setup = SetupChains(self.config.replicas, self.config.targets_per_disk)
        await console.routes._managers.ask(setup, Done, timeout_s=30.0)
        while not self.is_whole(self.routing()):
            await console.process.sleep(0.1)

    async def client(self, name: str) -> SimClient:
        """A new client with a session."""
        client = SimClient(self, name, read_from=READ_FROM[len(self.clients) % len(READ_FROM)])
        self.clients.append(client)
        await client.process.spawn(_until_done(client.process, client.routes.start), "start")
        return client

    def routing(self) -> Routing:
        """The table as the primary has it; an empty one when there is no primary."""
        primary = self.primary
        if primary is None or primary.service is None:
            return Routing(0)
        return primary.service._cluster.routing

    def is_whole(self, routing: Routing) -> bool:
        """All chains have all their targets serving."""
        return bool(routing.chains) and all(
            len(chain.serving) == len(chain.targets) == chain.replicas for chain in routing.chains
        )

    def holder(self, node: str) -> StorageMachine:
        """The storage machine of that name."""
        return next(machine for machine in self.storage if machine.name == node)

    def stop(self) -> None:
        """Kill everything: the simulation is over."""
        for client in self.clients:
            client.kill()
        for machine in self.machines:
            machine.kill()

    async def within(self, work: Coroutine[Any, Any, Any], process: SimProcess) -> Any:
        """Run `work` as a task of `process`."""
        return await process.spawn(work, "work")


async def _until_done(process: SimProcess, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start something, however often that fails."""
    while True:
        try:
            return await start()
        except EmberError:
            await process.sleep(RESTART_S)


def _fsync() -> None:
    """Costs the time of an offloaded call."""
