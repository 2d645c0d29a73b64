"""Where plays and walks of the KV cache take place: a cluster, two servers and clients, and what must be so in the end.

Does not know: who dies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from emberfs.client.namespace import Namespace as StoreNamespace
from emberfs.errors import Conflict, DeadlineExceeded, NotFound, Unavailable, UpdateUnknown
from emberfs.testing.sim.cluster import ClusterConfig, SimCluster
from emberfs.testing.sim.loop import SimRuntime
from emberfs.testing.sim.simulation import _no_garbage_collection
from emberfs.testing.sim.tenants import _findings
from emberkv import messages, puts
from emberkv.errors import ReadOnly, SeatGone

from tests.sim.cache_cluster import TENANT, CacheClient, CacheServer, chain
from tests.sim.cache_ledger import Ledger

SHAPE = ClusterConfig(managers=1, storage_nodes=3, metas=1, replicas=2, targets_per_disk=2, session_timeout_s=8.0)
RESERVATION_S = 2.0
LEASE_S = 1.5
SILENCE_S = 2.5
"""Who has not taken over by then, has no reason to."""
FRESH, FULL_PROMPTS = 1000, 14
"""Prompts that nobody has put, and more of them than there is room for."""
PATIENCE_S = 30.0
"""What is asked for again and again comes within it."""
COLLECTED_S = 30.0
AWAY = (Unavailable, DeadlineExceeded, UpdateUnknown, ReadOnly, NotFound)
"""What a client may be told while something is down."""
ALLOWED = (*AWAY, SeatGone)
"""The same where servers may follow each other more often than a client asks for a seat again."""


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Reservations are shorter than elsewhere, and nobody looks for garbage in circles: there is little."""
    with patch.object(puts, "RESERVATION_S", RESERVATION_S), _no_garbage_collection():
        yield


@dataclass(slots=True)
class Stage:
    """A cluster with two servers, a writer and a reader."""

    cluster: SimCluster
    ledger: Ledger = field(default_factory=Ledger)
    servers: list[CacheServer] = field(default_factory=list)
    clients: list[CacheClient] = field(default_factory=list)

    @property
    def world(self) -> SimRuntime:
        return self.cluster.world

    @property
    def managers(self) -> list[str]:
        return [machine.name for machine in self.cluster.managers]

    @property
    def writer(self) -> CacheClient:
        return self.clients[0]

    @property
    def reader(self) -> CacheClient:
        return self.clients[1]

    async def open(self) -> None:
        await self.cluster.start()
        self.servers = [CacheServer(self.cluster, name, self.ledger) for name in ("ka", "kb")]
        self.servers[0].start()
        for name in ("writer", "reader"):
            await self.join(name)
        # Patient enough to hear what a server has to say that was stopped for long.
        del self.writer.addresses[1:]

    async def join(self, name: str) -> CacheClient:
        """One more client."""
        client = CacheClient(await self.cluster.client(name), [server.address for server in self.servers])
        self.clients.append(client)
        return client

    async def served(self) -> CacheServer:
        """Who serves, once a client is served."""
        until_s = self.world.now_s() + PATIENCE_S
        while True:
            try:
                await self.within(self.reader, self.reader.match(chain(0, 1)))
            except ALLOWED as error:
                assert self.world.now_s() < until_s, f"nobody serves: {error}"
                await self.world.sleep(0.2)
                continue
            serving = [each for each in self.servers if each.pool is not None and not each.process.is_paused]
            if serving:
                return max(serving, key=lambda each: each.pool.ownership.epoch)  # type: ignore[union-attr]

    async def within(self, client: CacheClient, work: Coroutine[Any, Any, Any]) -> Any:
        """Work of a client, as a task of its process."""
        return await client.process.spawn(work, "work")

    def start_all(self) -> None:
        """The servers that are down."""
        for server in self.servers:
            if not server.is_up:
                server.start()

    def close(self) -> None:
        """Nothing runs any more."""
        for server in self.servers:
            server.kill()
        self.cluster.stop()

    # ---- at the end

    async def check(self, *, fills: bool = False) -> None:
        """Whatever happened: the cache goes on, and nothing is lost or left. `fills`: all that was there may go."""
        client = await self.join("inspector")
        await self.world.sleep(SILENCE_S)
        server = await self.served()
        ledger = self.ledger
        await self.within(client, ledger.check_index(server, client))
        for prompt in (2, 90):
            keys = chain(prompt, 4)
            await self.within(client, self.put_patiently(client, keys))
            leased = await self.within(client, ledger.match(client, keys, lease_s=LEASE_S))
            assert await self.within(client, ledger.read(client, leased)) == len(keys)
        await self.within(client, ledger.check_nothing_leaks(server, client))
        await self.within(client, ledger.check_index(server, client))
        for prompt in range(FRESH, FRESH + FULL_PROMPTS) if fills else ():
            await self.within(client, self.put_patiently(client, chain(prompt, 4)))
        ledger.committed.clear()
        await self.within(client, client.call(messages.Erase(TENANT), messages.Numbers))
        await self.within(client, ledger.check_all_goes(server, client))
        for each in self.clients:
            if each.process.is_alive:
                await self.within(each, each.let_go())
        await self.within(client, self._check_store(client))

    async def put_patiently(self, client: CacheClient, keys: Sequence[bytes]) -> None:
        """Until all of them are there: who was at them may have died."""
        until_s = client.process.now_s() + PATIENCE_S
        while True:
            try:
                told = str(await self.ledger.put(client, keys))
            except ALLOWED as error:
                told = str(error)
            if all(key in self.ledger.committed for key in keys):
                return
            assert client.process.now_s() < until_s, f"what is put does not come: {told}"
            await client.process.sleep(0.5)

    async def _check_store(self, client: CacheClient) -> None:
        """When the sessions of who died are over, nothing of what was removed is left in the store."""
        until_s = client.process.now_s() + COLLECTED_S
        store, meta = StoreNamespace(client.client.core), self.cluster.metas[0]
        while True:
            assert meta.process is not None
            try:
                pending = (await store.collect_garbage(True)).pending
                findings = await meta.process.spawn(_findings(meta), "check")
            except Conflict as error:  # Rows changed while it looked.
                left = str(error)
            else:
                if not pending and not findings:
                    return
                left = "\n".join([f"{pending} removed files are still there", *map(str, findings)])
            assert client.process.now_s() < until_s, left
            await client.process.sleep(1.0)
