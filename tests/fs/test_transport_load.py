"""More than a server can do: what waits, what is refused, and what neither. Gates decide the order, not the clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import Overloaded, Unanswered
from emberfs.messages import (
    AskCommitted,
    ChunksRead,
    CommittedVersions,
    Done,
    Forward,
    Heartbeat,
    Message,
    ReadChunks,
    WriteChunks,
)
from emberfs.messages.base import EVERYBODY
from emberfs.portal import Portal
from emberfs.runtime import OFFLOAD_THREADS_MAX, AsyncioRuntime
from emberfs.testing.transport import Filling, outcome, pattern, read_request, write_request
from emberfs.transport import LoadConfig, TcpConfig, TcpNetwork
from emberfs.transport.codec import encode_message, message_classes
from emberfs.transport.frame import Kind, encode_frame
from emberfs.transport.handshake import client_hello, encode_hello
from emberfs.transport.turns import UNSENT_BYTES_MAX

KIB, MIB = 1 << 10, 1 << 20
LOAD = LoadConfig(bytes_max=96 * MIB, calls_max=8, waiting_max=20, wait_s_max=60.0)
MakeNetwork = Callable[..., TcpNetwork]


class Store(Filling):
    """Fills buffers; what is asked of chain 2 waits for a slow disk, until the test opens the gate."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self.gate = runtime.future()
        self.slow = 0
        self.served = 0

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if isinstance(request, AskCommitted):
            return CommittedVersions([1])
        if isinstance(request, ReadChunks | WriteChunks) and request.chains[0] == 2:
            self.slow += 1
            await asyncio.shield(self.gate)
        if isinstance(request, ReadChunks):
            self.served += 1
            return await super().handle(request, buffers)
        return Done()


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def make_network(runtime: AsyncioRuntime) -> Iterator[MakeNetwork]:
    made: list[TcpNetwork] = []

    def make(config: TcpConfig | None = None) -> TcpNetwork:
        made.append(TcpNetwork(runtime, config or TcpConfig(shares_memory=False)))
        return made[-1]

    yield make
    for network in made:
        Portal(runtime).run(network.close())


@pytest.fixture
def on_store(runtime: AsyncioRuntime, make_network: MakeNetwork) -> Callable[..., None]:
    """Runs a test with a store that is served under `LOAD`, and its address."""

    def on_store(work: Callable[[Store, str], Coroutine[Any, Any, None]], load: LoadConfig = LOAD) -> None:
        async def main() -> None:
            store = Store(runtime)
            listener = await make_network(TcpConfig(shares_memory=False, load=load)).serve("127.0.0.1:0", store)
            try:
                await work(store, listener.address)
            finally:
                if not store.gate.done():
                    store.gate.set_result(None)

        Portal(runtime).run(main())

    return on_store


def slow_read(size: int) -> ReadChunks:
    return ReadChunks([2], [b"c" * 16], [size])


async def read(connection: Any, size: int = 4 * KIB) -> None:
    buffer = bytearray(size)
    assert await connection.call(read_request([size]), [memoryview(buffer)]) == ChunksRead([size])
    assert buffer == pattern(size, 0)


def test_only_what_clients_ask_of_chunks_takes_turns() -> None:
    for kind in message_classes():
        if kind.takes_turns:
            assert kind.may_send >= EVERYBODY, f"{kind.__name__}: servers do not wait for readers"
    taking = {kind.__name__ for kind in message_classes() if kind.takes_turns}
    assert taking == {"ReadChunks", "WriteChunks", "TruncateChunk", "RemoveChunks", "ListChunks"}
    assert not Heartbeat.takes_turns
    assert not Forward.takes_turns


