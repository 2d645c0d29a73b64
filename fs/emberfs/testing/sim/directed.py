"""Faults that wait for their moment: narrow windows of the protocol that chance alone seldom hits.

Each play watches the messages (see `traps`) or the chain table, and strikes, holds or cuts just then. They lose nothing
that must survive: no disk is wiped here.

Does not know: what clients do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...messages import (
    Drop,
    Forward,
    Heartbeat,
    Install,
    InstallRequests,
    Message,
    Settled,
    SyncDone,
    Vouch,
    WriteChunks,
)
from .checker import Read
from .cluster import SimClient, SimMachine, StorageMachine
from .faults import Fault, Faults
from .loop import SimRuntime
from .traps import Passage, Trap
from .workload import LENGTH_MAX

DEATH_S = 4.0
"""After so long the manager has taken a silent node out of its chains."""
HOLD_S_MAX = 0.9
"""A message held no longer than this leaves its connection whole."""
ANSWER_S_MAX = 0.95
"""A node takes an answer to its heartbeat that comes no later than this."""
HURRY_S = 0.15
"""The mean pause between two reads of a client while the moment lasts."""

LATE: Sequence[type[Message]] = (
    Forward,
    Forward,
    Vouch,
    Install,
    Install,
    Drop,
    InstallRequests,
    SyncDone,
    Settled,
    WriteChunks,
)
"""What may come late; some more often."""


@dataclass(kw_only=True, slots=True)
class DirectedFaults(Faults):
    """Plays that need a moment. Each seed has two of them, over and over, and a few plain faults between."""

    _moment: int = 0
    _readers: list[asyncio.Task[None]] = field(default_factory=list)

    async def run(self, world: SimRuntime, end_s: float) -> None:
        await super(DirectedFaults, self).run(world, end_s)
        for reader in self._readers:
            await reader

    def kinds(self) -> list[tuple[Fault, int]]:
        plays = self.rng.sample(self.plays(), 2)
        return [*((play, 4) for play in plays), (self._crash_storage, 2), (self._partition, 1)]

    def plays(self) -> list[Fault]:
        return [
            self.late_after_a_change,
            self.dies_half_way,
            self.answers_come_late,
            self.island_under_a_new_primary,
            self.last_answer_comes_late,
            self.alone_and_slow,
            self.resync_is_overtaken,
        ]

    async def late_after_a_change(self, _: float) -> None:
        """A message is under way while its chain changes; its sender has given it up."""
        kind = self.rng.choice(LATE)
        passage, trap = await self._catch(_requests(kind), holds=True, breaks=True)
        if passage is not None:
            ends = [machine for machine in self._storage_of(passage) if machine.is_up]
            if ends and self.rng.random() < 0.7:
                await self._restart([self.rng.choice(ends)], power=self.rng.random() < 0.5)
            await self._sleep(self.rng.choice([0.3, 1.0, 3.0, 6.0]))
        self._release(trap)

    async def dies_half_way(self, _: float) -> None:
        """A replica has handed an update on and loses its own copy; or has its own copy, and what it sent is late."""
        victim = self.rng.choice(self.cluster.storage)
        if not victim.is_up or victim.process is None:
            return
        is_slow = self.rng.random() < 0.5
        if is_slow:
            victim.process.offload_slowdown_s = 0.3
        passage, trap = await self._catch(
            lambda each: _is(each, Forward) and each.source == victim.name, holds=not is_slow
        )
        if passage is not None and victim.is_up:
            await self._sleep(self.rng.uniform(0.003, 0.1))
            victims = self._chain_machines(passage) if self.rng.random() < 0.2 else [victim]
            await self._restart(victims, power=True)
        if victim.is_up:
            victim.process.offload_slowdown_s = 0.0
        self._release(trap)

    async def answers_come_late(self, _: float) -> None:
        """What the tail has committed its predecessors do not know yet, while clients read."""
        for _again in range(6):
            passage, trap = await self._catch(lambda each: each.is_reply and type(each.request) is Forward, holds=True)
            if passage is not None:
                await self._sleep(self.rng.uniform(0.3, HOLD_S_MAX))
            self._release(trap)

    async def island_under_a_new_primary(self, _: float) -> None:
        """A replica and some clients lose the managers, and the primary dies just then; or the replica's updates stick
        until it hears of the chain that went on without it.
        """
        cluster, rng = self.cluster, self.rng
        if not await self._wait_for_calm():
            return
        victim = rng.choice([self._machines([chain.serving[0].target])[0] for chain in cluster.routing().chains]).name
        cuts = self._cut(
            [manager.name for manager in cluster.managers],
            [victim, *(each.name for each in rng.sample(cluster.clients, 2))],
        )
        with self._hurry():
            if (primary := cluster.primary) is not None and rng.random() < 0.5:
                await self._restart([primary], power=False)
                await self._sleep(rng.uniform(2.0, 4.0))
            else:
                await self._sleep(rng.uniform(1.6, 2.2))
                held = self._trap(
                    lambda each: _is(each, Forward) and each.source == victim, holds=True, breaks=True, count=1000
                )
                await self._sleep(rng.choice([2.0, 4.0]))
                self._mend(cuts)
                await self._sleep(1.0)
                self._release(held)
        self._mend(cuts)

    async def last_answer_comes_late(self, _: float) -> None:
        """A heartbeat is answered as late as may be; then its sender and some clients hear of the managers no more."""
        cluster, rng = self.cluster, self.rng
        if not await self._wait_for_calm():
            return
        victim = rng.choice(cluster.storage).name
        managers = [manager.name for manager in cluster.managers]
        passage, trap = await self._catch(
            lambda each: each.is_reply and type(each.request) is Heartbeat and each.destination == victim, holds=True
        )
        if passage is not None:
            self._note("cut off", victim)
            for manager in managers:
                cluster.fabric.cut(victim, manager)
            await self._sleep(ANSWER_S_MAX)
        self._release(trap)
        if passage is not None:
            await self._sleep(0.01)
            cuts = self._cut(managers, [victim, *(each.name for each in rng.sample(cluster.clients, 2))])
            with self._hurry():
                await self._sleep(4.0 - ANSWER_S_MAX)
            self._mend(cuts)

    async def alone_and_slow(self, _: float) -> None:
        """A chain is down to one replica, which has a slow disk and the first updates for a while as another joins."""
        chains = [chain for chain in self.cluster.routing().chains if chain.serving]
        if not chains:
            return
        chain = self.rng.choice(chains)
        alone = self._machines([chain.serving[0].target])[0]
        others = [each for each in self._machines([each.target for each in chain.targets]) if each is not alone]
        for other in others:
            if other.is_up:
                self._note("kill", other.name)
                other.kill()
        cuts = self._cut([client.name for client in self.cluster.clients], [alone.name])
        await self._sleep(DEATH_S)
        if alone.is_up and alone.process is not None:
            self._note("slow disk", alone.name)
            alone.process.offload_slowdown_s = 0.4
        joining = self.rng.choice(others)
        if not joining.is_up:
            joining.start()
        with self._hurry():
            _passage, trap = await self._catch(lambda each: _is(each, Heartbeat) and each.source == joining.name)
            self._release(trap)
            self._mend(cuts)
            await self._sleep(self.rng.uniform(1.0, 3.0))
        if alone.is_up and alone.process is not None:
            alone.process.offload_slowdown_s = 0.0
        for other in others:
            if not other.is_up:
                other.start()

    async def resync_is_overtaken(self, _: float) -> None:
        """What a resync sends is slow, and clients write meanwhile."""
        victim = self.rng.choice(self.cluster.storage)
        if victim.is_up:
            self._note("kill", victim.name)
            victim.kill(power=self.rng.random() < 0.5)
            await self._sleep(self.rng.uniform(DEATH_S, 2 * DEATH_S))
            if not victim.is_up:
                victim.start()
        with self._hurry():
            for _again in range(4):
                breaks = self.rng.random() < 0.5
                passage, trap = await self._catch(
                    lambda each: _is(each, Install) and each.destination == victim.name, holds=True, breaks=breaks
                )
                if passage is not None:
                    await self._sleep(self.rng.uniform(0.2, HOLD_S_MAX))
                    if breaks and self.rng.random() < 0.7:
                        await self._wait_for_calm()
                self._release(trap)

    # ---- what plays are made of

    async def _catch(
        self,
        matches: Callable[[Passage], bool],
        *,
        holds: bool = False,
        breaks: bool = False,
        within_s: float = 8.0,
    ) -> tuple[Passage | None, Trap]:
        trap = self._trap(matches, holds=holds, breaks=breaks)
        passage = await trap.sprung(within_s)
        if passage is not None and holds:
            self._note("held message", f"{type(passage.request).__name__} to {passage.destination}")
        return passage, trap

    def _trap(
        self, matches: Callable[[Passage], bool], *, holds: bool = False, breaks: bool = False, count: int = 1
    ) -> Trap:
        trap = Trap(self.cluster.world, matches, holds=holds, breaks=breaks, count=count)
        self.cluster.fabric.traps.append(trap)
        return trap

    def _release(self, trap: Trap) -> None:
        self.cluster.fabric.traps.remove(trap)
        trap.release()

    async def _wait_for_calm(self) -> bool:
        """Return when all replicas serve, every node has heard of it, and nothing is cut. False if that takes long."""
        cluster = self.cluster
        for _ in range(100):
            if cluster.fabric.is_whole and cluster.is_whole(cluster.routing()):
                await self._sleep(0.6)
                return cluster.fabric.is_whole
            await self._sleep(0.1)
        return False

    async def _restart(self, victims: Sequence[SimMachine], *, power: bool) -> None:
        """They die and come back at once: before their leases are over."""
        victims = [victim for victim in victims if victim.is_up]
        for victim in victims:
            self._note("power failure" if power else "kill", victim.name)
            victim.kill(power=power)
        await self._sleep(self.rng.choice([0.0, 0.2]))
        for victim in victims:
            if not victim.is_up:
                victim.start()

    def _cut(self, here: Sequence[str], there: Sequence[str]) -> list[tuple[str, str]]:
        """Cut hosts off from others, both ways; give what it returns to `_mend`."""
        self._note("partition", f"{here} from {there}")
        cuts = [(source, destination) for source in here for destination in there]
        cuts += [(destination, source) for source, destination in cuts]
        for cut in cuts:
            self.cluster.fabric.cut(*cut)
        return cuts

    def _mend(self, cuts: Sequence[tuple[str, str]]) -> None:
        for cut in cuts:
            self.cluster.fabric.mend(*cut)

    @contextmanager
    def _hurry(self) -> Iterator[None]:
        """The moment is short: every client reads all the while."""
        self._moment += 1
        for client in self.cluster.clients:
            if client.process.is_alive:
                self._readers.append(client.process.spawn(self._read_on(client, self._moment), "reader"))
        try:
            yield
        finally:
            self._moment += 1

    async def _read_on(self, client: SimClient, moment: int) -> None:
        rng = self.cluster.world.random(f"reader {moment} of {client.name}")
        while self._moment == moment:
            await client.process.sleep(rng.expovariate(1 / HURRY_S))
            await self.workload.perform(client, [rng.randrange(self.workload.chunks)], [Read(0, 2 * LENGTH_MAX)])

    async def _sleep(self, seconds: float) -> None:
        await self.cluster.world.sleep(seconds)

    def _storage_of(self, passage: Passage) -> list[StorageMachine]:
        ends = (passage.source, passage.destination)
        return [machine for machine in self.cluster.storage if machine.name in ends]

    def _chain_machines(self, passage: Passage) -> list[StorageMachine]:
        chains = self.cluster.routing().chains
        assert isinstance(passage.request, Forward)
        targets = [each.target for chain in chains if chain.id == passage.request.chain for each in chain.targets]
        return self._machines(targets)

    def _machines(self, targets: Sequence[bytes]) -> list[StorageMachine]:
        homes = {target.id: target.node for target in self.cluster.routing().targets}
        return [self.cluster.holder(homes[target]) for target in targets]


@dataclass(kw_only=True, slots=True)
class ManagerFaults(Faults):
    """Only the primary manager dies, again and again."""

    def kinds(self) -> list[tuple[Fault, int]]:
        return [(self._kill_primary, 1)]

    async def _kill_primary(self, _: float) -> None:
        await self.cluster.world.sleep(2.0)  # Every server has heard of the chains and of the clients.
        primary = self.cluster.primary
        if primary is None or not all(manager.is_up for manager in self.cluster.managers):
            return
        self._note("kill", primary.name)
        primary.kill()
        await self.cluster.world.sleep(4.0)
        primary.start()


def _is(passage: Passage, kind: type[Message]) -> bool:
    return type(passage.request) is kind and not passage.is_reply


def _requests(kind: type[Message]) -> Callable[[Passage], bool]:
    return lambda passage: _is(passage, kind)
