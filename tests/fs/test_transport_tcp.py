"""What only a real connection can do: be silent, send nonsense, stop reading, or end in the middle of a payload.

The other side is often a bare socket in the test's own thread, which does exactly what the test says.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import (
    AccessDenied,
    EmberError,
    InvalidPath,
    LimitExceeded,
    Unanswered,
    Unavailable,
    UpdateUnknown,
)
from emberfs.messages import ChunkList, ChunksRead, Done, ListChunks, Message, Stat, Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Echo, Filling, Gated, Raising, Run, pattern, read_request, write_request
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.transport.codec import encode_message
from emberfs.transport.frame import PAYLOAD_BYTES_MAX, Frame, FrameReader, Kind, encode_frame
from emberfs.transport.handshake import Hello, client_hello, encode_hello

SECONDS_MAX = 20.0
"""How long a test waits for what must come."""
HASTY = TcpConfig(ping_s=0.02, dead_s=0.1, connect_timeout_s=SECONDS_MAX)
IMPATIENT = TcpConfig(connect_timeout_s=0.2)
MakeNetwork = Callable[..., TcpNetwork]


class Started:
    """A call under way in the loop's thread."""

    def __init__(self, call: Coroutine[Any, Any, Message], runtime: AsyncioRuntime) -> None:
        self._ended = threading.Event()
        self._future = asyncio.run_coroutine_threadsafe(self._run(call), runtime.loop)

    async def _run(self, call: Coroutine[Any, Any, Message]) -> Message:
        try:
            return await call
        finally:
            self._ended.set()

    def result(self) -> Message:
        return self._future.result(SECONDS_MAX)

    def cancel(self) -> None:
        """Returns when the call has raised."""
        self._future.cancel()
        assert self._ended.wait(SECONDS_MAX)


Start = Callable[[Any], Started]


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture
def start(runtime: AsyncioRuntime) -> Start:
    """Begins a call."""
    return lambda call: Started(call, runtime)


@pytest.fixture
def make_network(runtime: AsyncioRuntime, run: Run) -> Iterator[MakeNetwork]:
    made: list[TcpNetwork] = []

    def make(config: TcpConfig | None = None) -> TcpNetwork:
        made.append(TcpNetwork(runtime, config))
        return made[-1]

    yield make
    for network in made:
        run(network.close())


class Bare:
    """A bare socket that reads and writes frames, one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(SECONDS_MAX)
        self._frames: list[tuple[Kind, int, bytes]] = []
        self._reader = FrameReader(self)
        self.payload: list[bytearray] = []
        """Of the last frame that came with one; filled as the bytes come."""

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        self._frames.append((frame.kind, frame.call, bytes(frame.body)))
        if not frame.lengths or frame.kind == Kind.FETCH:
            return ()
        self.payload = [bytearray(length) for length in frame.lengths]
        return [memoryview(each) for each in self.payload]

    def end(self) -> None:
        pass

    def send(self, kind: Kind, call: int = 0, body: bytes = b"", lengths: Sequence[int] = ()) -> None:
        self.sock.sendall(encode_frame(kind, call, body, lengths))

    def receive(self, kind: Kind) -> tuple[int, bytes]:
        """(call, body) of the next frame of `kind`; signs of life are passed over."""
        while True:
            while self._frames:
                came, call, body = self._frames.pop(0)
                if came == kind:
                    return call, body
                assert came == Kind.PING, came
            self._read()

    def is_closed(self) -> bool:
        """True once the other side has closed; what comes before that is passed over."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def _read(self) -> None:
        count = self.sock.recv_into(self._reader.get_buffer())
        assert count, "the other side closed"
        self._reader.buffer_updated(count)


