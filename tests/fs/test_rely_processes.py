"""docs/rely.md, on threads, processes and event loops; see test_rely.

Run: pytest tests/fs/test_rely_processes.py
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emberfs
import fsspec
import pytest
from emberfs import Client, StoreClosed

from tests.fs.sharing_run import no_server_left
from tests.fs.stores import CHUNK, content, program, url_of

DATA = content(3 * CHUNK + 100)


@pytest.mark.sentence("T1")
def test_many_threads_on_one_client(client: Client) -> None:
    def work(thread: int) -> None:
        for step in range(15):
            path, data = f"/{thread}-{step % 3}", content(step * 20_011, seed=thread * 100 + step)
            client.put(path, data, chunk_size_bytes=CHUNK)
            assert client.get(path) == data
            with client.open(path, "r+b") as file:
                file.seek(len(data))
                file.write(data)
            buffer = bytearray(2 * len(data))
            client.batch_read([(path, 0, len(buffer))], into=buffer)
            assert buffer == data + data
            client.mkdir("/shared/dir", parents=True, exist_ok=True)
            client.rename(path, f"/shared/dir/{thread}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert len(client.list("/shared/dir")) == 8
    assert client.maintenance.fsck().findings == []


@pytest.mark.sentence("T2")
def test_the_blocking_client_inside_an_event_loop(client: Client, store: Path) -> None:
    async def main() -> None:
        async with emberfs.connect_async(url_of(store)) as other:
            client.put("/file", DATA, chunk_size_bytes=CHUNK)
            writes = [other.put(f"/{number}", DATA) for number in range(5)]
            tasks = [asyncio.create_task(write) for write in writes]
            with client.open("/file", "r+b") as file:
                file.write(b"inside")
                await asyncio.sleep(0)
            assert client.get("/file", 0, 6) == await other.get("/file", 0, 6) == b"inside"
            await asyncio.gather(*tasks)
            assert all(client.get(f"/{number}") == DATA for number in range(5))

    asyncio.run(main())


@pytest.mark.sentence("T3")
def test_several_processes_on_one_store(client: Client, store: Path) -> None:
    client.put("/file", b"x")
    second = "import sys, emberfs\nwith emberfs.connect(sys.argv[1]) as client: client.rename('/file', '/moved')"
    with no_server_left(store):
        with program(second, url_of(store)) as other:
            assert other.wait(60) == 0
        assert client.get("/moved") == b"x" and not client.exists("/file")
        client.close()


def in_a_fork(client: Client, file: Any, answers: Any) -> None:
    """What the child of a fork finds, step by step."""
    try:
        file.write(b"from the child")
    except StoreClosed:
        answers.put(("file", "closed"))
    answers.put(("read", client.get("/file")))
    client.put("/child", b"was here")
    answers.put(("id", client._attachment.core.client()))
    client.close()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 warns of any fork with threads")
@pytest.mark.sentence("T4")
def test_a_forked_child_starts_anew(client: Client, store: Path) -> None:
    client.put("/file", b"parent")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with no_server_left(store):
        with client.open("/held", "ab") as file:
            child = context.Process(target=in_a_fork, args=(client, file, answers))
            child.start()
            assert answers.get(timeout=60) == ("file", "closed")
            assert answers.get(timeout=60) == ("read", b"parent")
            file.write(b"the parent goes on")
        name, child_id = answers.get(timeout=60)
        assert name == "id" and child_id != client._attachment.core.client()
        child.join(60)
        assert child.exitcode == 0
        assert client.get("/child") == b"was here"
        assert client.get("/held") == b"the parent goes on"
        client.close()


@pytest.mark.sentence("T5")
def test_clients_and_file_systems_pickle(store: Path) -> None:
    with emberfs.connect(url_of(store), targets=2, gc_delay_s=7.0) as client:
        client.put("/file", b"x")
        with pickle.loads(pickle.dumps(client)) as again:
            assert (again.url, again._attachment.config) == (client.url, client._attachment.config)
            assert again.get("/file") == b"x"
        fs = fsspec.filesystem("ember", url=url_of(store), trash=False, skip_instance_cache=True)
        copy = pickle.loads(pickle.dumps(fs))
        assert copy.cat("/file") == b"x" and copy.storage_options == fs.storage_options
        for file_system in (fs, copy):
            file_system.close()

    async def main() -> None:
        async with emberfs.connect_async(url_of(store)) as awaited, pickle.loads(pickle.dumps(awaited)) as again:
            assert await again.get("/file") == b"x"

    asyncio.run(main())


def test_fsck_right_after_a_kill_finds_nothing(tmp_path: Path) -> None:
    """A put that was cut off leaves chunks of an inode that never came to be; fsck sweeps them first."""
    store = tmp_path / "store"
    program = (
        "import emberfs, os\n"
        f"client = emberfs.connect('ember://{store}')\n"
        "core, portal = client._attachment.core, client._attachment.store.portal\n"
        "from emberfs.client.core import NewFile\n"
        "for _ in range(20):\n"
        "    reserved, owner = portal.run(core.reserve(NewFile()))\n"
        "    portal.run(core.write_reserved(reserved, 0, memoryview(bytes(100_000)), owner))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    with emberfs.connect(f"ember://{store}") as client:
        assert client.maintenance.fsck().clean
        assert client.space()["used_bytes"] == 0
