"""Plays for the directed faults (`emberfs.testing.sim.directed`) that are of use to single tests only."""

from __future__ import annotations

from emberfs.errors import Conflict, EmberError
from emberfs.messages import ConfigReply, GetConfig, SetConfig
from emberfs.testing.sim.cluster import SimClient
from emberfs.testing.sim.directed import DirectedFaults

LONG_S, SHORT_S = 10.0, 3.0
"""What `dead_after_s` is lowered from, and to."""


async def island_under_a_shorter_lease(faults: DirectedFaults, _: float) -> None:
    """A replica with a long lease, and some clients, lose the managers; then leases become shorter for the others."""
    cluster, rng = faults.cluster, faults.rng
    if not await faults._wait_for_calm():
        return
    outside, *others = rng.sample(cluster.clients, len(cluster.clients))
    await _set_dead_after_s(outside, LONG_S)
    await faults._sleep(2.0)  # Every node has such a lease.
    victim = rng.choice([faults._machines([chain.serving[0].target])[0] for chain in cluster.routing().chains]).name
    faults._note("shorter leases", victim)
    managers = [manager.name for manager in cluster.managers]
    cuts = faults._cut(managers, [victim, *(each.name for each in others[:2])])
    with faults._hurry():
        await _set_dead_after_s(outside, SHORT_S)
        if (primary := cluster.primary) is not None and rng.random() < 0.5:
            await faults._restart([primary], power=False)
        await faults._sleep(rng.uniform(5.0, 9.0))
    faults._mend(cuts)


async def readers_hurry_over_slow_disks(faults: DirectedFaults, _: float) -> None:
    """A read takes longer than an update: what it saw when it began is old when it ends."""
    if not await faults._wait_for_calm():
        return
    faults._note("slow disk", "everywhere, while clients read")
    with faults._hurry():
        for _again in range(20):
            for machine in faults.cluster.storage:
                if machine.is_up:
                    machine.process.offload_slowdown_s = faults.rng.choice([0.0, 0.0, 0.03])
            await faults._sleep(0.2)
    for machine in faults.cluster.storage:
        if machine.is_up:
            machine.process.offload_slowdown_s = 0.0


async def _set_dead_after_s(client: SimClient, seconds: float) -> None:
    """As an operator does, who looks and tries again."""

    async def work() -> None:
        while True:
            try:
                found = await client.routes._managers.ask(GetConfig(), ConfigReply, timeout_s=30.0)
                # Tombstones stay for longer than in other plays, or the long leases are refused.
                values = {"dead_after_s": seconds, "tombstone_s": LONG_S}
                change = SetConfig(found.config.version, values)
                await client.routes._managers.ask(change, ConfigReply, timeout_s=30.0)
                return
            except Conflict:
                pass
            except EmberError:
                return

    await client.process.spawn(work(), "operator")
