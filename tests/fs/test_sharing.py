"""An embedded store that several processes use: the first one owns it until a second one comes.

Run: pytest tests/fs/test_sharing.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs import Client, StoreBusy, embedded
from emberfs.errors import SessionExpired
from emberfs.messages import Attach, Detach, Message, ReadChunks, WriteChunks
from emberfs.sharing.ownership import Mode, Ownership
from emberfs.sharing.server import ServerConfig
from emberfs.types import chunk_id

from tests.fs.sharing_run import ServedHere, is_free, no_server_left, owner_of, server_of, until
from tests.fs.stores import CHUNK, content, line_of, program, url_of

DATA = content(3 * CHUNK + 100)


@pytest.fixture(autouse=True)
def _ends(store: Path) -> Iterator[None]:
    with no_server_left(store):
        yield


def owns(client: Client) -> bool:
    """Whether calls of this client end in services of this process."""
    return client._attachment.store.services is not None  # type: ignore[attr-defined]


GUEST = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
print(client.get("/of-the-owner").decode(), flush=True)
client.put("/of-the-guest", b"guest")
print("done", flush=True)
sys.stdin.readline()
client.close()
"""


LOOKER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.sentence("T3")
def test_a_second_process_attaches_and_both_see_what_the_other_does(client: Client, store: Path) -> None:
    client.put("/of-the-owner", b"owner")
    assert owns(client)
    with program(GUEST, url_of(store)) as guest:
        assert [line_of(guest), line_of(guest)] == ["owner", "done"]
        assert not owns(client) and server_of(store) not in (os.getpid(), guest.pid)
        assert client.get("/of-the-guest") == b"guest"
        with program(GUEST, url_of(store)) as third:
            assert [line_of(third), line_of(third)] == ["owner", "done"]
        guest.communicate("go\n")
        assert guest.returncode == 0
    client.put("/later", DATA)
    assert client.get("/later") == DATA
    assert client.maintenance.fsck().findings == []


def test_what_the_owner_has_open_goes_on_through_the_move(client: Client, store: Path) -> None:
    client.put("/of-the-owner", b"owner")
    client.put("/old", DATA, chunk_size_bytes=CHUNK)
    reading = client.open("/old", "rb")
    assert reading.read(10) == DATA[:10]
    appending = client.open("/log", "ab", chunk_size_bytes=CHUNK)
    appending.write(DATA)
    appending.flush()  # Its length is known to the service's memory only.
    fresh = client.open("/fresh", "wb", chunk_size_bytes=CHUNK)
    fresh.write(DATA)  # Chunks of an inode that no name leads to.
    small = client.open("/small", "ab", chunk_size_bytes=CHUNK)
    small.write(b"in its row")
    small.flush()
    with program(GUEST, url_of(store)) as guest:
        assert [line_of(guest), line_of(guest)] == ["owner", "done"]
        assert not owns(client)
        assert client.stat("/log").length == len(DATA)
        assert reading.read() == DATA[10:]
        for file in (appending, fresh, small):
            file.write(DATA)
            file.close()
        with pytest.raises(emberfs.Conflict), client.open("/log", "ab"):
            client.open("/log", "ab")
    assert client.get("/log") == client.get("/fresh") == DATA + DATA
    assert client.get("/small") == b"in its row" + DATA
    reading.close()
    assert client.maintenance.fsck().findings == []


def test_calls_that_come_during_the_move_wait_for_its_end(client: Client, store: Path) -> None:
    client.put("/of-the-owner", b"owner")
    is_over = threading.Event()
    failures: list[Exception] = []

    def work(number: int) -> None:
        step = 0
        try:
            while not is_over.is_set() or step < 5:
                step += 1
                client.put(f"/{number}", content(step % 7 * 30_000, seed=step), chunk_size_bytes=CHUNK)
                assert client.get(f"/{number}") == content(step % 7 * 30_000, seed=step)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    with program(GUEST, url_of(store)) as guest:
        assert [line_of(guest), line_of(guest)] == ["owner", "done"]
        is_over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert client.maintenance.fsck().findings == []


def use_as_a_child(url: str, number: int) -> None:
    """Read what the parent has written, and write."""
    with emberfs.connect(url) as mine:
        assert mine.get("/of-the-owner") == DATA
        mine.put(f"/child-{number}", DATA)
        with mine.open(f"/log-{number}", "ab") as log:
            log.write(b"line\n")


