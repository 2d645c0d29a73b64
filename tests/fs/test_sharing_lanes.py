"""Lanes of an embedded store that several processes use: the same bytes as otherwise, through moves and mishaps.

Run: pytest tests/fs/test_sharing_lanes.py
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs import Client
from emberfs.checksum import crc32c
from emberfs.errors import DeadlineExceeded

from tests.fs.sharing_run import no_server_left, server_of, stopped, until
from tests.fs.stores import CHUNK, content, line_of, needs_native, program, url_of

pytestmark = needs_native

DATA = content(20 * CHUNK + 100)
STEP = CHUNK // 2 + 77

GUEST = "import sys, emberfs\nclient = emberfs.connect(sys.argv[1])\nprint('in', flush=True)\nsys.stdin.readline()"

READER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
with client.open("/file", "rb") as file:
    for _ in range(2):
        data = file.read_at(0, 1 << 30)
lane = client.stats().requests.get("lane")
print(len(data), lane.payload_bytes if lane else 0, flush=True)
"""

WRITER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
chunk_bytes = int(sys.argv[2])
with client.open("/file", "r+b") as file:
    for line in sys.stdin:
        number = int(line)
        client.batch_write([(file, number % 4 * chunk_bytes, number.to_bytes(8, "big") * (chunk_bytes // 8))])
        print(number, flush=True)
"""


@pytest.fixture(autouse=True)
def _ends(store: Path) -> Iterator[None]:
    with no_server_left(store):
        yield


@contextlib.contextmanager
def shared(client: Client, store: Path) -> Iterator[None]:
    """With a server, which a guest keeps."""
    with program(GUEST, url_of(store)) as guest:
        assert line_of(guest) == "in"
        server_of(store)
        yield
        guest.communicate("go\n")


def lane_bytes(client: Client) -> int:
    """That came to this client over lanes."""
    lane = client.stats().requests.get("lane")
    return lane.payload_bytes if lane is not None else 0


def read_all(client: Client, file: emberfs.File, memory: memoryview) -> bool:
    """Whether what is read, in pieces and by many at once, is the file."""
    ranges = [(at, min(STEP, len(DATA) - at)) for at in range(0, len(DATA), STEP)]
    into, end = [], 0
    for _, length in ranges:
        into.append(memory[end : end + length])
        end += length
    sums = array("I", bytes(4 * len(ranges)))
    counts = client.batch_read([(file, *each) for each in ranges], into=into, sums=sums)
    assert [crc32c(view) for view in into] == list(sums)
    return counts == [length for _, length in ranges] and memory[:end] == DATA


@pytest.mark.parametrize("where", ["buffer", "bytearray"])
def test_who_owned_the_store_has_lanes_when_a_server_does(client: Client, store: Path, where: str) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA)) if where == "buffer" else memoryview(bytearray(len(DATA)))
    with client.open("/file", "rb") as before:
        assert read_all(client, before, memory)
        with shared(client, store), client.open("/file", "rb") as file:
            assert lane_bytes(client) == 0
            for each in (file, before):
                assert read_all(client, each, memory)  # The server has it in memory now.
                begun = lane_bytes(client)
                assert read_all(client, each, memory)
                assert lane_bytes(client) - begun == len(DATA)


def test_what_was_written_has_lanes_at_its_first_read(client: Client, store: Path) -> None:
    with shared(client, store):
        client.put("/file", DATA, chunk_size_bytes=CHUNK)
        memory = client.buffer(len(DATA))
        with client.open("/file", "rb") as file:
            assert read_all(client, file, memory)
        assert lane_bytes(client) == len(DATA)
        with client.open("/file", "r+b") as file:
            file.write(DATA[::-1])
        with client.open("/file", "rb") as file:
            assert file.read_at(0, len(DATA)) == DATA[::-1]
        assert lane_bytes(client) == 2 * len(DATA)


def test_who_comes_later_has_lanes(client: Client, store: Path) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    with shared(client, store), program(READER, url_of(store)) as reader:
        size, by_lane = map(int, line_of(reader).split())
        assert size == len(DATA) and len(DATA) <= by_lane <= 2 * len(DATA)


def test_what_another_process_writes_is_seen_at_once(client: Client, store: Path) -> None:
    client.put("/file", bytes(4 * CHUNK), chunk_size_bytes=CHUNK)
    memory = memoryview(bytearray(4 * CHUNK))
    with program(WRITER, url_of(store), str(CHUNK)) as writer, client.open("/file", "rb") as file:
        assert writer.stdin is not None
        for number in range(1, 200):
            writer.stdin.write(f"{number}\n")
            writer.stdin.flush()
            assert line_of(writer) == str(number)
            for _ in range(2):  # The server does not have the new one in its table yet, and then it has.
                assert client.batch_read([(file, 0, 4 * CHUNK)], into=[memory]) == [4 * CHUNK]
                for last in range(max(1, number - 3), number + 1):
                    at = last % 4 * CHUNK
                    assert memory[at : at + CHUNK] == last.to_bytes(8, "big") * (CHUNK // 8)
        writer.communicate()
    assert lane_bytes(client) >= 100 * 4 * CHUNK


def test_what_was_removed_ends_as_it_does_otherwise(client: Client, store: Path) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = memoryview(bytearray(len(DATA)))
    with shared(client, store):
        with client.open("/file", "rb") as file:
            assert read_all(client, file, memory)
            client.put("/file", b"another one")
            assert read_all(client, file, memory)
        assert client.get("/file") == b"another one"


def test_when_the_server_dies_the_next_one_has_lanes(client: Client, store: Path) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA))
    with shared(client, store), client.open("/file", "rb") as file:
        for _ in range(2):
            assert read_all(client, file, memory)
            server, begun = server_of(store), lane_bytes(client)
            os.kill(server, signal.SIGKILL)
            assert read_all(client, file, memory)
            assert server_of(store) != server
            until(lambda begun=begun: read_all(client, file, memory) and lane_bytes(client) > begun)  # type: ignore[misc]


def test_a_server_that_is_stopped_writes_nothing_later(client: Client, store: Path) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA))
    with shared(client, store), client.open("/file", "rb") as file:
        assert read_all(client, file, memory) and read_all(client, file, memory)
        with stopped(server_of(store)):
            with pytest.raises(DeadlineExceeded, match="does not answer"):
                read_all(client, file, memory)
            memory[:] = kept = random.Random(1).randbytes(len(memory))
        begun = lane_bytes(client)
        other = client.buffer(len(DATA))

        def is_read() -> bool:
            with contextlib.suppress(DeadlineExceeded):
                return read_all(client, file, other) and lane_bytes(client) > begun
            return False

        until(is_read)
        assert memory == kept


def _child(client: Client, answer: Any) -> None:
    memory = memoryview(bytearray(len(DATA)))
    with client.open("/file", "rb") as file:
        answer.put(read_all(client, file, memory) and read_all(client, file, memory) and lane_bytes(client) > 0)


def test_a_forked_child_has_lanes_of_its_own(client: Client, store: Path) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA))
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with shared(client, store), client.open("/file", "rb") as file:
        assert read_all(client, file, memory) and read_all(client, file, memory)
        child = context.Process(target=_child, args=(client, answer))
        child.start()
        for _ in range(20):
            assert read_all(client, file, memory)
        assert answer.get(timeout=60) is True
        child.join(timeout=60)
        assert child.exitcode == 0


def test_nothing_of_lanes_is_left_with_a_closed_client(store: Path) -> None:
    def files() -> int:
        gc.collect()  # Memory that is shared goes with its last view.
        return len(os.listdir("/proc/self/fd"))

    def use() -> None:
        with emberfs.connect(url_of(store)) as client:
            client.put("/file", DATA, chunk_size_bytes=CHUNK)
            memory = client.buffer(len(DATA))
            with shared(client, store), client.open("/file", "rb") as file:
                assert read_all(client, file, memory) and read_all(client, file, memory)
                assert lane_bytes(client) > 0

    use()
    before = files()
    for _ in range(3):
        use()
    assert files() <= before
