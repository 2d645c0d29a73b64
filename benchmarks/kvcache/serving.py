"""A store of one node on this host, and a KV-cache service over it: each of their processes is one of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import emberkv
from emberfs.cluster.local import LocalCluster, Plan

from ..runner import verify

PAGE_TOKENS = 64


class Serving:
    """What runs."""

    def __init__(self, cluster: LocalCluster, *, capacity_bytes: int) -> None:
        self.cluster, self._capacity_bytes = cluster, capacity_bytes
        self.start_service()

    def start_service(self) -> None:
        """Start the service, over what an earlier one left."""
        self.serve_by(self.start_standby())

    def start_standby(self) -> subprocess.Popen[str]:
        """One that serves when the one that does has ended."""
        command = [sys.executable, "-m", "emberline", "kv", "serve", "--store", self.cluster.url, "--root", "/kv"]
        command += ["--listen", "127.0.0.1:0", "--capacity", str(self._capacity_bytes)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def serve_by(self, service: subprocess.Popen[str]) -> None:
        """Wait until it serves."""
        self.service = service
        assert self.service.stdout is not None
        line = self.service.stdout.readline()
        verify(bool(line), f"the service ended with {self.service.poll()}")
        self.address: str = json.loads(line)["address"]

    def end_service(self, *, kills: bool = False) -> None:
        """SIGTERM, or SIGKILL."""
        self.service.kill() if kills else self.service.terminate()
        self.service.wait()
        assert self.service.stdout is not None
        self.service.stdout.close()

    @property
    def pids(self) -> list[int]:
        """Of those that serve a get or a put."""
        return [self.service.pid, self.cluster.server("storage-1").pid() or 0]

    @property
    def all_pids(self) -> list[int]:
        """Of every server."""
        return [self.service.pid, *(server.pid() or 0 for server in self.cluster.servers())]

    def connect(self, page_bytes: int) -> emberkv.KVCache:
        """A client of the namespace of pages of this size."""
        return emberkv.connect(self.address, namespace(page_bytes), store=self.cluster.url)

    def connect_by_tcp(self, page_bytes: int) -> emberkv.KVCache:
        """A client that shares no memory with the servers."""
        # A store has one set of settings in a process: under another name it is another store.
        store = self.cluster.url.replace("127.0.0.1", "localhost")
        return emberkv.connect(self.address, namespace(page_bytes), store=store, shares_memory=False)

    def written_bytes(self) -> int:
        """What all servers gave the kernel to write into files, so far."""
        return sum(_written_bytes(pid) for pid in self.all_pids)

    def disk_bytes(self) -> int:
        """What the storage server takes on its disk."""
        data = self.cluster.directory / "storage-1" / "data"
        return sum(path.lstat().st_blocks * 512 for path in data.rglob("*"))


def namespace(page_bytes: int) -> emberkv.Namespace:
    """One for each size of pages; 0: pages of any size."""
    kind = emberkv.Kind("kv", payload_bytes=page_bytes)
    return emberkv.Namespace(
        model="bench", revision=str(page_bytes), dtype="bf16", layout="mla", page_tokens=PAGE_TOKENS, kinds=(kind,)
    )


@contextmanager
def serving(directory: Path, *, capacity_bytes: int) -> Iterator[Serving]:
    """Up to the end of the block; what it stored is removed then."""
    cluster = LocalCluster(directory)
    # Clients of this host come by a unix socket, where there is no TLS anyway; over TCP no peer has it either.
    cluster.up(Plan(cluster="bench", replicas=1, targets_per_disk=2, nodes=["storage-1"], tls=False))
    try:
        served = Serving(cluster, capacity_bytes=capacity_bytes)
        try:
            yield served
        finally:
            served.end_service()
    finally:
        cluster.down()
        shutil.rmtree(directory)


def _written_bytes(pid: int) -> int:
    """Sockets are not in it. Not `write_bytes`, which counts all of a folio as written for each page of it that is:
    tens of KiB more for each write into a block that was in the page cache, of which the disk never sees anything."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def settle() -> None:
    """What others left to be written is not written during the next measurement."""
    os.sync()
