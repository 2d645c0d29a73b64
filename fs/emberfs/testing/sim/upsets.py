"""What goes wrong for those who work on files: metadata servers and clients die, stop, and are cut off; bits flip.

Survivable, and therefore injected: any of it at any time, but flips. A bit flips while everything else is calm, on one
replica, and nothing else happens until it is right again: two more faults could take the other copies.

Does not know: the faults of the rest of the cluster (`faults`), which happen at the same time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ...engine.record import decode_record
from ...errors import EmberError
from ...messages import ChunksRead, ReadChunks
from .cluster import SimClient, SimCluster, StoredTarget
from .faults import Faults
from .tenants import Tenants

REPAIRED_S = 10.0
"""A flipped bit is found by reads and put right, at the latest after this."""


@dataclass(kw_only=True, slots=True)
class Upsets:
    """Injects for a while. What is still in force then, `Faults` takes back."""

    cluster: SimCluster
    tenants: Tenants
    faults: Faults
    rng: random.Random
    gap_s: float = 5.0

    async def run(self, end_s: float) -> None:
        """One after the other, overlapping as they do, until virtual time `end_s`."""
        world, rng = self.cluster.world, self.rng
        kinds: list[tuple[Callable[[float], Coroutine[Any, Any, None]], int]] = [
            (self._crash_meta, 4),
            (self._pause_meta, 3),
            (self._cut_meta, 3),
            (self._kill_client, 3),
            (self._pause_client, 3),
        ]
        upsets, weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]
        running: list[asyncio.Task[Any]] = []
        while world.now_s() < end_s:
            length_s = rng.choice([0.5, 1.0, 3.0, 6.0, 12.0]) * rng.uniform(0.5, 1.5)
            running.append(world.spawn(rng.choices(upsets, weights)[0](length_s), "upset"))
            await world.sleep(min(rng.expovariate(1 / self.gap_s), end_s - world.now_s()))
            if rng.random() < 0.3:
                await self._flip()
        for task in running:
            task.cancel()
        for client in self.tenants.here:
            client.process.resume()

    # ---- metadata servers

    async def _crash_meta(self, length_s: float) -> None:
        victim = self.rng.choice(self.cluster.metas)
        if not victim.is_up:
            return
        self.faults._note("kill a metadata server", victim.name)
        victim.kill()
        await self.cluster.world.sleep(length_s)
        if not victim.is_up:
            victim.start()

    async def _pause_meta(self, length_s: float) -> None:
        victim = self.rng.choice(self.cluster.metas)
        process = victim.process
        if process is None or not process.is_alive or process.is_paused:
            return
        self.faults._note("pause a metadata server", victim.name)
        victim.pause()
        await self.cluster.world.sleep(length_s)
        process.resume()

    async def _cut_meta(self, length_s: float) -> None:
        """It does not get through to the rows, or to a manager, or its answers to the clients."""
        fabric = self.cluster.fabric
        here = self.rng.choice(self.cluster.metas).name
        peers = self.rng.choice(
            [["kv"], [machine.name for machine in self.cluster.managers], [client.name for client in self.tenants.here]]
        )
        self.faults._note("metadata server cut off", f"{here} from {peers}")
        for peer in peers:
            fabric.cut(here, peer)
        await self.cluster.world.sleep(length_s)
        for peer in peers:
            fabric.mend(here, peer)

    # ---- clients

    async def _kill_client(self, length_s: float) -> None:
        victim = self.rng.choice(self.tenants.here)
        self.faults._note("kill a client", victim.name)
        await self.tenants.evict(victim)

    async def _pause_client(self, length_s: float) -> None:
        victim: SimClient = self.rng.choice(self.tenants.here)
        if victim.process.is_paused:
            return
        self.faults._note("pause a client", victim.name)
        victim.process.pause()
        await self.cluster.world.sleep(length_s)
        victim.process.resume()

    # ---- disks

    async def _flip(self) -> None:
        """A bit of one replica of a chunk."""
        cluster, faults = self.cluster, self.faults
        routing = cluster.routing()
        if not faults._is_calm() or not cluster.is_whole(routing):
            return
        chain = self.rng.choice(routing.chains)
        target = self.rng.choice(chain.targets).target
        home = next(each.node for each in routing.targets if each.id == target)
        machine = cluster.holder(home)
        places = _places(machine.targets[target])
        if not places:
            return
        chunk, file, begin, length = self.rng.choice(places)
        disk = machine.targets[target].disk
        assert disk is not None
        faults._note("flipped bit", f"{chunk.hex()} on {home}")
        disk.flip_bit(file, begin + self.rng.randrange(length), bit=self.rng.randrange(8))
        faults.is_truce = True
        reader = await cluster.client("reader")
        cluster.clients.remove(reader)
        await reader.process.spawn(self._read_until_right(reader, chain.id, chunk, machine.address), "read")
        reader.kill()
        faults.is_truce = False

    async def _read_until_right(self, reader: SimClient, chain: int, chunk: bytes, address: str) -> None:
        """This replica finds the damage, and gets a good copy from another one."""
        until_s = reader.process.now_s() + REPAIRED_S
        while True:
            assert reader.process.now_s() < until_s, f"chunk {chunk.hex()} on {address} stays damaged"
            request = ReadChunks([chain], [chunk], [0], [reader.routes.chain(chain).version])
            try:
                reply = await reader.network.connection(address).call(request, [memoryview(bytearray(1 << 17))])
            except EmberError:
                pass
            else:
                assert isinstance(reply, ChunksRead)
                if not reply.errors:
                    return
            await reader.process.sleep(0.1)


def _places(stored: StoredTarget) -> list[tuple[bytes, int, int, int]]:
    """(chunk, file, begin, length) of all that is committed and not about to change."""
    places = []
    if stored.index is None or stored.engine is None:
        return []  # It was killed, and nobody has noticed yet.
    for key, row in sorted(stored.index.snapshot().items()):
        if key.startswith(b"c"):
            record = decode_record(key[1:], row)
            if record.committed is not None and record.committed.length and not record.is_pending:
                file, begin = stored.engine.allocator.place(record.committed.position)
                places.append((key[1:], file, begin, record.committed.length))
    return places
