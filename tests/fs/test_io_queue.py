"""Reads and writes that are begun now and waited for later.

Run: pytest tests/fs/test_io_queue.py
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs import Client
from emberfs.client.io_queue import TOGETHER_BYTES_MAX, Completion
from emberfs.errors import Corruption, EmberError, IsADirectory, LimitExceeded, NotFound, StoreClosed
from emberfs.messages import Message, ReadChunks
from emberfs.transport import MemoryConnection

from tests.fs.sharing_run import until
from tests.fs.stores import CHUNK, content, flip_byte, url_of

DATA = content(4 * CHUNK + 1000)


@pytest.fixture(autouse=True)
def files(client: Client) -> None:
    client.put("/small", b"0123456789")
    client.put("/large", DATA, chunk_size_bytes=CHUNK)
    client.mkdir("/dir")


class Slow:
    """The storage service, of which reads wait for the gate: a disk that takes its time."""

    def __init__(self, client: Client) -> None:
        store: Any = client._attachment.store
        core: Any = client._attachment.core
        self._portal = store.portal
        self._runtime = store.runtime
        self._service = next(iter(core._chains.values()))
        self._gate = self._runtime.future()
        self.requests: list[ReadChunks] = []
        connection = MemoryConnection(self)
        core._chains = dict.fromkeys(core._chains, connection)
        core._only = connection

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if isinstance(request, ReadChunks):
            self.requests.append(request)
            while not self._gate.done():
                await self._runtime.sleep(1e-3)
        reply: Message = await self._service.call(request, buffers)
        return reply

    def open(self) -> None:
        async def work() -> None:
            self._gate.set_result(None)

        self._portal.run(work())


@pytest.fixture
def slow(client: Client) -> Iterator[Slow]:
    slow = Slow(client)
    yield slow
    if not slow._gate.done():
        slow.open()


def test_reads_of_paths_and_files_land_in_their_buffers(client: Client) -> None:
    sizes = [1, 4096, TOGETHER_BYTES_MAX, TOGETHER_BYTES_MAX + 1, 3 * CHUNK]
    with client.io_queue() as queue, client.open("/large") as file:
        wanted = {}
        for size in sizes:
            for name in ("/large", file):
                buffer = bytearray(size)
                wanted[queue.submit_read(name, 77, buffer)] = buffer
        completions = queue.wait(n=queue.open)
        assert {each.token for each in completions} == set(wanted)
        for token, nbytes, error in completions:
            assert error is None
            assert bytes(wanted[token]) == DATA[77 : 77 + nbytes]
            assert nbytes == len(wanted[token])
        assert queue.wait(n=0) == []


def test_the_end_of_a_file_cuts_a_read(client: Client) -> None:
    with client.io_queue() as queue:
        buffer = bytearray(100)
        token = queue.submit_read("/small", 4, buffer)
        assert queue.wait() == [Completion(token, 6, None)]
        assert buffer[:6] == b"456789"


def test_writes_are_there_when_they_complete(client: Client) -> None:
    with client.io_queue() as queue:
        tokens = [queue.submit_write("/new", at * 5000, content(5000, at)) for at in range(10)]
        with client.open("/small", "r+b") as file:
            tokens.append(queue.submit_write(file, 3, b"abc"))
            assert sorted(queue.wait(n=11)) == [(token, 3 if token == tokens[-1] else 5000, None) for token in tokens]
    assert client.get("/new") == b"".join(content(5000, at) for at in range(10))
    assert client.get("/small") == b"012abc6789"


def test_what_a_file_has_buffered_is_read(client: Client) -> None:
    with client.io_queue() as queue, client.open("/small", "r+b") as file:
        file.write(b"new")
        buffer = bytearray(10)
        queue.submit_read(file, 0, buffer)
        queue.wait()
        assert buffer == b"new3456789"


def test_what_goes_wrong_is_told_of_each(client: Client) -> None:
    with client.io_queue() as queue:
        tokens = [queue.submit_read(path, 0, bytearray(10)) for path in ("/none", "/small", "/dir")]
        tokens.append(queue.submit_write("/dir", 0, b"x"))
        ended = {each.token: each for each in queue.wait(n=4)}
        assert [type(ended[token].error) for token in tokens] == [NotFound, type(None), IsADirectory, IsADirectory]
        assert [ended[token].nbytes for token in tokens] == [0, 10, 0, 0]


def test_damage_is_told_of_the_read_that_met_it(tmp_path: Path) -> None:
    url = url_of(tmp_path / "damaged")
    with emberfs.connect(url) as client:
        client.put("/large", DATA, chunk_size_bytes=CHUNK)
    flip_byte(tmp_path / "damaged", DATA, CHUNK + 100)
    with emberfs.connect(url) as client, client.io_queue() as queue:
        tokens = [queue.submit_read("/large", at * CHUNK, bytearray(4096)) for at in range(3)]
        ended = {each.token: each for each in queue.wait(n=3)}
        assert [type(ended[token].error) for token in tokens] == [type(None), Corruption, type(None)]


def test_reads_go_on_while_nobody_waits(client: Client, slow: Slow) -> None:
    with client.io_queue() as queue:
        tokens = [queue.submit_read("/large", 4096 * at, bytearray(4096)) for at in range(16)]
        assert queue.wait(timeout_s=0.0) == []
        slow.open()
        assert sorted(each.token for each in queue.wait(n=16)) == tokens


def test_small_reads_go_together(client: Client, slow: Slow) -> None:
    with client.io_queue(depth=32) as queue:
        for at in range(16):
            queue.submit_read("/large", 4096 * at, bytearray(4096))
        assert queue.wait(timeout_s=0.0) == []
        while len(slow.requests) < 2:
            assert queue.wait(timeout_s=1e-3) == []
        assert [len(request.chunks) for request in slow.requests] == [1, 15]
        large = queue.submit_read("/large", 0, bytearray(TOGETHER_BYTES_MAX + 1))
        for _ in range(4):
            queue.submit_read("/small", 0, bytearray(4))
        slow.open()
        ended = queue.wait(n=21)
        assert len(ended) == 21
        assert large in {each.token for each in ended}


def test_no_more_than_the_depth_is_open(client: Client, slow: Slow) -> None:
    with client.io_queue(depth=3) as queue:
        for _ in range(3):
            queue.submit_read("/large", 0, bytearray(10))
        with pytest.raises(LimitExceeded, match="wait for some"):
            queue.submit_read("/large", 0, bytearray(10))
        with pytest.raises(LimitExceeded, match="4 completions of 3"):
            queue.wait(n=4)
        slow.open()
        assert len(queue.wait(n=3)) == 3
        queue.submit_read("/large", 0, bytearray(10))
    for depth in (0, 4097):
        with pytest.raises(LimitExceeded):
            client.io_queue(depth)


def test_close_waits_for_what_is_under_way(client: Client, slow: Slow) -> None:
    queue = client.io_queue()
    buffers = [bytearray(4096) for _ in range(5)]
    for buffer in buffers:
        queue.submit_read("/large", 0, buffer)
    closing = threading.Thread(target=queue.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    slow.open()
    closing.join()
    assert all(buffer == DATA[:4096] for buffer in buffers)
    for call in (queue.wait, lambda: queue.submit_read("/large", 0, bytearray(1))):
        with pytest.raises(StoreClosed):
            call()
    queue.close()


def test_buffers_are_kept_until_they_are_filled_and_no_longer(client: Client, slow: Slow) -> None:
    class Memory(bytearray):
        pass

    with client.io_queue() as queue:
        memory = Memory(4096)
        watch = weakref.ref(memory)
        queue.submit_read("/large", 0, memory)
        del memory
        gc.collect()
        assert watch() is not None
        slow.open()
        queue.wait()

        def is_let_go() -> bool:
            gc.collect()
            return watch() is None

        until(is_let_go)  # The loop's thread may not have returned from telling us.


def test_several_threads_share_a_queue(client: Client) -> None:
    found: list[Completion] = []
    lock = threading.Lock()

    def work() -> None:
        for at in range(50):
            queue.submit_read("/large", at * 100, bytearray(100))
            ended = queue.wait(n=0)
            with lock:
                found.extend(ended)

    with client.io_queue(depth=400) as queue:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found += queue.wait(n=queue.open)
        assert sorted(each.token for each in found) == list(range(1, 401))
        assert all((each.nbytes, each.error) == (100, None) for each in found)


def test_a_client_that_closes_lets_them_end(client: Client) -> None:
    queue = client.io_queue()
    buffer = bytearray(4096)
    token = queue.submit_read("/large", 0, buffer)
    client.close()
    assert queue.wait() == [Completion(token, 4096, None)]
    assert buffer == DATA[:4096]
    token = queue.submit_read("/large", 0, buffer)
    (completion,) = queue.wait()
    assert isinstance(completion.error, StoreClosed)
    queue.close()


def test_a_forked_child_has_none_and_the_parent_goes_on(client: Client, slow: Slow) -> None:
    queue = client.io_queue()
    token = queue.submit_read("/large", 0, bytearray(10))
    child = os.fork()
    if not child:
        code = 1
        try:
            try:
                queue.wait()
            except StoreClosed:
                queue.close()
                with client.io_queue() as own:
                    own.submit_read("/small", 0, bytearray(10))
                    code = 0 if own.wait()[0].error is None else 2
        except EmberError:
            code = 3
        finally:
            os._exit(code)
    slow.open()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert queue.wait() == [Completion(token, 10, None)]
    queue.close()
