"""A lane by hand: what a client's native part sends, byte by byte, so that tests can also send what it never would."""

from __future__ import annotations

import os
import socket
import struct
import time
from array import array
from typing import Any

from emberfs.checksum import crc32c
from emberfs.lane import native
from emberfs.transport.region import Region

HEAD = struct.Struct("=IHHQ")
ITEM = struct.Struct("=QQQQQIIII")
PART = struct.Struct("=iI")
MAGIC = 0x324C4D45
READ, COUNTS, REGION, FORGET, READ_SUMS = 1, 2, 3, 4, 5
DECLINED = -1


class LaneProbe:
    """A client of one lane of `server`, with memory of its own."""

    def __init__(self, server: Any, *, size: int = 1 << 20) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        server.adopt(theirs.detach(), False)
        self.region = Region(size)
        self.memory = self.region.memory()
        self.tell(self.region.number, self.region.fd)
        self.call, self.kind = 0, READ
        self.places: list[int] = []

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
        self.places = [ITEM.unpack(item)[4] for item in items]
        self.kind = READ_SUMS if self.call % 2 else READ
        self.socket.send(HEAD.pack(MAGIC, self.kind, len(items), self.call) + b"".join(items))

    def receive(self) -> list[int]:
        """Raises ConnectionError if the server has ended the lane."""
        answer = self.socket.recv(1 << 16)
        if not answer:
            raise ConnectionError("the lane is over")
        magic, kind, count, call = HEAD.unpack_from(answer)
        assert (magic, kind, call) == (MAGIC, COUNTS, self.call)
        counts = []
        for at, (length, crc) in enumerate(PART.iter_unpack(answer[HEAD.size :])):
            is_told = length != DECLINED and self.kind == READ_SUMS
            assert crc == (crc32c(self.memory[self.places[at] :][:length]) if is_told else 0)
            counts.append(length)
        assert len(counts) == count
        return counts

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


class StreamProbe(LaneProbe):
    """A client of a stream."""

    def __init__(self, server: Any, *, size: int = 1 << 20) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.socket = socket.socket()
            # So little that an answer of megabytes does not fit in between, however slowly it is taken.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            self.socket.connect(listening.getsockname())
            theirs, _ = listening.accept()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.socket.settimeout(10)
        server.adopt(theirs.detach(), True)
        self.region = Region(size)
        self.memory = self.region.memory()
        self.call = 0
        self.lengths: list[int] = []
        self.places = []

    def send(self, *items: bytes) -> None:
        fields = [ITEM.unpack(item) for item in items]
        self.lengths, self.places = [each[7] for each in fields], [each[4] for each in fields]
        self.call += 1
        self.socket.sendall(HEAD.pack(MAGIC, READ, len(items), self.call) + b"".join(items))

    def receive(self) -> list[int]:
        magic, kind, count, call = HEAD.unpack(self._exactly(HEAD.size))
        assert (magic, kind, call) == (MAGIC, COUNTS, self.call)
        promises = [PART.unpack(self._exactly(PART.size)) for _ in range(count)]
        payloads = [self._exactly(promised) for promised, _ in promises]
        counts = []
        for number, (promise, payload) in enumerate(zip(promises, payloads, strict=True)):
            verdict, crc = PART.unpack(self._exactly(PART.size))
            is_right = promise[0] and verdict == promise[0] and crc32c(payload, promise[1]) == crc
            counts.append(verdict if is_right else DECLINED)
            place = self.places[number]
            self.memory[place : place + len(payload)] = payload
        return counts

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(size - len(parts))
            if not part:
                raise ConnectionError("the stream is over")
            parts += part
        return bytes(parts)


def new_server(*, table_bytes_max: int = 1 << 20, lease_s: float = 3600.0) -> Any:
    """Serves chain 1 in version 1 for as long as any test."""
    server = native.Server(table_bytes_max, 1, 0)
    server.allow(1, 1)
    server.lease(int(1e9 * (_now_s() + lease_s)))
    return server


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
