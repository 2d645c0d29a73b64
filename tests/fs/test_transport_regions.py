"""Shared memory between a server and clients of its host: whose it is, and what a client that misbehaves can do."""

from __future__ import annotations

import array
import asyncio
import fcntl
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from emberfs.errors import AccessDenied, LimitExceeded, ProtocolError, Unanswered, Unreachable, UpdateUnknown
from emberfs.messages import ChunksRead, Done, Message, Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Echo, Filling, Gated, pattern, read_request, write_request
from emberfs.transport import TcpConfig, TcpNetwork, allocate
from emberfs.transport.address import parse_address
from emberfs.transport.codec import encode_message
from emberfs.transport.frame import Kind, encode_frame, encode_places
from emberfs.transport.handshake import client_hello, encode_hello
from emberfs.transport.region import REGION_BYTES_MAX, REGIONS_MAX, ForeignRegions, Region, find, renewals

SIZE = 1 << 20


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def network(runtime: AsyncioRuntime) -> Iterator[TcpNetwork]:
    network = TcpNetwork(runtime)
    yield network
    Portal(runtime).run(network.close())


class Remembering(Filling):
    """Keeps the buffers that it was given, as a worker thread that nobody stopped would."""

    def __init__(self) -> None:
        self.seen: list[memoryview] = []

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.seen += buffers
        return await super().handle(request, buffers)


