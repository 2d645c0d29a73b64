"""A shared store when its owner dies, or is stopped: nothing acknowledged is lost, nothing happens twice, nobody hangs.

Run: pytest tests/fs/test_sharing_faults.py
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emberfs
import pytest
from emberfs import Client, UpdateUnknown
from emberfs.errors import DeadlineExceeded, SessionExpired, Unavailable
from emberfs.messages import Attach, Attached, Attend, Done, Message, WriteChunks
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.sharing.attached import AttachedConnection
from emberfs.sharing.ownership import Mode, Ownership
from emberfs.types import chunk_id

from tests.fs.sharing_run import no_server_left, server_of, stopped, until
from tests.fs.stores import CHUNK, content, line_of, program, url_of

DATA = content(3 * CHUNK + 100)
WRITES = 60

GUEST = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
client.put("/of-the-guest", b"guest")
client.close()
"""

OWNER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
log = client.open("/log", "ab", chunk_size_bytes=65536)
print("open", flush=True)
for number, line in enumerate(sys.stdin):
    log.write(line.encode()); log.flush()
    client.put(f"/{number}", line.encode())
    print("wrote", flush=True)
log.close()
"""


@pytest.fixture(autouse=True)
def _ends(store: Path) -> Iterator[None]:
    with no_server_left(store):
        yield


def share(client: Client, store: Path) -> None:
    """See to it that the store is served by a server."""
    with program(GUEST, url_of(store)) as guest:
        assert line_of(guest) == "open"
        guest.communicate("go\n")


@pytest.mark.sentence("T6")
def test_killed_servers_lose_nothing_and_do_nothing_twice(client: Client, store: Path) -> None:
    share(client, store)
    lines = [content(1 + step * 997 % 9000, seed=step) for step in range(WRITES)]
    written = threading.Event()
    killed = []

    def kill() -> None:
        for _ in range(3):
            written.wait()
            written.clear()
            killed.append(server_of(store))
            os.kill(killed[-1], signal.SIGKILL)
            # The next one serves, in its own time.
            until(lambda: server_of_or_none(store) not in (None, killed[-1]))

    killer = threading.Thread(target=kill)
    killer.start()
    with client.open("/log", "ab", chunk_size_bytes=CHUNK) as log:
        step = 0
        while killer.is_alive() or step < WRITES:
            line = lines[step % WRITES]
            log.write(line)
            log.flush()
            client.put(f"/put-{step % 7}", line, overwrite=True)
            client.mkdir(f"/made-{step}")  # Done twice it would raise AlreadyExists.
            if step % 10 == 5:
                written.set()
            step += 1
    killer.join()
    assert len(set(killed)) == 3
    assert client.get("/log") == b"".join(lines[number % WRITES] for number in range(step))
    for number in range(max(step - 7, 0), step):
        assert client.get(f"/put-{number % 7}") == lines[number % WRITES]
    assert client.maintenance.fsck().findings == []


def server_of_or_none(store: Path) -> int | None:
    try:
        return server_of(store)
    except AssertionError:
        return None


@pytest.mark.sentence("T7")
def test_an_owner_that_is_stopped_is_named_and_may_go_on(store: Path) -> None:
    with program(OWNER, url_of(store)) as owner:
        assert line_of(owner) == "open"
        assert owner.stdin is not None
        unanswered = pytest.raises(DeadlineExceeded, match=f"process {owner.pid} owns this store and does not answer")
        with stopped(owner.pid), unanswered:
            emberfs.connect(url_of(store))
        owner.stdin.write("awake\n")
        owner.stdin.flush()
        assert line_of(owner) == "wrote"
        with emberfs.connect(url_of(store)) as client:
            assert client.get("/log") == client.get("/0") == b"awake\n"
            owner.stdin.write("moved\n")
            owner.stdin.flush()
            assert line_of(owner) == "wrote"
            assert client.get("/log") == b"awake\nmoved\n"
            owner.communicate()
            assert owner.returncode == 0
            assert client.maintenance.fsck().findings == []


@pytest.mark.sentence("T7")
def test_nobody_takes_over_from_an_owner_that_is_stopped_before_it_is_dead(store: Path) -> None:
    """The fence: as long as an owner could wake up and write, nobody else gets to write."""
    with program(OWNER, url_of(store)) as owner:
        assert line_of(owner) == "open"
        assert owner.stdin is not None
        owner.stdin.write("first\n")
        owner.stdin.flush()
        assert line_of(owner) == "wrote"
        os.kill(owner.pid, signal.SIGSTOP)
        owner.stdin.write("of one that is dead before it wakes up\n")
        owner.stdin.flush()
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                emberfs.connect(url_of(store))
        owner.kill()
        with emberfs.connect(url_of(store)) as client:
            owner.wait()
            assert client.get("/log") == client.get("/0") == b"first\n"
            assert not client.exists("/1")
            assert client.maintenance.fsck().findings == []


@pytest.mark.sentence("T7")
def test_a_server_that_is_stopped_is_named_and_may_go_on(client: Client, store: Path) -> None:
    client.put("/file", DATA)
    share(client, store)
    server = server_of(store)
    with client.open("/file", "r+b") as file:
        with stopped(server):
            with pytest.raises(UpdateUnknown, match=f"process {server} serves this store and does not answer"):
                file.write(DATA[::-1])
                file.flush()
            with ThreadPoolExecutor() as pool, program(TRY, url_of(store)) as guest:
                reading, writing = pool.submit(client.get, "/file"), pool.submit(client.put, "/other", b"x")
                with pytest.raises(DeadlineExceeded, match=f"process {server} "):
                    reading.result()
                with pytest.raises(Unavailable, match=f"process {server} "):
                    writing.result()
                assert line_of(guest).startswith(f"process {server} serves this store and does not answer")
        until(lambda: is_reached(client))
        file.seek(0)
        file.write(DATA)
    assert client.get("/file") == DATA
    assert server_of(store) == server
    assert client.maintenance.fsck().findings == []


TRY = "import sys, emberfs\ntry: emberfs.connect(sys.argv[1])\nexcept emberfs.errors.DeadlineExceeded as e: print(e)"


def is_reached(client: Client) -> bool:
    try:
        return client.exists("/file")
    except DeadlineExceeded:
        return False


def test_a_server_dies_while_nobody_calls(client: Client, store: Path) -> None:
    client.put("/file", DATA)
    share(client, store)
    server = server_of(store)
    os.kill(server, signal.SIGKILL)
    assert client.get("/file") == DATA
    assert server_of(store) != server


def test_ctrl_c_in_a_guest_leaves_the_others_alone(client: Client, store: Path) -> None:
    """The guest's process group, the server that it started apart: see `NewServer`."""
    with program(GUEST, url_of(store)) as guest:
        assert line_of(guest) == "open"
        server = server_of(store)
        assert os.getsid(server) != os.getsid(0) and os.getpgid(server) != os.getpgid(guest.pid)
        guest.send_signal(signal.SIGINT)
        guest.wait()
    client.put("/file", DATA)
    assert client.get("/file") == DATA
    assert server_of(store) == server


