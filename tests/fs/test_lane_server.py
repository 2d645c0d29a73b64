"""The native server of lanes: what it serves, what it declines, and what a client cannot do to it."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emberfs.checksum import crc32c, cumulative_sums, cumulative_sums_slowly
from emberfs.lane import native
from emberfs.types import chunk_id
from hypothesis import given
from hypothesis import strategies as st

from tests.fs.lane_probe import DECLINED, HEAD, MAGIC, READ, LaneProbe, StreamProbe, new_server, open_descriptors
from tests.fs.stores import needs_native

pytestmark = needs_native

GRANULE_LOG2 = 12
CHUNK = chunk_id(7, 3)


class File:
    """A file with content at `block`, and what a service would put into the table for it."""

    def __init__(self, path: Path, content: bytes, *, block: int = 8192) -> None:
        path.write_bytes(b"x" * block + content)
        self.fd = os.open(path, os.O_RDWR)
        self.content = content
        self.block = block
        self.sums = cumulative_sums(memoryview(content), granule=1 << GRANULE_LOG2)

    def put(self, server: Any, *, chunk: bytes = CHUNK, chain: int = 1) -> None:
        server.put(chain, chunk, self.fd, self.block, len(self.content), GRANULE_LOG2, self.sums)


@pytest.fixture
def server() -> Iterator[Any]:
    server = new_server()
    yield server
    server.stop()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "blocks", random.Random(1).randbytes(300_001))
    yield file
    os.close(file.fd)


@pytest.fixture(params=[LaneProbe, StreamProbe], ids=["local", "stream"])
def probe(server: Any, request: pytest.FixtureRequest) -> Iterator[LaneProbe]:
    probe: LaneProbe = request.param(server)
    yield probe
    probe.close()


# ---- the checksum


@given(st.binary(max_size=2000), st.integers(0, 2**32 - 1))
def test_the_native_checksum_is_the_one_we_store(data: bytes, start: int) -> None:
    assert native.crc32c(data, start) == crc32c(data, start)


@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=5))
def test_the_checksum_of_pieces_is_that_of_all(pieces: list[bytes]) -> None:
    joined = 0
    for piece in pieces:
        joined = native.crc32c_join(joined, crc32c(piece), len(piece))
    assert joined == crc32c(b"".join(pieces))
    before = b"".join(pieces[:-1])
    assert native.crc32c_join(crc32c(before), joined, len(pieces[-1])) == crc32c(pieces[-1]), "and back again"


@pytest.mark.parametrize("size", [4095, 4096, 65_536, 65_537, (1 << 20) + 321])
def test_long_pieces_too(size: int) -> None:
    data = random.Random(size).randbytes(size + 1)
    assert native.crc32c(data[:size]) == crc32c(data[:size])
    assert native.crc32c(memoryview(data)[1:]) == crc32c(data[1:]), "at any address"


def test_the_factors_of_folding_are_what_the_paper_says() -> None:
    def power(exponent: int) -> int:
        value = 1
        for _ in range(exponent):
            value = value << 1 ^ (0x11EDC6F41 if value >> 31 else 0)
        return value

    def reflected(exponent: int) -> str:
        return f"0x{int(f'{power(exponent):032b}'[::-1], 2) << 1:09x}ull"

    source = (Path(native.__file__).parent / "crc32c.c").read_text()
    for distance in (2048, 512):
        assert f"FACTOR_{distance}_LOW {reflected(distance + 32)}" in source
        assert f"FACTOR_{distance}_HIGH {reflected(distance - 32)}" in source


@given(st.binary(max_size=40_000), st.sampled_from([4096, 16_384]), st.integers(0, 70_000), st.integers(0, 2**32 - 1))
def test_fast_and_slow_sums_are_equal(payload: bytes, granule: int, offset: int, start: int) -> None:
    view = memoryview(payload)
    fast = cumulative_sums(view, granule=granule, offset=offset, start=start)
    assert fast == cumulative_sums_slowly(view, granule=granule, offset=offset, start=start)


# ---- what is served


def test_any_range_of_a_chunk(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    rng = random.Random(2)
    edges = [0, 1, 4095, 4096, 4097, 8192, 299_999, 300_000]
    for offset in edges + [rng.randrange(300_000) for _ in range(200)]:
        length = rng.randrange(1, len(file.content) - offset + 1)
        assert probe.read(CHUNK, offset, length) == file.content[offset : offset + length]
    assert probe.read(CHUNK, 0, len(file.content)) == file.content


def test_a_batch_lands_where_it_was_asked_for(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    rng = random.Random(3)
    ranges = [(rng.randrange(300_000), 1 + rng.randrange(1000)) for _ in range(900)]
    ranges = [(offset, min(length, len(file.content) - offset)) for offset, length in ranges]
    absent = chunk_id(7, 4)
    items = [
        probe.item(CHUNK if at % 7 else absent, offset, length, place=1000 * at)
        for at, (offset, length) in enumerate(ranges)
    ]
    probe.send(*items)
    for at, (count, (offset, length)) in enumerate(zip(probe.receive(), ranges, strict=True)):
        assert count == (length if at % 7 else DECLINED)
        if at % 7:
            assert bytes(probe.memory[1000 * at :][:length]) == file.content[offset : offset + length]


def test_what_is_not_certain_is_declined(server: Any, file: File, probe: LaneProbe) -> None:
    assert probe.read(CHUNK, 0, 10) is None, "nothing is known of it"
    file.put(server)
    assert probe.read(CHUNK, 0, 10) == file.content[:10]
    assert probe.read(CHUNK, 0, 10, version=2) is None, "another version of the chain"
    assert probe.read(CHUNK, 0, 10, version=0) is None
    assert probe.read(CHUNK, 0, 10, chain=2) is None, "another chain"
    assert probe.read(CHUNK, 300_000, 2) is None, "it ends before"
    assert probe.read(CHUNK, 2**32 - 1, 2) is None
    assert probe.read(CHUNK, 5, 0) is None, "nothing is wanted of it"
    server.allow(1, 0)
    assert probe.read(CHUNK, 0, 10) is None, "the chain is served by nobody"
    server.allow(1, 5)
    assert probe.read(CHUNK, 0, 10, version=5) == file.content[:10]
    server.lease(int(1e9 * time.clock_gettime(time.CLOCK_BOOTTIME)))
    assert probe.read(CHUNK, 0, 10, version=5) is None, "the lease is over"
    server.lease(int(1e9 * (time.clock_gettime(time.CLOCK_BOOTTIME) + 3600)))
    server.drop(1, CHUNK)
    assert probe.read(CHUNK, 0, 10, version=5) is None, "it was dropped"
    file.put(server)
    server.clear(1)
    assert probe.read(CHUNK, 0, 10, version=5) is None, "all of the chain was dropped"
    assert server.stats()["damaged"] == 0


def test_damaged_bytes_are_declined(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    os.pwrite(file.fd, bytes([file.content[5000] ^ 1]), file.block + 5000)
    assert probe.read(CHUNK, 4999, 3) is None
    assert probe.read(CHUNK, 8191, 2) is None, "the same granule"
    assert probe.read(CHUNK, 8192, 100) == file.content[8192:8292], "the next one is fine"
    assert probe.read(CHUNK, 0, len(file.content)) is None, "whole granules, which the client of a stream checks"


@pytest.mark.parametrize("seed", range(6))
def test_items_side_by_side_are_read_together_and_declined_each_for_itself(
    server: Any, file: File, probe: LaneProbe, seed: int
) -> None:
    file.put(server)
    rng = random.Random(seed)
    length_max = [10, 96, 3000, 60_000, 299_000, 1000][seed]
    ranges, offset = [], rng.choice([0, 1, 4096, 5000])
    while len(ranges) < 800 and offset < len(file.content) - 1:
        length = min(rng.randint(1, length_max), len(file.content) - offset)
        ranges.append((offset, length))
        offset += length + (rng.random() < 0.02)  # Now and then one begins a byte later.
    items = [probe.item(CHUNK, offset, length, place=offset) for offset, length in ranges]
    for damaged in (None, ranges[0][0], ranges[len(ranges) // 2][0], ranges[-1][0] + ranges[-1][1] - 1):
        if damaged is not None:
            os.pwrite(file.fd, bytes([file.content[damaged] ^ 1]), file.block + damaged)
        probe.send(*items)
        for count, (offset, length) in zip(probe.receive(), ranges, strict=True):
            granules = range(offset >> GRANULE_LOG2, (offset + length - 1 >> GRANULE_LOG2) + 1)
            is_good = damaged is None or damaged >> GRANULE_LOG2 not in granules
            assert count == (length if is_good else DECLINED)
            if is_good:
                assert bytes(probe.memory[offset : offset + length]) == file.content[offset : offset + length]
        if damaged is not None:
            os.pwrite(file.fd, file.content[damaged : damaged + 1], file.block + damaged)


class StreamedFile:
    """What `lane.client` packs of a file of one chunk, whose lane is the first one."""

    def __init__(self, length: int, *, chunk_bytes: int = 1 << 22) -> None:
        inode, _ = struct.unpack(">QQ", CHUNK)
        self.lane_spec = struct.pack("=QQQQQIi", inode, 3 * chunk_bytes + length, chunk_bytes, 1, 1, 1, 0)
        self.begin = 3 * chunk_bytes  # CHUNK is the fourth one.

    def read(
        self, lane: socket.socket, ranges: list[tuple[int, int]], files: list[StreamedFile] | None = None
    ) -> tuple[list[int], list[bytes]]:
        """By the client's native part: (count of each, what landed). Of this file, or of one for each range."""
        into = [bytearray(b"\xee" * length) for _, length in ranges]
        opened = files or [self] * len(ranges)
        items = [(each, self.begin + offset, length) for each, (offset, length) in zip(opened, ranges, strict=True)]
        descriptors, streams = array("i", [lane.fileno()]), bytearray([1])
        counts = native.read_ranges(
            *(items, into, "lane_spec", descriptors, streams, bytearray(1), b"", 0, 0, 0, 7, 0, 5 * 10**9),
            *(0, b"", bytearray(1), sums := array("I", [7] * len(items))),
        )
        found = [bytes(each) for each in into]
        for count, crc, came in zip(counts, sums, found, strict=True):
            assert count == -1 or crc == crc32c(came[:count])
        return counts, found


