"""The clients that work on the files of a simulated cluster, and the end of them all.

    tenants = Tenants(cluster)
    await tenants.move_in(3)
    await tenants.evict(rng)            # one is killed, another comes
    await tenants.stop()
    await tenants.audit(...)

When everybody has gone, what they left is recovered within RECOVERED_S: no session, no grant, no truncate that is due,
no block of ids is left. Then a last client looks at everything (`Files.audit`), empties the trash, and fsck is silent.

Does not know: what clients do, or when one is evicted.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from ...client.namespace import Namespace
from ...errors import Unavailable
from ...kv.types import decode_int
from ...meta.check import Finding
from ...meta.clients import CLEANED
from .cluster import MetaMachine, SimClient, SimCluster
from .namespace import Files
from .workload import INODE

WORKERS = 2
"""Of each client: so many operations at the same time."""
RECOVERED_S = 60.0
"""After everybody has gone, at the latest."""
COLLECTED_S = 30.0


class Tenants:
    """Clients with workers."""

    def __init__(self, cluster: SimCluster) -> None:
        self.files = Files()
        self.cluster = cluster
        self.here: list[SimClient] = []
        self._tasks: dict[SimClient, list[asyncio.Task[Any]]] = {}
        self._count = 0

    async def move_in(self, count: int) -> None:
        """So many new clients begin to work."""
        for _ in range(count):
            self._count += 1
            client = await self.cluster.client(f"n{self._count}")
            self.here.append(client)
            world = self.cluster.world
            self._tasks[client] = [
                client.process.spawn(self._work(client, world.random(f"files {worker} of {client.name}")), "files")
                for worker in range(WORKERS)
            ]

    async def _work(self, client: SimClient, rng: random.Random) -> None:
        try:
            await self.files.run(client, rng)
        except Exception as error:
            # Now: the client may be killed before anybody waits for it.
            self.cluster.world.loop.fail(error)

    async def evict(self, client: SimClient) -> None:
        """Kill a client; another one takes its place."""
        self._leave(client)
        await self.move_in(1)

    def _leave(self, client: SimClient) -> None:
        client.kill()
        self.here.remove(client)
        self.cluster.clients.remove(client)
        del self._tasks[client]

    async def stop(self) -> None:
        """Every operation comes to an end."""
        self.files.is_over = True
        for tasks in list(self._tasks.values()):
            for task in tasks:
                await task

    async def audit(self, rng: random.Random) -> None:
        """All leave, some without a word; then everything must be right."""
        for client in list(self.here):
            if rng.random() < 0.5:
                await client.process.spawn(client.routes.close(), "leave")
            self._leave(client)
        world = self.cluster.world
        until_s = world.now_s() + RECOVERED_S
        while left := self._unrecovered():
            assert world.now_s() < until_s, f"not recovered after {RECOVERED_S:g} s: {left}"
            await world.sleep(0.5)
        inspector = await self.cluster.client("inspector")
        await inspector.process.spawn(self.files.audit(inspector), "audit")
        await inspector.process.spawn(self._collect(inspector), "collect")
        await self._check()

    def _unrecovered(self) -> dict[str, int]:
        """Rows about clients: letter -> how many."""
        kv = self.cluster.kv.kv
        assert kv is not None
        left: dict[str, int] = {}
        for key, row in kv.snapshot().items():
            letter = key[:1].decode("latin-1")
            if letter in "SPTL" or (letter == "K" and decode_int(row) < CLEANED):
                left[letter] = left.get(letter, 0) + 1
        return left

    async def _collect(self, client: SimClient) -> None:
        """Nothing is left in the trash and of the garbage."""
        world = self.cluster.world
        until_s = world.now_s() + COLLECTED_S
        pending = 1
        while pending:
            assert world.now_s() < until_s, f"{pending} removed files are still there"
            await client.process.sleep(0.5)
            try:
                await Namespace(client.core).trash_empty(0)
                pending = (await Namespace(client.core).collect_garbage(True)).pending
            except Unavailable:
                pass

    async def _check(self) -> None:
        machine = self.cluster.metas[0]
        assert machine.process is not None
        findings = await machine.process.spawn(_findings(machine), "check")
        assert not findings, "fsck: " + "\n".join(map(str, findings))


async def _findings(machine: MetaMachine) -> list[Finding]:
    assert machine.service is not None
    found = await machine.service.check()
    return [each for each in found if f"inode {INODE:x}" not in each.detail]