FORKING = """
import multiprocessing, sys, emberfs

def use(client, number):
    with client as mine:
        assert mine.get("/of-the-owner") == b"owner"
        mine.put(f"/child-{number}", b"child")
        with mine.open(f"/log-{number}", "ab") as log:
            log.write(b"line\\n")

with emberfs.connect(sys.argv[1]) as client:
    client.put("/of-the-owner", b"owner")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=use, args=(client, number)) for number in range(4)]
    for child in children: child.start()
    for child in children: child.join(60)
    print(*[child.exitcode for child in children])
    for number in range(4):
        assert client.get(f"/child-{number}") == b"child"
        assert client.get(f"/log-{number}") == b"line\\n"
    print(client.maintenance.fsck().findings)
    for child in children: child.kill()
"""


@pytest.mark.sentence("T4")
def test_forked_children_attach(store: Path) -> None:
    """In a program of its own: this one's threads are not to be forked."""
    with program(FORKING, url_of(store)) as parent:
        assert [line_of(parent), line_of(parent)] == ["0 0 0 0", "[]"]


STARTING = """
import os, subprocess, sys, threading
from pathlib import Path
from emberfs.sharing import starting
from emberfs.sharing.ownership import Ownership

is_starting, has_forked = threading.Event(), threading.Event()

class SlowPopen(subprocess.Popen):
    def _execute_child(self, *arguments):
        is_starting.set()
        was_too_early.append(has_forked.wait(0.2))
        super()._execute_child(*arguments)

def fork():
    is_starting.wait()
    if not os.fork():
        sys.stdin.read()
        os._exit(0)
    has_forked.set()

was_too_early = []
subprocess.Popen = SlowPopen
threading.Thread(target=fork).start()
ownership = Ownership.take(Path(sys.argv[1]))
server = starting.NewServer(ownership)
has_forked.wait()
print(*was_too_early, flush=True)
ownership.close()
server.close()
print("closed", flush=True)
"""


def test_a_child_that_is_forked_while_a_server_starts_has_nothing_of_it(store: Path) -> None:
    """Else the server would not see that it is not wanted, and the lock would be held as long as the child is there."""
    store.mkdir()
    with program(STARTING, store) as parent:
        assert [line_of(parent), line_of(parent)] == ["False", "closed"]
        until(lambda: is_free(store))


def test_spawned_children_attach(client: Client, store: Path) -> None:
    client.put("/of-the-owner", DATA)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=use_as_a_child, args=(url_of(store), number)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 4
    for number in range(4):
        assert client.get(f"/child-{number}") == DATA
        assert client.get(f"/log-{number}") == b"line\n"
    assert client.maintenance.fsck().findings == []


def test_upkeep_is_done_by_the_owner(client: Client, store: Path) -> None:
    client.put("/of-the-owner", DATA)
    mine = (client.maintenance.info(), client.maintenance.scrub(), client.space()["used_bytes"])
    lines: list[str] = []
    client.maintenance.dump(lines.append)
    with program(LOOKER, url_of(store)) as guest:
        assert line_of(guest) == "done"
        assert not owns(client)
        seen: list[tuple[int, int]] = []
        theirs = client.maintenance.info()
        scrubbed = client.maintenance.scrub(progress=lambda *done: seen.append(done))
        assert (theirs["store"], theirs["targets"][0]["blocks"]) == (mine[0]["store"], mine[0]["targets"][0]["blocks"])
        assert scrubbed == mine[1] and seen[-1] == (scrubbed.chunks, scrubbed.read_bytes)
        assert client.space()["used_bytes"] == mine[2]
        theirs_lines: list[str] = []
        client.maintenance.dump(theirs_lines.append)
        assert theirs_lines[1:] == lines[1:]
        assert not list(store.glob("dump-*"))
        client.remove("/of-the-owner", trash=False)
        assert client.collect_garbage(force=True).chunks > 0
        assert client.maintenance.trim() >= 0
        assert client.space()["used_bytes"] == 0


def test_a_directory_with_a_name_too_long_for_a_socket(tmp_path: Path) -> None:
    store = tmp_path / ("long-" * 40) / "store"
    with no_server_left(store), emberfs.connect(url_of(store)) as client:
        client.put("/of-the-owner", b"owner")
        with program(GUEST, url_of(store)) as guest:
            assert [line_of(guest), line_of(guest)] == ["owner", "done"]
            assert client.get("/of-the-guest") == b"guest"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "older"),
        ({"mode": "inline", "is_reachable": False}, "no socket"),
    ],
)
def test_an_owner_that_cannot_share(store: Path, said: dict[str, Any], why: str) -> None:
    emberfs.connect(url_of(store)).close()
    ownership = Ownership.take(store)
    assert ownership is not None
    os.pwrite(ownership.file, json.dumps({"pid": 4711, **said}).encode(), 0)
    with pytest.raises(StoreBusy, match=f"process 4711 owns this store.*{why}") as caught:
        emberfs.connect(url_of(store))
    assert caught.value.pid == 4711
    ownership.close()


# ---- the server, in this process

