"""A lane by hand: what a client's native part sends, byte by byte, so that tests can also send what it never would."""

from __future__ import annotations

import os
import socket
import struct
from array import array
from typing import Any

from emberfs.lane import native
from emberfs.transport.region import Region

HEAD = struct.Struct("=IHHQ")
ITEM = struct.Struct("=QQQQQIIII")
MAGIC = 0x314C4D45
READ, COUNTS, REGION, FORGET = 1, 2, 3, 4
DECLINED = -1


class LaneProbe:
    """A client of one lane of `server`, with memory of its own."""

    def __init__(self, server: Any, *, size: int = 1 << 20) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        server.adopt(theirs.detach())
        self.region = Region(size)
        self.memory = self.region.memory()
        self.tell(self.region.number, self.region.fd)
        self.call = 0

    def tell(self, number: int, fd: int) -> None:
        descriptors = array("i", [fd])
        head = HEAD.pack(MAGIC, REGION, 0, number)
        self.socket.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])

    def item(
        self, chunk: bytes, offset: int, length: int, *, place: int = 0, chain: int = 1, version: int = 1
    ) -> bytes:
        inode, index = struct.unpack(">QQ", chunk)
        return ITEM.pack(inode, index, version, self.region.number, place, chain, offset, length, 0)

    def send(self, *items: bytes) -> None:
        self.call += 1
        self.socket.send(HEAD.pack(MAGIC, READ, len(items), self.call) + b"".join(items))

    def receive(self) -> list[int]:
        """Raises ConnectionError if the server has ended the lane."""
        answer = self.socket.recv(1 << 16)
        if not answer:
            raise ConnectionError("the lane is over")
        magic, kind, count, call = HEAD.unpack_from(answer)
        assert (magic, kind, call) == (MAGIC, COUNTS, self.call)
        return list(struct.unpack_from(f"={count}i", answer, HEAD.size))

    def read(self, chunk: bytes, offset: int, length: int, *, chain: int = 1, version: int = 1) -> bytes | None:
        """None: declined."""
        self.memory[:length] = b"\xee" * length
        self.send(self.item(chunk, offset, length, chain=chain, version=version))
        (count,) = self.receive()
        if count == DECLINED:
            return None
        assert count == length
        return bytes(self.memory[:length])

    def is_over(self) -> bool:
        """The server has ended the lane."""
        try:
            return self.socket.recv(1 << 16) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()


def new_server(*, table_bytes_max: int = 1 << 20, lease_s: float = 3600.0) -> Any:
    """Serves chain 1 in version 1 for as long as any test."""
    server = native.Server(table_bytes_max, 1, 0)
    server.allow(1, 1)
    server.lease(int(1e9 * (_now_s() + lease_s)))
    return server


def _now_s() -> float:
    import time

    return time.clock_gettime(time.CLOCK_BOOTTIME)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
