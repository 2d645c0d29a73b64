"""Large buffers by UCX: which go there, whose memory is whose when a peer is late or lost, and what is done without it.

Run: pytest tests/fs/test_transport_ucx.py. What needs the library is skipped where it is not installed. RDMA is not
tried: no machine of ours has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import Overloaded, Unanswered, Unavailable, Unreachable, UpdateUnknown
from emberfs.messages import ChunksRead, Done, Message, Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Echo, Filling, Gated, pattern, read_request, write_request
from emberfs.transport import TcpConfig, TcpNetwork, ucx_library, ucx_rail
from emberfs.transport.blocks import BlockPool
from emberfs.transport.connection import LET_GO_S, TcpConnection
from emberfs.transport.frame import ASIDE_BYTES_MIN
from emberfs.transport.turns import UNSENT_BYTES_MAX, Turns
from emberfs.transport.ucx_rail import Rail, Rails
from emberfs.transport.wire import Wire

SIZE = 1 << 20

needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="UCX is not installed: pip install 'emberline[ucx]'"
)


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Callable[..., Any]:
    return Portal(runtime).run


@pytest.fixture(params=["shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Make = Callable[..., TcpNetwork]


@pytest.fixture
def make(runtime: AsyncioRuntime, run: Callable[..., Any]) -> Iterator[Make]:
    """Makes networks that are closed afterwards."""
    networks: list[TcpNetwork] = []

    def make(ucx: str, **settings: Any) -> TcpNetwork:
        networks.append(TcpNetwork(runtime, TcpConfig(shares_memory=False, ucx=ucx, **settings)))
        return networks[-1]

    yield make
    for network in reversed(networks):
        run(network.close())


async def joined(server: TcpNetwork, client: TcpNetwork, service: Any) -> TcpConnection:
    """A connection whose rail is up."""
    connection = client.connection((await server.serve("127.0.0.1:0", Welcoming(service))).address)
    while not connection.has_rail:
        await connection.call(Usage())
    return connection


class Welcoming:
    """Answers `Usage` itself."""

    def __init__(self, service: Any) -> None:
        self._service = service

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        return Done() if isinstance(request, Usage) else await self._service.handle(request, buffers)


class Held:
    """Stands before `Rail.send` or `Rail.receive` and keeps what was to go, until it is told to let it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._act = getattr(Rail, name)
        self._kept: list[tuple[Any, ...]] = []
        self._is_open = False
        monkeypatch.setattr(Rail, name, lambda *args: self._take(*args))

    def _take(self, *args: Any) -> None:
        if self._is_open:
            self._act(*args)
        else:
            self._kept.append(args)

    async def until(self, runtime: AsyncioRuntime, count: int) -> None:
        while len(self._kept) < count:
            await runtime.sleep(1e-3)

    @property
    def count(self) -> int:
        return len(self._kept)

    def let_go(self) -> None:
        self._is_open = True
        for args in self._kept:
            self._act(*args)


# ---- what goes there


