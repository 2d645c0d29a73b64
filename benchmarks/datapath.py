"""How fast bytes come from a storage server in a process of its own: through shared memory, and over TLS.

A cluster of one storage server on this host, the data warm in the page cache, one thread here and one call in the air.
Ours goes into `client.buffer`; *any memory* is ours into a plain bytearray, *tls* the same with `shares_memory=False`.
Every byte is checked on the way: ours by the server, redis' values by the client. Destinations rotate over 64 MiB.

Not there yet: writes with replicas, many clients at once, CPU seconds of the servers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import emberfs
from emberfs.cluster.local import LocalCluster, Plan

from .corpus import make_corpus
from .peers import RedisValues
from .runner import Row, Subject, compare, verify

KIB, MIB = 1 << 10, 1 << 20
ROTATION_BYTES = 64 * MIB

GOALS: dict[tuple[int, int], tuple[float | None, float | None]] = {
    (MIB, 1): (0.4, 1.5),
    (MIB, 16): (None, None),
    (64 * KIB, 16): (0.4, 1.5),
    (4 * KIB, 256): (0.3, None),
}
"""(item bytes, items per call) -> ours / preadv, ours / redis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    calls: int
    """Per pass; fewer where each is of more than 1 MiB."""
    rounds: int
    has_goals: bool


FULL = Size(data_bytes=1024 * MIB, calls=256, rounds=7, has_goals=True)
QUICK = Size(data_bytes=128 * MIB, calls=64, rounds=2, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    corpus = make_corpus(directory / "raw", size_bytes=size.data_bytes)
    cluster = LocalCluster(directory / "cluster")
    cluster.up(Plan(cluster="bench", replicas=1, targets_per_disk=2, nodes=["storage-1"]))
    try:
        credentials = str(cluster.directory / "client")
        with emberfs.connect(cluster.url, credentials=credentials) as client:
            client.put("/corpus", corpus)
        rows: list[Row] = []
        for item_bytes, count in GOALS:
            rows += _reads(directory, cluster.url, credentials, corpus, size, item_bytes, count)
        return rows
    finally:
        cluster.down()


def _reads(
    directory: Path, url: str, credentials: str, corpus: memoryview, size: Size, item_bytes: int, count: int
) -> list[Row]:
    calls = size.calls * MIB // max(count * item_bytes, MIB)
    rng = random.Random(item_bytes)
    numbers = [[rng.randrange(size.data_bytes // item_bytes) for _ in range(count)] for _ in range(calls)]
    plain = memoryview(bytearray(ROTATION_BYTES))
    amount_mib = calls * count * item_bytes / MIB
    values, raw = RedisValues(directory / "redis"), os.open(directory / "raw", os.O_RDONLY)

    def views(memory: memoryview, call: int) -> list[memoryview]:
        begin = call * count * item_bytes % ROTATION_BYTES
        return [memory[begin + at * item_bytes :][:item_bytes] for at in range(count)]

    def checked(who: str, wanted: Sequence[int], into: Sequence[memoryview]) -> None:
        for number, view in zip(wanted, into, strict=True):
            verify(view == corpus[number * item_bytes :][:item_bytes], f"{who}: wrong bytes of item {number}")

    def through(client: emberfs.Client, memory: memoryview, who: str) -> Subject:
        def subject(check: bool) -> float:
            with client.open("/corpus", "rb") as file:
                for call, wanted in enumerate(numbers):
                    into = views(memory, call)
                    client.batch_read([(file, number * item_bytes, item_bytes) for number in wanted], into=into)
                    if check:
                        checked(who, wanted, into)
            return amount_mib

        return subject

    def redis(check: bool) -> float:
        for call, wanted in enumerate(numbers):
            values.read(wanted, views(plain, call))
        return amount_mib

    def preadv(check: bool) -> float:
        for call, wanted in enumerate(numbers):
            for number, view in zip(wanted, views(plain, call), strict=True):
                os.preadv(raw, [view], number * item_bytes)
        return amount_mib

    goal, redis_goal = GOALS[item_bytes, count] if size.has_goals else (None, None)
    name = f"{item_bytes // MIB} MiB" if item_bytes >= MIB else f"{item_bytes // KIB} KiB"
    try:
        values.load(corpus[at : at + item_bytes] for at in range(0, size.data_bytes, item_bytes))
        with emberfs.connect(url, credentials=credentials) as client:
            shared = client.buffer(ROTATION_BYTES)
            shared[:] = bytes(ROTATION_BYTES)
            row = compare(
                f"shm read {name} x {count}, MiB/s",
                through(client, shared, "ours"),
                peers={"any memory": through(client, plain, "any memory"), "redis": redis},
                ceiling=preadv,
                baseline="ceiling",
                goal=goal,
                rounds=size.rounds,
            )
        with emberfs.connect(url, credentials=credentials, shares_memory=False) as client:
            tls = compare(
                f"tls read {name} x {count}, MiB/s",
                through(client, plain, "tls"),
                ceiling=preadv,
                baseline="ceiling",
                rounds=max(size.rounds // 2, 1),
            )
    finally:
        os.close(raw)
        values.close()
    beside = replace(row, row=f"shm read {name} x {count}, beside redis", ratio=row.ours / row.peers["redis"])
    return [row, replace(beside, baseline="redis", goal=redis_goal, seconds={}), tls]