class Forgetful:
    """A server that has given everybody up that was there before."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        self.runtime = runtime
        self.names: list[tuple[bytes, int, int]] = []

    async def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if isinstance(request, Attach):
            if request.again:
                raise SessionExpired("given up")
            return Attached(os.getpid(), "{}")
        if isinstance(request, Attend):
            await self.runtime.future()
        if isinstance(request, WriteChunks):
            self.names.append((request.client, request.channel, request.sequence))
        return Done()


def test_an_update_that_waits_for_the_next_client_shares_its_name_with_none_of_that_one(store: Path) -> None:
    """Two updates of one name: the second is taken for the first, and acknowledged without being done."""
    store.mkdir()
    ownership = Ownership.take(store)
    assert ownership is not None
    ownership.declare(Mode.SERVER, is_reachable=True)
    runtime = AsyncioRuntime()
    server = Forgetful(runtime)

    async def work() -> None:
        connection = AttachedConnection(runtime, store, "{}", client=bytes(range(16)))
        connection._connection = server  # type: ignore[assignment]

        async def write() -> None:
            await connection.handle(WriteChunks(b"", 0, 0, [1], [chunk_id(1, 0)], [0], CHUNK), [memoryview(b"x")])

        await runtime.sleep(0)  # Goes on in the loop's thread.
        waiting = runtime.spawn(write(), "waits until we are attached")
        await runtime.sleep(0)
        connection.start()
        await waiting
        for _ in range(3):
            await write()
        await connection.close()

    Portal(runtime).run(work())
    runtime.stop()
    ownership.clear()
    ownership.close()
    assert len(set(server.names)) == len(server.names) == 4
