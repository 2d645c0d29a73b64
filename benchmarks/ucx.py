"""How fast large buffers come by UCX: beside `ucx_perftest tag_bw`, over the same kind of device in the same minute.

`read` is the transport alone: a server in a process of its own whose service says that it filled what it was given,
four calls of 1 MiB in the air (`tag_bw` has as many as it likes). `store` is a cluster of one storage server, its data
warm in the page cache, a call of 16 x 1 MiB at a time into memory that it does not share, each byte checked by the
server; `tls` is the same without UCX, and *socket* is `read` without it. The ceiling is what `ucx_perftest` says of
itself, without its start.

Both ends are on this host. RDMA is measured where there is some: name it in EMBERLINE_BENCH_UCX, as in "rdma,tcp".
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import emberfs
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.messages import ChunksRead, Done, Message, ReadChunks, Usage
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.transport.connection import TcpConnection

from .corpus import make_corpus
from .runner import Row, Subject, compare, verify

MIB = 1 << 20
KINDS = ("shm", "tcp")
GOAL = 0.6
IN_THE_AIR = 4
STORE_ITEMS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    reads: int
    """MiB of a pass."""
    data_bytes: int
    """Of the store's file."""
    rounds: int
    has_goals: bool


FULL = Size(reads=2000, data_bytes=256 * MIB, rounds=9, has_goals=True)
QUICK = Size(reads=400, data_bytes=64 * MIB, rounds=2, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows; none where UCX is not installed."""
    if importlib.util.find_spec("libucx") is None:
        click.echo("ucx: UCX is not installed: pip install 'emberline[ucx]', or libucx-cu12 alone", err=True)
        return []
    kinds = os.environ.get("EMBERLINE_BENCH_UCX", ",".join(KINDS)).split(",")
    rows = [_transport(kind, size) for kind in kinds]
    for kind in kinds:
        rows += _store(directory / kind, kind, size)
    return rows


# ---- the transport alone


class Service:
    """Fills what it is given with 0x5a if the offset of the first item says so, and else says that it did."""

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if not isinstance(request, ReadChunks):
            return Done()
        for buffer in buffers if request.offsets[0] else ():
            buffer[:] = b"\x5a" * len(buffer)
        return ChunksRead([len(buffer) for buffer in buffers])


def serve(ucx: str) -> None:
    """Until the standard input ends. Prints the address first."""
    runtime = AsyncioRuntime()
    network = TcpNetwork(runtime, TcpConfig(shares_memory=False, ucx=ucx))
    portal = Portal(runtime)
    print(portal.run(network.serve("127.0.0.1:0", Service())).address, flush=True)
    sys.stdin.read()
    portal.run(network.close())


class _Client:
    """A connection to a `serve` of its own."""

    def __init__(self, ucx: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ucx", ucx], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        address = self._server.stdout.readline().strip()
        self._runtime = AsyncioRuntime()
        self._network = TcpNetwork(self._runtime, TcpConfig(shares_memory=False, ucx=ucx))
        self._portal = Portal(self._runtime)
        self._connection = self._network.connection(address)
        if ucx:
            self._run(_until_rail(self._connection))
        self._buffers = [memoryview(bytearray(MIB)) for _ in range(IN_THE_AIR)]

    def read(self, count: int, *, fills: bool) -> None:
        """`count` calls of 1 MiB, `IN_THE_AIR` at a time."""
        self._run(self._read(count // IN_THE_AIR, fills))

    def check(self) -> None:
        """Every byte comes as the server wrote it."""
        for buffer in self._buffers:
            buffer[:] = bytes(MIB)
        self.read(IN_THE_AIR, fills=True)
        verify(all(buffer == b"\x5a" * MIB for buffer in self._buffers), "wrong bytes from the server")

    def close(self) -> None:
        self._run(self._network.close())
        self._runtime.stop()
        self._server.communicate()

    async def _read(self, each: int, fills: bool) -> None:
        tasks = [
            self._runtime.spawn(self._read_into(buffer, each, fills), "benchmark-read") for buffer in self._buffers
        ]
        await asyncio.gather(*tasks)

    async def _read_into(self, buffer: memoryview, count: int, fills: bool) -> None:
        for _ in range(count):
            await self._connection.call(ReadChunks([1], [b"c" * 16], [int(fills)]), [buffer])

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._portal.run(work)


async def _until_rail(connection: TcpConnection) -> None:
    deadline_s = time.monotonic() + 10
    while not connection.has_rail:
        verify(time.monotonic() < deadline_s, "no large buffer goes by UCX")
        await connection.call(Usage())


def _transport(kind: str, size: Size) -> Row:
    with contextlib.ExitStack() as stack:
        ours, plain = (stack.enter_context(contextlib.closing(_Client(ucx))) for ucx in (kind, ""))
        return compare(
            f"ucx {kind}: read 1 MiB, {IN_THE_AIR} in the air, MiB/s",
            _reading(ours, size),
            peers={"socket": _reading(plain, size)},
            ceiling=_perftest(kind, size),
            baseline="ceiling",
            goal=GOAL if size.has_goals else None,
            rounds=size.rounds,
        )


def _reading(client: _Client, size: Size) -> Subject:
    def subject(check: bool) -> float:
        if check:
            client.check()
        client.read(size.reads, fills=False)
        return size.reads

    return subject


# ---- a store


def _store(directory: Path, kind: str, size: Size) -> Iterator[Row]:
    directory.mkdir()
    corpus = make_corpus(directory / "raw", size_bytes=size.data_bytes)
    cluster = LocalCluster(directory / "cluster")
    cluster.up(Plan(cluster="bench", replicas=1, targets_per_disk=2, nodes=["storage-1"], ucx=kind))
    credentials = str(cluster.directory / "client")
    try:
        for ucx in (kind, ""):  # One after the other: a process has one connection to a store.
            with emberfs.connect(cluster.url, credentials=credentials, shares_memory=False, ucx=ucx) as client:
                client.put("/corpus", corpus)
                yield compare(
                    f"{f'ucx {kind}' if ucx else 'tls'}: store read 1 MiB x {STORE_ITEMS}, MiB/s",
                    _store_reading(client, corpus, size),
                    ceiling=_perftest(kind, size),
                    baseline="ceiling",
                    rounds=size.rounds,
                )
    finally:
        cluster.down()


def _store_reading(client: emberfs.Client, corpus: memoryview, size: Size) -> Subject:
    rng = random.Random(STORE_ITEMS)
    calls = [
        [rng.randrange(size.data_bytes // MIB) for _ in range(STORE_ITEMS)] for _ in range(size.reads // STORE_ITEMS)
    ]
    into = [memoryview(bytearray(MIB)) for _ in range(STORE_ITEMS)]

    def subject(check: bool) -> float:
        with client.open("/corpus", "rb") as file:
            for wanted in calls:
                client.batch_read([(file, number * MIB, MIB) for number in wanted], into=into)
                for number, view in zip(wanted, into, strict=True) if check else ():
                    verify(view == corpus[number * MIB :][:MIB], f"wrong bytes of item {number}")
        return len(calls) * STORE_ITEMS

    return subject


# ---- the ceiling


def _perftest(kind: str, size: Size) -> Subject:
    def subject(check: bool) -> float:
        begin = time.perf_counter()
        rate = _tag_bw(kind, size.reads)
        return rate * (time.perf_counter() - begin)  # So that the row has its own number, without its start.

    return subject


def _tag_bw(kind: str, count: int) -> float:
    """MiB/s of `ucx_perftest -t tag_bw` with messages of 1 MiB, between two processes on this host."""
    with _perftest_server(kind) as port:
        deadline_s = time.monotonic() + 10
        while True:
            client = _start_perftest(kind, port, "-t", "tag_bw", "-s", str(MIB), "-n", str(count), "127.0.0.1")
            output, _ = client.communicate(timeout=60)
            if client.returncode == 0:
                break
            verify(time.monotonic() < deadline_s, f"ucx_perftest does not run: {output}")
    final = next(line for line in output.splitlines() if line.startswith("Final:"))
    return float(final.split()[6])


@contextlib.contextmanager
def _perftest_server(kind: str) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    server = _start_perftest(kind, port)
    try:
        yield port
    finally:
        server.kill()
        server.communicate()


def _start_perftest(kind: str, port: int, *arguments: str) -> subprocess.Popen[str]:
    spec = importlib.util.find_spec("libucx")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    folders = [home / "lib", home / "lib" / "ucx", home.parent / "libucx_cu12.libs"]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(map(str, folders)),
        "UCX_TLS": {"rdma": "ib"}.get(kind, kind),
        "UCX_LOG_LEVEL": "error",
    }
    return subprocess.Popen(
        [home / "bin" / "ucx_perftest", "-p", str(port), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    serve(sys.argv[1])
