"""Pages that are written behind the caller's back: who is told what when the store refuses them, or all ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from emberfs import StoreClosed
from emberfs.errors import Unavailable
from emberkv.page import HEADER_BYTES, Place, decode_header
from emberkv.segments import SECTOR_BYTES
from emberkv.writing import Copied, PageWriter, Part

LENGTH = 5000


class Disk:
    """What a store does for a writer; `fails` are the writes that it refuses, `lets` holds them all back."""

    def __init__(self) -> None:
        self.written: list[tuple[str, int, bytes]] = []
        self.fails: Exception | None = None
        self.begun, self.lets = threading.Event(), threading.Event()
        self.lets.set()

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def open(self, path: str, mode: str) -> Any:
        return _File(path)

    def batch_write(self, items: Sequence[Any], *, whole_chunks: bool) -> None:
        assert whole_chunks
        self.begun.set()
        assert self.lets.wait(30)
        if self.fails is not None:
            raise self.fails
        self.written += [(file.path, offset, bytes(data)) for file, offset, data in items]


class _File:
    def __init__(self, path: str) -> None:
        self.path = path

    def close(self) -> None:
        pass


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
    writer = PageWriter(disk, "/s", committed)  # type: ignore[arg-type]
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
    writer = PageWriter(disk, "/s", committed)  # type: ignore[arg-type]
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
    writer = PageWriter(disk, "/s", committed)  # type: ignore[arg-type]
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
    writer = PageWriter(disk, "/s", committed)  # type: ignore[arg-type]
    disk.fails = MemoryError()
    for _ in range(3):  # There are two threads.
        with pytest.raises(MemoryError):
            writer.add(part(0, is_durable=True), timeout_s=10).wait(10)
    disk.fails = None
    writer.add(part(0, is_durable=True), timeout_s=10).wait(10)
    writer.close(10)