def pages(count: int, size: int, *, begin: int = 0) -> list[tuple[int, int]]:
    """(offset, length) of heads and payloads, one behind the other."""
    step = 96 + size
    return [each for at in range(begin, begin + count * step, step) for each in ((at, 96), (at + 96, size))]


@pytest.mark.parametrize("missing", [0, 1, 4095])
def test_the_client_of_a_stream_gets_what_lies_side_by_side_and_what_does_not(
    server: Any, tmp_path: Path, missing: int
) -> None:
    file = File(tmp_path / "blocks", random.Random(5).randbytes((3 << 20) - missing))
    file.put(server)
    end, rng = len(file.content), random.Random(6)
    probe, streamed = StreamProbe(server), StreamedFile(end)
    asked = [
        pages(16, 57_344), pages(3, 1 << 18, begin=4000), pages(2, 1 << 20, begin=8192), pages(400, 100, begin=77),
        [(0, end)], [(end - 70_000, 70_000)], [(1, 65_536), (65_537, 1), (65_539, 65_536), (5, 65_536)],
        [(rng.randrange(end - 1000), rng.choice([1, 96, 1000])) for _ in range(200)],
        [each for each in pages(16, 57_344) if rng.random() < 0.7], list(reversed(pages(4, 70_000))),
    ]  # fmt: skip
    for ranges in asked:
        counts, found = streamed.read(probe.socket, ranges)
        assert counts == [length for _, length in ranges]
        assert found == [file.content[offset : offset + length] for offset, length in ranges]
    probe.close()
    os.close(file.fd)


