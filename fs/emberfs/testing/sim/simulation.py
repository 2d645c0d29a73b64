"""One seed: a cluster, clients, faults, then quiet; and what must be true of it.

    report = simulate(seed)             # raises AssertionError, with the seed in a note

Checked: every chunk's history is linearizable, the reads after the faults included, so no acknowledged write is lost;
once faults have stopped every chain serves from all its replicas within QUIET_S, and these are equal byte for byte with
nothing pending; every operation comes to an end.

Does not know: how many seeds there are (see `campaign`).
"""

from __future__ import annotations

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
from .faults import Faults
from .loop import SimRuntime
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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


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
    cells: Cells = field(default_factory=Counter)


def simulate(
    seed: int, *, config: SimConfig | None = None, make_node: Callable[..., StorageNode] = StorageNode
) -> Report:
    """Run one seed. Raises AssertionError (and whatever the services should not raise)."""
    runtime = SimRuntime(seed)
    simulation = _Simulation(runtime, config or SimConfig(), make_node)
    with _watched(simulation.report.cells):
        runtime.run(lambda _: simulation.run())
    simulation.report.trace_hash = runtime.trace_hash()
    return simulation.report


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
        self.workload = Workload(chains=())

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
        faults = Faults(cluster=cluster, rng=world.random("faults"), gap_s=self.config.faults_gap_s)
        await faults.run(world, world.now_s() + self.config.busy_s)
        await self._calm_down()
        for task in running:
            await task
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
            workload.is_over = operations_of(workload.history) >= OPERATIONS_MIN
            if not is_whole and cluster.is_whole(cluster.routing()):
                is_whole, self.report.whole_after_s = True, world.now_s() - begin_s
            if not is_whole and world.now_s() >= begin_s + QUIET_S:
                raise AssertionError(f"not whole {QUIET_S} s after the last fault:\n{self._state()}")
            await world.sleep(0.25)

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
        self.report.operations = operations_of(history)
        stuck = unended(history)
        assert not stuck, "operations never ended:\n" + "\n".join(map(str, stuck))
        for chunk, story in failures(history):
            raise AssertionError(f"chunk {chunk.hex()} is not linearizable: {story}")


Content = dict[bytes, tuple[int, bytes]]
"""chunk -> (version, bytes)"""


def content_of(stored: StoredTarget) -> tuple[Content, str]:
    """What an open target holds, read behind the engine's back, and a problem: something pending or unreadable."""
    content: Content = {}
    assert stored.index is not None and stored.engine is not None and stored.disk is not None
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
