"""How fast a lost replica is brought back: a storage node of three comes back with an empty disk.

The ceiling is the smaller of two: what this disk takes (1 MiB writes, an fsync every 16 MiB), and the cap
that the operator set (`resync_bytes_per_s`). Sources and destination share the disk and two cores here.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import emberfs
from emberfs.cluster.local import LocalCluster, Plan

from .runner import Row, verify

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much, and under which caps (0: none that matters)."""

    files: int
    file_bytes: int
    caps_bytes_per_s: tuple[int, ...]


FULL = Size(files=64, file_bytes=16 * MIB, caps_bytes_per_s=(4096 * MIB, 100 * MIB))
QUICK = Size(files=8, file_bytes=8 * MIB, caps_bytes_per_s=(4096 * MIB,))


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    disk = _disk_mib_per_s(directory, size.files * size.file_bytes)
    cluster = LocalCluster(directory / "cluster")
    cluster.up(Plan(cluster="bench", replicas=3, targets_per_disk=2, nodes=["storage-1", "storage-2", "storage-3"]))
    try:
        with emberfs.connect(cluster.url, credentials=str(cluster.directory / "client")) as client:
            content = os.urandom(size.file_bytes)
            for number in range(size.files):
                client.put(f"/{number}", content[number:] + content[:number])
            rows = [_rebuild(cluster, size, disk, cap) for cap in size.caps_bytes_per_s]
            for number in range(size.files):
                verify(client.get(f"/{number}") == content[number:] + content[:number], f"/{number} changed")
            return rows
    finally:
        cluster.down()


def _rebuild(cluster: LocalCluster, size: Size, disk: float, cap_bytes_per_s: int) -> Row:
    with cluster.admin(timeout_s=60) as admin:
        admin.set_config(admin.config().version, {"resync_bytes_per_s": cap_bytes_per_s})
        cluster.wait_serving(admin, lambda _: None)
        lost = cluster.server("storage-2")
        lost.stop()
        shutil.rmtree(lost.directory / "data")
        lost.start()
        begin_s = time.monotonic()
        lost.wait_ready(begin_s + 60)
        # It reports an empty disk first, and is taken out of its chains for that.
        _wait_for_gap(cluster, begin_s + 60)
        cluster.wait_serving(admin, lambda _: None, timeout_s=600)
    seconds = time.monotonic() - begin_s
    rate = size.files * size.file_bytes / MIB / seconds
    # Two nodes send, each as much as it is allowed to.
    ceiling = min(disk, 2 * cap_bytes_per_s / MIB)
    return Row(
        row=f"empty disk to all serving, cap {cap_bytes_per_s // MIB} MiB/s a node, MiB/s",
        ours=rate,
        ceiling=ceiling,
        ratio=rate / ceiling,
        baseline="ceiling",
    )


def _wait_for_gap(cluster: LocalCluster, deadline_s: float) -> None:
    with cluster.admin() as admin:
        while time.monotonic() < deadline_s:
            if any(len(chain.serving) < chain.replicas for chain in admin.routing().chains):
                return
            time.sleep(0.02)


def _disk_mib_per_s(directory: Path, size_bytes: int) -> float:
    block = os.urandom(MIB)
    path = directory / "ceiling"
    begin_s = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for number in range(size_bytes // MIB):
            file.write(block)
            if number % 16 == 15:
                os.fsync(file.fileno())
        os.fsync(file.fileno())
    seconds = time.monotonic() - begin_s
    path.unlink()
    return size_bytes / MIB / seconds