HOLDER = """
import os, sys, emberfs
client = emberfs.connect(sys.argv[1])
file = client.open("/log", "ab")
file.write(b"flushed"); file.flush(); file.write(b" and not")
print("open", flush=True)
if sys.stdin.readline(): file.close()
"""


def test_a_server_without_clients_leaves_a_store_that_one_process_may_own(store: Path) -> None:
    store.mkdir()
    served = ServedHere(store, ServerConfig(idle_s=0.0, grace_s=0.5, look_s=0.01))
    with program(LOOKER + 'client.put("/of-the-guest", b"guest"); client.close()', url_of(store)) as guest:
        assert line_of(guest) == "done"
        assert owner_of(store).mode is Mode.SERVER
        guest.communicate("go\n")
    assert served.is_idle.wait(60)
    served.close()
    assert is_free(store) and (store / "owner.lock").read_bytes() == b""
    with emberfs.connect(url_of(store)) as client:
        assert owns(client)
        assert client.get("/of-the-guest") == b"guest"
        assert client.maintenance.fsck().findings == []


def test_a_server_whose_socket_is_gone_is_not_waited_for_without_end(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mkdir()
    served = ServedHere(store, ServerConfig(idle_s=3600.0, grace_s=0.5, look_s=0.01))
    os.unlink(store / "owner.sock")
    monkeypatch.setattr(embedded, "WAIT_S", 0.1)
    with pytest.raises(StoreBusy, match="cannot be reached") as caught:
        emberfs.connect(url_of(store))
    assert caught.value.pid == os.getpid()
    served.close()
    assert is_free(store)


def test_the_next_server_waits_for_the_clients_of_the_one_before(store: Path) -> None:
    store.mkdir()
    config = ServerConfig(idle_s=3600.0, grace_s=3600.0, look_s=0.01)
    before = ServedHere(store, config)
    with program(HOLDER, url_of(store)) as holder:
        assert line_of(holder) == "open"
        os.kill(holder.pid, signal.SIGSTOP)
        (client,) = before.server._sessions.live
        before.close()
        served = ServedHere(store, config)
        assert served.server._sessions.live == [client]
        with program(LOOKER, url_of(store)) as looker, program(LOOKER, url_of(store)) as another:
            assert line_of(looker) == line_of(another) == "done"
            os.kill(holder.pid, signal.SIGCONT)
            holder.communicate("go\n")  # It writes what it held back, and closes.
            assert holder.returncode == 0
    served.close()
    with no_server_left(store), emberfs.connect(url_of(store)) as owner:
        assert owner.get("/log") == b"flushed and not"


def test_a_client_that_was_given_up_is_not_let_in_again(store: Path) -> None:
    """What it did is forgotten: it would be done again."""
    store.mkdir()
    config = ServerConfig(idle_s=3600.0, grace_s=3600.0)
    served = ServedHere(store, config)
    gone, other = b"g" * 16, b"o" * 16
    chunk = chunk_id(99, 0)

    def call(request: Message, *buffers: memoryview) -> None:
        served.portal.run(_answer(served.server.handle(request, buffers)))

    def write(client: bytes, data: bytes) -> None:
        call(WriteChunks(client, 0, 1, [1], [chunk], [0], CHUNK), memoryview(data))

    for client, data in ((gone, b"lost"), (other, b"last")):
        call(Attach(client, False, "one of the test's"))
        write(client, data)
    call(Detach(gone))
    for _ in range(2):
        with pytest.raises(SessionExpired):
            call(Attach(gone, True, "one of the test's"))
        with pytest.raises(SessionExpired):
            write(gone, b"lost")
        found = bytearray(4)
        call(ReadChunks([1], [chunk], [0]), memoryview(found))
        assert found == b"last"
        served.close()
        served = ServedHere(store, config)  # The next server does not know it either.
    served.close()


async def _answer(answer: Awaitable[Message]) -> Message:
    return await answer


def test_what_a_dead_client_had_open_is_closed(store: Path) -> None:
    store.mkdir()
    served = ServedHere(store, ServerConfig(idle_s=3600.0, grace_s=0.5, look_s=0.01))
    with program(HOLDER, url_of(store)) as holder, program(HOLDER, url_of(store)) as second:
        lines = {line_of(holder), line_of(second)}
        assert lines == {"open", ""}  # One of them was refused: it appends already.
        for each in (holder, second):
            each.kill()
    with program(HOLDER.replace("file = ", RETRY), url_of(store)) as third:
        assert line_of(third) == "open"
        third.kill()
    until(lambda: not served.server._sessions.live)
    served.close()
    with emberfs.connect(url_of(store)) as client:
        assert client.get("/log") == b"flushedflushed"
        assert client.maintenance.fsck().findings == []


RETRY = """
def again():
    while True:
        try:
            return client.open("/log", "ab")
        except emberfs.Conflict:
            pass
again().close()
file = """
