"""A client has a connection without an event loop to the service, and goes on when it is gone, or the service."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import emberkv
import pytest
from emberfs.errors import DeadlineExceeded, Unavailable
from emberfs.messages import Foreign, Message
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.transport.direct import DirectConnection
from emberkv import caller as caller_module
from emberkv import direct_way, messages
from emberkv.breaker import BreakerConfig
from emberkv.caller import Caller
from emberkv.direct_way import MISSES_MAX
from emberkv.errors import SeatGone

from tests.kvcache.serving import Server

NAMESPACE = emberkv.Namespace(model="test", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv"),))
SECONDS_MAX = 30.0
PATIENT = TcpConfig(shares_memory=False, dead_s=SECONDS_MAX)
Serve = Callable[..., Server]


class Service:
    """Finds whatever is looked up, `held` once `opened` is set; but one `refused` if it is told to refuse it."""

    def __init__(self) -> None:
        self.served = Counter[bytes]()
        self.began, self.opened = threading.Event(), threading.Event()
        self.refuses = False
        self.knows_seats = self.seats = True
        """It gives some."""

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        assert isinstance(request, Foreign)
        ask = messages.decode_ask(request)
        if isinstance(ask, messages.Open):
            while not self.seats:
                self.began.set()
                await asyncio.sleep(0.01)
            return messages.encode_answer(messages.Opened(1, 1, "store", "root"))
        if not isinstance(ask, messages.Lookup):
            return messages.encode_answer(messages.Okay(0))
        if not self.knows_seats:
            return messages.encode_error(SeatGone("it is not taken"))
        if ask.keys == b"refused" and self.refuses:
            self.refuses = False
            raise Unavailable("not now")
        while ask.keys == b"held" and not self.opened.is_set():
            self.began.set()
            await asyncio.sleep(0.01)
        self.served[ask.keys] += 1
        return messages.encode_answer(messages.LookedUp(ask.keys, 0))


@pytest.fixture
def listen() -> Iterator[Callable[[], tuple[Service, str]]]:
    """A service in this process, and its address."""
    runtime = AsyncioRuntime()
    portal, network = Portal(runtime), TcpNetwork(runtime, PATIENT)

    def start() -> tuple[Service, str]:
        service = Service()
        return service, portal.run(network.serve("127.0.0.1:0", service)).address

    yield start
    portal.run(network.close())
    runtime.stop()


@pytest.fixture
def make_caller() -> Iterator[Callable[..., Caller]]:
    made: list[Caller] = []

    def make(*addresses: str) -> Caller:
        caller = Caller(
            ",".join(addresses), NAMESPACE, tenant="test", token="", policy="write-through", timeout_s=SECONDS_MAX,
            tcp=PATIENT, breaker=BreakerConfig(),
        )  # fmt: skip
        made.append(caller)
        return caller

    yield make
    for caller in made:
        if not caller.is_closed:
            caller.close()


def look_up(caller: Caller, keys: bytes) -> bytes:
    return caller.ask(lambda seat: messages.Lookup(seat, 0, keys, 0.0), messages.LookedUp).places


def look_up_until(caller: Caller, is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + SECONDS_MAX
    while not is_so():
        assert time.monotonic() < ends_s
        look_up(caller, b"any")


def direct_of(caller: Caller) -> DirectConnection | None:
    """To the address whose turn it is."""
    return caller._ways[caller.addresses[0]].connection


def has_direct(cache: emberkv.KVCache) -> bool:
    direct = direct_of(cache._caller)
    return direct is not None and not direct.is_closed


def ask_until(cache: emberkv.KVCache, is_so: Callable[[], bool]) -> None:
    keys = cache.keys(range(8))
    ends_s = time.monotonic() + SECONDS_MAX
    while not is_so():
        assert time.monotonic() < ends_s
        cache.exists(keys)


def test_who_asks_once_in_a_while_has_none(serve: Serve) -> None:
    with emberkv.connect(serve().address, NAMESPACE) as cache:
        for _ in range(MISSES_MAX - 2):  # It was asked for a seat, too.
            cache.exists(cache.keys(range(8)))
        (way,) = cache._caller._ways.values()
        assert not way._is_opening and not has_direct(cache)
        ask_until(cache, lambda: has_direct(cache))


def test_threads_get_their_own_answers(serve: Serve) -> None:
    with emberkv.connect(serve().address, NAMESPACE) as cache:
        start = threading.Barrier(8)

        def work(number: int) -> None:
            keys = cache.keys(range(number * 1000, number * 1000 + 4 * number))
            start.wait()
            for _ in range(50):
                if cache.put(keys, [bytes([number]) * 500] * number) == ["stored"] * number:
                    cache.flush()
                assert cache.match(keys).pages == number
                assert cache.get(cache.match(keys)) == [bytes([number]) * 500] * number

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(1, 9)))
        assert has_direct(cache)


def test_a_service_that_comes_back_is_found_again(serve: Serve, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/service"
    server = serve(listen=address)
    with emberkv.connect(server.address, NAMESPACE) as cache:
        keys = cache.keys(range(8))
        for end in (signal.SIGTERM, signal.SIGKILL):
            cache.put(keys, [b"x" * 500] * 2, durable="committed")
            ask_until(cache, lambda: has_direct(cache))
            server.end(end)
            server = serve(listen=address)
            assert server.address
            assert cache.match(keys).pages == 2
            assert not has_direct(cache)
            ask_until(cache, lambda: has_direct(cache))


def test_a_client_that_ends_leaves_no_thread_that_waits(serve: Serve) -> None:
    cache = emberkv.connect(serve().address, NAMESPACE)
    ask_until(cache, lambda: has_direct(cache))
    direct = direct_of(cache._caller)
    assert direct is not None
    cache.close()
    assert direct._sock.fileno() == -1


def test_many_threads_open_one_and_none_cuts_anothers_call(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, cut = Counter[str](), []
    open_direct, call = TcpNetwork.open_direct, DirectConnection.call

    async def count(network: TcpNetwork, address: str) -> DirectConnection | None:
        opened[address] += 1
        return await open_direct(network, address)

    def note(direct: DirectConnection, request: Message, **more: Any) -> Message:
        try:
            return call(direct, request, **more)
        except Exception as error:
            cut.append(error)
            raise

    monkeypatch.setattr(TcpNetwork, "open_direct", count)
    monkeypatch.setattr(DirectConnection, "call", note)
    (service, address), (standby, other) = listen(), listen()

    def work(caller: Caller, number: int) -> None:
        for i in range(60):
            keys = b"%d of %d" % (i, number)
            assert look_up(caller, keys) == keys

    clients = 10
    for client in range(clients):
        caller = make_caller(address, other)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i, caller=caller, client=client: work(caller, 8 * client + i), range(8)))
    assert not cut
    assert opened == {address: clients}
    assert set(service.served.values()) == {1}
    assert not standby.served


def test_a_client_that_ends_waits_for_its_calls(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller]
) -> None:
    service, address = listen()
    caller = make_caller(address)
    look_up_until(caller, lambda: direct_of(caller) is not None)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(look_up, caller, b"held")
        assert service.began.wait(SECONDS_MAX)
        caller.is_closed = True
        closed = threads.submit(caller.close)
        wait([closed], timeout=0.3)
        service.opened.set()
        assert asked.result(SECONDS_MAX) == b"held"
        closed.result(SECONDS_MAX)
    assert service.served[b"held"] == 1


def test_a_call_ends_where_it_began_though_others_go_on_to_the_next_address(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller]
) -> None:
    (first, address), (second, other) = listen(), listen()
    caller = make_caller(address, other)
    look_up_until(caller, lambda: direct_of(caller) is not None)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(look_up, caller, b"held")
        assert first.began.wait(SECONDS_MAX)
        second.opened.set()  # There it would end at once.
        first.refuses = True
        assert look_up(caller, b"refused") == b"refused"
        assert caller.addresses[0] == other
        look_up_until(caller, lambda: direct_of(caller) is not None)
        first.opened.set()
        assert asked.result(SECONDS_MAX) == b"held"
    assert (first.served[b"held"], second.served[b"held"]) == (1, 0)


@pytest.mark.parametrize("is_direct", [False, True])
def test_who_takes_long_is_waited_for_though_there_is_another_address(
    is_direct: bool,
    listen: Callable[[], tuple[Service, str]],
    make_caller: Callable[..., Caller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A standby knows of no seat of the service's, and so says that there is none."""
    monkeypatch.setattr(caller_module, "TURN_S", 0.05)
    (first, address), (second, other) = listen(), listen()
    second.knows_seats = False
    caller = make_caller(address, other)
    if is_direct:
        look_up_until(caller, lambda: direct_of(caller) is not None)
    caller.seated()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(look_up, caller, b"held")
        assert first.began.wait(SECONDS_MAX)
        wait([asked], timeout=0.5)
        assert not asked.done()
        first.opened.set()
        assert asked.result(SECONDS_MAX) == b"held"
    assert first.served[b"held"] == 1
    assert caller.addresses == [address, other]


