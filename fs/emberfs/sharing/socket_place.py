"""Where the owner of a store listens: a unix socket in the store's directory.

The address of a unix socket has room for 107 bytes. A longer one is reached through an open directory.

Does not know: who listens.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

SOCKET = "owner.sock"
ADDRESS_BYTES_MAX = 107
BACKLOG = 128


class SocketPlace:
    """The socket's path, as this process may spell it until `close`."""

    def __init__(self, directory: Path) -> None:
        self._directory: int | None = None
        self.path = str(directory / SOCKET)
        if len(os.fsencode(self.path)) > ADDRESS_BYTES_MAX:
            self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.path = f"/proc/self/fd/{self._directory}/{SOCKET}"

    def listen(self) -> socket.socket:
        """A listening socket there, in place of what an owner before us left. Raises OSError. Needs the ownership."""
        self.remove()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            listening.bind(self.path)
            os.chmod(self.path, 0o600)
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
        return listening

    def connect(self, *, timeout_s: float) -> socket.socket:
        """A socket connected to whoever listens. Raises OSError (refused, no such file, TimeoutError)."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            connected.connect(self.path)
        except BaseException:
            connected.close()
            raise
        return connected

    def remove(self) -> None:
        """Nobody listens there any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """The path means nothing from now on."""
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None
