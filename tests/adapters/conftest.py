"""A KV-cache service of each test's own. Run: make test-adapters, which makes an environment with the engines.

Where an engine is not installed, as in the environment of the other tests, its tests are not collected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emberkv.adapters.door import Door

ENGINES = ("lmcache", "vllm", "sglang")

MISSING = [engine for engine in ENGINES if importlib.util.find_spec(engine) is None]
collect_ignore_glob = [f"test_{engine}*.py" for engine in MISSING]


class Service:
    """A server process, on a store of its own."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Where it was before, if it was."""
        command = [sys.executable, "-m", "emberline", "kv", "serve", "--store", f"ember://{self._store}"]
        command += ["--listen", self.address, "--capacity", str(256 << 20)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = json.loads(self.process.stdout.readline())["address"]

    def freeze(self) -> None:
        """It does not answer, and its connections stay."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        """It goes on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a machine that fails: nothing is said to anybody."""
        self.process.kill()
        self.process.communicate(timeout=60)

    def end(self) -> None:
        """As an operator ends it."""
        if self.process.poll() is not None:
            return
        self.thaw()
        self.process.terminate()
        self.process.communicate(timeout=60)


def flush(door: Door) -> None:
    """What was stored is there even if the service is killed now."""
    assert door.call(lambda cache: cache.flush() or True, False)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path / "store")
    yield running
    running.end()
