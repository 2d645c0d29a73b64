"""One seed: a cluster, clients, faults, then quiet; and what must be true of it.

    report = simulate(seed)             # raises AssertionError, with the seed in a note

Checked: every chunk's history is linearizable, the reads after the faults included, so no acknowledged write is lost;
once faults have stopped every chain serves from all its replicas within QUIET_S, and these are equal byte for byte with
nothing pending; every operation comes to an end. With files: every answer is that of a model (see `namespace`), what
clients leave is recovered, and fsck is silent (see `tenants`).

Does not know: how many seeds there are (see `campaign`).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from ...engine.record import decode_record
from ...errors import Corruption
from ...manager import service as manager_service
from ...manager import states
from ...manager.states import counts_as
from ...routing import Chain, Routing
from ...storage import StorageNode
from .checker import Read, failures
from .cluster import ClusterConfig, SimCluster, StoredTarget
from .directed import DirectedFaults
from .faults import Faults
from .loop import SimRuntime
from .tenants import Tenants
from .upsets import Upsets
from .workload import LENGTH_MAX, Workload, operations_of, unended

QUIET_S = 40.0
"""So long after the last fault every chain must be whole, at the latest."""
OPERATIONS_MIN = 300
VIRTUAL_S_MIN = 60.0
"""A seed goes on in the quiet until it has done so much."""
Cells = Counter[tuple[str, str]]
"""(public state, report) -> how often the manager met it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimConfig:
    """How hard one seed tries."""

    clients: int = 4
    workers: int = 2
    """Of each client: so many operations at the same time."""
    busy_s: float = 45.0
    """Virtual seconds with clients and faults."""
    faults_gap_s: float = 2.5
    faults: type[Faults] = Faults
    chunks: int = 6
    pause_s: float = 1.2
    """The mean pause of a worker between two operations."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tenants: int = 0
    """Clients that work on files. Takes metadata servers."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What one seed did."""

    seed: int
    trace_hash: str = ""
    operations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    whole_after_s: float = 0.0
    """From the last fault until every chain was whole."""
    longest_s: float = 0.0
    """The longest operation of a client."""
    cells: Cells = field(default_factory=Counter)


DIRECTED = SimConfig(faults=DirectedFaults, chunks=3, pause_s=0.6, cluster=ClusterConfig(tombstone_s=4.0))
"""Few chunks, busy clients, and faults that wait for their moment."""


def config_of(seed: int) -> SimConfig:
    """Three of four seeds leave the faults to chance; the fourth directs them.

    Every second seed has files, and less of the rest.
    """
    if seed % 2 == 0:
        shape = ClusterConfig(managers=2, storage_nodes=4, metas=2, session_timeout_s=8.0)
        return SimConfig(clients=2, tenants=3, workers=1, busy_s=35.0, cluster=shape)
    if seed % 4 != 3:
        return SimConfig()
    return DIRECTED


def simulate(
    seed: int, *, config: SimConfig | None = None, make_node: Callable[..., StorageNode] = StorageNode
) -> Report:
    """Run one seed. Raises AssertionError (and whatever the services should not raise)."""
    with _no_garbage_collection():
        return _report(SimRuntime(seed), config or config_of(seed), make_node)


def _report(runtime: SimRuntime, config: SimConfig, make_node: Callable[..., StorageNode]) -> Report:
    """A function of its own: when it has returned nobody holds the cluster, and its garbage is looked at once."""
    simulation = _Simulation(runtime, config, make_node)
    with _watched(simulation.report.cells):
        runtime.run(lambda _: simulation.run())
    simulation.report.trace_hash = runtime.trace_hash()
    return simulation.report


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A seed leaves little garbage in circles, and to look for it takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _watched(cells: Cells) -> Iterator[None]:
    """Count the cells of the state table that managers apply."""
    next_chain = states.next_chain

    def watched(chain: Chain, reports: dict[bytes, object]) -> Chain:
        if chain.version:
            for each in chain.targets:
                cells[each.state.name.lower(), counts_as(chain, each, reports.get(each.target)).name.lower()] += 1  # type: ignore[arg-type]
        return next_chain(chain, reports)  # type: ignore[arg-type]

    with patch.object(manager_service, "next_chain", watched):
        yield


