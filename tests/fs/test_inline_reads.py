"""Reads of an embedded store past its services, and of plain files: the same bytes and errors as the slow way.

Run: pytest tests/fs/test_inline_reads.py
"""

from __future__ import annotations

import multiprocessing
import os
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emberfs
import numpy as np
import pytest
from emberfs import Client, File
from emberfs.checksum import crc32c
from emberfs.errors import Corruption, NotFound, StoreClosed
from emberfs.lane import native
from emberfs.plain_files import read_files, read_files_slowly
from emberfs.portal import Portal

from tests.fs.stores import CHUNK, content, flip_byte, needs_native, url_of

DATA = content(5 * CHUNK + 1000)


@pytest.fixture(autouse=True)
def files(client: Client) -> None:
    client.put("/large", DATA, chunk_size_bytes=CHUNK)
    client.put("/small", b"0123456789")
    for path in ("/large", "/small"):
        assert client.get(path)  # The table knows of chunks that were read before.


@pytest.fixture
def no_services(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called nothing goes through the portal."""

    def run(self: Portal, call: Any) -> Any:
        call.close()
        raise AssertionError("it went through the services")

    return lambda: monkeypatch.setattr(Portal, "run", run)


def read(client: Client, file: File, *ranges: tuple[int, int]) -> list[bytes]:
    buffers, sums = [bytearray(length) for _, length in ranges], array("I", [7] * len(ranges))  # Of a read before.
    counts = client.batch_read([(file, *each) for each in ranges], buffers, sums=sums)
    assert list(sums) == [crc32c(buffer[:count]) for buffer, count in zip(buffers, counts, strict=True)]
    return [bytes(buffer[:count]) for buffer, count in zip(buffers, counts, strict=True)]


@needs_native
@pytest.mark.parametrize("is_whole", [False, True])
def test_any_ranges_are_read_without_the_services(
    client: Client, no_services: Callable[[], None], is_whole: bool
) -> None:
    rng = random.Random(3)
    begins = [rng.randrange(len(DATA)) for _ in range(300)]
    ranges = [(begin, rng.choice([0, 1, 100, 5000, 3 * CHUNK])) for begin in begins]
    ranges = [(begin, min(length, len(DATA) - begin)) for begin, length in ranges]
    with client.open("/large") as file:
        no_services()
        if is_whole:
            into = bytearray(sum(length for _, length in ranges))
            counts = client.batch_read([(file, *each) for each in ranges], into)
            assert counts == [length for _, length in ranges]
            assert bytes(into) == b"".join(DATA[begin : begin + length] for begin, length in ranges)
        else:
            assert read(client, file, *ranges) == [DATA[begin : begin + length] for begin, length in ranges]
        assert read(client, file, (len(DATA) - 5, 100), (len(DATA) + 7, 3)) == [DATA[-5:], b""]


def test_the_checksum_is_of_what_is_in_memory_afterwards(client: Client) -> None:
    """Also where two ranges were asked for into one place."""
    memory = memoryview(bytearray(8000))
    with client.open("/large") as file:
        for second, beside in ((0, 5000), (0, 9000), (2000, 5000), (3999, 1000), (4000, 5000)):
            views, sums = [memory[:4000], memory[second : second + 4000]], array("I", [0, 0])
            counts = client.batch_read([(file, 1000, 4000), (file, beside, 4000)], views, sums=sums)
            assert counts == [4000, 4000]
            assert list(sums) == [crc32c(view) for view in views]


def test_what_is_not_in_chunks_or_not_known_is_read_all_the_same(client: Client) -> None:
    client.put("/new", DATA[:CHUNK])
    with client.open("/large") as large, client.open("/small") as small, client.open("/new") as new:
        into, sums = bytearray(30), array("I", [7] * 3)
        assert client.batch_read([(large, 100, 10), (small, 2, 10), (new, 50, 10)], into, sums=sums) == [10, 8, 10]
        assert list(sums) == [crc32c(part) for part in (into[:10], into[10:18], into[20:])]
        assert (bytes(into[:10]), bytes(into[10:18]), bytes(into[20:])) == (DATA[100:110], b"23456789", DATA[50:60])


def test_changes_are_seen_at_once(client: Client) -> None:
    with client.open("/large") as file:
        assert read(client, file, (0, 10), (CHUNK, 10)) == [DATA[:10], DATA[CHUNK : CHUNK + 10]]
        client.batch_write([("/large", 5, b"XXXXX")])
        assert read(client, file, (0, 10), (CHUNK, 10)) == [DATA[:5] + b"XXXXX", DATA[CHUNK : CHUNK + 10]]
        client.truncate("/large", 7)
        assert read(client, file, (0, 10)) == [DATA[:5] + b"XX" + bytes(3)]


def test_a_file_whose_chunks_are_gone_is_not_found(tmp_path: Path) -> None:
    with emberfs.connect(url_of(tmp_path / "other"), gc_delay_s=0.0) as client:
        client.put("/large", DATA, chunk_size_bytes=CHUNK)
        with client.open("/large") as file:
            assert read(client, file, (0, 10)) == [DATA[:10]]
            client.remove("/large", trash=False)
            client.collect_garbage(force=True)
            with pytest.raises(NotFound, match="removed while it was open"):
                read(client, file, (0, 10))


def test_damage_is_found(client: Client, store: Path) -> None:
    with client.open("/large") as file:
        read(client, file, (CHUNK, 100))
        flip_byte(store, DATA, CHUNK + 50)
        with pytest.raises(Corruption, match="/large"):
            read(client, file, (0, 10), (CHUNK, 10))
        assert read(client, file, (0, 10)) == [DATA[:10]]


def test_a_closed_store_reads_nothing(store: Path, client: Client) -> None:
    file = client.open("/large")
    read(client, file, (0, 10))
    client.close()
    with pytest.raises(StoreClosed):
        read(client, file, (0, 10))
    with pytest.raises(StoreClosed):
        file.read(10)


def test_a_forked_child_reads_nothing_of_its_parents(client: Client) -> None:
    file = client.open("/large")
    read(client, file, (0, 10))

    def tell(connection: Any) -> None:
        try:
            connection.send(bytes(file.read(10)))
        except StoreClosed:
            connection.send("closed")

    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=tell, args=(theirs,))
    child.start()
    assert ours.recv() == "closed"
    child.join()
    assert read(client, file, (0, 10)) == [DATA[:10]]


@pytest.mark.parametrize("is_slow", [False, True])
def test_ranges_of_plain_files(tmp_path: Path, is_slow: bool) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(DATA[::-1])
    opened = [os.open(tmp_path / name, os.O_RDONLY) for name in "ab"]
    rng = np.random.default_rng(1)
    which = rng.integers(0, 2, 50)
    fds = np.array(opened, np.int32)[which]
    lengths = rng.integers(0, 9000, 50)
    offsets = rng.integers(0, len(DATA) - 9000, 50)
    into = bytearray(int(lengths.sum()))

    def ask() -> int:
        if is_slow:
            return read_files_slowly(fds.tolist(), offsets.tolist(), lengths.tolist(), memoryview(into))
        return read_files(fds, offsets, lengths, memoryview(into))

    assert ask() == 50
    wanted = [
        (DATA, DATA[::-1])[file][offset : offset + length]
        for file, offset, length in zip(which.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
    ]
    assert bytes(into) == b"".join(wanted)
    offsets[20], lengths[20] = len(DATA) - 3, 4
    into = bytearray(int(lengths.sum()))
    assert ask() == 20
    for descriptor in opened:
        os.close(descriptor)
    with pytest.raises(OSError):
        ask()


@needs_native
def test_a_buffer_that_is_too_small_is_refused(tmp_path: Path) -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="room"):
        native.read_files(np.zeros(1, np.int32), one, 2 * one, bytearray(1))
    with pytest.raises(ValueError, match="room"):
        native.read_files(np.zeros(2, np.int32), one, one, bytearray(9))


@needs_native
@pytest.mark.parametrize("count", [0, 1, 32, 1000, 3 << 19])
@pytest.mark.parametrize("kinds", [1, 2, 700])
def test_words_are_found(count: int, kinds: int) -> None:
    words = np.random.default_rng(count).integers(0, kinds, count, np.uint32)
    assert np.array_equal(np.frombuffer(native.find_word(words, 0), np.int64), np.flatnonzero(words == 0))


@needs_native
def test_what_is_not_of_words_is_refused() -> None:
    for data in (bytearray(6), memoryview(bytearray(9))[1:]):
        with pytest.raises(ValueError, match="aligned"):
            native.find_word(data, 0)
