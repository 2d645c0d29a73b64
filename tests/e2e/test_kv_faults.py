"""A KV cache under load, harmed in turn. `pytest tests/e2e/test_kv_faults.py --chaos-seconds 600 --seed 7`

Two servers on a cluster of three storage nodes, one serving and one standing by, and a cache that is always full. What
must hold: no byte of a page is wrong, whatever is killed, stopped or damaged; and when all is over nothing is left of
leases, reservations or segments. Misses and errors are allowed while something is down.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emberfs
import emberkv
import pytest
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.errors import EmberError

from tests.e2e.kv_load import NAMESPACE, PROMPTS, READ_MIN, STORED_MIN, page, tokens

CAPACITY_BYTES = 16 << 20
LOADS = 3
_LOAD = Path(__file__).with_name("kv_load.py")


class KvLab:
    """The cluster, the servers and the load."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = LocalCluster(directory / "cluster")
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.loads: list[subprocess.Popen[str]] = []
        self.reports: list[dict[str, Any]] = []
        self._seed = 0

    def open(self) -> None:
        self.cluster.up(Plan(cluster="kv", targets_per_disk=2, nodes=["storage-1", "storage-2", "storage-3"]))
        for name in ("a", "b"):
            self.start(name)

    def close(self) -> None:
        for process in (*self.servers.values(), *self.loads):
            process.kill()
            process.communicate()
        if self.cluster.exists:
            self.cluster.down()

    def address(self, name: str) -> str:
        return f"unix:{self.directory}/{name}"

    @property
    def addresses(self) -> str:
        return ",".join(map(self.address, self.servers))

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "EMBERLINE_CREDENTIALS": str(self.cluster.directory / "client")}

    def start(self, name: str) -> None:
        """A server; it may have to wait for the other one to end."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / name)
        words = ["--store", self.cluster.url, "--listen", self.address(name), "--capacity", str(CAPACITY_BYTES)]
        self.servers[name] = subprocess.Popen(
            [sys.executable, "-m", "emberline", "kv", "serve", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment,
        )  # fmt: skip

    def start_load(self) -> None:
        self._seed += 1
        self.loads.append(
            subprocess.Popen(
                [sys.executable, _LOAD, self.addresses, str(self._seed)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            )
        )  # fmt: skip

    def end_load(self, load: subprocess.Popen[str]) -> None:
        output, _ = load.communicate("", timeout=300)
        assert load.returncode == 0, "a process of the load died"
        self.reports.append(json.loads(output))

    def connect(self) -> emberkv.KVCache:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMBERLINE_CREDENTIALS", self.environment["EMBERLINE_CREDENTIALS"])
            return emberkv.connect(self.addresses, NAMESPACE, timeout_s=30)

    def numbers(self, ask: Callable[[emberkv.Operator], dict[str, object]]) -> dict[str, object]:
        """What the server says that serves."""
        for _ in range(100):
            for name in self.servers:
                with contextlib.suppress(EmberError), emberkv.Operator(self.address(name), timeout_s=5) as operator:
                    return ask(operator)
            time.sleep(0.1)
        raise AssertionError("no server serves")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[KvLab]:
    lab = KvLab(tmp_path)
    try:
        lab.open()
        yield lab
    finally:
        lab.close()


# --- the faults


def kill_server(lab: KvLab, rng: random.Random) -> str:
    name = rng.choice(list(lab.servers))
    lab.servers[name].kill()
    lab.servers[name].communicate()
    lab.start(name)
    return f"server {name} killed"


def pause_server(lab: KvLab, rng: random.Random) -> str:
    """The other one takes over, and then the first goes on where it was."""
    name = rng.choice(list(lab.servers))
    pause_s = rng.choice([1.0, 6.0])
    lab.servers[name].send_signal(signal.SIGSTOP)
    try:
        time.sleep(pause_s)
    finally:
        lab.servers[name].send_signal(signal.SIGCONT)
    return f"server {name} stopped for {pause_s} s"


def kill_node(lab: KvLab, rng: random.Random) -> str:
    server = lab.cluster.server(f"storage-{rng.randint(1, 3)}")
    server.stop(by=signal.SIGKILL)
    time.sleep(rng.choice([0.0, 2.0]))
    server.start()
    server.wait_ready(time.monotonic() + 120)
    return f"{server.name} killed"


def kill_client(lab: KvLab, rng: random.Random) -> str:
    """While it writes, or reads into its memory."""
    load = lab.loads.pop(rng.randrange(len(lab.loads)))
    load.kill()
    load.communicate()
    lab.start_load()
    return "a client killed"


def flip_bits(lab: KvLab, rng: random.Random) -> str:
    """In one page, on every node: no replica is left that is right."""
    with contextlib.suppress(EmberError), lab.connect() as cache:
        keys = cache.keys(tokens(rng.randrange(PROMPTS)))[:4]
        cache.put(keys, [page(key) for key in keys], durable="committed")
        content = page(keys[-1])[100:1000]
        flipped = 0
        for path in lab.cluster.directory.glob("storage-*/data/target-*/blocks-*"):
            if (at := path.read_bytes().find(content)) >= 0:
                with open(path, "r+b") as file:
                    file.seek(at + 500)
                    file.write(bytes([content[500] ^ 1]))
                flipped += 1
        return f"a bit flipped at {flipped} places"
    return "no bit flipped: no server answered in time"


FAULTS = [kill_server, pause_server, kill_node, kill_client, flip_bits]


def test_no_byte_is_wrong_and_nothing_is_left(lab: KvLab, request: pytest.FixtureRequest) -> None:
    rng = random.Random(request.config.getoption("--seed") or 0)
    begin_s, seconds = time.monotonic(), request.config.getoption("--chaos-seconds")
    for _ in range(LOADS):
        lab.start_load()
    while True:
        for fault in rng.sample(FAULTS, len(FAULTS)):
            time.sleep(rng.uniform(0.5, 1.5))
            print(f"{time.monotonic() - begin_s:6.1f} s: {fault(lab, rng)}", flush=True)
        if time.monotonic() - begin_s > seconds:
            break
    time.sleep(2)
    for load in lab.loads:
        lab.end_load(load)
    lab.loads.clear()
    seen: Counter[str] = Counter()
    for report in lab.reports:
        assert report["wrong"] == []
        seen.update(report["seen"])
        assert report["seen"]["read"] >= READ_MIN and report["seen"]["stored"] >= STORED_MIN
    print(dict(seen))
    assert sum(report["read_before_end"] for report in lab.reports), "no page was read while faults came"
    check_nothing_is_left(lab)


def check_nothing_is_left(lab: KvLab) -> None:
    """Once leases and reservations have run out and all pages are dropped."""
    name = NAMESPACE.name
    lab.numbers(lambda operator: operator.drop(name))
    soon_s = time.monotonic() + 120
    while True:
        found = lab.numbers(lambda operator: (operator.collect(name), operator.stat()["namespaces"][name])[1])
        left = {what: found[what] for what in ("pages", "live_bytes", "leases", "pending_bytes", "disk_bytes")}
        if not any(left.values()):
            break
        assert time.monotonic() < soon_s, left
        time.sleep(0.5)
    with emberfs.connect(lab.cluster.url, credentials=str(lab.cluster.directory / "client")) as client:
        while names := [each for each, _ in client.list(f"/kv/{name}/segments")]:
            assert time.monotonic() < soon_s, names
            time.sleep(0.5)