def test_who_gives_no_seat_in_time_is_passed_over(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "TURN_S", 0.05)
    (first, address), (_, other) = listen(), listen()
    first.seats = False
    caller = make_caller(address, other)
    assert look_up(caller, b"it") == b"it"
    assert caller.addresses == [other, address]
    assert not first.served


def test_a_direct_connection_is_for_its_own_address(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller]
) -> None:
    (first, address), (second, other) = listen(), listen()
    caller = make_caller(address, other)
    look_up_until(caller, lambda: direct_of(caller) is not None)
    first.refuses = True
    assert look_up(caller, b"refused") == b"refused"
    assert caller.addresses[0] == other
    before = first.served.total()
    for _ in range(4 * MISSES_MAX):
        look_up(caller, b"any")
    assert first.served.total() == before
    assert second.served[b"any"] == 4 * MISSES_MAX


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "there can be none"])
def test_where_there_was_none_none_is_asked_for_at_once(
    listen: Callable[[], tuple[Service, str]],
    make_caller: Callable[..., Caller],
    monkeypatch: pytest.MonkeyPatch,
    is_refused: bool,
) -> None:
    asked = threading.Semaphore(0)

    async def refuse(_: TcpNetwork, address: str) -> None:
        asked.release()
        if is_refused:
            raise Unavailable(f"{address} has too many")

    monkeypatch.setattr(TcpNetwork, "open_direct", refuse)
    monkeypatch.setattr(direct_way, "PAUSE_S", 1000.0)
    monkeypatch.setattr(direct_way, "PAUSE_S_MAX", 1000.0)
    caller = make_caller(listen()[1])
    for _ in range(20 * MISSES_MAX):
        look_up(caller, b"any")
    assert asked.acquire(timeout=SECONDS_MAX)
    assert not asked.acquire(timeout=0.1)