@needs_ucx
def test_large_buffers_go_by_ucx_and_small_ones_do_not(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [0, ASIDE_BYTES_MIN - 1, ASIDE_BYTES_MIN, 7, SIZE]

    async def work() -> None:
        echo = Echo()
        connection = await joined(make(kind), make(kind), echo)
        sent: list[int] = []
        act = Rail.send
        monkeypatch.setattr(Rail, "send", lambda rail, view, *args: (sent.append(len(view)), act(rail, view, *args)))
        payload = [pattern(size, seed) for seed, size in enumerate(sizes)]
        await connection.call(write_request(len(sizes)), [memoryview(each) for each in payload])
        assert echo.payloads == [payload]
        assert sent == [ASIDE_BYTES_MIN, SIZE]

    run(work())


@needs_ucx
@pytest.mark.parametrize(("here", "there"), [("", "shm"), ("shm", ""), ("shm", "tcp")])
def test_without_a_common_kind_all_bytes_go_over_the_socket(
    run: Callable[..., Any], make: Make, here: str, there: str
) -> None:
    async def work() -> None:
        listener = await make(there).serve("127.0.0.1:0", Filling())
        connection = make(here).connection(listener.address)
        for _ in range(3):
            buffer = bytearray(SIZE)
            assert await connection.call(read_request([SIZE]), [memoryview(buffer)]) == ChunksRead([SIZE])
            assert buffer == pattern(SIZE, 0)
        assert not connection.has_rail

    run(work())


@needs_ucx
def test_the_best_common_kind_is_taken() -> None:
    rails = Rails("auto")
    try:
        assert rails.kinds[-2:] == ("shm", "tcp")
        assert rails.common(("tcp", "shm"), is_same_host=True) == "shm"
        assert rails.common(("tcp", "shm"), is_same_host=False) == "tcp"
        assert rails.common((), is_same_host=True) == ""
    finally:
        rails.close()


@needs_ucx
def test_more_rails_than_there_may_be_are_done_without(
    run: Callable[..., Any], make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ucx_rail, "RAILS_MAX", 0)

    async def work() -> None:
        connection = make("shm").connection((await make("shm").serve("127.0.0.1:0", Filling())).address)
        buffer = bytearray(SIZE)
        assert await connection.call(read_request([SIZE]), [memoryview(buffer)]) == ChunksRead([SIZE])
        assert not connection.has_rail

    run(work())
    assert "goes on without UCX" in caplog.text


@needs_ucx
@pytest.mark.parametrize("ucx", ["", "tcp"])
def test_with_a_rail_there_is_no_lane_beside_it(
    run: Callable[..., Any], make: Make, runtime: AsyncioRuntime, ucx: str
) -> None:
    """Lanes over TCP take every read of an open file: none would be left for UCX."""

    async def work() -> None:
        config = TcpConfig(shares_memory=False, ucx="tcp")
        server = TcpNetwork(runtime, config, adopt_lane=lambda descriptor, is_stream, tenant: os.close(descriptor))
        client = make(ucx)
        address = (await server.serve("127.0.0.1:0", Filling())).address
        await client.connection(address).call(read_request([1]), [memoryview(bytearray(1))])
        lane = await client.open_lane(address)
        assert (lane is None) == bool(ucx)
        if lane is not None:
            lane.close()
        await client.close()
        await server.close()

    run(work())


@needs_ucx
def test_a_rail_on_which_nothing_comes_through_is_not_used(
    run: Callable[..., Any], make: Make, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    """A firewall, say."""
    monkeypatch.setattr(ucx_library.Worker, "send", lambda worker, view, tag: 0)

    async def work() -> None:
        connection = make("tcp").connection((await make("tcp").serve("127.0.0.1:0", Filling())).address)
        for _ in range(3):
            buffer = bytearray(SIZE)
            assert await connection.call(read_request([SIZE]), [memoryview(buffer)]) == ChunksRead([SIZE])
            await runtime.sleep(0.02)
        assert not connection.has_rail

    run(work())


# ---- whose memory it is


@needs_ucx
def test_a_read_that_is_cancelled_while_it_lands_ends_when_it_has_landed(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    async def work() -> None:
        connection = await joined(make(kind), make(kind), Filling())
        held, buffer = Held(monkeypatch, "receive"), bytearray(SIZE)
        read = runtime.spawn(connection.call(read_request([SIZE]), [memoryview(buffer)]), "read")  # type: ignore[arg-type]
        await held.until(runtime, 1)
        read.cancel()
        await runtime.sleep(0.02)
        assert not read.done(), "its memory is still in use"
        held.let_go()
        with pytest.raises(asyncio.CancelledError):
            await read
        buffer[:] = bytes(SIZE)
        assert await connection.call(Usage()) == Done()
        assert buffer == bytes(SIZE)

    run(work())


@needs_ucx
def test_a_write_that_is_cancelled_keeps_its_memory_until_the_server_has_it(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    async def work() -> None:
        echo = Echo()
        connection = await joined(make(kind), make(kind), echo)
        held, buffer = Held(monkeypatch, "receive"), bytearray(pattern(SIZE, 1))
        write = runtime.spawn(connection.call(write_request(1), [memoryview(buffer)]), "write")  # type: ignore[arg-type]
        await held.until(runtime, 1)
        write.cancel()
        await runtime.sleep(0.02)
        assert not write.done(), "its memory is still in use"
        held.let_go()
        with pytest.raises(asyncio.CancelledError):
            await write
        buffer[:] = bytes(SIZE)
        assert await connection.call(Usage()) == Done()
        assert echo.payloads == [[pattern(SIZE, 1)]]

    run(work())


@needs_ucx
def test_a_read_that_was_given_up_before_its_answer_lands_elsewhere(
    run: Callable[..., Any], make: Make, kind: str, runtime: AsyncioRuntime
) -> None:
    async def work() -> None:
        filling = Unstoppable(runtime)
        connection = await joined(make(kind), make(kind), filling)
        buffer = bytearray(SIZE)
        read = runtime.spawn(connection.call(read_request([SIZE]), [memoryview(buffer)]), "read")  # type: ignore[arg-type]
        await filling.began
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await runtime.sleep(0.1)
        assert await connection.call(Usage()) == Done()
        assert buffer == bytes(SIZE)
        assert connection.has_rail

    run(work())


class Unstoppable(Filling):
    """Answers a call that was cancelled all the same."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self.began = runtime.future()
        self._runtime = runtime

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.began.set_result(None)
        with contextlib.suppress(asyncio.CancelledError):
            await self._runtime.sleep(0.05)
        return await super().handle(request, buffers)


@needs_ucx
def test_a_read_whose_time_is_over_while_it_lands_ends_when_it_has_landed(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    """What UCX writes to cannot be taken away from it, however long it takes."""

    async def work() -> None:
        connection = await joined(make(kind), make(kind), Filling())
        held, buffer = Held(monkeypatch, "receive"), bytearray(SIZE)
        call = connection.call(read_request([SIZE]), [memoryview(buffer)], timeout_s=0.2)
        read = runtime.spawn(call, "read")  # type: ignore[arg-type]
        await held.until(runtime, 1)
        await runtime.sleep(0.2 + 2 * LET_GO_S)
        assert not read.done(), "its memory is still in use"
        held.let_go()
        with pytest.raises(Unanswered):
            await read
        buffer[:] = bytes(SIZE)
        assert await connection.call(Usage()) == Done()
        assert buffer == bytes(SIZE)
        assert connection.has_rail

    run(work())


@needs_ucx
def test_a_write_whose_bytes_have_left_waits_for_nothing(
    run: Callable[..., Any], make: Make, kind: str, runtime: AsyncioRuntime
) -> None:
    async def work() -> None:
        gated = Gated(runtime)
        connection = await joined(make(kind), make(kind), gated)
        buffers = [memoryview(bytearray(SIZE)) for _ in range(2)]
        cancelled = runtime.spawn(connection.call(write_request(1), [buffers[0]]), "write")  # type: ignore[arg-type]
        await gated.until_began(1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with pytest.raises(UpdateUnknown):
            await connection.call(write_request(1), [buffers[1]], timeout_s=0.3)
        assert connection._link is not None
        assert all(not call.buffers for call in connection._link._calls.values()), "nothing refers to the memory"
        gated.open()
        assert await connection.call(Usage()) == Done()

    run(work())


@needs_ucx
def test_a_payload_that_is_refused_is_received_and_forgotten(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        echo = Echo()
        connection = await joined(make(kind), make(kind), echo)
        payload = [memoryview(bytearray(size)) for size in (7, SIZE, ASIDE_BYTES_MIN, 2 * SIZE)]
        with monkeypatch.context() as patch:
            patch.setattr(Turns, "admit", refuse)
            patch.setattr(BlockPool, "take", lambda pool, size: pytest.fail("no memory is taken for it"))
            with pytest.raises(Overloaded):
                await connection.call(write_request(len(payload)), payload)
        await connection.call(write_request(1), [memoryview(pattern(SIZE, 3))])
        assert echo.payloads == [[pattern(SIZE, 3)]]

    def refuse(*args: Any) -> None:
        raise Overloaded("too much", retry_after_s=0.1)

    run(work())


@needs_ucx
def test_a_reply_is_unsent_until_all_of_it_has_left(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    """Who does not take its replies begins nothing, whichever way they go."""

    async def work() -> None:
        filling = Filling()
        connection = await joined(make(kind), make(kind), filling)
        held, size = Held(monkeypatch, "send"), UNSENT_BYTES_MAX + 1
        buffers = [memoryview(bytearray(size)) for _ in range(2)]
        calls = [
            runtime.spawn(connection.call(read_request([size]), [buffer]), "read")  # type: ignore[arg-type]
            for buffer in buffers
        ]
        await held.until(runtime, 1)
        await runtime.sleep(0.05)
        assert held.count == 1, "the second one waits for its turn"
        held.let_go()
        for call in calls:
            await call
        assert all(buffer == pattern(size, 0) for buffer in buffers)

    run(work())


@needs_ucx
def test_nothing_comes_after_a_loss(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    """The server has announced its bytes, the client waits for them, and the connection ends."""

    async def work() -> None:
        server = make(kind)
        connection = await joined(server, make(kind), Filling())
        held, buffer = Held(monkeypatch, "send"), bytearray(SIZE)
        read = runtime.spawn(connection.call(read_request([SIZE]), [memoryview(buffer)]), "read")  # type: ignore[arg-type]
        await held.until(runtime, 1)
        await runtime.sleep(0.02)
        link = connection._link
        assert link is not None
        link.wire.lose(ConnectionError("cut"))
        with pytest.raises(Unreachable):
            await read
        buffer[:] = bytes(SIZE)
        await runtime.sleep(0.02)
        assert buffer == bytes(SIZE)

    run(work())


@needs_ucx
def test_bytes_of_a_server_that_has_closed_the_connection_are_not_believed(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have used its memory for something else while they were taken from there."""

    async def work() -> None:
        connection = await joined(make(kind), make(kind), Filling())
        monkeypatch.setattr(Wire, "is_open", lambda wire: False)
        with pytest.raises(Unreachable):
            await connection.call(read_request([SIZE]), [memoryview(bytearray(SIZE))])
        with pytest.raises(UpdateUnknown):
            await (await joined(make(kind), make(kind), Echo())).call(write_request(1), [memoryview(bytes(SIZE))])

    run(work())


@needs_ucx
def test_what_was_announced_and_does_not_come_ends_the_connection(
    run: Callable[..., Any], make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        connection = await joined(make(kind, ping_s=0.05), make(kind, ping_s=0.05, dead_s=0.2), Filling())
        Held(monkeypatch, "send")
        with pytest.raises(Unreachable, match="did not come by UCX"):
            await connection.call(read_request([SIZE]), [memoryview(bytearray(SIZE))])

    run(work())


def test_a_socket_that_was_closed_is_seen_behind_what_it_still_brings() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        wire = Wire(asyncio.get_running_loop(), ours, Deaf())
        assert wire.is_open()
        theirs.send(b"more")
        assert wire.is_open()
        theirs.close()
        assert not wire.is_open()
        wire.lose(ConnectionError("done"))

    asyncio.run(work())


def test_an_end_is_seen_though_a_child_has_a_copy_of_the_socket() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        pair = socket.socketpair()
        for sock in pair:
            sock.setblocking(False)
        copy = pair[1].dup()
        ours, theirs = (Wire(loop, sock, Deaf()) for sock in pair)
        theirs.lose(ConnectionError("done"))
        assert not ours.is_open()
        ours.lose(ConnectionError("done"))
        copy.close()

    asyncio.run(work())


class Deaf:
    """A peer that is told nothing here."""

    def begin(self, frame: Any) -> Sequence[memoryview]:
        return ()

    def end(self) -> None:
        pass

    def lost(self, error: Exception) -> None:
        pass


@needs_ucx
def test_a_killed_server_is_a_lost_one_and_the_next_one_is_found(
    run: Callable[..., Any], make: Make, kind: str, runtime: AsyncioRuntime
) -> None:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            own = AsyncioRuntime()
            network = TcpNetwork(own, TcpConfig(shares_memory=False, ucx=kind))
            os.write(writes, Portal(own).run(network.serve("127.0.0.1:0", Welcoming(Filling()))).address.encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writes)
    address = os.read(reads, 100).decode()
    os.close(reads)
    failed: list[Exception] = []
    networks = [make(kind)]

    async def read_on(connection: TcpConnection) -> None:
        buffer = bytearray(8 * SIZE)
        try:
            while True:
                await connection.call(read_request([8 * SIZE]), [memoryview(buffer)])
                assert buffer == pattern(8 * SIZE, 0)
        except Unavailable as error:
            failed.append(error)

    async def work() -> None:
        connection = networks[0].connection(address)
        while not connection.has_rail:
            await connection.call(Usage())
        tasks = [runtime.spawn(read_on(connection), "read") for _ in range(4)]
        await runtime.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        for task in tasks:
            await task
        assert len(failed) == 4

    async def work_again() -> None:
        connection = networks[0].connection(address)
        listener = await make(kind).serve(address, Welcoming(Filling()))
        while not connection.has_rail:
            await connection.call(Usage())
        buffer = bytearray(SIZE)
        await connection.call(read_request([SIZE]), [memoryview(buffer)])
        assert buffer == pattern(SIZE, 0)
        await listener.close()

    try:
        run(work())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # Its port is free now.
    run(work_again())


@needs_ucx
def test_workers_leave_no_file_descriptor_behind(run: Callable[..., Any], make: Make, kind: str) -> None:
    async def work() -> None:
        server, client = make(kind), make(kind)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            connection = await joined(server, client, Filling())
            await connection.close()
        for listener in server._listeners:
            await listener.close()
        assert len(os.listdir("/proc/self/fd")) == before

    run(work())
