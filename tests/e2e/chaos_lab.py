"""A cluster to do harm to: three storage nodes, the third on a network of its own and the first on a small disk.

Where we may not mount or make network namespaces (only root may), the lab does without, and `has_network` and
`has_small_disk` say so. Everything that was made is gone after `close`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import emberfs
import msgspec
from emberfs.cluster import local
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.cluster.processes import ServerProcess
from emberfs.server import read_config, write_config
from emberfs.transport.certificates import issue

from tests.e2e.chaos_load import PROCESSES, Board, prepare

DISK_BYTES = 256 << 20
RESERVE_BYTES = 8 << 20
BACK_TIMEOUT_S = 120.0
"""All chains serve again by then: generous, for a machine that does much else."""
_CLONE_NEWNET = 0x40000000
_LOAD = Path(__file__).with_name("chaos_load.py")


class Lab:
    """The cluster, its odd hardware, and the load on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = LocalCluster(directory / "cluster")
        self.has_network = self.has_small_disk = False
        self.board = Board(directory / "board", makes=True)
        self._netns = f"ember{os.getpid()}"
        self._links = (f"em{os.getpid()}a", f"em{os.getpid()}b")
        self._net = f"10.213.{os.getpid() % 250}"
        self._mounts: list[Path] = []
        self._loads: list[subprocess.Popen[str]] = []

    # --- setting up ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start it, with some files in it."""
        self.has_network = self._make_network()
        host = f"{self._net}.1" if self.has_network else local.HOST
        usual, local.HOST = local.HOST, host
        try:
            nodes = ["storage-1", "storage-2", "storage-3"]
            self.cluster.up(Plan(cluster="chaos", targets_per_disk=2, nodes=nodes, reserve_bytes=RESERVE_BYTES))
        finally:
            local.HOST = usual
        if self.has_network:
            self._move_to_own_network(self.cluster.server("storage-3"))
        self.has_small_disk = self._move_to_small_disk(self.cluster.server("storage-1"))
        self.wait_serving()
        with self.connect() as client:
            prepare(client, self.board)

    def close(self) -> None:
        """End all that we started."""
        self._kill_load()
        if self.cluster.exists:
            for server in self.cluster.servers():
                server.stop(by=9)
            self.cluster.down()
        for mount in self._mounts:
            subprocess.run(["umount", "-l", mount], check=True)
        if self.has_network:
            subprocess.run(["ip", "link", "del", self._links[0]], check=True)
            subprocess.run(["ip", "netns", "del", self._netns], check=True)

    def _make_network(self) -> bool:
        ours, theirs = self._links
        steps = (
            f"ip netns add {self._netns}",
            f"ip link add {ours} type veth peer name {theirs}",
            f"ip link set {theirs} netns {self._netns}",
            f"ip addr add {self._net}.1/24 dev {ours}",
            f"ip link set {ours} up",
            f"ip -n {self._netns} addr add {self._net}.2/24 dev {theirs}",
            f"ip -n {self._netns} link set {theirs} up",
            f"ip -n {self._netns} link set lo up",
        )
        if os.geteuid() or not shutil.which("ip"):
            return False
        for number, step in enumerate(steps):
            if subprocess.run(step.split(), capture_output=True).returncode:
                for undo in (f"ip link del {ours}", f"ip netns del {self._netns}")[: number + 1]:
                    subprocess.run(undo.split(), capture_output=True)
                return False
        return True

    def _move_to_own_network(self, server: ServerProcess) -> None:
        server.stop()
        path = server.directory / "config.toml"
        config = read_config(path)
        address = f"{self._net}.2"
        write_config(path, msgspec.structs.replace(config, listen=f"{address}:7401", metrics=f"{address}:7402"))
        ca = self.cluster.directory / "ca"
        issue(ca, [config.name, address], role=config.role, into=server.directory / "tls", now_s=time.time())
        self.start(server)

    def _move_to_small_disk(self, server: ServerProcess) -> bool:
        if os.geteuid():
            return False
        server.stop()
        data, old = server.directory / "data", server.directory / "data.old"
        data.rename(old)
        data.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(data)]
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if is_mounted:
            self._mounts.append(data)
            shutil.copytree(old, data, dirs_exist_ok=True)
        else:
            data.rmdir()
            old.rename(data)
        self.start(server)
        return is_mounted

    # --- looking ---------------------------------------------------------------------------------------------------

    def connect(self, **settings: object) -> emberfs.Client:
        return emberfs.connect(self.cluster.url, credentials=str(self.credentials), **settings)

    @property
    def credentials(self) -> Path:
        return self.cluster.directory / "client"

    def wait_serving(self) -> None:
        """Until every chain has all its replicas."""
        with self.cluster.admin(timeout_s=BACK_TIMEOUT_S) as admin:
            self.cluster.wait_serving(admin, lambda _: None, timeout_s=BACK_TIMEOUT_S)

    def metric(self, server: ServerProcess, name: str) -> float:
        """A figure of a server's Prometheus page."""
        address = read_config(server.directory / "config.toml").metrics
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise AssertionError(f"{server.name} has no metric {name}")

    # --- harm and its repair ---------------------------------------------------------------------------------------

    def start(self, server: ServerProcess) -> None:
        """Start it on its network, and wait until it serves."""
        with self._inside(server):
            server.start()
        server.wait_ready(time.monotonic() + BACK_TIMEOUT_S)

    @contextmanager
    def _inside(self, server: ServerProcess) -> Iterator[None]:
        """What this thread starts is on the network of `server`."""
        if not (self.has_network and server.name == "storage-3"):
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{self._netns}") as theirs:
            assert libc.setns(theirs.fileno(), _CLONE_NEWNET) == 0
            try:
                yield
            finally:
                assert libc.setns(ours.fileno(), _CLONE_NEWNET) == 0

    def cut(self) -> None:
        """Nothing passes between storage-3 and the others."""
        # At the far end: without ours there were no route, and another network might answer.
        subprocess.run(["ip", "-n", self._netns, "link", "set", self._links[1], "down"], check=True)

    def join(self) -> None:
        """It does again."""
        subprocess.run(["ip", "-n", self._netns, "link", "set", self._links[1], "up"], check=True)

    def fill_disk(self) -> None:
        """Another program takes every byte that storage-1's disk has left."""
        with open(self._filler, "wb") as filler:
            piece = bytes(1 << 20)
            try:
                while True:
                    filler.write(piece)
                    filler.flush()
            except OSError:
                return

    def empty_disk(self) -> None:
        """And gives it back."""
        self._filler.unlink()

    @property
    def _filler(self) -> Path:
        return self.cluster.server("storage-1").directory / "data" / "somebody-elses.bin"

    def flip_bit(self, server: ServerProcess, content: bytes) -> None:
        """Damage `content` on the server's disk: wherever it lies, for it may have lain elsewhere before."""
        found = 0
        for path in sorted((server.directory / "data").glob("target-*/blocks-*")):
            blocks = path.read_bytes()
            with open(path, "r+b") as file:
                at = blocks.find(content)
                while at >= 0:
                    middle = at + len(content) // 2
                    file.seek(middle)
                    file.write(bytes([blocks[middle] ^ 1]))
                    found += 1
                    at = blocks.find(content, at + len(content))
        assert found, f"the block is not on the disk of {server.name}"

    # --- load ------------------------------------------------------------------------------------------------------

    def start_load(self, seed: int) -> None:
        """Begin to write, read and check."""
        self._kill_load()  # Of a test that has failed: it would write to the same blocks.
        for number in range(PROCESSES):
            words = [self.cluster.url, self.credentials, self.directory / "board", number, seed]
            self._loads.append(
                subprocess.Popen(
                    [sys.executable, _LOAD, *map(str, words)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def end_load(self) -> list[dict[str, object]]:
        """Stop it: what each process saw."""
        reports = []
        for load in self._loads:
            output, _ = load.communicate("", timeout=BACK_TIMEOUT_S)
            assert load.returncode == 0, "a process of the load died"
            reports.append(msgspec.json.decode(output))
        self._loads.clear()
        return reports

    def _kill_load(self) -> None:
        for load in self._loads:
            load.kill()
            load.communicate()
        self._loads.clear()
