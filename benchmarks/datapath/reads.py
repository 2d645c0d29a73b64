"""Reads of one client, one call in the air: through shared memory, over TCP, over TLS."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import emberfs
from emberfs.cluster.local import LocalCluster

from ..mooncake import MOONCAKE, MooncakeValues
from ..peers import RedisPyValues, RedisValues, Values
from ..runner import Row, Subject, compare, verify
from .bare import RawSocket

if TYPE_CHECKING:
    from .rows import Size

KIB, MIB = 1 << 10, 1 << 20
ROTATION_BYTES = 64 * MIB

SHM_GOALS: dict[tuple[int, int], tuple[float | None, float | None]] = {
    (MIB, 1): (0.4, 1.5),
    (MIB, 16): (None, None),
    (64 * KIB, 16): (0.4, 1.5),
    (4 * KIB, 256): (0.55, None),
}
"""(item bytes, items per call) -> ours / preadv, ours / redis. 4 KiB has the goal of a native path: `emberfs.lane`."""
TCP_GOALS = {(MIB, 1): (1.3, 0.6), (64 * KIB, 16): (1.3, 0.6)}
"""-> ours / redis-py and Mooncake, ours / raw socket loop."""


class Reads:
    """The same random reads for everybody, into memory that rotates."""

    def __init__(self, corpus: memoryview, size: Size, item_bytes: int, count: int) -> None:
        # Small chunks, and so the corpus of 4 KiB items, are of its first 256 MiB.
        self.corpus = corpus[: 256 * MIB] if item_bytes < 64 * KIB else corpus
        self.path = "/small-chunks" if item_bytes < 64 * KIB else "/corpus"
        self.item_bytes = item_bytes
        self.count = count
        calls = size.calls * MIB // max(count * item_bytes, MIB)
        rng = random.Random(item_bytes)
        items = len(self.corpus) // item_bytes
        self.numbers = [[rng.randrange(items) for _ in range(count)] for _ in range(calls)]
        self.amount_mib = calls * count * item_bytes / MIB
        name = f"{item_bytes // MIB} MiB" if item_bytes >= MIB else f"{item_bytes // KIB} KiB"
        self.name = f"{name} x {count}"

    def values(self) -> list[memoryview]:
        """Every item."""
        return [self.corpus[at : at + self.item_bytes] for at in range(0, len(self.corpus), self.item_bytes)]

    def into(self, memory: memoryview, call: int) -> list[memoryview]:
        """Where the items of a call go."""
        begin = call * self.count * self.item_bytes % ROTATION_BYTES
        return [memory[begin + at * self.item_bytes :][: self.item_bytes] for at in range(self.count)]

    def check(self, who: str, call: int, into: Sequence[memoryview]) -> None:
        """Raises WrongResult."""
        for number, view in zip(self.numbers[call], into, strict=True):
            wanted = self.corpus[number * self.item_bytes :][: self.item_bytes]
            verify(view == wanted, f"{who}: wrong bytes of item {number}")

    def through(self, client: emberfs.Client, memory: memoryview, who: str) -> Subject:
        """Our client."""
        file = client.open(self.path, "rb")

        def read(call: int, into: list[memoryview]) -> None:
            client.batch_read(
                [(file, number * self.item_bytes, self.item_bytes) for number in self.numbers[call]], into
            )

        return self.subject(read, memory, who)

    def of(self, values: Values, memory: memoryview, who: str) -> Subject:
        """A peer."""
        return self.subject(lambda call, into: values.read(self.numbers[call], into), memory, who)

    def subject(self, read: Callable[[int, list[memoryview]], None], memory: memoryview, who: str) -> Subject:
        def work(check: bool) -> float:
            for call in range(len(self.numbers)):
                into = self.into(memory, call)
                read(call, into)
                if check:
                    self.check(who, call, into)
            return self.amount_mib

        return work

    def preadv(self, file: int, memory: memoryview) -> Subject:
        """The ceiling: a loop in Python over the raw file."""

        def read(call: int, into: list[memoryview]) -> None:
            for number, view in zip(self.numbers[call], into, strict=True):
                os.preadv(file, [view], number * self.item_bytes)

        return self.subject(read, memory, "preadv")


def shm_rows(
    directory: Path, cluster: LocalCluster, corpus: memoryview, size: Size, item_bytes: int, count: int
) -> list[Row]:
    """Beside `preadv` and a bare client of redis on a unix socket; then over TLS."""
    from .rows import connect

    reads = Reads(corpus, size, item_bytes, count)
    plain = memoryview(bytearray(ROTATION_BYTES))
    goal, redis_goal = SHM_GOALS[item_bytes, count] if size.has_goals else (None, None)
    with ExitStack() as stack:
        raw = os.open(directory / "raw", os.O_RDONLY)
        stack.callback(os.close, raw)
        redis = stack.enter_context(closing(RedisValues(directory / "redis")))
        redis.load(reads.values())
        server = [cluster.server("storage-1").pid() or 0]
        with connect(cluster) as client:
            shared = client.buffer(ROTATION_BYTES)
            shared[:] = bytes(ROTATION_BYTES)
            row = compare(
                f"shm read {reads.name}, MiB/s",
                reads.through(client, shared, "ours"),
                peers={
                    "any memory": reads.through(client, plain, "any memory"),
                    "redis": reads.of(redis, plain, "redis"),
                },
                ceiling=reads.preadv(raw, shared),
                baseline="ceiling",
                goal=goal,
                rounds=size.rounds,
                servers={"ours": server, "any memory": server, "redis": [redis.pid]},
            )
        with connect(cluster, shares_memory=False) as client:
            tls = compare(
                f"tls read {reads.name}, MiB/s",
                reads.through(client, plain, "tls"),
                ceiling=reads.preadv(raw, plain),
                baseline="ceiling",
                rounds=max(size.rounds // 2, 1),
                servers={"ours": server},
            )
    beside = replace(row, row=f"shm read {reads.name}, beside redis", ratio=row.against("redis"))
    return [row, replace(beside, baseline="redis", goal=redis_goal, seconds={}), tls]


def tcp_rows(
    directory: Path, cluster: LocalCluster, corpus: memoryview, size: Size, item_bytes: int, count: int
) -> list[Row]:
    """Beside redis-py, a bare client of redis, Mooncake where it is set up, and a loop over a bare socket."""
    from .rows import connect

    reads = Reads(corpus, size, item_bytes, count)
    plain = memoryview(bytearray(ROTATION_BYTES))
    goal, raw_goal = TCP_GOALS[item_bytes, count] if size.has_goals else (None, None)
    with ExitStack() as stack:
        redis = stack.enter_context(closing(RedisPyValues(directory / "redis")))
        redis.load(reads.values())
        socket = stack.enter_context(closing(RawSocket(directory / "raw")))
        client = stack.enter_context(connect(cluster, shares_memory=False))
        server = [cluster.server("storage-1").pid() or 0]
        peers = {"redis-py": reads.of(redis, plain, "redis-py"), "redis tcp": reads.of(redis.bare, plain, "redis tcp")}
        pids = {"ours": server, "redis-py": [redis.pid], "redis tcp": [redis.pid], "ceiling": [socket.pid]}
        if size.has_goals and MOONCAKE.is_there():
            mooncake = stack.enter_context(closing(MooncakeValues(directory / "mooncake")))
            mooncake.load(directory / "raw", item_bytes, items=len(reads.corpus) // item_bytes)
            peers["mooncake"] = mooncake.subject(reads.numbers, reads.amount_mib)
            pids["mooncake"] = mooncake.pids
        row = compare(
            f"tcp read {reads.name}, MiB/s",
            reads.through(client, plain, "ours"),
            peers=peers,
            ceiling=reads.of(socket, plain, "raw socket"),
            baseline="ceiling",
            goal=raw_goal,
            rounds=size.rounds,
            servers=pids,
        )
    rows = [row]
    for peer in ("redis-py", "mooncake"):
        if peer in row.peers:
            title = f"tcp read {reads.name}, beside {peer}"
            rows.append(replace(row, row=title, ratio=row.against(peer), baseline=peer, goal=goal, seconds={}))
    return rows
