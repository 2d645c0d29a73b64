"""A client that asks often has a connection of its own to the service, and goes on when it is gone, or the service."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emberkv
from emberkv.caller import MISSES_MAX

from tests.kvcache.serving import Server

NAMESPACE = emberkv.Namespace(model="test", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv"),))
SECONDS_MAX = 30.0
Serve = Callable[..., Server]


def has_direct(cache: emberkv.KVCache) -> bool:
    direct = cache._caller._direct
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
        time.sleep(0.2)
        assert not has_direct(cache)
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
    direct = cache._caller._direct
    assert direct is not None
    cache.close()
    assert direct._sock.fileno() == -1