def test_one_that_was_refused_is_asked_for_later(
    listen: Callable[[], tuple[Service, str]], make_caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_direct, asked = TcpNetwork.open_direct, []

    async def refuse_twice(network: TcpNetwork, address: str) -> DirectConnection | None:
        asked.append(address)
        if len(asked) <= 2:
            raise Unavailable(f"{address} has too many")
        return await open_direct(network, address)

    monkeypatch.setattr(TcpNetwork, "open_direct", refuse_twice)
    monkeypatch.setattr(direct_way, "PAUSE_S", 0.05)
    caller = make_caller(listen()[1])
    look_up_until(caller, lambda: direct_of(caller) is not None)
    assert len(asked) == 3


def test_signals_do_not_prolong_a_call_of_a_service_that_stands_still(serve: Serve) -> None:
    server = serve()
    ends_s = time.monotonic() + 2 * SECONDS_MAX

    def interrupt(*_: object) -> None:
        if time.monotonic() > ends_s:
            signal.setitimer(signal.ITIMER_REAL, 0)  # It is prolonged: let it end all the same.

    with emberkv.connect(server.address, NAMESPACE, timeout_s=1.0) as cache:
        ask_until(cache, lambda: has_direct(cache))
        before = signal.signal(signal.SIGALRM, interrupt)
        server.process.send_signal(signal.SIGSTOP)
        os.waitpid(server.process.pid, os.WUNTRACED)  # Until then it may answer.
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with pytest.raises(DeadlineExceeded):
                cache.stat()
            assert time.monotonic() < ends_s
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            server.process.send_signal(signal.SIGCONT)
