"""New pages, in batches of 16, by one writer: ours into one replica, all of them on the disk when a pass is over."""

from __future__ import annotations

import itertools
import mmap
import random
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import emberkv

from ..peers import LmdbValues, RedisPyValues, RedisValues
from ..runner import Row, Subject, compare, verify
from .pages import BATCH, page_name
from .serving import Serving, settle

if TYPE_CHECKING:
    from .rows import Size

MIB = 1 << 20
GOAL = 1.0
"""Ours / SET by a bare client of redis, on a unix socket."""
PAGE_SIZES = (56 << 10, MIB)
FIRST_TOKEN = 1 << 31
"""No page of the gets begins with it."""


def put_rows(directory: Path, serving: Serving, size: Size) -> list[Row]:
    """Of pages of both sizes."""
    return [_put_row(directory, serving, size, page_bytes) for page_bytes in PAGE_SIZES]


def _put_row(directory: Path, serving: Serving, size: Size, page_bytes: int) -> Row:
    payload = memoryview(random.Random(page_bytes).randbytes(BATCH * page_bytes))
    values = [payload[at * page_bytes :][:page_bytes] for at in range(BATCH)]
    calls = max(size.pass_bytes // (BATCH * page_bytes), 1)
    settle()
    with ExitStack() as stack:
        cache = stack.enter_context(serving.connect(page_bytes))
        unix = stack.enter_context(closing(RedisValues(directory / "redis-unix")))
        tcp = stack.enter_context(closing(RedisPyValues(directory / "redis-tcp")))
        lmdb = stack.enter_context(closing(LmdbValues(directory / "lmdb")))
        return compare(
            f"put {page_name(page_bytes)} x {BATCH}, MiB/s",
            _ours(cache, values, calls, "buffered"),
            peers={
                "committed": _ours(cache, values, calls, "committed"),
                "redis": _redis(unix, values, calls),
                "redis tcp": _redis(tcp.bare, values, calls),
                "lmdb": _lmdb(lmdb, values, calls),
            },
            baseline="redis",
            goal=GOAL if size.has_goals else None,
            rounds=size.rounds,
            between=lambda: _use_memory(directory / "scratch", 2 * size.pass_bytes),
            servers={
                "ours": serving.pids,
                "committed": serving.pids,
                "redis": [unix.pid],
                "redis tcp": [tcp.pid],
            },
        )


def _use_memory(scratch: Path, size_bytes: int) -> None:
    """Have so much memory of programs and so much page cache, and let go of it.

    A virtual machine may give free memory back to its host after a while. To get it again takes several times as long
    as to write to it, and would be charged to whoever comes next.
    """
    with mmap.mmap(-1, size_bytes) as memory:
        for at in range(0, size_bytes, mmap.PAGESIZE):
            memory[at] = 1
    with scratch.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(bytes(MIB))
    scratch.unlink()


def _ours(cache: emberkv.KVCache, values: list[memoryview], calls: int, durable: str) -> Subject:
    tokens = BATCH * cache.namespace.page_tokens
    first = FIRST_TOKEN if durable == "buffered" else FIRST_TOKEN * 3 // 2
    batches = (cache.keys(range(at, at + tokens)) for at in itertools.count(first, tokens))

    def work(check: bool) -> float:
        for keys in itertools.islice(batches, calls):
            states = cache.put(keys, values, durable=durable)
            verify(states == ["stored"] * BATCH, f"ours: {states}")
            if check:
                cache.flush()
                verify(cache.get(cache.match(keys)) == values, "ours: wrong bytes")
        cache.flush()  # A pass is over when all of it is on the disk.
        return calls * sum(map(len, values)) / MIB

    return work


def _redis(server: RedisValues, values: list[memoryview], calls: int) -> Subject:
    def work(check: bool) -> float:
        for _ in range(calls):
            server.append(values)
        if check:
            into = memoryview(bytearray(len(values[0])))
            server.read([0], [into])
            verify(into == values[0], "redis: wrong bytes")
        return calls * sum(map(len, values)) / MIB

    return work


def _lmdb(store: LmdbValues, values: list[memoryview], calls: int) -> Subject:
    numbers = itertools.count()

    def work(check: bool) -> float:
        for _ in range(calls):
            store.write([next(numbers) for _ in values], values)
        return calls * sum(map(len, values)) / MIB

    return work