def test_servers_among_themselves_do_not_wait_behind_readers(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        connection = make_network().connection(address)
        reads = [
            runtime.spawn(outcome(connection.call(slow_read(MIB), [memoryview(bytearray(MIB))])), "read")
            for _ in range(60)
        ]
        while not (refused := [each for each in reads if each.done()]):
            await runtime.sleep(1e-3)
        assert all(isinstance(each.result(), Overloaded) for each in refused)
        assert await connection.call(AskCommitted(1, 1, [b"c" * 16])) == CommittedVersions([1])
        forward = Forward(1, 1, 1, 1, [], [], [], [], [], [])
        assert await connection.call(forward, [memoryview(bytes(16 * MIB))]) == Done()
        store.gate.set_result(None)
        outcomes = [await each for each in reads]
        assert {type(each) for each in outcomes} == {ChunksRead, Overloaded}
        assert store.served == outcomes.count(ChunksRead([MIB])) >= LOAD.waiting_max

    on_store(work)


def test_a_write_does_not_wait_behind_reads_of_a_slow_disk(runtime: AsyncioRuntime) -> None:
    gate = threading.Event()

    async def work() -> str:
        await runtime.enter_loop()
        reads = [runtime.spawn(runtime.offload_read(gate.wait, 60.0), "read") for _ in range(4 * OFFLOAD_THREADS_MAX)]
        written = await runtime.offload(lambda: "written")
        assert not any(each.done() for each in reads)
        gate.set()
        assert all([await each for each in reads])
        return written

    assert Portal(runtime).run(work()) == "written"


def test_others_read_what_is_cached_while_a_disk_is_slow(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        waiting = []
        for _ in range(10):
            connection = make_network().connection(address)
            for _ in range(2):
                call = outcome(connection.call(slow_read(MIB), [memoryview(bytearray(MIB))]))
                waiting.append(runtime.spawn(call, "slow"))
        while store.slow < LOAD.calls_max:
            await runtime.sleep(1e-3)
        connection = make_network().connection(address)
        for _ in range(10):
            await read(connection)
        assert not any(each.done() for each in waiting)
        store.gate.set_result(None)
        assert [await each for each in waiting] == [ChunksRead([MIB])] * 20

    on_store(work)


def test_a_payload_that_is_refused_is_read_and_forgotten(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        slow = WriteChunks(b"client", 1, 1, [2], [b"c" * 16], [0], 1 << 20)
        first = make_network().connection(address).call(slow, [memoryview(bytes(60 * MIB))])
        writing = runtime.spawn(outcome(first), "write")
        while not store.slow:
            await runtime.sleep(1e-3)
        connection = make_network().connection(address)
        with pytest.raises(Overloaded) as caught:
            await connection.call(write_request(1), [memoryview(bytes(60 * MIB))])
        assert 0 < caught.value.retry_after_s <= LOAD.wait_s_max
        await read(connection)
        store.gate.set_result(None)
        assert await writing == Done()
        assert await connection.call(write_request(1), [memoryview(bytes(60 * MIB))]) == Done()

    on_store(work)


def test_a_read_that_is_given_up_while_it_waits_does_not_begin(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        connection = make_network().connection(address)

        def slow() -> Any:
            return runtime.spawn(outcome(connection.call(slow_read(MIB), [memoryview(bytearray(MIB))])), "slow")

        waiting = [slow() for _ in range(10)]
        while not store.slow:
            await runtime.sleep(1e-3)
        with pytest.raises(Unanswered):
            await connection.call(slow_read(MIB), [memoryview(bytearray(MIB))], timeout_s=0.1)
        store.gate.set_result(None)
        assert [await each for each in waiting] == [ChunksRead([MIB])] * 10
        assert store.slow == 10

    on_store(work)


def test_a_client_that_is_lost_leaves_nothing_behind(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        for _ in range(5):
            network = make_network()
            reads = [
                runtime.spawn(
                    outcome(network.connection(address).call(slow_read(MIB), [memoryview(bytearray(MIB))])), "slow"
                )
                for _ in range(20)
            ]
            seen = store.slow
            while store.slow == seen:
                await runtime.sleep(1e-3)
            await network.close()
            for each in reads:
                await each
        store.gate.set_result(None)
        connection = make_network().connection(address)
        tasks = [runtime.spawn(read(connection, MIB), "read") for _ in range(20)]
        for task in tasks:
            await task

    on_store(work)


async def deaf(address: str) -> asyncio.StreamWriter:
    """A client that asks for 64 MiB and reads nothing of it."""
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=KIB)
    writer.write(encode_frame(Kind.HELLO, 0, encode_hello(client_hello(TcpConfig()))))
    for number in range(1, 513):
        writer.write(encode_frame(Kind.FETCH, number, encode_message(read_request([128 * KIB])), [128 * KIB]))
    return writer


def test_who_does_not_read_is_given_little_and_hurts_nobody(
    on_store: Callable[..., None], make_network: MakeNetwork, runtime: AsyncioRuntime
) -> None:
    async def work(store: Store, address: str) -> None:
        writer = await deaf(address)
        while not store.served:
            await runtime.sleep(1e-3)
        connection = make_network().connection(address)
        for _ in range(50):
            await read(connection, 64 * KIB)
        served = store.served - 50
        assert UNSENT_BYTES_MAX < served * 128 * KIB < 32 * MIB, "what the kernel takes, and a little more"
        writer.close()

    on_store(work)


def test_who_never_reads_is_given_up(make_network: MakeNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        config = TcpConfig(shares_memory=False, ping_s=0.05, dead_s=60.0, stall_s=0.2)
        listener = await make_network(config).serve("127.0.0.1:0", Store(runtime))
        writer = await deaf(listener.address)
        while not listener.sessions:
            await runtime.sleep(1e-3)
        while listener.sessions:
            await runtime.sleep(1e-2)
        writer.close()

    Portal(runtime).run(work())
