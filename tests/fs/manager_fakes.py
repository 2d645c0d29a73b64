"""A cluster to test the manager against, in virtual time: clocks that drift, nodes that do nothing but heartbeat."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from emberfs.errors import AlreadyExists, Conflict, EmberError, StaleRouting, Unavailable, UpdateUnknown
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import Transaction
from emberfs.manager import ManagerConfig, ManagerService, rows
from emberfs.messages import GetConfig, GetRouting, Heartbeat, HeartbeatReply, Message, SetConfig, TargetReport
from emberfs.routing import Chain, LocalState, Node, Role, Routing, TargetState
from emberfs.testing.sim.loop import SimRuntime

HEARTBEAT_S = 0.5


class Clock:
    """A runtime whose clock runs at `rate` and began elsewhere."""

    def __init__(self, sim: SimRuntime, rate: float) -> None:
        self._sim = sim
        self._rate = rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sim, name)

    def now_s(self) -> float:
        return 1e6 + self._sim.now_s() * self._rate

    def timer(self, seconds: float) -> asyncio.Future[None]:
        return self._sim.timer(seconds / self._rate)

    async def sleep(self, seconds: float) -> None:
        await self.timer(seconds)


class Link:
    """The way to something, which takes time and may be cut."""

    def __init__(self, sim: SimRuntime, *, delay_s_max: float = 0.005) -> None:
        self.is_cut = False
        self.loses_answers = False
        self._sim = sim
        self._random = sim.random("link")
        self.delay_s_max = delay_s_max

    async def carry(self, work: Callable[[], Awaitable[Any]]) -> Any:
        await self._sim.sleep(self._random.uniform(0, self.delay_s_max))
        if self.is_cut:
            raise Unavailable("cut")
        answer = await work()
        await self._sim.sleep(self._random.uniform(0, self.delay_s_max))
        if self.is_cut or self.loses_answers:
            raise UpdateUnknown("cut")
        return answer


class FarKV:
    """The cluster's KV as one manager reaches it."""

    def __init__(self, kv: MemoryKV, link: Link) -> None:
        self._kv = kv
        self._link = link

    def begin(self) -> Transaction:
        if self._link.is_cut:
            raise Unavailable("cut")
        return self._kv.begin()

    async def run(self, work: Any, *, reclaims: bool = False) -> Any:
        return await self._link.carry(lambda: self._kv.run(work, reclaims=reclaims))


class Managers:
    """Some managers on one KV, and what a test does with them."""

    def __init__(
        self,
        sim: SimRuntime,
        *,
        count: int = 1,
        kv: MemoryKV | None = None,
        rates: Sequence[float] = (1.0, 1.0, 1.0),
        config: ManagerConfig | None = None,
    ) -> None:
        self.sim = sim
        self.kv = kv or MemoryKV(sim)
        self.links = [Link(sim) for _ in range(count)]
        self.clocks = [Clock(sim, rates[index]) for index in range(count)]
        self.services = [
            ManagerService(FarKV(self.kv, link), clock, address=f"m{index}:1", config=config)  # type: ignore[arg-type]
            for index, (link, clock) in enumerate(zip(self.links, self.clocks, strict=True))
        ]

    async def start(self) -> Managers:
        for service in self.services:
            await service.start()
        await until(self.sim, lambda: self.primary is not None)
        return self

    async def close(self) -> None:
        for service in self.services:
            await service.close()

    @property
    def primary(self) -> ManagerService | None:
        acting = [service for service in self.services if service.is_primary]
        assert len(acting) <= 1, "two managers act as primary"
        return acting[0] if acting else None

    async def call(self, request: Message) -> Any:
        """Ask the primary, as soon as there is one."""
        while True:
            for service in self.services:
                try:
                    return await service.handle(request)
                except StaleRouting:
                    pass
            await self.sim.sleep(0.05)

    async def configure(self, **values: float) -> None:
        """Set these, whatever others do."""
        while True:
            config = (await self.call(GetConfig())).config
            try:
                await self.call(SetConfig(config.version, values))
                return
            except Conflict:
                pass

    async def chains(self) -> dict[int, Chain]:
        """As they stand in the KV now."""
        found = await rows.get_all(self.kv.begin(), rows.CHAINS, Chain)
        return {chain.id: chain for chain in found.values()}