def test_a_file_that_is_open_as_it_was_before_it_grew_and_as_it_is(server: Any, file: File) -> None:
    file.put(server)
    end = len(file.content)
    probe, before, after = StreamProbe(server), StreamedFile(end - 30_000), StreamedFile(end)
    ranges = [(end - 130_000, 100_000), (end - 30_000, 30_000), (0, 80_000)]
    counts, found = before.read(probe.socket, ranges, files=[before, after, after])
    assert counts == [length for _, length in ranges]
    assert found == [file.content[offset : offset + length] for offset, length in ranges]
    probe.close()


def test_the_client_of_a_stream_finds_damage_between_its_items(server: Any, file: File) -> None:
    file.put(server)
    probe, streamed = StreamProbe(server), StreamedFile(len(file.content))
    ranges = [(100, 70_000), (90_000, 70_000), (200_000, 50), (200_050, 50)]
    for at, damaged in ((50, 0), (150, 0), (70_101, 0), (89_999, 1), (160_001, 1), (200_099, 2)):
        os.pwrite(file.fd, bytes([file.content[at] ^ 1]), file.block + at)
        counts, found = streamed.read(probe.socket, ranges)
        is_good = [True, True, True, True]
        is_good[damaged] = False
        if damaged == 2:
            is_good[3] = False  # It was asked for in one with what lies before it.
        assert counts == [length if good else -1 for good, (_, length) in zip(is_good, ranges, strict=True)]
        for good, (offset, length), bytes_found in zip(is_good, ranges, found, strict=True):
            assert not good or bytes_found == file.content[offset : offset + length]
        os.pwrite(file.fd, file.content[at : at + 1], file.block + at)
    probe.close()


