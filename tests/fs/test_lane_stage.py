"""Where a client has a server put bytes for memory that the server does not know: in a stage, to be copied.

What a place costs no test can tell: some processors copy slowly to 1 to 31 bytes ahead of the source, modulo 4,096.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from array import array

import numpy as np
import pytest
from emberfs.checksum import crc32c
from emberfs.lane import native
from emberfs.transport.region import Region
from emberfs.types import chunk_id

from tests.fs.lane_probe import COUNTS, HEAD, ITEM, MAGIC, PART
from tests.fs.stores import needs_native

pytestmark = needs_native

CHUNK_BYTES = 1 << 20
CHUNK = chunk_id(7, 0)


class Chunk:
    """A file of one chunk, and a server that has it."""

    def __init__(self, stage_bytes: int) -> None:
        self.content = random.Random(1).randbytes(CHUNK_BYTES)
        inode, _ = struct.unpack(">QQ", CHUNK)
        self.lane_spec = struct.pack("=QQQQQIi", inode, CHUNK_BYTES, CHUNK_BYTES, 1, 1, 1, 0)
        self.stage = Region(stage_bytes)
        self.memory = self.stage.memory()
        self.stage_bytes = stage_bytes
        self.damaged = 0
        """So many ranges are, once they are in the stage."""

    def read(
        self, ranges: list[tuple[int, int]], into: list[memoryview]
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Count of each range, and of what was asked for (offset, length, place)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked: list[tuple[int, int, int]] = []

        def serve() -> None:
            packet = theirs.recv(1 << 18)
            _, _, count, call = HEAD.unpack_from(packet)
            for *_, place, _, offset, length, _ in ITEM.iter_unpack(packet[HEAD.size :]):
                asked.append((offset, length, place))
                self.memory[place : place + length] = self.content[offset : offset + length]
            parts = b"".join(PART.pack(length, crc32c(self.content[at : at + length])) for at, length, _ in asked)
            for _, _, place in asked[: self.damaged]:
                self.memory[place] ^= 1
            theirs.send(HEAD.pack(MAGIC, COUNTS, count, call) + parts)

        server = threading.Thread(target=serve)
        server.start()
        with ours, theirs:
            counts = native.read_ranges(
                *([(self, *each) for each in ranges], into, "lane_spec", array("i", [ours.fileno()]), bytearray(1)),
                *(bytearray(1), b"", self.stage.number, self.stage.address, self.stage_bytes, 7, 0, 5 * 10**9),
                *(0, b"", bytearray(1), sums := array("I", [7] * len(ranges))),
            )
            server.join()
        for count, crc, view in zip(counts, sums, into, strict=True):
            assert count == -1 or crc == crc32c(view[:count])
        return counts, asked


def test_what_is_damaged_in_the_stage_is_for_another_way() -> None:
    chunk, memory = Chunk(1 << 20), np.empty(4 * 5000, np.uint8)
    chunk.damaged = 2
    into = [memory[at * 5000 :][:5000].data for at in range(4)]
    counts, _ = chunk.read([(at * 6000, 5000) for at in range(4)], into)
    assert counts == [-1, -1, 5000, 5000]


@pytest.mark.parametrize("size", [4097, 16_388, 65_540, 65_536, 100])
def test_neither_of_the_two_copies_has_a_target_a_little_ahead_of_its_source(size: int) -> None:
    rng, chunk = random.Random(size), Chunk(2 << 20)
    memory = np.empty(CHUNK_BYTES + 4096, np.uint8)
    count = min(200, CHUNK_BYTES // size)
    begin = rng.randrange(4096)
    pages = (CHUNK_BYTES - size) // 4096
    ranges = [(rng.randrange(pages) * 4096 + rng.choice([0, 0, 0, 4, 30, 96]), size) for _ in range(count)]
    into = [memory[begin + at * size : begin + (at + 1) * size].data for at in range(count)]
    counts, asked = chunk.read(ranges, into)
    assert counts == [size] * count
    assert [bytes(each) for each in into] == [chunk.content[offset : offset + length] for offset, length in ranges]
    first = memory.__array_interface__["data"][0] + begin
    end = 0
    for at, (offset, length, place) in enumerate(asked):
        assert place >= end, "one does not lie on the other"
        end = place + length
        for source, target in ((offset, place), (chunk.stage.address + place, first + at * size)):
            assert not 0 < (target - source) % 4096 < 32


def test_what_has_no_room_in_the_stage_is_for_another_way() -> None:
    chunk = Chunk(8192)
    into = [memoryview(bytearray(4096)) for _ in range(4)]
    ranges = [(0, 4096), (4100, 4000), (9000, 96), (20_000, 4)]
    counts, asked = chunk.read(ranges, into)
    assert counts[0] == 4096 and -1 in counts
    assert all(place + length <= 8192 for _, length, place in asked)
    for (offset, length), count, found in zip(ranges, counts, into, strict=True):
        assert count in (length, -1)
        assert count == -1 or found[:length] == chunk.content[offset : offset + length]


def test_what_just_fits_is_staged_wherever_it_goes() -> None:
    chunk = Chunk(65_536)
    memory = np.empty(65_536 + 8192, np.uint8)
    begin = -memory.__array_interface__["data"][0] % 4096
    for ahead in (0, 1, 16, 31, 32):
        for ranges in ([(4096, 65_536)], [(at * 8192, 8192) for at in range(8)]):
            into = [memory[begin + ahead :][at * length :][:length].data for at, (_, length) in enumerate(ranges)]
            counts, _ = chunk.read(ranges, into)
            assert counts[0] == ranges[0][1] and counts.count(-1) <= 1
            for (offset, length), count, found in zip(ranges, counts, into, strict=True):
                assert count == -1 or bytes(found) == chunk.content[offset : offset + length]