class FakeNode:
    """A storage node without storage: it heartbeats, follows the routing and keeps its lease."""

    def __init__(self, managers: Managers, name: str, *, host: str = "", rate: float = 1.0) -> None:
        self.name = name
        self.host = host or name
        self.disk: dict[bytes, bytes] = {}
        """Target -> generation. Outlives the process."""
        self.link = Link(managers.sim, delay_s_max=0.05)
        self.runtime = Clock(managers.sim, rate)
        self.routing = Routing(0)
        self.sessions: set[bytes] = set()
        self.is_running = False
        self.must_stop = False
        self._trusted: set[bytes] = set()
        self._managers = managers
        self._tasks: list[Any] = []

    def start(self) -> FakeNode:
        assert not self.is_running
        self.is_running, self.must_stop = True, False
        self.incarnation = self.runtime.random_bytes(8)
        self.routing = Routing(0)
        self._known = 0
        self.sessions_version = 0
        self.lease_until_s = float("-inf")
        self._given_up: set[bytes] = set()
        self._synced: dict[bytes, int] = {}
        self._tasks = [self.runtime.spawn(self._beat_for_ever(), f"node {self.name}")]
        return self

    async def kill(self) -> None:
        self.is_running = False
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            try:
                await task
            except asyncio.CancelledError:
                pass
        self._tasks = []

    def wipe(self) -> None:
        assert not self.is_running
        self.disk.clear()
        self._trusted.clear()

    def serving(self) -> list[tuple[int, bytes, int]]:
        """(chain, target, chain version) of all that it would answer a reader for now."""
        if not self.is_running or self.runtime.now_s() >= self.lease_until_s:
            return []
        return [
            (chain.id, each.target, chain.version)
            for chain in self.routing.chains
            for each in chain.serving
            if self.disk.get(each.target) == each.generation and each.target not in self._given_up
        ]

    async def _beat_for_ever(self) -> None:
        while True:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks.append(self.runtime.spawn(self._beat(), f"beat of {self.name}"))
            await self.runtime.sleep(HEARTBEAT_S)

    async def _beat(self) -> None:
        node = Node(self.name, Role.STORAGE, f"{self.name}:1", self.incarnation, host=self.host)
        for service in self._managers.services:
            sent_s = self.runtime.now_s()
            try:
                if not self._known:
                    reply = await self.link.carry(partial(service.handle, GetRouting()))
                    self._known = reply.routing.version if reply.routing else 0
                version = max(self.routing.version, self._known)
                request = Heartbeat(node, self.reports(), version, self.sessions_version)
                await self.link.carry(partial(self._deliver, service, request, sent_s))
                return
            except AlreadyExists:
                self.must_stop = True
            except EmberError:
                pass

    async def _deliver(self, service: ManagerService, request: Heartbeat, sent_s: float) -> None:
        reply = await service.handle(request)
        await self.link.carry(_nothing)
        assert isinstance(reply, HeartbeatReply)
        if reply.sessions is not None:
            self.sessions, self.sessions_version = set(reply.sessions), reply.sessions_version
        if reply.routing is not None and reply.routing.version > self.routing.version:
            self.routing = reply.routing
        self.lease_until_s = max(self.lease_until_s, sent_s + reply.lease_s)

    def reports(self) -> list[TargetReport]:
        """What it says of its targets now."""
        chains = {chain.id: chain for chain in self.routing.chains}
        mine = {each.id: chains[each.chain] for each in self.routing.targets if each.node == self.name}
        if self.routing.version:
            self.disk = {target: content for target, content in self.disk.items() if target in mine}
        open_chains = {mine[target].id for target in self.disk if target in mine}
        for target, chain in mine.items():
            if chain.id not in open_chains:  # One of a chain at a time, as `storage.node` has it.
                self.disk.setdefault(target, self.runtime.random_bytes(8))
                open_chains.add(chain.id)
        return [self._report(target, content, mine.get(target)) for target, content in sorted(self.disk.items())]

    def _report(self, target: bytes, generation: bytes, chain: Chain | None) -> TargetReport:
        place = chain and next(each for each in chain.targets if each.target == target)
        if place and place.generation == generation:
            self._trusted.add(target)
        if chain and chain.may_leave(target):
            self._given_up.add(target)
        state, synced = LocalState.ONLINE if target in self._trusted else LocalState.FRESH, 0
        if target in self._given_up:
            state = LocalState.OFFLINE
        elif place and chain and place.generation == generation and place.state == TargetState.SERVING:
            state = LocalState.UP_TO_DATE
        elif place and chain and place.generation == generation and place.state == TargetState.SYNCING:
            # It takes a heartbeat to sync.
            if self._synced.get(target) == chain.version:
                state, synced = LocalState.UP_TO_DATE, chain.version
            self._synced[target] = chain.version
        return TargetReport(target, generation, state, synced)


async def _nothing() -> None:
    pass


async def until(sim: SimRuntime, is_so: Callable[[], bool], *, within_s: float = 30.0) -> None:
    """Wait, in steps of 10 ms."""
    end_s = sim.now_s() + within_s
    while not is_so():
        assert sim.now_s() < end_s, "it did not come about"
        await sim.sleep(0.01)


async def all_serving(managers: Managers, *, replicas: int, within_s: float = 30.0) -> None:
    """Wait until every chain has all its replicas, and no target more."""
    end_s = managers.sim.now_s() + within_s
    while True:
        chains = await managers.chains()
        if chains and all(len(chain.serving) == replicas == len(chain.targets) for chain in chains.values()):
            return
        assert managers.sim.now_s() < end_s, f"not all-serving: {chains}"
        await managers.sim.sleep(0.05)


def drift(rng: random.Random) -> float:
    return rng.choice([0.98, 1.0, 1.02])
