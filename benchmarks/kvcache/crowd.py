"""8 client processes at once, each with a batch in the air: how much they get together."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..peers import LmdbValues, RedisPyValues, RedisValues
from ..runner import OURS, Row, Seconds, cpu_s_of, verify
from .pages import BATCH, KIB, LEASE_S, MIB, Pages
from .serving import Serving

if TYPE_CHECKING:
    from .rows import Size

CLIENTS = 8
PAGE_SIZES = (56 * KIB, MIB)
TIMEOUT_S = 120.0
"""For all of them to connect, and for a round."""
Read = Callable[[int, list[memoryview]], None]
Connect = Callable[[], tuple[Read, memoryview]]
"""In a client's process: (reads a sequence, memory to read into)."""


@dataclass(frozen=True, slots=True)
class _Side:
    connect: Connect
    pids: list[int]


@dataclass(frozen=True, slots=True)
class _Round:
    rate: float
    wall_s: float
    cpu_s: float
    servers_s: float


def crowd_rows(directory: Path, serving: Serving, corpus: memoryview, size: Size) -> list[Row]:
    """Pages that are stored already."""
    return [
        _crowd_row(directory, serving, Pages(corpus, page_bytes, size), size)
        for page_bytes in size.page_sizes
        if page_bytes in PAGE_SIZES
    ]


def _crowd_row(directory: Path, serving: Serving, pages: Pages, size: Size) -> Row:
    with ExitStack() as stack:
        lmdb = stack.enter_context(closing(LmdbValues(directory / "lmdb")))
        unix = stack.enter_context(closing(RedisValues(directory / "redis-unix")))
        tcp = stack.enter_context(closing(RedisPyValues(directory / "redis-tcp")))
        for values in (lmdb, unix, tcp):
            values.load(pages.values())
        lmdb.let_go()
        sides = {
            OURS: _Side(_ours(serving, pages), serving.pids),
            "lmdb": _Side(_peer(lmdb, pages), []),
            "redis": _Side(_peer(unix, pages), [unix.pid]),
            "redis tcp": _Side(_peer(tcp.bare, pages), [tcp.pid]),
        }
        rounds: dict[str, list[_Round]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(size.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                rounds[name].append(_round(sides[name], pages, size.crowd_bytes))
        lmdb.reopen()
    rates = {name: statistics.median(each.rate for each in done) for name, done in rounds.items()}
    return Row(
        row=f"get {pages.name}, {CLIENTS} processes, MiB/s",
        ours=rates.pop(OURS),
        peers=rates,
        ratio=statistics.median(a.rate / b.rate for a, b in zip(rounds[OURS], rounds["redis"], strict=True)),
        baseline="redis",
        seconds={name: _seconds(done, pages, size.crowd_bytes) for name, done in rounds.items()},
    )


def _ours(serving: Serving, pages: Pages) -> Connect:
    def connect() -> tuple[Read, memoryview]:
        cache = serving.connect(pages.page_bytes)
        hits = [cache.match(keys, lease_s=LEASE_S) for keys in pages.keys(cache)]

        def read(sequence: int, into: list[memoryview]) -> None:
            verify(all(cache.get_into(hits[sequence], into)), "ours: a page is missing")

        return read, cache.buffer(BATCH * pages.page_bytes)

    return connect


def _peer(values: LmdbValues | RedisValues, pages: Pages) -> Connect:
    def connect() -> tuple[Read, memoryview]:
        values.reopen()
        memory = memoryview(bytearray(BATCH * pages.page_bytes))
        return lambda sequence, into: values.read(pages.numbers(sequence), into), memory

    return connect


def _round(side: _Side, pages: Pages, amount_bytes: int) -> _Round:
    """All clients connect and read each of their batches once, then all begin at once."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    start = context.Barrier(CLIENTS + 1, timeout=TIMEOUT_S)
    calls = _calls(pages, amount_bytes)
    workers = [
        context.Process(target=_work, args=(side.connect, pages, calls, number, start, answers))
        for number in range(CLIENTS)
    ]
    for worker in workers:
        worker.start()
    start.wait()
    servers_s = cpu_s_of(side.pids)
    found = [answers.get(timeout=TIMEOUT_S) for _ in workers]
    servers_s = cpu_s_of(side.pids) - servers_s
    for worker in workers:
        worker.join()
    wall_s = max(end_s for _, end_s, _ in found) - min(begin_s for begin_s, _, _ in found)
    amount_mib = CLIENTS * calls * BATCH * pages.page_bytes / MIB
    return _Round(amount_mib / wall_s, wall_s, sum(cpu_s for _, _, cpu_s in found), servers_s)


def _calls(pages: Pages, amount_bytes: int) -> int:
    return max(amount_bytes // (BATCH * pages.page_bytes), 2)


def _seconds(rounds: list[_Round], pages: Pages, amount_bytes: int) -> Seconds:
    return Seconds(
        wall=statistics.median(each.wall_s for each in rounds),
        cpu=statistics.median(each.cpu_s for each in rounds),
        servers=statistics.mean(each.servers_s for each in rounds),
        amount=CLIENTS * _calls(pages, amount_bytes) * BATCH * pages.page_bytes / MIB,
    )


def _work(connect: Connect, pages: Pages, calls: int, number: int, start: Any, answers: Any) -> None:
    rng = random.Random(number)
    read, memory = connect()
    into = [memory[at * pages.page_bytes :][: pages.page_bytes] for at in range(BATCH)]
    sequences = [rng.randrange(pages.sequences) for _ in range(calls)]
    for sequence in sequences:
        read(sequence, into)
        pages.check("a client of the crowd", sequence, into)
    start.wait()
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    for sequence in sequences:
        read(sequence, into)
    answers.put((begin_s, time.perf_counter(), time.process_time() - cpu_s))
