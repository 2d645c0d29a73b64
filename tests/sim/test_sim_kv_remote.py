"""The KV server and its clients under the simulated loop: the suite, and clients that lose and repeat messages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import Conflict, Unavailable, UpdateUnknown
from emberfs.kv.memory import MemoryKV
from emberfs.kv.remote import RemoteKV
from emberfs.kv.server import KvServer
from emberfs.kv.types import KV, Transaction, decode_int, encode_int
from emberfs.messages import Message
from emberfs.testing.kv import KVConformance
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.transport import MemoryConnection

CLIENTS = 4
INCREMENTS = 8
RESTARTS = 3


class TestSimulatedRemoteKV(KVConformance):
    @pytest.fixture(params=range(3))
    def runtime(self, request: pytest.FixtureRequest) -> Iterator[SimRuntime]:
        runtime = SimRuntime(request.param)
        yield runtime
        runtime.loop.close()

    @pytest.fixture
    def run(self, runtime: SimRuntime) -> Callable[..., Any]:
        return runtime.loop.run_until_complete

    @pytest.fixture
    def make_kv(self, runtime: SimRuntime, run: Callable[..., Any]) -> Callable[[], KV]:
        def make_kv() -> KV:
            server = KvServer(slow_kv(runtime), runtime)
            run(server.start())
            return RemoteKV(MemoryConnection(server), runtime)

        return make_kv

    def count_applies(self, kv: Any) -> Callable[[], int]:
        return super().count_applies(kv._connection.call.__self__._kv)


def slow_kv(runtime: SimRuntime, rows: dict[bytes, bytes] | None = None) -> MemoryKV:
    """A KV whose commits take as long as an offloaded call."""
    return MemoryKV(runtime, rows=rows, persist=lambda: runtime.offload(lambda: None))


class LossyMachine:
    """A server that crashes and comes back, behind a network that loses, delays and repeats messages."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.rng: random.Random = runtime.random("network")
        self.kv = slow_kv(runtime)
        self.server = KvServer(self.kv, runtime)
        self.copies: list[Any] = []
        self.is_lossy = True

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        fate = self.rng.random() if self.is_lossy else 1.0
        if fate < 0.05:
            raise Unavailable("did not leave")
        if fate < 0.1:
            raise UpdateUnknown("lost on the way there")
        if fate < 0.2:
            self.copies.append(self.runtime.spawn(self.deliver_late(request), "copy"))
        server = self.server
        reply = await server.handle(request)
        if server is not self.server or fate < 0.3:
            raise UpdateUnknown("lost on the way back")
        return reply

    async def deliver_late(self, request: Message) -> None:
        await self.runtime.sleep(self.rng.uniform(0, 0.2))
        try:
            await self.server.handle(request)
        except (Conflict, Unavailable, UpdateUnknown):
            pass

    async def crash(self) -> None:
        """Keep the durable rows and nothing else."""
        old, old_kv = self.server, self.kv
        self.kv = slow_kv(self.runtime, self.kv.snapshot())
        self.server = KvServer(self.kv, self.runtime)
        # What the old one does from now on reaches no disk that anybody reads.
        self.copies += [self.runtime.spawn(close(), "old") for close in (old.close, old_kv.close)]
        await self.runtime.sleep(self.rng.uniform(0, 1))
        await self.server.start()


def test_every_commit_is_applied_once(seeds: Sequence[int]) -> None:
    """Clients add to a counter blindly and by reading it. None sees an error, nothing is lost or doubled."""

    async def main(runtime: SimRuntime) -> None:
        machine = LossyMachine(runtime)
        await machine.server.start()

        async def work() -> None:
            kv = RemoteKV(MemoryConnection(machine), runtime)
            for _ in range(INCREMENTS):
                await kv.run(read_and_add)
                await kv.run(add_blindly)
                await runtime.sleep(machine.rng.uniform(0, 0.1))

        async def crash() -> None:
            for _ in range(RESTARTS):
                await runtime.sleep(machine.rng.uniform(0, 0.5))
                await machine.crash()

        tasks = [runtime.spawn(work(), "client") for _ in range(CLIENTS)] + [runtime.spawn(crash(), "crash")]
        for task in tasks:
            await task
        machine.is_lossy = False
        for copy in machine.copies:
            await copy
        rows = machine.kv.snapshot()
        assert decode_int(rows[b"blind"]) == decode_int(rows[b"read"]) == CLIENTS * INCREMENTS
        await machine.server.close()
        await machine.kv.close()

    for seed in seeds:
        run(seed, main)


async def read_and_add(transaction: Transaction) -> None:
    count = decode_int(await transaction.get(b"read"))
    transaction.put(b"read", encode_int(count + 1))


async def add_blindly(transaction: Transaction) -> None:
    transaction.add(b"blind", 1)
