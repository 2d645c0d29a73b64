"""Five hundred clients at once on one storage server that takes on little.

Run: pytest tests/e2e/test_cluster_load.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emberfs
import msgspec
import pytest
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.server import read_config, write_config
from emberfs.server.config import LoadSection

from tests.e2e import load_clients

PROCESSES, CLIENTS, IN_THE_AIR, READS = 4, 125, 4, 4
BLOCK_BYTES, FILE_BYTES = 64 << 10, 64 << 20
LOAD = LoadSection(bytes_max=96 << 20, calls_max=64)
RSS_GROWTH_BYTES_MAX = 200 << 20
"""Of the server: `LOAD`, and for each of 500 connections a receive buffer of 128 KiB, and what TLS and Python need."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """One storage server, which takes on little."""
    cluster = LocalCluster(tmp_path / "loaded")
    try:
        plan = Plan(cluster="loaded", replicas=1, targets_per_disk=2, nodes=["storage-1"])
        cluster.up(plan)
        path = cluster.directory / "storage-1" / "config.toml"
        write_config(path, msgspec.structs.replace(read_config(path), load=LOAD))
        cluster.server("storage-1").stop()
        cluster.up(plan)
        yield cluster
    finally:
        if cluster.exists:
            cluster.down()


def rss_bytes_max(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_all_reads_of_five_hundred_clients_are_right(cluster: LocalCluster) -> None:
    with emberfs.connect(cluster.url) as client:
        blocks = (load_clients.block(number, BLOCK_BYTES) for number in range(FILE_BYTES // BLOCK_BYTES))
        client.put("/blocks", b"".join(blocks))
    pid = cluster.server("storage-1").pid()
    assert pid is not None
    before = rss_bytes_max(pid)
    arguments = [cluster.url, "/blocks", *map(str, (CLIENTS, IN_THE_AIR, READS, BLOCK_BYTES))]
    command = [sys.executable, load_clients.__file__, *arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    counts = [int(each.communicate(timeout=300)[0] or 0) for each in running]
    assert [each.returncode for each in running] == [0] * PROCESSES
    assert counts == [(CLIENTS + 19) * IN_THE_AIR * READS] * PROCESSES
    assert rss_bytes_max(pid) - before < RSS_GROWTH_BYTES_MAX
    assert cluster.server("storage-1").pid() == pid, "it is still the same"
