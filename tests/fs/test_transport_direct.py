"""A connection of which a thread waits for the answers itself: what it answers, and that nothing keeps it waiting."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from socket import SHUT_RD, SO_SNDBUF, SOL_SOCKET, create_connection, socket, socketpair

import pytest
from emberfs.errors import LimitExceeded, NotFound, ProtocolError, StoreClosed, Unanswered, Unavailable, Unreachable
from emberfs.messages import Foreign, Message, Stat
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Echo, Gated, Raising, Run
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.transport import direct as direct_module
from emberfs.transport.codec import encode_message
from emberfs.transport.direct import DirectConnection
from emberfs.transport.frame import HEADER_BYTES_MAX, Kind, encode_frame

SECONDS_MAX = 20.0
"""How long a test waits for what must come."""
HASTY = TcpConfig(ping_s=0.05, dead_s=0.5, connect_timeout_s=SECONDS_MAX)
ASK = Foreign(b"what")
MakeNetwork = Callable[..., TcpNetwork]


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture
def make_network(runtime: AsyncioRuntime, run: Run) -> Iterator[MakeNetwork]:
    made: list[TcpNetwork] = []

    def make(config: TcpConfig | None = None) -> TcpNetwork:
        made.append(TcpNetwork(runtime, config))
        return made[-1]

    yield make
    for network in made:
        run(network.close())


@pytest.fixture
def bare() -> Iterator[tuple[DirectConnection, socket]]:
    """One that was let in, and the other end."""
    ours, theirs = socketpair()
    theirs.settimeout(SECONDS_MAX)
    direct = DirectConnection(ours, address="bare", dead_s=1.0)
    yield direct, theirs
    direct.close()
    theirs.close()


def ask(direct: DirectConnection, request: Message = ASK, *, timeout_s: float = SECONDS_MAX) -> Message:
    assert direct.try_begin()
    try:
        return direct.call(request, timeout_s=timeout_s)
    finally:
        direct.end()


@pytest.mark.parametrize("shares_memory", [False, True], ids=["tcp", "door"])
def test_it_answers_one_after_the_other(make_network: MakeNetwork, run: Run, shares_memory: bool) -> None:
    config = TcpConfig(shares_memory=shares_memory)
    address = run(make_network(config).serve("127.0.0.1:0", Echo())).address
    direct = run(make_network(config).open_direct(address))
    for size in (0, 10, 1 << 20):
        assert ask(direct, Foreign(bytes(size))) == Foreign(bytes(size))


def test_an_error_of_the_server_leaves_it_as_it_was(make_network: MakeNetwork, run: Run) -> None:
    address = run(make_network().serve("127.0.0.1:0", Raising(NotFound("no such thing")))).address
    direct = run(make_network().open_direct(address))
    for _ in range(2):
        with pytest.raises(NotFound, match="no such thing"):
            ask(direct)


def test_what_is_over_the_limit_does_not_leave(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    with pytest.raises(LimitExceeded):
        ask(direct, Foreign(bytes(HEADER_BYTES_MAX)))
    assert not direct.is_closed
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_another_thread_finds_it_busy(make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime) -> None:
    gated = Gated(runtime)
    address = run(make_network().serve("127.0.0.1:0", gated)).address
    direct = run(make_network().open_direct(address))
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct, Stat("/"))
        run(gated.until_began(1))
        assert not direct.try_begin()
        gated.open()
        asked.result(SECONDS_MAX)
    assert direct.try_begin()
    direct.end()


def test_it_lives_while_nobody_asks_and_during_a_long_call(
    make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    address = run(make_network(HASTY).serve("127.0.0.1:0", gated)).address
    direct = run(make_network(HASTY).open_direct(address))
    run(runtime.sleep(3 * HASTY.dead_s))
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct, Stat("/"))
        run(gated.until_began(1))
        run(runtime.sleep(3 * HASTY.dead_s))
        gated.open()
        asked.result(SECONDS_MAX)


def test_it_ends_when_nobody_asks_any_more(
    make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = run(make_network(HASTY).serve("127.0.0.1:0", Echo())).address
    direct = run(make_network(HASTY).open_direct(address))
    monkeypatch.setattr(direct_module, "IDLE_S", 0.2)
    ends_s = time.monotonic() + SECONDS_MAX
    while not direct.is_closed:
        assert time.monotonic() < ends_s
        run(runtime.sleep(0.01))
    run(runtime.sleep(HASTY.ping_s))
    assert direct._sock.fileno() == -1


def test_a_silent_server_is_given_up(bare: tuple[DirectConnection, socket]) -> None:
    with pytest.raises(Unreachable) as raised:
        ask(bare[0])
    assert not isinstance(raised.value, Unanswered)
    assert not bare[0].try_begin()


def test_a_call_has_its_time_whatever_else_is_said(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    ended = threading.Event()

    def say() -> None:
        while not ended.wait(0.02):
            theirs.sendall(encode_frame(Kind.PING, 0))

    with ThreadPoolExecutor() as threads:
        threads.submit(say)
        with pytest.raises(Unanswered):
            ask(direct, timeout_s=0.5)
        ended.set()
    assert not direct.try_begin()  # Else the answer might come, and be taken for that to the next request.


@pytest.fixture
def watch(bare: tuple[DirectConnection, socket]) -> Iterator[None]:
    """Looks after the bare one, as a network does."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(0.05):
            bare[0].keep_alive()

    with ThreadPoolExecutor() as threads:
        kept = threads.submit(keep)
        yield
        ended.set()
        kept.result()


