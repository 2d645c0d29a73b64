"""What a server without a store does, in a process of its own: the ceilings of TCP, and of a crowd of clients."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from emberfs.checksum import crc32c

from ..runner import verify

_ITEM = struct.Struct("<QI")
"""offset, length; answered by a CRC32C and the bytes."""
_SUM = struct.Struct("<I")


class RawSocket:
    """Items over one TCP connection: the server reads each with `preadv` and sends it, the client checks the CRC."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.pid = _fork(self._serve, path)
        self._sock = socket.create_connection(self._listening.getsockname())
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _serve(self, path: Path) -> None:
        sock, _ = self._listening.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        file, block = os.open(path, os.O_RDONLY), memoryview(bytearray(8 << 20))
        while True:
            count = sock.recv(4, socket.MSG_WAITALL)
            if not count:
                return
            items = sock.recv(_ITEM.size * int.from_bytes(count, "little"), socket.MSG_WAITALL)
            for offset, length in _ITEM.iter_unpack(items):
                os.preadv(file, [block[:length]], offset)
                sock.sendall(_SUM.pack(crc32c(block[:length])))
                sock.sendall(block[:length])

    def load(self, values: object) -> None:
        """The file is what is served."""

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> None:
        """See `peers.Values`."""
        items = b"".join(_ITEM.pack(number * len(view), len(view)) for number, view in zip(numbers, into, strict=True))
        self._sock.sendall(len(numbers).to_bytes(4, "little") + items)
        for view in into:
            (expected,) = _SUM.unpack(self._sock.recv(4, socket.MSG_WAITALL))
            received = 0
            while received < len(view):
                received += self._sock.recv_into(view[received:])
            verify(crc32c(view) == expected, "raw socket: a checksum is wrong")

    def close(self) -> None:
        """End the server."""
        self._sock.close()
        self._listening.close()
        os.waitpid(self.pid, 0)


class EpollServer:
    """One thread, one epoll, any number of clients on a unix socket: `preadv`, CRC32C, send."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.address = str(directory / "bare.socket")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.address)
        self._listening.listen(128)
        self.pid = _fork(self._serve, path)

    def _serve(self, path: Path) -> None:
        file, block = os.open(path, os.O_RDONLY), memoryview(bytearray(8 << 20))
        poll, clients = select.epoll(), {}
        poll.register(self._listening, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number == self._listening.fileno():
                    sock, _ = self._listening.accept()
                    clients[sock.fileno()] = sock
                    poll.register(sock, select.EPOLLIN)
                    continue
                item = clients[number].recv(_ITEM.size, socket.MSG_WAITALL)
                if not item:
                    clients.pop(number).close()
                    if not clients:
                        return
                    continue
                offset, length = _ITEM.unpack(item)
                os.preadv(file, [block[:length]], offset)
                clients[number].sendall(_SUM.pack(crc32c(block[:length])))
                clients[number].sendall(block[:length])

    def close(self) -> None:
        """Wait for the server, which ends with its last client."""
        self._listening.close()
        os.waitpid(self.pid, 0)
        os.unlink(self.address)


class EpollClient:
    """A client of `EpollServer`."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(address)

    def read(self, offset: int, into: memoryview) -> None:
        """Raises WrongResult."""
        self._sock.sendall(_ITEM.pack(offset, len(into)))
        (expected,) = _SUM.unpack(self._sock.recv(4, socket.MSG_WAITALL))
        received = 0
        while received < len(into):
            received += self._sock.recv_into(into[received:])
        verify(crc32c(into) == expected, "epoll server: a checksum is wrong")

    def close(self) -> None:
        """Leave."""
        self._sock.close()


def _fork(serve: object, path: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            serve(path)  # type: ignore[operator]
        finally:
            os._exit(0)
    return pid
