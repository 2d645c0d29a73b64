"""Lanes of an embedded store that several processes use: the same bytes as otherwise, through moves and mishaps.

Run: pytest tests/fs/test_sharing_lanes.py
"""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import signal
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs import Client
from emberfs.checksum import crc32c
from emberfs.errors import DeadlineExceeded
from emberfs.sharing.server import ServerConfig

from tests.fs.sharing_run import ServedHere, no_server_left, server_of, state_of, stopped, until
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


def test_a_fork_waits_for_no_thread(client: Client, store: Path) -> None:
    """Who reads at the moment of a fork may hold what is not there to be let go in the child."""
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA))
    with shared(client, store), client.open("/file", "rb") as file:
        assert read_all(client, file, memory)
        reader = client._attachment.store.lanes  # type: ignore[attr-defined]
        taken = reader._take()
        assert taken.sockets
        with reader._lock:
            child = os.fork()
            if not child:
                os._exit(17 if all(lane.fileno() < 0 for lane in taken.sockets.values()) else 1)
        try:
            until(lambda: state_of(Path(f"/proc/{child}")) == "Z")
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 17
        reader._give(taken)
        assert read_all(client, file, memory)


def test_lanes_end_before_anything_that_can_fail(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server whose store cannot be closed would serve what was, when another one owns the store."""
    store.mkdir()
    served = ServedHere(store, ServerConfig(idle_s=3600.0, grace_s=0.0, look_s=0.01))
    lanes = served.server._lanes
    assert lanes is not None
    adopted, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lanes.adopt(theirs.detach(), False)

    async def fail() -> None:
        adopted.setblocking(False)
        assert adopted.recv(1) == b"", "the lane is over"
        raise OSError("a disk that does not answer")

    close = served.server._services.close
    monkeypatch.setattr(served.server._services, "close", fail)
    with adopted, pytest.raises(OSError, match="does not answer"):
        served.portal.run(served.server.close())
    served.portal.run(close())
    served.runtime.stop()
    served.ownership.close()


def test_without_threads_for_lanes_a_store_is_shared_all_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise OSError(errno.EAGAIN, "no thread")

    store.mkdir()
    monkeypatch.setattr("emberfs.sharing.lanes.LaneServer", refuse)
    served = ServedHere(store, ServerConfig(idle_s=3600.0, grace_s=0.0, look_s=0.01))
    assert "no lanes" in caplog.text
    with program(GUEST, url_of(store)) as guest:
        assert line_of(guest) == "in"
        guest.communicate("go\n")
    served.close()


@pytest.mark.parametrize("error", [TimeoutError, ValueError, KeyError])
def test_what_a_signals_handler_raises_is_told(client: Client, store: Path, error: type[Exception]) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    memory = client.buffer(len(DATA))

    def ring(*_: Any) -> None:
        raise error("of the handler")

    with shared(client, store), client.open("/file", "rb") as file:
        assert read_all(client, file, memory) and read_all(client, file, memory)
        before = signal.signal(signal.SIGALRM, ring)
        try:
            with stopped(server_of(store)), pytest.raises(error, match="of the handler"):
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                read_all(client, file, memory)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def test_without_memory_for_a_stage_it_is_read_another_way(
    client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    with shared(client, store), client.open("/file", "rb") as file:
        monkeypatch.setattr("emberfs.lane.client.Region", refuse)
        assert file.read_at(0, len(DATA)) == DATA
        assert lane_bytes(client) == 0
