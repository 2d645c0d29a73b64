"""Pages that come while the caller goes on: by layers, until a deadline, and not after it was told that it is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import emberkv
import pytest
from emberfs.errors import LimitExceeded, StoreClosed
from emberkv.prefetch import STEP_PAGES, Prefetch

from tests.kvcache.serving import Server

PAGE_BYTES = 4096


class Store:
    """Pages that are read when the test lets them."""

    def __init__(self, pages: int) -> None:
        self.memory = bytearray(pages * PAGE_BYTES)
        self.views = [memoryview(self.memory)[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] for at in range(pages)]
        self.asked: list[tuple[int, list[int]]] = []
        self.bad: set[tuple[int, int]] = set()
        self.before: Callable[[], None] = lambda: None

    def read(self, pages: Sequence[int], parts: Sequence[memoryview], layer: int) -> list[bool]:
        self.before()
        self.asked.append((layer, list(pages)))
        for page, part in zip(pages, parts, strict=True):
            part[:] = bytes([page + 1]) * len(part)
        return [(page, layer) not in self.bad for page in pages]


def test_the_first_layer_of_all_pages_comes_first() -> None:
    store = Store(STEP_PAGES + 8)
    prefetch = Prefetch(store.views, layers=4, has_time=lambda: True, read=store.read)
    prefetch.run()
    assert [layer for layer, _ in store.asked] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert prefetch.is_done and all(prefetch.wait())
    assert all(set(view) == {page + 1} for page, view in enumerate(store.views))


def test_a_page_that_is_gone_is_not_read_on() -> None:
    store = Store(3)
    store.bad = {(1, 1)}
    prefetch = Prefetch(store.views, layers=4, has_time=lambda: True, read=store.read)
    prefetch.run()
    assert prefetch.wait(0) == [True] * 3
    assert prefetch.wait(1) == prefetch.wait() == [True, False, True]
    assert store.asked[2:] == [(2, [0, 2]), (3, [0, 2])]


def test_after_the_deadline_nothing_is_begun() -> None:
    store, looks = Store(3), iter([True, True, False])
    prefetch = Prefetch(store.views, layers=4, has_time=lambda: next(looks), read=store.read)
    prefetch.run()
    assert prefetch.is_done and prefetch.wait(1) == [True] * 3 and prefetch.wait() == [False] * 3


def test_who_cancels_waits_for_the_read_under_way() -> None:
    store, reading, goes_on = Store(2), threading.Event(), threading.Event()

    def before() -> None:
        reading.set()
        assert goes_on.wait(30)

    store.before = before
    prefetch = Prefetch(store.views, layers=2, has_time=lambda: True, read=store.read)
    thread = threading.Thread(target=prefetch.run)
    thread.start()
    assert reading.wait(30)
    found: list[list[bool]] = []
    canceller = threading.Thread(target=lambda: found.append(prefetch.cancel()))
    canceller.start()
    assert prefetch.wait(timeout_s=0.05) == [False] * 2 and not prefetch.is_done
    goes_on.set()
    canceller.join(30)
    thread.join(30)
    assert found == [[False] * 2] and prefetch.is_done and len(store.asked) == 1


def test_a_cache_prefetches_what_it_gets(serve: Callable[..., Server]) -> None:
    namespace = emberkv.Namespace(
        model="m", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv", payload_bytes=8192),)
    )
    with emberkv.connect(serve().address, namespace) as cache:
        keys = cache.keys(range(40 * 4))
        pages = [bytes([page]) * 4096 + bytes([page + 100]) * 4096 for page in range(40)]
        cache.put(keys, pages, durable="committed")
        hit = cache.match(keys)
        buffers = [bytearray(8192) for _ in range(38)]
        prefetch = cache.prefetch(hit, buffers, first=2, layers=2)
        assert all(prefetch.wait(0))
        assert [bytes(buffer[:4096]) for buffer in buffers] == [page[:4096] for page in pages[2:]]
        assert all(prefetch.wait()) and [bytes(buffer) for buffer in buffers] == pages[2:]
        late = cache.prefetch(hit, [bytearray(8192)], deadline_s=0)
        assert late.wait() == [False] and late.is_done
        with pytest.raises(LimitExceeded):
            cache.prefetch(hit, [bytearray(8191)])
        with pytest.raises(LimitExceeded):
            cache.prefetch(hit, [bytearray(8192)], layers=3)
    with pytest.raises(StoreClosed):
        cache.match(keys)


def test_pages_that_a_kind_has_not_are_misses(serve: Callable[..., Server]) -> None:
    kinds = (emberkv.Kind("kv"), emberkv.Kind("state", policy="trailing:1"))
    namespace = emberkv.Namespace(model="m", dtype="bf16", layout="mla", page_tokens=4, kinds=kinds)
    with emberkv.connect(serve().address, namespace) as cache:
        keys = cache.keys(range(12))
        cache.put(keys, [bytes(PAGE_BYTES)] * 3, durable="committed")
        cache.put(keys[2:], [b"s" * 100], parent=keys[1], kind="state", durable="committed")
        hit = cache.match(keys)
        buffers = [bytearray(100) for _ in range(3)]
        assert cache.prefetch(hit, buffers, kind="state", layers=2).wait() == [False, False, True]
        assert bytes(buffers[2]) == b"s" * 100