def test_a_file_that_is_too_short_is_declined(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    os.ftruncate(file.fd, file.block + 10_000)
    assert probe.read(CHUNK, 9000, 2000) is None
    assert probe.read(CHUNK, 0, 4096) == file.content[:4096]


def test_the_table_is_bounded_and_the_oldest_go_first(file: File, tmp_path: Path) -> None:
    server = new_server(table_bytes_max=200_000)
    probe = LaneProbe(server)
    try:
        small = File(tmp_path / "small", b"abc" * 1000)
        for index in range(5000):
            small.put(server, chunk=chunk_id(9, index))
        count = server.stats()["extents"]
        assert 500 < count < 5000
        for index in (0, 4999 - count):
            assert probe.read(chunk_id(9, index), 0, 10) is None
        for index in (5000 - count, 4999):
            assert probe.read(chunk_id(9, index), 0, 10) == b"abcabcabca"
        for index in range(5000):
            server.drop(1, chunk_id(9, index))
        assert server.stats()["extents"] == 0
        os.close(small.fd)
    finally:
        probe.close()
        server.stop()


def test_a_chunk_that_changes_all_the_time_is_never_read_wrong(server: Any, tmp_path: Path, probe: LaneProbe) -> None:
    """Blocks are reused as soon as an entry is dropped, as the engine does it."""
    contents = [bytes([number]) * 200_000 for number in range(1, 5)]
    files = [File(tmp_path / f"blocks-{number}", content) for number, content in enumerate(contents)]
    current, stop = [0], threading.Event()

    def change() -> None:
        rng = random.Random(4)
        while not stop.is_set():
            server.drop(1, CHUNK)
            old = files[current[0]]
            os.pwrite(old.fd, b"\xff" * 200_000, old.block)  # Its block is somebody else's now.
            current[0] = rng.randrange(4)
            new = files[current[0]]
            os.pwrite(new.fd, new.content, new.block)
            new.put(server)
            time.sleep(0.0002)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        served = declined = 0
        while served < 300 or declined < 300:  # Both happen, as often as the machine lets them.
            found = probe.read(CHUNK, 0, 200_000)
            assert found is None or found in contents
            served += found is not None
            declined += found is None
    finally:
        stop.set()
        thread.join()
        for each in files:
            os.close(each.fd)


# ---- clients that break the rules


def _memfd(size: int, *, sealed: bool) -> int:
    import fcntl

    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"x",
        HEAD.pack(MAGIC + 1, READ, 0, 1),
        HEAD.pack(MAGIC, 9, 0, 1),
        HEAD.pack(MAGIC, READ, 1, 1),
        HEAD.pack(MAGIC, READ, 2049, 1) + bytes(56 * 2049),
        HEAD.pack(MAGIC, READ, 1, 1) + bytes(56),
        HEAD.pack(MAGIC, 3, 0, 99),
        bytes(120_000),
    ],
    ids=["empty", "short", "magic", "kind", "no items", "too many", "unknown memory", "no descriptor", "too long"],
)
def test_a_packet_that_breaks_the_rules_ends_its_lane_and_no_other(
    server: Any, file: File, probe: LaneProbe, packet: bytes
) -> None:
    file.put(server)
    bad = LaneProbe(server)
    bad.socket.send(packet) if packet else bad.socket.shutdown(socket.SHUT_WR)
    assert bad.is_over()
    bad.close()
    assert probe.read(CHUNK, 0, 10) == file.content[:10]


