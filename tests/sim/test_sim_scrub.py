"""Damage in a simulated cluster that nobody would ever read: the storage nodes find it by themselves, and mend it."""

from __future__ import annotations

from collections.abc import Sequence

from emberfs.cluster.status import summarise
from emberfs.engine.record import Extent
from emberfs.storage.scrubber import LOOK_S
from emberfs.testing.sim.checker import Replace
from emberfs.testing.sim.cluster import ClusterConfig, SimCluster, StoredTarget
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.testing.sim.workload import Workload

INTERVAL_S = 100.0
SHAPE = ClusterConfig(managers=1, storage_nodes=3, scrub_interval_s=INTERVAL_S)
TEXT = b"nobody reads this" * 100


async def committed(stored: StoredTarget, chunk: bytes) -> Extent:
    assert stored.engine is not None
    record = await stored.engine.record(chunk)
    assert record is not None and record.committed is not None
    return record.committed


async def damage(stored: StoredTarget, chunk: bytes, *, is_cached: bool = True) -> None:
    """`is_cached`: the page cache still has what was written."""
    assert stored.engine is not None and stored.disk is not None
    file, block = stored.engine.allocator.place((await committed(stored, chunk)).position)
    stored.disk.flip_bit(file, block + 7, is_cached=is_cached)


async def content(stored: StoredTarget, chunk: bytes) -> bytes:
    assert stored.engine is not None and stored.disk is not None
    extent = await committed(stored, chunk)
    file, block = stored.engine.allocator.place(extent.position)
    return stored.disk.peek(file, block, extent.length)


async def filled(cluster: SimCluster) -> dict[bytes, list[StoredTarget]]:
    """A few chunks on each chain: chunk -> its replicas."""
    await cluster.start()
    client = await cluster.client("c1")
    chains = cluster.routing().chains
    workload = Workload(chains=[chain.id for chain in chains], chunks=3 * len(chains))
    nodes = {target.id: target.node for target in cluster.routing().targets}
    held = {}
    for number in range(workload.chunks):
        await client.process.spawn(workload.perform(client, [number], [Replace(TEXT)]), "write")
        targets = chains[number % len(chains)].targets
        held[workload.chunk(number)] = [cluster.holder(nodes[each.target]).targets[each.target] for each in targets]
    return held


def test_a_flipped_bit_is_mended_within_the_interval(seeds: Sequence[int]) -> None:
    async def main(world: SimRuntime) -> None:
        cluster = SimCluster(world, config=SHAPE)
        held = await filled(cluster)
        rng = world.random("damage")
        for chunk, replicas in held.items():
            await damage(rng.choice(replicas), chunk)
        await world.sleep(LOOK_S + INTERVAL_S)  # After the setting has been noticed.
        for chunk, replicas in held.items():
            assert [await content(each, chunk) for each in replicas] == [TEXT] * 3
        counts = [machine.node.scrubber.counts for machine in cluster.storage if machine.node is not None]
        assert sum(each.repaired for each in counts) == len(held)
        assert sum(each.unrepairable for each in counts) == 0
        cluster.stop()

    for seed in seeds[:2]:
        run(seed, main)


def test_what_all_replicas_lost_is_in_the_status_of_the_cluster() -> None:
    async def main(world: SimRuntime) -> None:
        cluster = SimCluster(world, config=SHAPE)
        held = await filled(cluster)
        chunk = next(iter(held))
        for each in held[chunk]:
            await damage(each, chunk, is_cached=False)
        await world.sleep(LOOK_S + INTERVAL_S)
        client = cluster.clients[0]
        facts = summarise(await client.process.spawn(client.routes.status(), "status"))
        assert sorted(facts["problems"]) == [
            f"s{number} holds a damaged chunk that no other replica could mend: `emberline fs scrub` names the files"
            for number in (1, 2, 3)
        ]
        cluster.stop()

    run(0, main)