@pytest.mark.usefixtures("watch")
def test_nor_do_signals_prolong_it(bare: tuple[DirectConnection, socket]) -> None:
    ends_s = time.monotonic() + SECONDS_MAX

    def interrupt(*_: object) -> None:
        if time.monotonic() > ends_s:
            signal.setitimer(signal.ITIMER_REAL, 0)  # It is prolonged: let it end all the same.

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with pytest.raises(Unanswered):
            ask(bare[0], timeout_s=0.5)
        assert time.monotonic() < ends_s
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert bare[0]._sock.fileno() == -1


@pytest.mark.usefixtures("watch")
def test_nor_does_a_server_that_reads_now_and_then(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    direct._sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096)
    ended = threading.Event()
    took = 0

    def read() -> None:
        nonlocal took
        while not ended.wait(0.02) and (count := len(theirs.recv(2048))):
            took += count

    request = Foreign(bytes(1 << 20))
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(read)
        with pytest.raises(Unanswered):
            ask(direct, request, timeout_s=0.5)
        ended.set()
        reading.result()
    assert took < len(request.body)


def test_one_that_cannot_say_that_we_live_is_let_go(bare: tuple[DirectConnection, socket]) -> None:
    bare[1].shutdown(SHUT_RD)
    bare[0].keep_alive()
    assert bare[0]._sock.fileno() == -1


def test_whoever_drains_it_waits_for_the_call(make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime) -> None:
    gated = Gated(runtime)
    address = run(make_network().serve("127.0.0.1:0", gated)).address
    direct = run(make_network().open_direct(address))
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct, Stat("/"))
        run(gated.until_began(1))
        drained = threads.submit(direct.drain, SECONDS_MAX)
        gated.open()
        asked.result(SECONDS_MAX)
        drained.result(SECONDS_MAX)
    assert direct._sock.fileno() == -1


def test_but_no_longer_than_it_wants_to(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    direct._dead_s = SECONDS_MAX
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct)
        assert theirs.recv(1 << 16)
        direct.drain(0.1)
        with pytest.raises(Unreachable):
            asked.result(SECONDS_MAX)
    assert direct._sock.fileno() == -1


def test_an_answer_that_nobody_waits_for_ends_it(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    theirs.sendall(encode_frame(Kind.REPLY, 1, encode_message(ASK)))
    assert not direct.try_begin()


@pytest.mark.parametrize("numbers", [(1, 1), (2,)], ids=["twice", "of another"])
def test_an_answer_to_something_else_is_taken_for_none(
    bare: tuple[DirectConnection, socket], numbers: tuple[int, ...]
) -> None:
    direct, theirs = bare
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct)
        assert theirs.recv(1 << 16)
        theirs.sendall(b"".join(encode_frame(Kind.REPLY, number, encode_message(ASK)) for number in numbers))
        with pytest.raises(ProtocolError):
            asked.result(SECONDS_MAX)
    assert not direct.try_begin()


