"""Clients of a KV cache at random, and everything that may die at random, for a while; then all must be right.

    report = walk(seed)             # what was done, by kind; raises AssertionError, with the seed in a note

Servers and clients are killed and stopped, nodes lose power, ways are cut. More pages are put than the cache holds, so
that it evicts and compacts all the time.

Does not know: what is right (see `cache_ledger`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from emberfs.testing.sim.cluster import SimCluster, SimMachine
from emberfs.testing.sim.loop import SimRuntime
from emberkv import messages

from tests.sim.cache_cluster import CacheClient, chain
from tests.sim.cache_ledger import Ledger
from tests.sim.cache_stage import ALLOWED, SHAPE, Stage, hurried

CLIENTS = 4
BUSY_S = 12.0
PAUSE_S = 0.1
"""The mean pause of a client between two requests."""
FAULT_GAP_S = 1.0
WEIGHTS = (10, 12, 1, 1, 1)
"""How often a client puts, reads, removes, pins, and puts without waiting."""
PROMPTS = 16
PAGES_MAX = 6
LEASE_S = 2.0
PIN_S = 5.0
WHOLE_S = 30.0
END_S = 60.0
"""Every request comes to an end within it."""


def walk(seed: int) -> Counter[str]:
    """One seed."""
    counts: Counter[str] = Counter()

    async def main(world: SimRuntime) -> None:
        stage = Stage(SimCluster(world, config=SHAPE), Ledger(counts=counts))
        try:
            await _Walk(stage).run()
        finally:
            stage.close()

    with hurried():
        runtime = SimRuntime(seed)
        runtime.run(main)
    counts["steps"] = runtime.loop.steps
    return counts


class _Walk:
    def __init__(self, stage: Stage) -> None:
        self.stage, self.world, self.ledger = stage, stage.world, stage.ledger
        self._rng = stage.world.random("faults of the cache")
        self._is_over = False
        self._working: dict[CacheClient, asyncio.Task[None]] = {}
        self._came = 0

    async def run(self) -> None:
        stage, world = self.stage, self.world
        await stage.open()
        stage.start_all()
        for _ in range(CLIENTS):
            await self._move_in()
        end_s, running = world.now_s() + BUSY_S, []
        while world.now_s() < end_s:
            fault, seconds = self._rng.choice(self._faults()), self._rng.choice([0.1, 0.6, 1.5, 4.0])
            self.ledger.counts[fault.__name__.strip("_")] += 1
            running.append(world.spawn(fault(seconds), "fault"))
            await world.sleep(self._rng.expovariate(1 / FAULT_GAP_S))
        for task in running:
            await task
        self._is_over = True
        until_s = world.now_s() + WHOLE_S
        stage.start_all()
        while not stage.cluster.is_whole(stage.cluster.routing()):
            assert world.now_s() < until_s, f"not whole {WHOLE_S:g} s after the last fault"
            await world.sleep(0.2)
        for task in list(self._working.values()):
            done, _ = await asyncio.wait([task], timeout=END_S)
            assert done, "a request does not come to an end"
        await stage.check(fills=True)

    # ---- clients

    async def _move_in(self) -> None:
        self._came += 1
        client = await self.stage.join(f"c{self._came}")
        rng = self.world.random(f"requests of c{self._came}")
        self._working[client] = client.process.spawn(self._work(client, rng), "requests")

    async def _work(self, client: CacheClient, rng: random.Random) -> None:
        requests = [self._put, self._read, self._remove, self._pin, self._flush]
        while not self._is_over:
            await client.process.sleep(rng.expovariate(1 / PAUSE_S))
            keys = chain(rng.randrange(100, 100 + PROMPTS), rng.randint(1, PAGES_MAX))
            try:
                await rng.choices(requests, WEIGHTS)[0](client, keys, rng)
            except ALLOWED as error:
                self.ledger.counts[type(error).__name__] += 1
            except Exception as error:
                self.world.loop.fail(error)  # Now: it may be killed before anybody looks.

    async def _put(self, client: CacheClient, keys: list[bytes], rng: random.Random) -> None:
        await self.ledger.put(client, keys)

    async def _read(self, client: CacheClient, keys: list[bytes], rng: random.Random) -> None:
        """At once, or long after the lease."""
        leased = await self.ledger.match(client, keys, lease_s=LEASE_S)
        await client.process.sleep(rng.choices([0.0, 0.3, 1.5 * LEASE_S], [5, 10, 1])[0])
        await self.ledger.read(client, leased)
        if leased.hit.lease and rng.random() < 0.5:  # Others end by themselves.
            await client.ask(lambda seat: messages.Release(seat, [leased.hit.lease]), messages.Okay)

    async def _remove(self, client: CacheClient, keys: list[bytes], rng: random.Random) -> None:
        await client.ask(lambda seat: messages.Remove(seat, keys[-1]), messages.Okay)

    async def _pin(self, client: CacheClient, keys: list[bytes], rng: random.Random) -> None:
        await client.ask(lambda seat: messages.Pin(seat, keys[0], PIN_S), messages.Okay)

    async def _flush(self, client: CacheClient, keys: list[bytes], rng: random.Random) -> None:
        await client.put(keys, durable=False)
        await client.flush()

    # ---- faults

    def _faults(self) -> list[Callable[[float], Coroutine[Any, Any, None]]]:
        return [
            self._kill_a_server, self._kill_a_server, self._stop_a_server, self._cut_a_server_off,
            self._kill_a_client, self._cut_power, self._cut_all_power, self._kill_the_metadata,
        ]  # fmt: skip

    async def _kill_a_server(self, seconds: float) -> None:
        server = self._rng.choice(self.stage.servers)
        server.kill()
        await self.world.sleep(seconds)
        if not server.is_up:
            server.start()

    async def _stop_a_server(self, seconds: float) -> None:
        """For long enough that the other one takes over, or not."""
        server = self._rng.choice(self.stage.servers)
        if server.is_up and not server.process.is_paused:
            process = server.process
            process.pause()
            self.stage.cluster.fabric.suspect(server.host)
            await self.world.sleep(seconds)
            process.resume()

    async def _cut_a_server_off(self, seconds: float) -> None:
        """From the metadata, or from the nodes, one way or both."""
        fabric, cluster = self.stage.cluster.fabric, self.stage.cluster
        host = self._rng.choice(self.stage.servers).host
        others: Sequence[SimMachine] = self._rng.choice([cluster.metas, cluster.storage])
        pairs = [pair for each in others for pair in ((host, each.name), (each.name, host))]
        pairs = self._rng.choice([pairs, pairs[::2], pairs[1::2]])
        for pair in pairs:
            fabric.cut(*pair)
        await self.world.sleep(seconds)
        for pair in pairs:
            fabric.mend(*pair)

    async def _kill_a_client(self, seconds: float) -> None:
        client = self._rng.choice(list(self._working))
        del self._working[client]
        client.client.kill()
        await self._move_in()

    async def _cut_power(self, seconds: float) -> None:
        await self._crash([self._rng.choice(self.stage.cluster.storage)], seconds)

    async def _cut_all_power(self, seconds: float) -> None:
        await self._crash(self.stage.cluster.storage, seconds)

    async def _kill_the_metadata(self, seconds: float) -> None:
        cluster = self.stage.cluster
        await self._crash([self._rng.choice([cluster.metas[0], cluster.kv])], min(seconds, 1.5))

    async def _crash(self, machines: Sequence[SimMachine], seconds: float) -> None:
        victims = [machine for machine in machines if machine.is_up]
        for machine in victims:
            machine.kill(power=True)
        await self.world.sleep(seconds)
        for machine in victims:
            if not machine.is_up:
                machine.start()
