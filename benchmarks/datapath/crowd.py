"""Many clients at once: how evenly they are served, and how much more they get together.

Clients are threads of four processes, so that they are not one another's interpreter lock; each has its own lanes.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import emberfs
from emberfs.cluster.local import LocalCluster

from ..runner import Row, verify
from .bare import EpollClient, EpollServer

if TYPE_CHECKING:
    from .rows import Size

KIB, MIB = 1 << 10, 1 << 20
ITEM_BYTES = 64 * KIB
CLIENTS, PROCESSES = 32, 4
TAIL_GOAL = 1.5
"""p99/p50 of ours, at most so many times that of the bare server."""

Read = Callable[[int, memoryview], None]
Connect = Callable[[], tuple[Read, Callable[[], None]]]
"""Makes a client: (reads an offset, ends)."""


def tail_row(directory: Path, cluster: LocalCluster, size: Size) -> Row:
    """How much longer than usual a client has to wait now and then."""
    data_bytes = min(size.data_bytes, 256 * MIB)
    ours, bare, ratios = [], [], []
    for _ in range(size.rounds):
        ours.append(_tail(_through(cluster), data_bytes, size.crowd_reads))
        server = EpollServer(directory / "raw", directory)
        try:
            bare.append(_tail(_to_bare(server.address), data_bytes, size.crowd_reads))
        finally:
            server.close()
        ratios.append(ours[-1] / bare[-1])
    return Row(
        row=f"p99/p50 of a 64 KiB read, {CLIENTS} clients",
        ours=statistics.median(ours),
        peers={"bare epoll": statistics.median(bare)},
        ratio=statistics.median(ratios),
        baseline="bare epoll",
        goal=TAIL_GOAL if size.has_goals else None,
        at_most=True,
    )


def _tail(connect: Connect, data_bytes: int, reads: int) -> float:
    latencies = sorted(_crowd(connect, CLIENTS, PROCESSES, data_bytes, reads))
    return latencies[len(latencies) * 99 // 100] / latencies[len(latencies) // 2]


def growth_rows(cluster: LocalCluster, size: Size, *, servers: int) -> list[Row]:
    """MiB/s of 1, 2 and 4 client processes together."""
    data_bytes, reads = min(size.data_bytes, 256 * MIB), 4 * size.crowd_reads
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(size.rounds):
        for clients in rates:
            latencies = _crowd(_through(cluster), clients, clients, data_bytes, reads)
            # Each client reads without a pause, so its latencies are the time it took.
            rates[clients].append(len(latencies) * ITEM_BYTES / MIB / (sum(latencies) / clients))
    one = statistics.median(rates[1])
    rows = []
    for clients, found in rates.items():
        title = f"64 KiB reads, {clients} clients, {servers} servers, MiB/s"
        rate = statistics.median(found)
        rows.append(Row(row=title, ours=rate, ratio=rate / one, baseline="1 client"))
    return rows


def _through(cluster: LocalCluster) -> Connect:
    url, credentials = cluster.url, str(cluster.directory / "client")

    def connect() -> tuple[Read, Callable[[], None]]:
        client = emberfs.connect(url, credentials=credentials)
        file = client.open("/corpus", "rb")

        def read(offset: int, into: memoryview) -> None:
            count = client.batch_read([(file, offset, len(into))], [into])
            verify(count == [len(into)], "ours: a short read")

        return read, client.close

    return connect


def _to_bare(address: str) -> Connect:
    def connect() -> tuple[Read, Callable[[], None]]:
        client = EpollClient(address)
        return client.read, client.close

    return connect


def _crowd(connect: Connect, clients: int, processes: int, data_bytes: int, reads: int) -> list[float]:
    """Seconds of each read of each client."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    start = context.Barrier(processes)
    workers = [
        context.Process(target=_work, args=(connect, clients // processes, number, data_bytes, reads, start, answers))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    latencies = [each for _ in workers for each in answers.get(timeout=300)]
    for worker in workers:
        worker.join()
    return latencies


def _work(connect: Connect, threads: int, number: int, data_bytes: int, reads: int, start: Any, answers: Any) -> None:
    latencies: list[float] = []
    ready = threading.Barrier(threads)

    def client(seed: int) -> None:
        rng, into = random.Random(seed), memoryview(bytearray(ITEM_BYTES))
        read, end = connect()
        for offset in range(0, data_bytes, 4 * MIB):  # Whoever has to look once has looked.
            read(offset, into)
        if ready.wait() == 0:
            start.wait()
        ready.wait()
        mine = []
        for _ in range(reads):
            offset = rng.randrange(data_bytes // ITEM_BYTES) * ITEM_BYTES
            begin_s = time.perf_counter()
            read(offset, into)
            mine.append(time.perf_counter() - begin_s)
        latencies.extend(mine)
        end()

    workers = [threading.Thread(target=client, args=(number * 1000 + each,)) for each in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    answers.put(latencies)
