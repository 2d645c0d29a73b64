"""Pages that are written behind the caller's back: who is told what when the store refuses them, or all ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from emberfs import StoreClosed
from emberfs.errors import Unavailable
from emberkv.files import SEGMENT_CHUNK_BYTES
from emberkv.opening import GrantedSegments, SegmentFiles
from emberkv.page import HEADER_BYTES, Place, decode_header
from emberkv.segments import SECTOR_BYTES
from emberkv.writing import Copied, PageWriter, Part

LENGTH = 5000


class Disk:
    """What a store does for a writer; `fails` are the writes that it refuses, `lets` holds them all back."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.written: list[tuple[str, int, bytes]] = []
        self.fails: Exception | None = None
        self.begun, self.lets = threading.Event(), threading.Event()
        self.lets.set()

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def open(self, path: str, mode: str) -> Any:
        self.opened.append(path)
        return _File(self, path)

    def batch_write(self, items: Sequence[Any], *, whole_chunks: bool) -> None:
        assert whole_chunks
        self.begun.set()
        assert self.lets.wait(30)
        if self.fails is not None:
            raise self.fails
        self.written += [(file.path, offset, bytes(data)) for file, offset, data in items]


class _File:
    def __init__(self, disk: Disk, path: str) -> None:
        self._disk, self.path = disk, path

    def close(self) -> None:
        self._disk.closed.append(self.path)


def committed(parts: Sequence[Copied]) -> None:
    for part in parts:
        part.ticket.settle(None)


def part(offset: int, *, pages: int = 1, is_durable: bool = False) -> Part:
    places = [Place(1, offset + at * (HEADER_BYTES + LENGTH), LENGTH, 0) for at in range(pages)]
    keys = [bytes([at + 1]) * 32 for at in range(pages)]
    payloads = [memoryview(bytes([at + 1]) * LENGTH) for at in range(pages)]
    return Part(1, 1, keys, [bytes(32)] * pages, places, payloads, 0, 0, is_durable)