class BareServer:
    """A listening socket that plays a server."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._sock.settimeout(SECONDS_MAX)
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self._open: list[socket.socket] = [self._sock]

    def accept(self, *, calls_max: int = 16) -> Bare:
        """A client, let in."""
        bare = Bare(self._sock.accept()[0])
        self._open.append(bare.sock)
        bare.receive(Kind.HELLO)
        hello = Hello(1, 1, "", "storage", calls_max=calls_max, bytes_max=1 << 30)
        bare.send(Kind.HELLO, body=encode_hello(hello))
        return bare

    def close(self) -> None:
        for sock in self._open:
            sock.close()


@pytest.fixture
def bare_server() -> Iterator[BareServer]:
    server = BareServer()
    yield server
    server.close()


@pytest.fixture
def dial() -> Iterator[Callable[[str], Bare]]:
    """Connects a bare socket."""
    made: list[socket.socket] = []

    def dial(address: str) -> Bare:
        host, port = address.split(":")
        made.append(socket.create_connection((host, int(port))))
        return Bare(made[-1])

    yield dial
    for sock in made:
        sock.close()


# ---- silence


def test_a_silent_server_is_given_up(
    bare_server: BareServer, make_network: MakeNetwork, start: Start, run: Run
) -> None:
    connection = make_network(HASTY).connection(bare_server.address)
    read, update = start(connection.call(Stat("/"))), start(connection.call(write_request(0)))
    bare_server.accept()
    with pytest.raises(Unavailable, match="silent"):
        read.result()
    with pytest.raises(UpdateUnknown, match="silent"):
        update.result()


def test_a_silent_client_is_given_up(dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run) -> None:
    bare = dial(run(make_network(HASTY).serve("127.0.0.1:0", Echo())).address)
    bare.send(Kind.HELLO, body=encode_hello(client_hello(HASTY)))
    assert bare.is_closed()


def test_who_does_not_greet_is_given_up(dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run) -> None:
    assert dial(run(make_network(IMPATIENT).serve("127.0.0.1:0", Echo())).address).is_closed()


def test_a_server_that_does_not_greet_is_unavailable(
    bare_server: BareServer, make_network: MakeNetwork, run: Run
) -> None:
    with pytest.raises(Unavailable):
        run(make_network(IMPATIENT).connection(bare_server.address).call(Usage()))


def test_a_call_that_takes_long_is_no_silence(
    make_network: MakeNetwork, run: Run, start: Start, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    connection = make_network(HASTY).connection(run(make_network(HASTY).serve("127.0.0.1:0", gated)).address)
    slow = start(connection.call(Stat("/")))
    run(gated.until_began(1))
    run(runtime.sleep(5 * HASTY.dead_s))
    gated.open()
    assert slow.result() == Done()


# ---- nonsense


def test_nonsense_closes_that_connection_only(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    address = run(make_network().serve("127.0.0.1:0", Echo())).address
    connection = make_network().connection(address)
    assert run(connection.call(Usage())) == Usage()
    bare = dial(address)
    name = f"127.0.0.1:{bare.sock.getsockname()[1]}"
    with caplog.at_level(logging.WARNING, "emberline.transport"):
        bare.sock.sendall(b"GET / HTTP/1.1\r\nHost: emberline\r\n\r\n")
        assert bare.is_closed()
        assert run(connection.call(Usage())) == Usage()
    assert any(name in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("kind", "call"), [(Kind.REPLY, 1), (Kind.GOODBYE, 0), (Kind.HELLO, 0)], ids=lambda value: str(value)
)
def test_what_a_client_may_not_say(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run, kind: Kind, call: int
) -> None:
    bare = dial(run(make_network().serve("127.0.0.1:0", Echo())).address)
    bare.send(Kind.HELLO, body=encode_hello(client_hello(TcpConfig())))
    bare.receive(Kind.HELLO)
    bare.send(kind, call, encode_hello(client_hello(TcpConfig())) if kind == Kind.HELLO else b"")
    assert bare.is_closed()


def test_a_request_before_the_handshake(dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run) -> None:
    echo = Echo()
    bare = dial(run(make_network().serve("127.0.0.1:0", echo)).address)
    bare.send(Kind.REQUEST, 1, encode_message(Usage()))
    assert bare.is_closed()
    assert not echo.payloads


def test_who_is_refused_gets_nothing_in_beside_the_greeting(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run
) -> None:
    echo = Echo()
    bare = dial(run(make_network(TcpConfig(token="secret")).serve("127.0.0.1:0", echo)).address)
    request = encode_frame(Kind.REQUEST, 1, encode_message(Usage()))
    bare.sock.sendall(encode_frame(Kind.HELLO, 0, encode_hello(client_hello(TcpConfig()))) + request)
    bare.receive(Kind.ERROR)
    assert bare.is_closed()
    assert not echo.payloads


def test_a_call_that_is_cancelled_before_the_first_step_of_its_task_is_answered(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    listener = run(make_network().serve("127.0.0.1:0", gated))
    bare = dial(listener.address)
    bare.send(Kind.HELLO, body=encode_hello(client_hello(TcpConfig())))
    bare.receive(Kind.HELLO)
    bare.sock.sendall(encode_frame(Kind.REQUEST, 1, encode_message(Stat("/"))) + encode_frame(Kind.CANCEL, 1))
    call, body = bare.receive(Kind.ERROR)
    assert (call, b"cancelled" in body) == (1, True)
    assert (gated.began, gated.ended) == (1, 0)
    run(listener.close(drain_s=SECONDS_MAX))  # Nothing is left under way.


def test_an_unknown_message_is_an_error_of_its_call(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run
) -> None:
    bare = dial(run(make_network().serve("127.0.0.1:0", Echo())).address)
    bare.send(Kind.HELLO, body=encode_hello(client_hello(TcpConfig())))
    bare.receive(Kind.HELLO)
    bare.send(Kind.REQUEST, 7, encode_message(Usage()).replace(b"Usage", b"Usago"))
    call, body = bare.receive(Kind.ERROR)
    assert (call, b"ProtocolError" in body) == (7, True)
    bare.send(Kind.REQUEST, 8, encode_message(Usage()))
    assert bare.receive(Kind.REPLY) == (8, encode_message(Usage()))


def test_more_than_the_window_closes_the_connection(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    bare = dial(run(make_network(TcpConfig(calls_max=2)).serve("127.0.0.1:0", gated)).address)
    bare.send(Kind.HELLO, body=encode_hello(client_hello(TcpConfig())))
    for call in (1, 2, 3):
        bare.send(Kind.REQUEST, call, encode_message(Stat("/")))
    assert bare.is_closed()


@pytest.mark.parametrize("lengths", [[11], [5, 5]])
def test_a_reply_that_does_not_fit_touches_nothing(
    bare_server: BareServer, make_network: MakeNetwork, start: Start, lengths: list[int]
) -> None:
    buffer = bytearray(10)
    read = start(make_network().connection(bare_server.address).call(read_request([10]), [memoryview(buffer)]))
    bare = bare_server.accept()
    call, _ = bare.receive(Kind.FETCH)
    bare.send(Kind.REPLY, call, encode_message(ChunksRead([10])), lengths)
    with pytest.raises(Unavailable, match="lost"):
        read.result()
    assert buffer == bytes(10)


# ---- the handshake


@pytest.mark.parametrize(
    ("server", "client", "why"),
    [
        (TcpConfig(cluster="c1"), TcpConfig(cluster="c2"), "not of 'c2'"),
        (TcpConfig(token="secret"), TcpConfig(), "token"),
        (TcpConfig(token="secret"), TcpConfig(token="secrét"), "token"),
    ],
)
def test_who_is_not_let_in(make_network: MakeNetwork, run: Run, server: TcpConfig, client: TcpConfig, why: str) -> None:
    echo = Echo()
    listener = run(make_network(server).serve("127.0.0.1:0", echo))
    with pytest.raises(AccessDenied, match=why):
        run(make_network(client).connection(listener.address).call(Usage()))
    assert not echo.payloads


def test_the_token_lets_in(make_network: MakeNetwork, run: Run) -> None:
    config = TcpConfig(cluster="c1", token="secret")
    listener = run(make_network(config).serve("127.0.0.1:0", Echo()))
    assert run(make_network(config).connection(listener.address).call(Usage())) == Usage()


def test_a_newer_protocol_is_refused_with_a_sentence(
    dial: Callable[[str], Bare], make_network: MakeNetwork, run: Run
) -> None:
    bare = dial(run(make_network().serve("127.0.0.1:0", Echo())).address)
    bare.send(Kind.HELLO, body=encode_hello(Hello(7, 9, "", "client")))
    _, body = bare.receive(Kind.ERROR)
    assert b"protocols 1 to 1, the client 7 to 9" in body
    assert bare.is_closed()


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:70000", "unix:relative"])
def test_what_is_no_address(make_network: MakeNetwork, address: str) -> None:
    with pytest.raises(InvalidPath):
        make_network().connection(address)


def test_plain_text_to_other_machines_needs_to_be_asked_for(make_network: MakeNetwork, run: Run) -> None:
    with pytest.raises(AccessDenied, match="insecure"):
        run(make_network().serve("0.0.0.0:0", Echo()))
    with pytest.raises(AccessDenied, match="insecure"):
        run(make_network().connection("192.0.2.1:1").call(Usage()))
    listener = run(make_network(TcpConfig(insecure=True)).serve("0.0.0.0:0", Echo()))
    address = listener.address.replace("0.0.0.0", "127.0.0.1")
    assert run(make_network().connection(address).call(Usage())) == Usage()


# ---- memory and time


def test_a_read_that_is_cancelled_in_mid_payload(
    bare_server: BareServer, make_network: MakeNetwork, start: Start, run: Run, runtime: AsyncioRuntime
) -> None:
    buffer = bytearray(200_000)
    connection = make_network().connection(bare_server.address)
    read = start(connection.call(read_request([200_000]), [memoryview(buffer)]))
    bare = bare_server.accept()
    call, _ = bare.receive(Kind.FETCH)
    bare.send(Kind.REPLY, call, encode_message(ChunksRead([200_000])), [200_000])
    bare.sock.sendall(b"x" * 1000)
    while buffer[:1000] != b"x" * 1000:
        run(runtime.sleep(1e-3))
    read.cancel()
    assert bare.receive(Kind.CANCEL)[0] == call
    bare.sock.sendall(b"x" * 199_000)
    other = start(connection.call(Usage()))
    call, _ = bare.receive(Kind.REQUEST)
    bare.send(Kind.REPLY, call, encode_message(Done()))
    assert other.result() == Done()
    assert buffer == b"x" * 1000 + bytes(199_000)


def test_a_write_that_is_cancelled_half_sent_arrives_as_it_was(
    bare_server: BareServer, make_network: MakeNetwork, start: Start
) -> None:
    size = 32 << 20
    payload = bytearray(pattern(size, 7))
    connection = make_network().connection(bare_server.address)
    write = start(connection.call(write_request(1), [memoryview(payload)]))
    bare = bare_server.accept()
    bare.receive(Kind.REQUEST)
    write.cancel()
    payload[:] = bytes(size)
    other = start(connection.call(Usage()))
    call, _ = bare.receive(Kind.REQUEST)
    assert bare.payload[0] == pattern(size, 7)
    bare.send(Kind.REPLY, call, encode_message(Done()))
    assert other.result() == Done()


def test_calls_beyond_the_window_wait_their_turn(
    make_network: MakeNetwork, run: Run, start: Start, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    listener = run(make_network(TcpConfig(calls_max=2)).serve("127.0.0.1:0", gated))
    connection = make_network().connection(listener.address)
    calls = [start(connection.call(Stat("/"))) for _ in range(20)]
    run(gated.until_began(2))
    run(runtime.sleep(0.02))
    assert gated.began == 2
    gated.open()
    assert [call.result() for call in calls] == [Done()] * 20


def test_a_server_that_is_slow_to_greet_is_given_more_time(
    bare_server: BareServer, make_network: MakeNetwork, run: Run
) -> None:
    connection = make_network(TcpConfig(connect_timeout_s=0.02)).connection(bare_server.address)
    for patience in (1, 2, 4, 4):
        assert connection._patience == patience
        with pytest.raises(Unavailable):
            run(connection.call(Usage()))


@pytest.mark.parametrize("is_update", [False, True])
def test_the_time_of_a_call_counts_while_it_connects(
    bare_server: BareServer, make_network: MakeNetwork, start: Start, is_update: bool
) -> None:
    connection = make_network(TcpConfig(connect_timeout_s=SECONDS_MAX)).connection(bare_server.address)
    request = write_request(0) if is_update else Stat("/")
    with pytest.raises(Unanswered, match="did not answer in time"):
        start(connection.call(request, timeout_s=0.05)).result()
    other = start(connection.call(Usage()))
    bare = bare_server.accept()
    call, body = bare.receive(Kind.REQUEST)
    assert body == encode_message(Usage()), "it is not sent late"
    bare.send(Kind.REPLY, call, encode_message(Done()))
    assert other.result() == Done()


def test_the_time_of_a_call_counts_while_it_waits_for_room(
    make_network: MakeNetwork, run: Run, start: Start, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    listener = run(make_network(TcpConfig(calls_max=1)).serve("127.0.0.1:0", gated))
    connection = make_network().connection(listener.address)
    first = start(connection.call(Stat("/")))
    run(gated.until_began(1))
    for request in (Stat("/"), write_request(0)):
        with pytest.raises(Unanswered):
            run(connection.call(request, timeout_s=0.05))
    gated.open()
    assert first.result() == Done()
    assert run(connection.call(Usage(), timeout_s=SECONDS_MAX)) == Done()
    assert gated.began == 1, "what waited is not sent late"


def test_an_update_goes_on_when_its_caller_is_lost(
    make_network: MakeNetwork, run: Run, start: Start, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    address = run(make_network().serve("127.0.0.1:0", gated)).address
    network = make_network()
    connection = network.connection(address)
    update, read = start(connection.call(write_request(0))), start(connection.call(Stat("/")))
    run(gated.until_began(2))
    run(network.close())
    with pytest.raises(UpdateUnknown):
        update.result()
    with pytest.raises(Unavailable):
        read.result()
    other = make_network().connection(address)
    assert run(other.call(Usage())) == Done()  # By now the server has seen the loss.
    gated.open()
    assert run(other.call(write_request(0))) == Done()
    assert gated.ended == 2


# ---- limits and mistakes


def test_requests_over_the_limits_do_not_leave(make_network: MakeNetwork, run: Run) -> None:
    connection = make_network().connection(run(make_network().serve("127.0.0.1:0", Echo())).address)
    for request, buffers in [
        (write_request(1), [memoryview(bytearray(PAYLOAD_BYTES_MAX + 1))]),
        (write_request(0), [memoryview(b"")] * 4097),
        (Stat("/" * (21 << 20)), []),
    ]:
        with pytest.raises(LimitExceeded):
            run(connection.call(request, buffers))
    assert run(connection.call(Usage())) == Usage()


def test_a_reply_over_the_limit_is_an_error(make_network: MakeNetwork, run: Run) -> None:
    class Verbose:
        async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
            return ChunkList([(b"c" * (21 << 20), 1)])

    connection = make_network().connection(run(make_network().serve("127.0.0.1:0", Verbose())).address)
    with pytest.raises(LimitExceeded, match="ask for less"):
        run(connection.call(ListChunks(1, b"", b"\xff")))


def test_a_mistake_of_the_server_stays_in_its_log(
    make_network: MakeNetwork, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    service = Raising(ZeroDivisionError("a secret"))
    connection = make_network().connection(run(make_network().serve("127.0.0.1:0", service)).address)
    with caplog.at_level(logging.ERROR, "emberline.transport"), pytest.raises(EmberError) as raised:
        run(connection.call(Usage()))
    assert str(raised.value) == "internal error (ZeroDivisionError): see the server's log"
    assert "a secret" in caplog.text


def test_the_largest_message_passes(make_network: MakeNetwork, run: Run) -> None:
    connection = make_network().connection(run(make_network().serve("127.0.0.1:0", Filling())).address)
    buffer = bytearray(64 << 20)
    run(connection.call(read_request([64 << 20]), [memoryview(buffer)]))
    assert buffer == pattern(64 << 20, 0)


def test_a_listener_leaves_a_socket_that_took_its_path(run: Run, make_network: MakeNetwork, tmp_path: Any) -> None:
    path = tmp_path / "s"
    first = run(make_network().serve(f"unix:{path}", Echo()))
    path.unlink()
    second = run(make_network().serve(f"unix:{path}", Echo()))
    run(first.close())
    assert path.exists()
    run(second.close())
    assert not path.exists()


def test_a_socket_that_nobody_listens_on_is_replaced(make_network: MakeNetwork, run: Run, tmp_path: Any) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "s"))
    listener = run(make_network().serve(f"unix:{tmp_path}/s", Echo()))
    assert run(make_network().connection(listener.address).call(Usage())) == Usage()
    with pytest.raises(OSError, match="in use"):
        run(make_network().serve(f"unix:{tmp_path}/s", Echo()))


def test_at_the_end_of_a_process_a_call_is_refused_and_does_not_wait_for_ever() -> None:
    program = """
import atexit
from emberfs.errors import Unreachable
from emberfs.messages import Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpNetwork

runtime = AsyncioRuntime("late")
portal, network = Portal(runtime), TcpNetwork(runtime)

def call():
    try:
        portal.run_last(network.connection("localhost:1").call(Usage()))
    except Unreachable as error:
        print(error)

atexit.register(call)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "localhost:1: cannot schedule new futures after" in done.stdout
    assert done.stderr == ""