def test_nonsense_ends_it(bare: tuple[DirectConnection, socket]) -> None:
    direct, theirs = bare
    theirs.sendall(bytes(100))
    assert not direct.try_begin()
    assert direct.is_closed


def test_the_loss_of_the_server_is_seen_before_the_next_call(bare: tuple[DirectConnection, socket]) -> None:
    bare[1].close()
    assert not bare[0].try_begin()


def test_a_server_that_ends_takes_no_more(make_network: MakeNetwork, run: Run) -> None:
    listener = run(make_network().serve("127.0.0.1:0", Echo()))
    direct = run(make_network().open_direct(listener.address))
    ask(direct)
    run(listener.close(drain_s=SECONDS_MAX))
    assert not direct.try_begin()


def test_who_waits_learns_that_the_network_is_closed(
    make_network: MakeNetwork, run: Run, runtime: AsyncioRuntime
) -> None:
    gated = Gated(runtime)
    address = run(make_network().serve("127.0.0.1:0", gated)).address
    network = make_network()
    direct = run(network.open_direct(address))
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, direct, Stat("/"))
        run(gated.until_began(1))
        run(network.close())
        with pytest.raises(Unreachable):
            asked.result(SECONDS_MAX)
    assert direct._sock.fileno() == -1
    with pytest.raises(StoreClosed):
        run(network.open_direct(address))


def test_there_is_none_where_there_is_no_server(make_network: MakeNetwork, run: Run) -> None:
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises((Unavailable, OSError)):
            run(make_network().open_direct(f"127.0.0.1:{taken.getsockname()[1]}"))


class Hasty:
    """Stands before a server, and says `more` right behind its welcome. One connection."""

    def __init__(self, address: str, more: bytes) -> None:
        self._listening = socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._to, self._more = address.rsplit(":", 1), more

    def serve(self) -> bytes:
        """What the client says once it was let in, to the end of its connection."""
        with self._listening, self._listening.accept()[0] as client, create_connection(self._to) as server:
            client.settimeout(SECONDS_MAX)
            server.sendall(client.recv(1 << 16))
            client.sendall(server.recv(1 << 16) + self._more)
            said = b""
            while more := client.recv(1 << 16):
                said += more
            return said


@pytest.mark.parametrize(
    ("more", "error"),
    [(encode_frame(Kind.PING, 0)[:10], ProtocolError), (encode_frame(Kind.GOODBYE, 0), Unreachable)],
    ids=["the begin of a frame", "goodbye"],
)
def test_none_is_made_where_more_came_than_a_welcome(
    make_network: MakeNetwork, run: Run, more: bytes, error: type[Exception]
) -> None:
    config = TcpConfig(shares_memory=False)
    hasty = Hasty(run(make_network(config).serve("127.0.0.1:0", Echo())).address, more)
    with ThreadPoolExecutor() as threads:
        served = threads.submit(hasty.serve)
        with pytest.raises(error) as raised:
            run(make_network(config).open_direct(hasty.address))
        assert served.result(SECONDS_MAX) == b""  # The socket is closed, though what was raised knows it yet.
    assert raised.value is not None


def test_one_that_fails_does_not_end_the_watch_of_the_others(
    make_network: MakeNetwork, run: Run, monkeypatch: pytest.MonkeyPatch, runtime: AsyncioRuntime
) -> None:
    address = run(make_network(HASTY).serve("127.0.0.1:0", Echo())).address
    network = make_network(HASTY)
    bad, good = run(network.open_direct(address)), run(network.open_direct(address))
    monkeypatch.setattr(bad, "keep_alive", lambda: 1 / 0)
    run(runtime.sleep(3 * HASTY.dead_s))
    assert ask(good) == ASK
    assert bad.is_closed
