"""Which rows there are, and the clusters they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import emberfs
from emberfs.cluster.local import LocalCluster, Plan

from ..corpus import make_corpus
from ..runner import Row
from . import crowd, reads, writes

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    calls: int
    """Per pass; fewer where each is of more than 1 MiB."""
    rounds: int
    crowd_reads: int
    """Of each of the 32 clients, a pass."""
    has_goals: bool


FULL = Size(data_bytes=1024 * MIB, calls=256, rounds=7, crowd_reads=400, has_goals=True)
QUICK = Size(data_bytes=64 * MIB, calls=48, rounds=1, crowd_reads=40, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    corpus = make_corpus(directory / "raw", size_bytes=size.data_bytes)
    rows: list[Row] = []
    with _cluster(directory / "shm", nodes=1) as shm:
        _load(shm, corpus)
        for item_bytes, count in reads.SHM_GOALS:
            rows += reads.shm_rows(directory, shm, corpus, size, item_bytes, count)
        rows.append(crowd.tail_row(directory, shm, size))
        rows += crowd.growth_rows(shm, size, servers=1)
    with _cluster(directory / "tcp", nodes=1, tls=False) as plain:
        _load(plain, corpus)
        for item_bytes, count in reads.TCP_GOALS:
            rows += reads.tcp_rows(directory, plain, corpus, size, item_bytes, count)
    with _cluster(directory / "three", nodes=3, replicas=3) as three:
        rows += writes.write_rows(directory, three, size)
    with _cluster(directory / "crowd", nodes=4) as four:
        _load(four, corpus[: 256 * MIB])
        rows += crowd.growth_rows(four, size, servers=4)
    return rows


@contextmanager
def _cluster(directory: Path, *, nodes: int, replicas: int = 1, tls: bool = True) -> Iterator[LocalCluster]:
    cluster = LocalCluster(directory)
    names = [f"storage-{number}" for number in range(1, nodes + 1)]
    cluster.up(Plan(cluster="bench", replicas=replicas, targets_per_disk=2 * replicas, nodes=names, tls=tls))
    try:
        yield cluster
    finally:
        cluster.down()


def _load(cluster: LocalCluster, corpus: memoryview) -> None:
    """One file with default chunks, and one with small chunks, whose granules are of 4 KiB."""
    with connect(cluster) as client:
        client.put("/corpus", corpus)
        client.put("/small-chunks", corpus[: 256 * MIB], chunk_size_bytes=MIB)


def connect(cluster: LocalCluster, *, shares_memory: bool = True) -> emberfs.Client:
    """A client of one of these clusters."""
    if not cluster.plan().tls:
        return emberfs.connect(cluster.url, shares_memory=shares_memory)
    return emberfs.connect(cluster.url, credentials=str(cluster.directory / "client"), shares_memory=shares_memory)
