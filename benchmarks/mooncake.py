"""Mooncake Store over TCP, in an environment of its own (`python -m benchmarks --setup` makes it) and other processes.

Its wheel needs Debian's libibverbs1, librdmacm1 and libnl-route-3-200; where they are missing it is left out, and
`--setup` says so. Its client checks each value with the same CRC32C.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .environments import Environment
from .runner import Subject, verify

MOONCAKE = Environment(
    name="mooncake",
    requirements=("mooncake-transfer-engine-non-cuda==0.3.13.post1", "msgpack", "aiohttp", "requests", "awscrt"),
    imports="mooncake.store",
    needs="Debian's libibverbs1 librdmacm1 libnl-route-3-200",
)
WORKER = Path(__file__).with_name("mooncake_worker.py")


class MooncakeValues:
    """A master, a process that holds the segment, and a client that reads from it over TCP."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        master, metadata, metrics = _free_ports(3)
        options = [
            f"--rpc_port={master}",
            "--enable_http_metadata_server=true",
            "--http_metadata_server_host=127.0.0.1",
        ]
        options += [f"--http_metadata_server_port={metadata}", f"--metrics_port={metrics}", "--logtostderr"]
        binary = next(MOONCAKE.directory.glob("lib/python*/site-packages/mooncake/mooncake_master"))
        log = (directory / "log").open("w")
        self._processes = [subprocess.Popen([binary, *options], stdout=log, stderr=log, text=True)]
        self._workers = {}
        for role in ("owner", "reader"):
            command = [MOONCAKE.python, "-P", WORKER, role, str(master), str(metadata)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            self._workers[role] = worker
            self._processes.append(worker)
            self._ask(role, {})
        self.pids = [process.pid for process in self._processes]

    def load(self, path: Path, item_bytes: int, *, items: int) -> None:
        """Store the items of a file."""
        self._ask("owner", {"path": str(path), "item_bytes": item_bytes, "items": items})

    def subject(self, numbers: Sequence[Sequence[int]], amount_mib: float) -> Subject:
        """Reads these in turn; every pass checks every value."""
        self._ask("reader", {"calls": [list(call) for call in numbers]})

        def work(check: bool) -> float:
            self._ask("reader", {"run": True})
            return amount_mib

        return work

    def _ask(self, role: str, request: dict[str, object]) -> None:
        worker = self._workers[role]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        while answer and not answer.startswith("done"):
            answer = worker.stdout.readline()  # The library logs there.
        verify(answer.startswith("done"), f"mooncake {role} failed")

    def close(self) -> None:
        """End all of it."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self._directory)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
