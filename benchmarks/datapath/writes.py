"""Durable writes of 1 MiB to three replicas, and what the disk and the copies in between would take by themselves."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emberfs.checksum import crc32c
from emberfs.cluster.local import LocalCluster

from ..runner import Row, Subject, compare, verify

if TYPE_CHECKING:
    from .rows import Size

MIB = 1 << 20
REPLICAS = 3
IN_FLIGHT = 16
GOAL = 0.6


def write_rows(directory: Path, cluster: LocalCluster, size: Size) -> list[Row]:
    """16 in flight, with the goal, and one at a time."""
    from .rows import connect

    rows = []
    payload = memoryview(random.Random(3).randbytes(IN_FLIGHT * MIB))
    servers = [cluster.server(f"storage-{number}").pid() or 0 for number in range(1, REPLICAS + 1)]
    with connect(cluster) as client:
        shared = client.buffer(len(payload))
        shared[:] = payload
        client.put("/written", payload, chunk_size_bytes=MIB)
        file = client.open("/written", "r+b")
        for count in (IN_FLIGHT, 1):
            calls = max(size.calls // 16, 2) if count > 1 else max(size.calls // 4, 4)

            def ours(check: bool, count: int = count, calls: int = calls) -> float:
                for _ in range(calls):
                    client.batch_write([(file, at * MIB, shared[at * MIB :][:MIB]) for at in range(count)])
                if check:
                    verify(client.get("/written", 0, count * MIB) == payload[: count * MIB], "ours: wrong bytes")
                return float(calls * count)

            rows.append(
                compare(
                    f"write 1 MiB x {count}, 3 replicas, MiB/s",
                    ours,
                    ceiling=_least(directory, payload, count, calls),
                    baseline="ceiling",
                    goal=GOAL if size.has_goals and count > 1 else None,
                    rounds=size.rounds,
                    servers={"ours": servers},
                )
            )
        file.close()
    return rows


def _least(directory: Path, payload: memoryview, count: int, calls: int) -> Subject:
    """The least that a chain of three has to do for `count` payloads at once, without a store.

    Of each payload: one copy out of the client's memory, two trips over a loopback socket (head to middle, middle to
    tail), three checksums; three files are written side by side, a thread each, and each is flushed once for all.
    """
    files = [os.open(directory / f"replica-{number}", os.O_RDWR | os.O_CREAT, 0o600) for number in range(REPLICAS)]
    copies = [memoryview(bytearray(MIB)) for _ in range(REPLICAS)]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname())
        there, _ = listening.accept()

    def send(source: memoryview) -> None:
        here.sendall(source)

    def hop(source: memoryview, into: memoryview) -> None:
        thread = threading.Thread(target=send, args=(source,))
        thread.start()
        received = 0
        while received < len(into):
            received += there.recv_into(into[received:])
        thread.join()
        crc32c(into)

    def write(replica: int, offset: int) -> None:
        os.pwrite(files[replica], copies[replica], offset)

    def work(check: bool) -> float:
        for _ in range(calls):
            for at in range(count):
                copies[0][:] = payload[at * MIB :][:MIB]
                crc32c(copies[0])
                hop(copies[0], copies[1])
                hop(copies[1], copies[2])
                for replica in range(REPLICAS):
                    write(replica, at * MIB)
            _side_by_side([lambda file=file: os.fdatasync(file) for file in files])  # type: ignore[misc]
        if check:
            verify(os.pread(files[-1], count * MIB, 0) == payload[: count * MIB], "the ceiling wrote wrong bytes")
        return float(calls * count)

    return work


def _side_by_side(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