class _Simulation:
    def __init__(self, world: SimRuntime, config: SimConfig, make_node: Callable[..., StorageNode]) -> None:
        self.world = world
        self.config = config
        self.report = Report(seed=world.seed)
        self.cluster = SimCluster(world, config=config.cluster, make_node=make_node)
        self.workload = Workload(chains=(), chunks=config.chunks, pause_s=config.pause_s)
        self.tenants = Tenants(self.cluster) if config.tenants else None

    async def run(self) -> None:
        world, cluster, workload = self.world, self.cluster, self.workload
        watchdog = world.spawn(self._bark(), "watchdog")
        await cluster.start()
        workload.chains = [chain.id for chain in cluster.routing().chains]
        clients = [await cluster.client(f"c{number + 1}") for number in range(self.config.clients)]
        running = [
            client.process.spawn(workload.run(client, world.random(f"worker {worker} of {client.name}")), "workload")
            for client in clients
            for worker in range(self.config.workers)
        ]
        faults = self.config.faults(
            cluster=cluster, workload=workload, rng=world.random("faults"), gap_s=self.config.faults_gap_s
        )
        end_s = world.now_s() + self.config.busy_s
        if self.tenants is not None:
            await self.tenants.move_in(self.config.tenants)
            upsets = Upsets(cluster=cluster, tenants=self.tenants, faults=faults, rng=world.random("upsets"))
            upsetting = world.spawn(upsets.run(end_s), "upsets")
        await faults.run(world, end_s)
        if self.tenants is not None:
            await upsetting
        await self._calm_down()
        for task in running:
            await task
        if self.tenants is not None:
            await self.tenants.stop()
            await self.tenants.audit(world.random("leaving"))
        await self._become_equal()
        await world.sleep(max(VIRTUAL_S_MIN - world.now_s(), 0.0))
        for number in range(workload.chunks):
            for _ in range(self.config.cluster.replicas):
                read = workload.perform(clients[0], [number], [Read(0, 2 * LENGTH_MAX)])
                await clients[0].process.spawn(read, "final-read")
        watchdog.cancel()
        self._judge()
        self.report.faults = faults.counts
        self.report.virtual_s = world.now_s()
        cluster.stop()

    async def _bark(self) -> None:
        """Two managers act as primary at the same time, or something waits for ever."""
        while self.world.now_s() < self.config.busy_s + 2 * QUIET_S + VIRTUAL_S_MIN:
            await self.world.sleep(0.05)
            try:
                _ = self.cluster.primary
            except AssertionError as error:
                self.world.loop.fail(error)
        stuck = map(str, unended(self.workload.history))
        lines = ["operations in the air:", *stuck, "tasks:", *self.world.loop.pending(), self._state()]
        self.world.loop.fail(AssertionError("\n".join(["the simulation does not end", *lines])))

    async def _calm_down(self) -> None:
        """The faults have stopped: soon all replicas of every chain serve.

        Clients stop as soon as they have done enough: what is pending then must be settled by the servers alone.
        """
        world, cluster, workload = self.world, self.cluster, self.workload
        begin_s, is_whole = world.now_s(), False
        while not (is_whole and workload.is_over):
            workload.is_over = self._operations() >= OPERATIONS_MIN
            if self.tenants is not None:
                self.tenants.files.is_over = workload.is_over
            if not is_whole and cluster.is_whole(cluster.routing()):
                is_whole, self.report.whole_after_s = True, world.now_s() - begin_s
            if not is_whole and world.now_s() >= begin_s + QUIET_S:
                raise AssertionError(f"not whole {QUIET_S} s after the last fault:\n{self._state()}")
            await world.sleep(0.25)

    def _operations(self) -> int:
        return operations_of(self.workload.history) + (self.tenants.files.operations if self.tenants else 0)

    def _state(self) -> str:
        """The chains and what the nodes say of them."""
        lines = [f"primary: {self.cluster.primary.name if self.cluster.primary else None}"]
        routing = self.cluster.routing()
        homes = {target.id: target.node for target in routing.targets}
        for chain in routing.chains:
            states = [f"{homes[each.target]} {each.state.name.lower()}" for each in chain.targets]
            lines.append(f"chain {chain.id} version {chain.version}: {', '.join(states)}")
        return "\n".join(lines)

    async def _become_equal(self) -> None:
        """No client writes any more: a moment later nothing is pending and all replicas are equal."""
        for _ in range(40):
            differences = self._differences(self.cluster.routing())
            if not differences:
                return
            await self.world.sleep(0.25)
        raise AssertionError("replicas differ when all is quiet:\n" + "\n".join([*differences, self._state()]))

    def _differences(self, routing: Routing) -> list[str]:
        homes = {target.id: target.node for target in routing.targets}
        found = []
        for chain in routing.chains:
            contents = [
                (homes[each.target], content_of(self.cluster.holder(homes[each.target]).targets[each.target]))
                for each in chain.targets
            ]
            (first, expected), *others = contents
            found += [f"chain {chain.id}: {problem} on {node}" for node, (_, problem) in contents if problem]
            for node, content in others:
                for chunk in sorted(set(content[0]) | set(expected[0])):
                    if content[0].get(chunk) != expected[0].get(chunk):
                        found.append(
                            f"chain {chain.id} chunk {chunk.hex()}: {first} has {_short(expected[0].get(chunk))}, "
                            f"{node} has {_short(content[0].get(chunk))}"
                        )
        return found

    def _judge(self) -> None:
        history = self.workload.history
        self.report.operations = self._operations()
        self.report.longest_s = max((took_s for _, took_s in self.workload.stalls_s), default=0.0)
        stuck = unended(history)
        assert not stuck, "operations never ended:\n" + "\n".join(map(str, stuck))
        for chunk, story in failures(history):
            raise AssertionError(f"chunk {chunk.hex()} is not linearizable: {story}")


Content = dict[bytes, tuple[int, bytes]]
"""chunk -> (version, bytes)"""


def content_of(stored: StoredTarget) -> tuple[Content, str]:
    """What a target holds, read behind the engine's back, and a problem: something pending or unreadable."""
    content: Content = {}
    if stored.engine is None:
        return content, "the target is not open yet"  # Restarted so fast that the manager did not notice.
    assert stored.index is not None and stored.disk is not None
    for key, row in sorted(stored.index.snapshot().items()):
        if not key.startswith(b"c"):
            continue
        chunk = key[1:]
        try:
            record = decode_record(chunk, row)
        except Corruption as error:
            return content, str(error)
        if record.is_pending:
            return content, f"chunk {chunk.hex()} is pending"
        if record.committed is None or not record.committed.length:
            continue
        file, begin = stored.engine.allocator.place(record.committed.position)
        content[chunk] = (record.committed.version, stored.disk.peek(file, begin, record.committed.length))
    return content, ""


def _short(entry: tuple[int, bytes] | None) -> str:
    if entry is None:
        return "nothing"
    version, content = entry
    return f"version {version}, {len(content)} bytes {content[:24]!r}"