def test_parts_that_follow_each_other_are_one_write_of_whole_sectors() -> None:
    disk = Disk()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    disk.lets.clear()
    writer.add(part(1 << 20), timeout_s=10)  # It is taken at once, and the others gather behind it.
    assert disk.begun.wait(30)
    writer.add(part(0, pages=2), timeout_s=10)
    second = -(-2 * (HEADER_BYTES + LENGTH) // SECTOR_BYTES) * SECTOR_BYTES
    writer.add(part(second), timeout_s=10)
    disk.lets.set()
    writer.flush(10)
    (_, offset, data) = disk.written[1]
    assert len(disk.written) == 2 and offset == 0 and len(data) % SECTOR_BYTES == 0
    header = decode_header(data[second:])
    assert header is not None and header.place.offset == second
    assert data[second + HEADER_BYTES :][:LENGTH] == bytes([1]) * LENGTH
    writer.close(10)


def test_flush_tells_of_what_nobody_waited_for_and_once() -> None:
    disk = Disk()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    disk.fails = Unavailable("no")
    writer.add(part(0), timeout_s=10)
    with pytest.raises(Unavailable):
        writer.flush(10)
    writer.flush(10)
    ticket = writer.add(part(0, is_durable=True), timeout_s=10)
    with pytest.raises(Unavailable):
        ticket.wait(10)
    disk.fails = None
    writer.add(part(0, is_durable=True), timeout_s=10).wait(10)
    writer.flush(10)  # Whoever waited was told, and has put it again.
    writer.close(10)


def test_who_waits_is_told_when_all_ends() -> None:
    disk = Disk()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    disk.lets.clear()
    first = writer.add(part(0), timeout_s=10)
    assert disk.begun.wait(30)
    late = writer.add(part(1 << 20, is_durable=True), timeout_s=10)
    with pytest.raises(TimeoutError):
        writer.close(0.01)
    with pytest.raises(StoreClosed):
        late.wait(10)
    with pytest.raises(StoreClosed):
        writer.add(part(0), timeout_s=10)
    disk.lets.set()
    first.wait(10)


def test_the_threads_outlive_an_error_that_nobody_thought_of() -> None:
    disk = Disk()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    disk.fails = MemoryError()
    for _ in range(3):  # There are two threads.
        with pytest.raises(MemoryError):
            writer.add(part(0, is_durable=True), timeout_s=10).wait(10)
    disk.fails = None
    writer.add(part(0, is_durable=True), timeout_s=10).wait(10)
    writer.close(10)


def large(offset: int, *, pages: int, segment: int = 1) -> Part:
    """A part of pages of 1 MiB, each of other bytes."""
    length = 1 << 20
    places = [Place(segment, offset + at * (HEADER_BYTES + length), length, 0) for at in range(pages)]
    payloads = [memoryview(bytes([1 + places[at].offset % 251]) * length) for at in range(pages)]
    return Part(offset + 1, 1, [bytes(32)] * pages, [bytes(32)] * pages, places, payloads, 0, 0, False)


STEP = -(-16 * (HEADER_BYTES + (1 << 20)) // SECTOR_BYTES) * SECTOR_BYTES
"""From a part of 16 large pages to the next one."""


def test_a_full_slab_leaves_the_chunk_that_it_would_not_fill_to_the_next_one() -> None:
    disk, done = Disk(), list[int]()

    def commit(parts: Sequence[Copied]) -> None:
        done.extend(part.reservation for part in parts)
        committed(parts)

    writer = PageWriter(disk, SegmentFiles(disk, "/s"), commit)  # type: ignore[arg-type]
    disk.lets.clear()
    parts = [large(at * STEP, pages=16) for at in range(4)]
    for each in parts:
        writer.add(each, timeout_s=10)
    disk.lets.set()
    writer.flush(30)
    image, ends = bytearray(4 * STEP), list[int]()
    for _, offset, data in disk.written:
        assert not any(image[offset : offset + len(data)]), "written once"
        image[offset : offset + len(data)] = data
        ends.append(offset + len(data))
    for each in parts:
        for place, payload in zip(each.places, each.payloads, strict=True):
            header = decode_header(image[place.offset :])
            assert header is not None and header.place[:3] == place[:3]
            assert image[place.offset + HEADER_BYTES : place.end] == payload
    # The last has nothing behind it, and the first may have been taken before anything followed it.
    assert len(ends) == 4 and all(end % SEGMENT_CHUNK_BYTES == 0 for end in sorted(ends)[1:-1])
    assert sorted(done) == [each.reservation for each in parts]
    writer.close(10)
    assert disk.opened == disk.closed == ["/s/00000001"]


def test_a_part_whose_beginning_was_not_written_is_not_committed() -> None:
    class Refusing(Disk):
        def batch_write(self, items: Sequence[Any], *, whole_chunks: bool) -> None:
            if any(STEP // 2 < offset <= STEP for _, offset, _ in items):
                raise Unavailable("no")
            super().batch_write(items, whole_chunks=whole_chunks)

    disk = Refusing()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    disk.lets.clear()
    first, second, third = [writer.add(large(at * STEP, pages=16), timeout_s=10) for at in range(3)]
    disk.lets.set()
    with pytest.raises(Unavailable):
        writer.flush(30)
    assert first.error is None or isinstance(first.error, Unavailable)  # Its end may have gone to the second slab.
    assert isinstance(second.error, Unavailable) and isinstance(third.error, Unavailable)
    writer.close(10)


def test_files_of_full_segments_are_closed_and_those_that_could_not_be_opened_are_tried_again() -> None:
    class Shut(Disk):
        refuses = True

        def open(self, path: str, mode: str) -> Any:
            if self.refuses:
                raise Unavailable("no")
            return super().open(path, mode)

    disk = Shut()
    writer = PageWriter(disk, SegmentFiles(disk, "/s"), committed)  # type: ignore[arg-type]
    writer.add(large(0, pages=1), timeout_s=10)
    with pytest.raises(Unavailable):
        writer.flush(10)
    disk.refuses = False
    paths = [f"/s/0000000{segment}" for segment in (1, 2, 3)]
    for segment in (1, 2, 3):
        writer.add(large(0, pages=1, segment=segment), timeout_s=10)
        writer.flush(10)
    assert [path for path, _, _ in disk.written] == disk.opened == paths
    writer.close(10)
    ends_s = time.monotonic() + 30
    while sorted(disk.closed) != paths:  # The thread that opened the last one closes the one before, and nobody waits.
        assert time.monotonic() < ends_s
        time.sleep(0.001)


class Granting(Disk):
    """Where what is written is shown grants for."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[list[bytes], set[int]]] = []

    def write_granted(self, grants: Sequence[bytes], items: Sequence[Any]) -> None:
        assert self.lets.wait(30)
        self.shown.append((list(grants), {segment for segment, _, _ in items}))


def test_a_slab_is_written_under_the_newest_grant_of_each_of_its_segments() -> None:
    """Others may have expired, and with them all would be refused."""
    disk = Granting()
    writer = PageWriter(disk, GrantedSegments(disk), committed)  # type: ignore[arg-type]
    disk.lets.clear()
    for segment in (1, 2, 3):
        for step in range(4):  # A slab and a bit go on in one segment.
            given = replace(large(step * STEP // 4, pages=4, segment=segment), grant=f"{segment} {step}".encode())
            writer.add(given, timeout_s=10)
            if len(writer._full) == 3:
                disk.lets.set()
    disk.lets.set()
    writer.flush(30)
    assert len(disk.shown) >= 3
    for grants, segments in disk.shown:
        assert {int(grant.split()[0]) for grant in grants} == segments
        assert len(grants) == len(segments)
    newest = {
        segment: max(step for grants, _ in disk.shown for of, step in [g.split() for g in grants] if int(of) == segment)
        for segment in (1, 2, 3)
    }
    assert set(newest.values()) == {b"3"}
    writer.close(10)