def memfd(size: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# ---- memory


def open_memory() -> int:
    """How many memfds this process has open: other descriptors come and go with other tests' threads."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(entry).startswith("/memfd:")
    return count


def test_memory_goes_with_its_last_view() -> None:
    gc.collect()
    before = open_memory()
    view = allocate(SIZE)
    part = view[100:200]
    place = find(part)
    assert place is not None and place.offset == 100
    assert find(memoryview(bytearray(100))) is None
    assert find(part.toreadonly()) is None
    del view, place
    part[:] = b"x" * 100
    assert open_memory() == before + 1
    del part
    gc.collect()
    assert open_memory() == before


@pytest.mark.parametrize("size", [0, -1, 1 << 41])
def test_memory_has_limits(size: int) -> None:
    with pytest.raises(LimitExceeded):
        allocate(size)


def test_renewed_memory_keeps_its_content_and_its_place() -> None:
    region = Region(SIZE)
    mine = region.memory()
    mine[:] = pattern(SIZE, 7)
    theirs = ForeignRegions()
    theirs.add(1, os.dup(region.fd))
    (late,) = theirs.views([(1, 0)], [SIZE])
    assert late == mine
    region.renew()
    late[:] = bytes(SIZE)
    assert mine == pattern(SIZE, 7)


# ---- calls


def test_a_read_lands_in_the_callers_memory_and_nowhere_else(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        service = Remembering()
        connection = network.connection((await network.serve("127.0.0.1:0", service)).address)
        memory = allocate(SIZE)
        buffers = [memory[10:5010], memory[6000:6001], memory[7000:7000]]
        assert await connection.call(read_request([5000, 1, 0]), buffers) == ChunksRead([5000, 1, 0])
        assert [bytes(buffer) for buffer in buffers] == [pattern(5000, 0), pattern(1, 1), b""]
        service.seen[0][:] = b"!" * 5000
        assert bytes(buffers[0]) == b"!" * 5000, "the server was given our memory"

    Portal(runtime).run(work())


def test_what_is_written_is_the_servers_own(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        gated = Gated(runtime)
        connection = network.connection((await network.serve("127.0.0.1:0", Keeping(gated))).address)
        memory = allocate(SIZE)
        memory[:] = pattern(SIZE, 1)
        writing = runtime.spawn(connection.call(write_request(1), [memory]), "write")  # type: ignore[arg-type]
        await gated.until_began(1)
        memory[:] = bytes(SIZE)
        gated.open()
        await writing

    class Keeping:
        def __init__(self, gated: Gated) -> None:
            self.gated = gated

        async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
            await self.gated.handle(request, ())
            assert bytes(buffers[0]) == pattern(SIZE, 1)
            return Done()

    Portal(runtime).run(work())


def test_a_cancelled_read_ends_when_the_server_has_let_go(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    class Slow:
        """Is stopped, and goes on to write: a thread does not hear of it."""

        has_let_go = False

        async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
            try:
                await runtime.sleep(60)
            finally:
                buffers[0][:] = b"late"
                self.has_let_go = True
            raise AssertionError

    async def work() -> None:
        slow = Slow()
        connection = network.connection((await network.serve("127.0.0.1:0", slow)).address)
        memory = allocate(4)
        reading = runtime.spawn(connection.call(read_request([4]), [memory]), "read")  # type: ignore[arg-type]
        await runtime.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert slow.has_let_go

    Portal(runtime).run(work())


def test_a_server_that_is_lost_writes_to_nothing_of_ours(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        taken: list[memoryview] = []
        forever = runtime.future()

        class Stuck:
            async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
                taken.extend(buffers)
                await forever
                raise AssertionError

        listener = await network.serve("127.0.0.1:0", Stuck())
        connection = network.connection(listener.address)
        other = network.connection((await network.serve("127.0.0.1:0", Stuck())).address)
        memory = allocate(SIZE)
        memory[:] = pattern(SIZE, 3)
        half = SIZE // 2
        reading = runtime.spawn(outcome(connection.call(read_request([half]), [memory[:half]])), "read")
        beside = runtime.spawn(outcome(other.call(read_request([half]), [memory[half:]])), "beside")
        while len(taken) < 2:
            await runtime.sleep(0.001)
        await listener.close()
        assert type(await reading) is Unreachable
        taken[0][:] = bytes(half)
        assert memory == pattern(SIZE, 3)
        forever.cancel()
        await beside

    async def outcome(call: object) -> object:
        try:
            return await call  # type: ignore[misc]
        except BaseException as error:
            return error

    Portal(runtime).run(work())


def test_a_server_that_is_lost_finds_what_was_to_be_written(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    """It may have the request still before it, and copy its bytes when their owner has others there."""

    async def work() -> None:
        gated = Gated(runtime)
        listener = await network.serve("127.0.0.1:0", gated)
        memory = allocate(SIZE)
        memory[:] = pattern(SIZE, 3)
        place, theirs = find(memory), ForeignRegions()
        assert place is not None
        theirs.add(1, os.dup(place.region.fd))
        (late,) = theirs.views([(1, 0)], [SIZE])
        call = network.connection(listener.address).call(write_request(1), [memory])
        writing = runtime.spawn(call, "write")  # type: ignore[arg-type]
        await gated.until_began(1)
        await listener.close()
        with pytest.raises(UpdateUnknown):
            await writing
        assert memory == pattern(SIZE, 3)
        memory[:] = bytes(SIZE)
        assert late == pattern(SIZE, 3)

    Portal(runtime).run(work())


def test_the_loss_of_a_server_is_told_even_if_there_is_no_memory_left(
    network: TcpNetwork, runtime: AsyncioRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def renew(_: Region) -> None:
        raise OSError(12, "Cannot allocate memory")

    async def work() -> None:
        gated = Gated(runtime)
        listener = await network.serve("127.0.0.1:0", gated)
        connection = network.connection(listener.address)
        calls = [
            runtime.spawn(connection.call(read_request([SIZE]), [allocate(SIZE)]), f"read-{number}")  # type: ignore[arg-type]
            for number in range(3)
        ]
        await gated.until_began(3)
        await listener.close()
        for call in calls:
            with pytest.raises(Unreachable):
                await call

    monkeypatch.setattr(Region, "renew", renew)
    Portal(runtime).run(work())
    assert "could not be renewed" in caplog.text


def test_a_late_answer_lands_where_nobody_looks(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    """A server that does not let go in time, as with a disk that hangs: the memory is renewed under it."""

    class Stuck(Remembering):
        """Its thread does not hear that the call is over."""

        gate = runtime.future()
        ended = runtime.future()

        async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
            if self.seen:
                return await Filling.handle(self, request, buffers)
            self.seen += buffers
            while not self.gate.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(self.gate)
            buffers[0][:] = b"late"
            self.ended.set_result(None)
            return ChunksRead([4])

    async def work() -> None:
        stuck = Stuck()
        connection = network.connection((await network.serve("127.0.0.1:0", stuck)).address)
        memory = allocate(8)
        memory[:] = b"mine too"
        with pytest.raises(Unanswered):
            await connection.call(read_request([4]), [memory[:4]], timeout_s=0.05)
        assert memory == b"mine too"
        assert await connection.call(read_request([4]), [memory[4:]], timeout_s=60.0) == ChunksRead([4])
        stuck.gate.set_result(None)
        await stuck.ended
        assert stuck.seen[0] == b"late"
        assert await connection.call(read_request([0]), [memory[:0]], timeout_s=60.0) == ChunksRead([0])
        assert memory == b"mine" + pattern(4, 0)

    Portal(runtime).run(work())


def test_a_worker_thread_lets_go_before_a_cancelled_call_ends(runtime: AsyncioRuntime) -> None:
    begun, gate = threading.Event(), threading.Event()
    memory = bytearray(4)

    def read() -> None:
        begun.set()
        assert gate.wait(60.0)
        memory[:] = b"done"

    async def work() -> None:
        await runtime.enter_loop()
        reading = runtime.spawn(runtime.offload(read), "read")
        while not begun.is_set():
            await runtime.sleep(1e-3)
        reading.cancel()
        await runtime.sleep(0.01)
        assert not reading.done()
        reading.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert memory == b"done"

    Portal(runtime).run(work())


def test_a_cancelled_write_ends_when_the_server_has_let_go(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        gated = Gated(runtime)
        connection = network.connection((await network.serve("127.0.0.1:0", gated)).address)
        writing = runtime.spawn(connection.call(write_request(1), [allocate(SIZE)]), "write")  # type: ignore[arg-type]
        await gated.until_began(1)
        writing.cancel()
        await runtime.sleep(0.05)
        assert not writing.done()
        gated.open()
        with pytest.raises(asyncio.CancelledError):
            await writing

    Portal(runtime).run(work())


def test_another_servers_answer_for_renewed_memory_does_not_count(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    """It has filled pages that are not ours any more."""

    async def work() -> None:
        gated = Gated(runtime)
        connection = network.connection((await network.serve("127.0.0.1:0", gated)).address)
        memory = allocate(SIZE)
        reading = runtime.spawn(connection.call(read_request([SIZE]), [memory]), "read")  # type: ignore[arg-type]
        await gated.until_began(1)
        place = find(memory)
        assert place is not None
        place.region.renew()
        gated.open()
        with pytest.raises(Unreachable, match="renewed"):
            await reading
        assert await connection.call(read_request([SIZE]), [memory]) == ChunksRead([SIZE])

    Portal(runtime).run(work())


def test_regions_that_are_gone_are_forgotten(network: TcpNetwork, runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        connection = network.connection((await network.serve("127.0.0.1:0", Filling())).address)
        for _ in range(REGIONS_MAX):
            memory = allocate(100)
            await connection.call(read_request([100]), [memory])
        before = open_memory()
        for _ in range(50):
            memory = allocate(100)
            await connection.call(read_request([100]), [memory])
        assert open_memory() <= before + 2

    Portal(runtime).run(work())


def test_who_shares_no_memory_is_served_over_the_socket(runtime: AsyncioRuntime) -> None:
    async def work() -> None:
        for here, there in ((True, False), (False, True)):
            server = TcpNetwork(runtime, TcpConfig(shares_memory=there))
            client = TcpNetwork(runtime, TcpConfig(shares_memory=here))
            service = Remembering()
            connection = client.connection((await server.serve("127.0.0.1:0", service)).address)
            memory = allocate(SIZE)
            assert await connection.call(read_request([SIZE]), [memory]) == ChunksRead([SIZE])
            assert memory == pattern(SIZE, 0)
            service.seen[0][:5] = bytes(5)
            assert memory == pattern(SIZE, 0)
            await client.close()
            await server.close()

    Portal(runtime).run(work())


# ---- clients that misbehave


class Intruder:
    """A bare socket at a unix address, that has said hello."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(path)

    def send(
        self, kind: Kind, call: int = 0, body: bytes = b"", lengths: Sequence[int] = (), fds: Sequence[int] = ()
    ) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([encode_frame(kind, call, body, lengths)], rights)
        for fd in fds:
            os.close(fd)

    def is_closed(self) -> bool:
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        self.sock.close()
        return True


READ = encode_message(read_request([10]))


def region(fd: int) -> dict[str, Any]:
    return {"kind": Kind.REGION, "call": 1, "fds": [fd]}


def placed(number: int, offset: int) -> dict[str, Any]:
    return {"kind": Kind.PLACED, "call": 1, "body": encode_places([(number, offset)]) + READ, "lengths": [10]}


MISDEEDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "memory that may become smaller": lambda: [region(memfd(SIZE, 0))],
    "a file": lambda: [region(os.open("/dev/null", os.O_RDWR))],
    "no descriptor": lambda: [{"kind": Kind.REGION, "call": 1}],
    "empty memory": lambda: [region(memfd(0))],
    "a number twice": lambda: [region(memfd(SIZE)), region(memfd(SIZE))],
    "many descriptors": lambda: [{"kind": Kind.PING, "fds": [memfd(SIZE) for _ in range(20)]}],
    "an unknown region": lambda: [placed(9, 0)],
    "behind the end": lambda: [region(memfd(SIZE)), placed(1, SIZE - 9)],
    "far behind the end": lambda: [region(memfd(SIZE)), placed(1, (1 << 64) - 5)],
    "no places": lambda: [{"kind": Kind.PLACED, "call": 1, "lengths": [10]}],
    "a reply": lambda: [{"kind": Kind.PLACED_REPLY, "call": 1}],
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_client_that_misbehaves_loses_its_connection_and_harms_nobody(
    misdeed: str, runtime: AsyncioRuntime, network: TcpNetwork, tmp_path: Path
) -> None:
    portal = Portal(runtime)
    address = f"unix:{tmp_path}/socket"
    portal.run(network.serve(address, Filling()))
    before = open_memory()
    intruder = Intruder(parse_address(address).path)
    intruder.send(Kind.HELLO, body=encode_hello(client_hello(TcpConfig())))
    for frame in MISDEEDS[misdeed]():
        intruder.send(**frame)
    assert intruder.is_closed()
    memory = allocate(10)
    reply = portal.run(network.connection(address).call(read_request([10]), [memory]))  # type: ignore[arg-type]
    assert reply == ChunksRead([10])
    gc.collect()
    assert open_memory() <= before + 2, "memory was left open"  # Ours, and the server's of it.


def test_the_door_opens_once_for_each_key(runtime: AsyncioRuntime, network: TcpNetwork) -> None:
    async def work() -> None:
        listener = await network.serve("127.0.0.1:0", Echo())
        door = listener._door  # type: ignore[attr-defined]
        address, key = door.offer(None)
        assert door.enter(key) is None
        for wrong in (key, "", "x" * 32):
            with pytest.raises(AccessDenied):
                door.enter(wrong)
        with pytest.raises(AccessDenied, match="key"):
            await network.connection(address).call(Usage())

    Portal(runtime).run(work())


def test_over_the_network_nobody_hands_over_memory(runtime: AsyncioRuntime, network: TcpNetwork) -> None:
    address = Portal(runtime).run(network.serve("127.0.0.1:0", Filling())).address
    for kind in (Kind.REGION, Kind.PLACED, Kind.FORGET):
        with socket.create_connection((parse_address(address).host, parse_address(address).port), 10) as sock:
            sock.sendall(encode_frame(Kind.HELLO, 0, encode_hello(client_hello(TcpConfig()))))
            sock.sendall(encode_frame(kind, 1))
            while sock.recv(1 << 16):
                pass


def test_who_reads_in_another_thread_can_tell_that_memory_gets_new_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lands between the copy and the new pages is lost: such a read does not count (`emberfs.lane.client`)."""
    memory = allocate(SIZE)
    place = find(memory)
    assert place is not None
    before = renewals()
    during: list[int | None] = []
    pwrite = os.pwrite

    def watched(*arguments: Any) -> int:
        during.append(renewals())
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", watched)
    place.region.renew()
    assert during and set(during) == {None}
    assert renewals() not in (None, before)


def sealed(size: int, flags: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def test_a_server_maps_a_bounded_amount_of_a_client_s_memory() -> None:
    regions = ForeignRegions()
    regions.add(1, sealed(1 << 20))
    with pytest.raises(ProtocolError, match="at most 1 TiB"):
        regions.add(2, sealed(REGION_BYTES_MAX))
    assert len(regions.views([(1, 0)], [1 << 20])[0]) == 1 << 20


def test_memory_of_huge_pages_is_refused() -> None:
    try:
        fd = sealed(4 << 20, os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    with pytest.raises(ProtocolError, match="huge pages"):
        ForeignRegions().add(1, fd)