def test_places_outside_the_memory_end_the_lane(server: Any, file: File) -> None:
    file.put(server)
    for place, length in (((1 << 20) - 9, 10), (1 << 20, 1), (2**64 - 1, 10), (2**63, 2**31)):
        bad = LaneProbe(server)
        bad.send(bad.item(CHUNK, 0, length, place=place))
        assert bad.is_over()
        bad.close()


def test_only_memory_that_cannot_shrink_is_taken(server: Any, tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(b"x" * 4096)
    for fd in (_memfd(4096, sealed=False), os.open(plain, os.O_RDWR), _memfd(0, sealed=True)):
        bad = LaneProbe(server)
        bad.tell(77, fd)
        assert bad.is_over()
        bad.close()
        os.close(fd)


def test_memory_of_huge_pages_is_not_taken(server: Any) -> None:
    import fcntl

    try:
        fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    os.ftruncate(fd, 4 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    bad = LaneProbe(server)
    bad.tell(77, fd)
    assert bad.is_over()
    bad.close()
    os.close(fd)


def test_memory_of_one_lane_is_not_known_to_another(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    other = LaneProbe(server)
    other.region.number = probe.region.number
    other.send(other.item(CHUNK, 0, 10))
    assert other.is_over()
    other.close()


def test_a_flood_that_nobody_reads_the_answers_of_ends_its_lane(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    flood = LaneProbe(server)
    flood.socket.settimeout(0.5)
    try:
        for _ in range(100_000):
            flood.send(*[flood.item(CHUNK, 0, 1)] * 200)
    except OSError:
        pass
    else:
        raise AssertionError("it was never stopped")
    flood.close()
    assert probe.read(CHUNK, 0, 10) == file.content[:10]


@pytest.mark.parametrize(
    "sent", [b"x", HEAD.pack(MAGIC + 1, READ, 0, 1), HEAD.pack(MAGIC, 2, 0, 1), HEAD.pack(MAGIC, READ, 2049, 1)]
)
def test_what_breaks_the_rules_ends_its_stream_and_no_other(
    server: Any, file: File, probe: LaneProbe, sent: bytes
) -> None:
    file.put(server)
    bad = StreamProbe(server)
    bad.socket.sendall(sent)
    bad.socket.shutdown(socket.SHUT_WR)
    assert bad.is_over()
    bad.close()
    assert probe.read(CHUNK, 0, 10) == file.content[:10]


def test_a_stream_that_is_not_read_holds_nobody_up(server: Any, file: File, probe: LaneProbe) -> None:
    """Files are let go of while its server waits to send."""
    file.put(server)
    slow = StreamProbe(server)
    for _ in range(40):
        slow.send(*[slow.item(CHUNK, 0, 300_000)] * 20)
    assert probe.read(CHUNK, 0, 10) == file.content[:10]
    server.clear(1)  # Would wait for it for ever.
    assert probe.read(CHUNK, 0, 10) is None
    slow.close()


def test_what_is_dropped_while_a_stream_is_slow_is_declined_at_last(server: Any, file: File) -> None:
    file.put(server)
    slow = StreamProbe(server, size=20 * 300_000)
    slow.send(*[slow.item(CHUNK, 0, 300_000, place=300_000 * at) for at in range(20)])
    time.sleep(0.2)  # The socket is full by now.
    server.drop(1, CHUNK)
    assert slow.receive() == [DECLINED] * 20
    file.put(server)
    assert slow.read(CHUNK, 0, 10) == file.content[:10], "and the stream goes on"
    slow.close()


def test_nothing_is_left_of_lanes_and_servers(file: File) -> None:
    before = open_descriptors()
    for _ in range(20):
        server = new_server()
        file.put(server)
        kinds = [LaneProbe, StreamProbe, LaneProbe, StreamProbe, LaneProbe]
        probes = [kind(server, size=mmap.PAGESIZE) for kind in kinds]
        for probe in probes:
            assert probe.read(CHUNK, 0, 10) == file.content[:10]
        for probe in probes[:3]:
            probe.close()
        server.stop()
        with pytest.raises(ValueError, match="stopped"):
            server.adopt(0, False)
        for probe in probes[3:]:
            assert probe.is_over()
            probe.close()
        del probe, probes, server
    assert open_descriptors() <= before


def test_descriptors_that_nobody_asked_for_are_closed(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    bad = LaneProbe(server)
    before = open_descriptors()
    for count in (2, 3, 4, 5, 9):
        descriptors = array("i", [bad.region.fd] * count)
        head = HEAD.pack(MAGIC, 3, 0, 100 + count)
        bad.socket.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        assert bad.is_over()
        bad.close()
        bad = LaneProbe(server)
    assert probe.read(CHUNK, 0, 10) == file.content[:10]
    bad.close()
    assert open_descriptors() <= before


def test_how_much_memory_is_mapped_is_bounded(server: Any, file: File, probe: LaneProbe) -> None:
    file.put(server)
    bad = LaneProbe(server)
    fd = _memfd(1 << 41, sealed=True)
    bad.tell(77, fd)
    assert bad.is_over()
    os.close(fd)
    bad.close()
    assert probe.read(CHUNK, 0, 10) == file.content[:10]


def test_files_may_be_closed_after_clear_while_they_are_read(server: Any, tmp_path: Path) -> None:
    """The number of a file may be another one's by then: that one is never read."""
    slow = StreamProbe(server, size=20 * 300_000)
    file = File(tmp_path / "first", b"1" * 300_000)
    file.put(server)
    slow.send(*[slow.item(CHUNK, 0, 300_000, place=300_000 * at) for at in range(20)])
    time.sleep(0.2)
    server.clear(1)
    os.close(file.fd)
    other = File(tmp_path / "second", b"2" * 300_000)
    assert other.fd == file.fd, "the test wants the same number"
    assert slow.receive() == [DECLINED] * 20
    assert b"2" not in bytes(slow.memory)
    other.put(server)
    assert slow.read(CHUNK, 0, 10) == b"2" * 10
    slow.close()
    os.close(other.fd)


def test_a_server_that_was_never_made_says_so() -> None:
    empty = native.Server.__new__(native.Server)
    for call in (
        lambda: empty.clear(1),
        lambda: empty.stats(),
        lambda: empty.drop(1, CHUNK),
        lambda: empty.allow(1, 1),
    ):
        with pytest.raises(ValueError, match="not initialised"):
            call()
