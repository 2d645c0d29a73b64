"""Where a client has a server put bytes for memory that the server does not know: in a stage, to be copied by steps.

What a place costs no test can tell: some processors copy slowly to 1 to 31 bytes ahead of the source, modulo 4,096.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable

import numpy as np
import pytest
from emberfs.checksum import crc32c
from emberfs.lane import native
from emberfs.transport.region import Region
from emberfs.types import chunk_id

from tests.fs.lane_probe import COUNTS, HEAD, ITEM, MAGIC, PART
from tests.fs.stores import needs_native

pytestmark = needs_native

CHUNK_BYTES = 8 << 20
CHUNK = chunk_id(7, 0)
SLOT_BYTES = getattr(native, "STAGE_SLOT_BYTES", 0)
STEP_BYTES = SLOT_BYTES - 4096
"""Of these no piece is larger, nor lies across a multiple of it."""


class Chunk:
    """A file of one chunk, and a server that has it."""

    def __init__(self, slots: int) -> None:
        self.content = random.Random(1).randbytes(CHUNK_BYTES)
        inode, _ = struct.unpack(">QQ", CHUNK)
        self.lane_spec = struct.pack("=QQQQQIi", inode, CHUNK_BYTES, CHUNK_BYTES, 1, 1, 1, 0)
        self.stage = Region(slots * SLOT_BYTES + 100)
        self.memory = self.stage.memory()
        self.damaged = 0
        """So many ranges are, once they are in the stage."""
        self.steps: list[list[tuple[int, int, int]]] = []
        """(offset, length, place) of what was asked for at once."""
        self.tails: list[bytes] = []
        """What came after it."""
        self.before_answer: Callable[[int], None] = lambda step: None
        self.answers = 1 << 30
        """After so many the lane is over."""
        self.shorts = 0
        """Of the first step, so many ranges are told to have a byte less."""
        self.room_bytes = 1 << 18
        """In the lane."""
        self.begin_s = 0.0
        """So long it takes nothing; what comes of it is the same."""
        self.calls: set[int] = set()

    def read(
        self, ranges: list[tuple[int, int]], into: list[memoryview], grant: bytes = b"", call: int = 7
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Count of each range, and of what was asked for (offset, length, place)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.room_bytes)
        self.steps.clear()
        sums = array("I", [7] * len(ranges))
        server = threading.Thread(target=self._serve, args=(theirs,))
        server.start()
        try:
            counts = native.read_ranges(
                *([(self, *each) for each in ranges], into, "lane_spec", array("i", [ours.fileno()]), bytearray(1)),
                *(pending := bytearray(1), b"", self.stage.number, self.stage.address, self.stage.size, call, 0),
                *(5 * 10**9, 1 if grant else 0, grant, bytearray([bool(grant)]), sums),
            )
        finally:
            self.is_pending = bool(pending[0])
            ours.close()
            server.join()
        for count, crc, view in zip(counts, sums, into, strict=True):
            assert count == -1 or crc == crc32c(view[:count])
        return counts, [each for step in self.steps for each in step]

    def _serve(self, lane: socket.socket) -> None:
        time.sleep(self.begin_s)
        with lane:
            while packet := lane.recv(1 << 18):
                _, _, count, call = HEAD.unpack_from(packet)
                assert call not in self.calls
                self.calls.add(call)
                end = HEAD.size + count * ITEM.size
                items = ITEM.iter_unpack(packet[HEAD.size : end])
                step = [(offset, length, place) for *_, place, _, offset, length, _ in items]
                self.tails.append(packet[end:])
                self.steps.append(step)
                if len(self.steps) > self.answers:
                    return
                for offset, length, place in step:
                    self.memory[place : place + length] = self.content[offset : offset + length]
                lengths = [length - (index < self.shorts) for index, (_, length, _) in enumerate(step)]
                crcs = [crc32c(self.content[at : at + length]) for (at, *_), length in zip(step, lengths, strict=True)]
                parts = b"".join(map(PART.pack, lengths, crcs))
                for _, _, place in step[: self.damaged]:
                    self.memory[place] ^= 1
                self.before_answer(len(self.steps))
                lane.send(HEAD.pack(MAGIC, COUNTS, count, call) + parts)

    def has(self, ranges: list[tuple[int, int]], into: list[memoryview]) -> bool:
        """What was read is right."""
        return all(view == self.content[at : at + length] for (at, length), view in zip(ranges, into, strict=True))


def views_of(memory: np.ndarray, sizes: list[int]) -> list[memoryview]:
    """Of memory, one after the other."""
    begins = np.cumsum([0, *sizes])
    return [memory[begin : begin + size].data for begin, size in zip(begins, sizes, strict=False)]


def test_what_is_damaged_in_the_stage_is_for_another_way() -> None:
    chunk, memory = Chunk(1), np.empty(4 * 5000, np.uint8)
    chunk.damaged = 2
    into = [memory[at * 5000 :][:5000].data for at in range(4)]
    counts, _ = chunk.read([(at * 6000, 5000) for at in range(4)], into)
    assert counts == [-1, -1, 5000, 5000]


@pytest.mark.parametrize("size", [4097, 16_388, 65_540, 65_536, 100])
@pytest.mark.parametrize("slots", [1, 3])
def test_neither_of_the_two_copies_has_a_target_a_little_ahead_of_its_source(size: int, slots: int) -> None:
    rng, chunk = random.Random(size), Chunk(slots)
    count = min(200, CHUNK_BYTES // size)
    memory = np.empty(count * size + 4096, np.uint8)
    begin = rng.randrange(4096)
    pages = (CHUNK_BYTES - size) // 4096
    ranges = [(rng.randrange(pages) * 4096 + rng.choice([0, 0, 0, 4, 30, 96]), size) for _ in range(count)]
    into = views_of(memory[begin:], [size] * count)
    counts, asked = chunk.read(ranges, into)
    assert counts == [size] * count and chunk.has(ranges, into)
    target = memory.__array_interface__["data"][0] + begin
    for offset, length, place in asked:
        for source, to in ((offset, place), (chunk.stage.address + place, target)):
            assert not 0 < (to - source) % 4096 < 32
        target += length
    for step in chunk.steps:
        places = sorted((place, place + length) for _, length, place in step)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places)), "one lies on another"
        assert places[0][0] // SLOT_BYTES == (places[-1][1] - 1) // SLOT_BYTES


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("shift", [0, 1, 4096, 5000])
def test_however_much_it_is_it_goes_through_the_stage(slots: int, shift: int) -> None:
    chunk = Chunk(slots)
    ranges = [(shift, 6 << 20), (7 << 20, 100), (1000, STEP_BYTES), (STEP_BYTES, STEP_BYTES), (3, 3 * STEP_BYTES)]
    into = views_of(np.empty(32 << 20, np.uint8), [length for _, length in ranges])
    counts, asked = chunk.read(ranges, into)
    assert counts == [length for _, length in ranges] and chunk.has(ranges, into)
    assert sum(length for _, length, _ in asked) == sum(counts)
    assert len(chunk.steps) >= sum(counts) // SLOT_BYTES
    for number, step in enumerate(chunk.steps):
        assert {place // SLOT_BYTES for _, _, place in step} == {number % slots}
        for offset, length, place in step:
            assert offset // STEP_BYTES == (offset + length - 1) // STEP_BYTES
            assert place % SLOT_BYTES + length <= SLOT_BYTES
    assert not chunk.is_pending


@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_what_just_fits_is_of_the_same_step(length: int) -> None:
    chunk, memory = Chunk(2), np.empty(SLOT_BYTES + 8192, np.uint8)
    begin = -memory.__array_interface__["data"][0] % 4096
    ranges = [(0, STEP_BYTES), (STEP_BYTES, length)]
    into = views_of(memory[begin:], [STEP_BYTES, length])
    assert chunk.read(ranges, into)[0] == [STEP_BYTES, length]
    assert len(chunk.steps) == (1 if length <= 4096 else 2) and chunk.has(ranges, into)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_place_is_written_again_only_when_it_was_copied(slots: int) -> None:
    """All of memory is as it was read when a step is answered of which the client can have copied what came before."""
    chunk = Chunk(slots)
    ranges = [(at * STEP_BYTES, STEP_BYTES) for at in range(12)]
    into = views_of(np.zeros(12 * STEP_BYTES, np.uint8), [STEP_BYTES] * 12)

    def look(step: int) -> None:
        copied = range(step - slots)
        assert all(into[at] == chunk.content[at * STEP_BYTES : (at + 1) * STEP_BYTES] for at in copied)

    chunk.before_answer = look
    counts, _ = chunk.read(ranges, into)
    assert counts == [STEP_BYTES] * 12 and chunk.has(ranges, into)
    assert len(chunk.steps) == 12


def test_a_grant_is_shown_once() -> None:
    chunk = Chunk(2)
    ranges = [(0, 3 * STEP_BYTES)]
    chunk.read(ranges, views_of(np.empty(3 * STEP_BYTES, np.uint8), [3 * STEP_BYTES]), grant=b"a grant")
    assert chunk.tails == [b"a grant", b"", b""]


@pytest.mark.parametrize("answers", [0, 1, 2, 3, 4])
def test_a_lane_that_is_lost_on_the_way_is_pending_still(answers: int) -> None:
    chunk = Chunk(2)
    chunk.answers = answers
    ranges = [(0, 5 * STEP_BYTES)]
    with pytest.raises(native.LaneLost):
        chunk.read(ranges, views_of(np.empty(5 * STEP_BYTES, np.uint8), [5 * STEP_BYTES]))
    assert chunk.is_pending


def test_two_reads_have_no_call_in_common() -> None:
    chunk = Chunk(2)
    for call in (1, 2, 3):
        chunk.read([(0, 4 * STEP_BYTES)], views_of(np.empty(4 * STEP_BYTES, np.uint8), [4 * STEP_BYTES]), call=call)
    assert len(chunk.calls) == 3 * 4


def test_a_lane_that_is_full_is_waited_for() -> None:
    chunk = Chunk(4)
    chunk.room_bytes, chunk.begin_s = 8192, 0.05
    sizes = [STEP_BYTES // 100] * 400
    ranges = list(zip(itertools.accumulate([0, *sizes[1:]]), sizes, strict=True))
    into = views_of(np.empty(sum(sizes), np.uint8), sizes)
    counts, _ = chunk.read(ranges, into)
    assert counts == sizes and chunk.has(ranges, into)


def test_who_brings_less_than_was_asked_for_has_brought_nothing() -> None:
    chunk = Chunk(2)
    chunk.shorts = 1
    ranges = [(0, 100), (200, 100)]
    counts, _ = chunk.read(ranges, views_of(np.empty(200, np.uint8), [100, 100]))
    assert counts == [-1, 100]


def test_what_is_damaged_in_a_later_step_is_for_another_way() -> None:
    chunk = Chunk(2)
    ranges = [(0, 100), (STEP_BYTES, 2 * STEP_BYTES), (200, 100)]
    into = views_of(np.empty(4 * STEP_BYTES, np.uint8), [length for _, length in ranges])

    def damage(step: int) -> None:
        if step == 2:
            chunk.memory[chunk.steps[-1][0][2]] ^= 1

    chunk.before_answer = damage
    counts, _ = chunk.read(ranges, into)
    assert counts == [100, -1, 100]


def test_the_sums_of_overlapping_memory_are_of_what_is_there_in_the_end() -> None:
    chunk = Chunk(2)
    memory = np.zeros(3 * STEP_BYTES, np.uint8)
    into = [memory[: 2 * STEP_BYTES].data, memory[STEP_BYTES:].data]
    ranges = [(5, 2 * STEP_BYTES), (4 * STEP_BYTES + 9, 2 * STEP_BYTES)]
    counts, _ = chunk.read(ranges, into)  # Which compares them.
    assert counts == [2 * STEP_BYTES] * 2
    assert into[1] == chunk.content[4 * STEP_BYTES + 9 :][: 2 * STEP_BYTES]


def test_without_a_stage_it_is_for_another_way() -> None:
    counts, asked = (chunk := Chunk(0)).read([(0, 100)], views_of(np.empty(100, np.uint8), [100]))
    assert (counts, asked, chunk.steps) == ([-1], [], [])
