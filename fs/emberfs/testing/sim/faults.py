"""What goes wrong in a simulated cluster, by a seeded plan, and what must survive it.

Survivable, and therefore injected: any number of kills, power failures, pauses and partitions of any machines at any
time; one new disk at a time, while its chains are whole; clocks that drift by 2 %; a network that loses, doubles and
delays. Not survivable, and therefore not: new disks in all replicas of a chain.

Does not know: what clients do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...routing import TargetState
from .cluster import SimCluster, SimMachine, StorageMachine
from .loop import SimRuntime
from .network import LinkFaults
from .workload import Workload

Fault = Callable[[float], Coroutine[Any, Any, None]]
"""Begins, lasts about so many seconds, ends."""


@dataclass(kw_only=True, slots=True)
class Faults:
    """Injects for a while, then undoes what is still in force."""

    cluster: SimCluster
    workload: Workload
    rng: random.Random
    gap_s: float = 3.0
    """The mean time between the beginnings of two faults."""
    counts: Counter[str] = field(default_factory=Counter)
    is_truce: bool = False
    """No new fault: a disk was wiped, and the manager does not know yet. Another loss now would not be survivable."""

    async def run(self, world: SimRuntime, end_s: float) -> None:
        """Faults one after the other, overlapping as they do, until virtual time `end_s`."""
        rng = self.rng
        faults, weights = zip(*self.kinds(), strict=True)
        running = []
        while world.now_s() < end_s:
            if self.is_truce:
                await world.sleep(0.1)
                continue
            fault = rng.choices(faults, weights)[0]
            length_s = rng.choice([0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0]) * rng.uniform(0.5, 1.5)
            running.append(world.spawn(fault(length_s), "fault"))
            await world.sleep(min(rng.expovariate(1 / self.gap_s), end_s - world.now_s()))
        for task in running:
            task.cancel()
        self._stop()

    def kinds(self) -> list[tuple[Fault, int]]:
        """What may happen, and how often."""
        return [
            (self._crash_storage, 8),
            (self._crash_several, 2),
            (self._wipe, 3),
            (self._wipe_in_blackout, 1),
            (self._pause, 4),
            (self._partition, 8),
            (self._crash_manager, 2),
            (self._crash_kv, 1),
            (self._weather, 3),
            (self._slow_disk, 3),
        ]

    def _stop(self) -> None:
        """The network is whole, and every machine runs."""
        fabric = self.cluster.fabric
        fabric.heal()
        for trap in fabric.traps:
            trap.release()
        fabric.traps.clear()
        fabric.faults = LinkFaults()
        for machine in self.cluster.machines:
            if machine.process is None or not machine.process.is_alive:
                machine.start()
                continue
            machine.process.offload_slowdown_s = 0.0
            if machine.process.is_paused:
                machine.resume()

    def _note(self, kind: str, what: str = "") -> None:
        self.counts[kind] += 1
        self.cluster.world.note(f"fault {kind} {what}")

    # ---- machines

    async def _crash_storage(self, length_s: float) -> None:
        await self._crash([self.rng.choice(self.cluster.storage)], length_s)

    async def _crash_several(self, length_s: float) -> None:
        count = self.rng.randint(2, len(self.cluster.storage))
        await self._crash(self.rng.sample(self.cluster.storage, count), length_s)

    async def _crash_manager(self, length_s: float) -> None:
        primary = self.cluster.primary
        victim = primary if primary is not None and self.rng.random() < 0.7 else self.rng.choice(self.cluster.managers)
        await self._crash([victim], length_s)

    async def _crash_kv(self, length_s: float) -> None:
        await self._crash([self.cluster.kv], min(length_s, 4.0))

    async def _crash(self, victims: Sequence[SimMachine], length_s: float) -> None:
        victims = [victim for victim in victims if victim.is_up]
        power = self.rng.random() < 0.5
        for victim in victims:
            self._note("power failure" if power else "kill", victim.name)
            victim.kill(power=power)
        await self.cluster.world.sleep(length_s)
        for victim in victims:
            if not victim.is_up:
                victim.start()
            await self.cluster.world.sleep(self.rng.choice([0.0, 0.0, 0.3, 3.0, 10.0]))

    async def _wipe(self, length_s: float) -> None:
        """A machine dies and comes back with empty disks, if nobody needs them."""
        victim: StorageMachine | None = self.rng.choice(self.cluster.storage)
        if self.rng.random() < 0.5:
            victim, length_s = await self._one_that_syncs(), 0.0
        if victim is None or not victim.is_up or not self._can_spare(victim):
            return
        self._note("wiped disk", victim.name)
        victim.kill()
        victim.wipe()
        self.is_truce = True
        await self.cluster.world.sleep(min(length_s, 6.0))
        if not victim.is_up:
            victim.start()
        while self._is_serving(victim):
            await self.cluster.world.sleep(0.1)
        self.is_truce = False

    async def _one_that_syncs(self) -> StorageMachine | None:
        """Wait a while for a machine that is just brought up to date."""
        for _ in range(200):
            routing = self.cluster.routing()
            homes = {target.id: target.node for target in routing.targets}
            for chain in routing.chains:
                for each in chain.targets:
                    if each.state == TargetState.SYNCING:
                        return self.cluster.holder(homes[each.target])
            await self.cluster.world.sleep(0.05)
        return None

    def _can_spare(self, victim: StorageMachine) -> bool:
        """All its chains are whole without it, or would be with it."""
        routing = self.cluster.routing()
        homes = {target.id: target.node for target in routing.targets}
        chains = [chain for chain in routing.chains if any(homes[each.target] == victim.name for each in chain.targets)]
        return (
            self._is_calm(victim)
            and bool(chains)
            and all(
                each.state == TargetState.SERVING and self.cluster.holder(homes[each.target]).is_up
                for chain in chains
                for each in chain.targets
                if homes[each.target] != victim.name
            )
        )

    def _is_calm(self, victim: StorageMachine | None = None) -> bool:
        """Every machine (but `victim`) runs, and reaches every other one."""
        others = [machine.process for machine in self.cluster.machines if machine is not victim]
        is_running = all(process is not None and not process.is_stopped for process in others)
        return is_running and not self.is_truce and self.cluster.fabric.is_whole

    def _is_serving(self, machine: StorageMachine) -> bool:
        """The manager believes so, or there is none."""
        routing = self.cluster.routing()
        own = {target.id for target in routing.targets if target.node == machine.name}
        return not routing.version or any(each.target in own for chain in routing.chains for each in chain.serving)

    async def _wipe_in_blackout(self, length_s: float) -> None:
        """All machines lose power; one comes back with empty disks, and first."""
        cluster = self.cluster
        if not cluster.is_whole(cluster.routing()) or not self._is_calm():
            return
        self._note("blackout with a wiped disk")
        self.is_truce = True
        # The managers, too: the next primary calls all nodes dead in one step, so no one is taken for the last.
        for machine in cluster.managers + cluster.storage:
            machine.kill()
        victim = self.rng.choice(cluster.storage)
        victim.wipe()
        for manager in cluster.managers:
            manager.start()
        await cluster.world.sleep(8.0)
        for machine in [victim, *(machine for machine in cluster.storage if machine is not victim)]:
            if not machine.is_up:
                machine.start()
            await cluster.world.sleep(self.rng.choice([0.0, 1.0]))
        self.is_truce = False

    async def _pause(self, length_s: float) -> None:
        victim = self.rng.choice([*self.cluster.storage, *self.cluster.storage, *self.cluster.managers])
        process = victim.process
        if process is None or not process.is_alive or process.is_paused:
            return
        self._note("pause", victim.name)
        victim.pause()
        await self.cluster.world.sleep(length_s)
        process.resume()

    # ---- between them

    async def _partition(self, length_s: float) -> None:
        """Some hosts are cut off from the others, both ways or one way."""
        cluster, rng = self.cluster, self.rng
        hosts = [machine.name for machine in cluster.machines] + [client.name for client in cluster.clients]
        if rng.random() < 0.5:
            # An island on which clients and storage go on by what they know.
            storage = rng.sample([machine.name for machine in cluster.storage], rng.randint(1, 2))
            inside = storage + rng.sample([client.name for client in cluster.clients], 2)
            outside = [host for host in hosts if host not in inside]
        elif rng.random() < 0.5:
            inside = rng.sample(hosts, rng.randint(1, 3))
            outside = [host for host in hosts if host not in inside]
        else:
            inside, outside = ([host] for host in rng.sample(hosts, 2))
        ways = rng.choice(["both", "both", "out", "in"])
        self._note("partition" if ways == "both" else "one-way partition", f"{inside} {ways}")
        cuts = [(here, there) for here in inside for there in outside]
        pairs = cuts if ways == "out" else [(there, here) for here, there in cuts]
        for pair in cuts + pairs if ways == "both" else pairs:
            cluster.fabric.cut(*pair)
        await cluster.world.sleep(length_s)
        for pair in cuts + pairs if ways == "both" else pairs:
            cluster.fabric.mend(*pair)

    async def _weather(self, length_s: float) -> None:
        """The whole network is bad for a while."""
        kind = self.rng.choice(["reset", "lost", "doubled", "slow"])
        faults = self.cluster.fabric.faults
        if getattr(faults, kind):
            return
        self._note(f"network: {kind}")
        setattr(faults, kind, self.rng.choice([0.01, 0.05, 0.2]))
        await self.cluster.world.sleep(length_s)
        setattr(faults, kind, 0.0)

    async def _slow_disk(self, length_s: float) -> None:
        victim = self.rng.choice(self.cluster.storage)
        if victim.process is None or not victim.process.is_alive:
            return
        process = victim.process
        self._note("slow disk", victim.name)
        process.offload_slowdown_s = self.rng.choice([0.02, 0.2])
        await self.cluster.world.sleep(length_s)
        process.offload_slowdown_s = 0.0
