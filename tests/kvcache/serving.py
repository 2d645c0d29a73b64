"""A service process on a store, for tests of what talks to one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

MIB = 1 << 20


class Server:
    """A server process of this test."""

    def __init__(
        self, store: str, capacity_bytes: int = 64 * MIB, tenants: str = "", listen: str = "127.0.0.1:0",
        more: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", "emberline", "kv", "serve", "--store", store, "--listen", listen]
        self._address: str | None = None
        command += ["--capacity", str(capacity_bytes), *(["--tenants", tenants] if tenants else []), *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)

    @property
    def address(self) -> str:
        """Once it serves."""
        if self._address is None:
            assert self.process.stdout is not None
            self._address = json.loads(self.process.stdout.readline())["address"]
        return self._address

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
