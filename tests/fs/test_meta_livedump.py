"""The backup of a namespace in use: whole in itself, and nothing that was there all the time is missing."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from typing import Any, BinaryIO, cast

import pytest
from emberfs.cluster.rows import ClusterRows
from emberfs.errors import EmberError
from emberfs.kv.memory import MemoryKV
from emberfs.messages import (
    CommitPut,
    Link,
    Mkdir,
    ReadRows,
    Remove,
    Rename,
    ReportLength,
    SetXattr,
    TrashRestore,
)
from emberfs.meta import reading, scan
from emberfs.meta.check import check
from emberfs.meta.dump import dump, load
from emberfs.meta.keys import decode_inode, entry_key, pack_id, unpack_id
from emberfs.meta.livedump import dump_live
from emberfs.types import ROOT_INODE
from emberfs.waiting import finish

from tests.fs.meta_cluster import Client, Cluster, open_file, simulate
from tests.fs.test_meta_dump import Meta, fill


def put(path: str, data: bytes) -> CommitPut:
    return CommitPut(path, 0, None, data, len(data), 0o644, True)


def mkdir(path: str) -> Mkdir:
    return Mkdir(path, 0o755, False, False)


def spool() -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile())


class Distant:
    """The way to a metadata server, on which each message takes its time."""

    def __init__(self, cluster: Cluster, delay_s: float) -> None:
        self.cluster, self.delay_s = cluster, delay_s

    async def call(self, request: Any, buffers: Any = ()) -> Any:
        await self.cluster.runtime.sleep(self.delay_s)
        return await self.cluster.servers[0].handle(request)


async def dumped(cluster: Cluster, *, delay_s: float = 0.01) -> list[str]:
    lines: list[str] = []
    rows = ClusterRows(Distant(cluster, delay_s), cluster.runtime)
    await dump_live(rows, lines.append, open_spool=spool, now_ns=cluster.runtime.wall_ns())
    return lines


async def loaded(cluster: Cluster, lines: list[str]) -> MemoryKV:
    """What a load makes of it; fsck is silent."""
    kv = MemoryKV(cluster.runtime)
    await load(kv, lines)
    assert await check(kv) == []
    return kv


def paths(kv: MemoryKV) -> dict[str, int]:
    """Every path with its inode."""
    rows = kv.snapshot()
    below: dict[int, dict[str, int]] = {}
    for key, row in rows.items():
        if key[:1] == b"D":
            below.setdefault(unpack_id(key, 1), {})[key[9:].decode()] = unpack_id(row)
    found: dict[str, int] = {}
    left = [("", 1), ("(trash)", 2)]
    while left:
        path, inode = left.pop()
        found[path] = inode
        left += [(f"{path}/{name}", child) for name, child in below.get(inode, {}).items()]
    return found


def test_at_rest_it_is_the_dump_of_a_store_at_rest() -> None:
    meta = Meta()
    fill(meta)
    calm: list[str] = []
    live: list[str] = []
    meta.run(dump(meta.kv, calm.append))
    meta.run(dump_live(meta.kv, live.append, open_spool=spool, now_ns=meta.runtime.wall_ns()))
    assert live[0] == calm[0]
    assert sorted(live) == sorted(calm)
    meta.close()


async def play(client: Client, rng: random.Random, over: asyncio.Future[None], *, pause_s: float = 0.05) -> None:
    """Rename, replace, remove and make things, in /busy; /calm/N is renamed, and never gone."""
    number = 0
    while not over.done():
        number += 1
        a, b = f"/busy/{rng.randrange(12)}", f"/busy/{rng.randrange(12)}"
        calm = rng.randrange(10)
        old = [f"/calm/{calm}", f"/aside/{calm}"]
        request = rng.choice(
            [
                Rename(*(old if rng.random() < 0.5 else old[::-1]), True),
                Rename(a, b, True),
                Rename(f"/tree/{calm}", f"/busy/{calm}/in", True),
                Rename(f"/busy/{calm}/in", f"/tree/{calm}", True),
                put(a, b"new" * (number % 99)),
                Remove(a, True, rng.random() < 0.5, "any"),
                mkdir(a),
                Link(old[0], f"{a}/link"),
            ]
        )
        try:
            await client(number % 2, request)
        except (EmberError, OSError):
            pass
        await client.cluster.runtime.sleep(rng.random() * pause_s)


@pytest.mark.parametrize("seed", range(12))
def test_in_use_it_is_whole_and_what_was_there_is_in_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE_ROWS", 5)
    monkeypatch.setattr(scan, "PAGE_ROWS", 5)

    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        for directory in ("/calm", "/aside", "/busy", "/tree"):
            await client(0, mkdir(directory))
        for number in range(10):
            await client(0, put(f"/calm/{number}", b"calm"))
            await client(0, mkdir(f"/tree/{number}"))
            await client(0, put(f"/tree/{number}/leaf", b"leaf"))
        kept = {inode for path, inode in paths(cluster.kv).items() if path[:5] in ("/calm", "/tree")}
        rng = random.Random(seed)
        over = cluster.runtime.future()
        playing = [cluster.runtime.spawn(play(client, rng, over), "play") for _ in range(2)]
        for _ in range(3):
            lines = await dumped(cluster)
            copy = paths(await loaded(cluster, lines))
            missing = kept - set(copy.values())
            # A tree may have been removed together with what was put under it.
            assert missing <= kept - set(paths(cluster.kv).values())
        finish(over)
        for task in playing:
            await task

    simulate(main, seed)


def test_lengths_of_open_files_and_what_waits_for_collection_are_in_it() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        inode = await client.put(0, "/grows", 1000)
        await client(0, SetXattr("/grows", "user.a", b"b"))
        opened = await client(0, open_file("/grows"))
        await client(0, ReportLength(opened.session, inode.id, 5000, inode.truncate_generation, True))
        await client.put(0, "/gone", 100)
        await client(0, Remove("/gone", False, False, "any"))
        lines = await dumped(cluster)
        kv = await loaded(cluster, lines)
        inodes = [decode_inode(row) for key, row in kv.snapshot().items() if key[:1] == b"I"]
        assert {each.length for each in inodes if each.id == inode.id} == {5000}
        assert json.loads(lines[0])["counts"] | {"inode": 0, "time": 0} == {
            "inode": 0,
            "entry": 1,
            "time": 0,
            "xattr": 1,
            "intent": 0,
            "garbage": 1,
            "trash": 0,
        }

    simulate(main)


def test_what_is_restored_meanwhile_stays_in_the_trash_of_the_dump() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await client.put(0, "/wanted", 100)
        trash_id = (await client(0, Remove("/wanted", False, True, "any"))).trash_id

        class Restoring(Distant):
            """Restores it when its name in the trash has been read, and the rows of the trash have not."""

            async def call(self, request: Any, buffers: Any = ()) -> Any:
                if isinstance(request, ReadRows) and request.begin == b"R":
                    await client(0, TrashRestore(trash_id, ""))
                return await super().call(request, buffers)

        lines: list[str] = []
        rows = ClusterRows(Restoring(cluster, 0.0), cluster.runtime)
        now_ns = cluster.runtime.wall_ns()
        await dump_live(rows, lines.append, open_spool=spool, now_ns=now_ns)
        assert f"(trash)/{trash_id}" in paths(await loaded(cluster, lines))
        (trash,) = [line for line in map(json.loads, lines) if line.get("row") == "trash"]
        assert (trash["id"], trash["deleted_ns"]) == (trash_id, now_ns)

    simulate(main)


def test_what_nothing_names_is_in_the_trash_of_the_dump() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await client.put(0, "/calm", 100)
        file = await client.put(0, "/lost", 100)
        directory = (await client(0, mkdir("/lost-directory"))).inode
        await client(0, put("/lost-directory/leaf", b"leaf"))
        txn = cluster.kv.begin()
        for name in (b"lost", b"lost-directory"):
            txn.delete(entry_key(pack_id(ROOT_INODE), name))
        await txn.commit()
        lines: list[str] = []
        rows = ClusterRows(Distant(cluster, 0.0), cluster.runtime)
        nameless = await dump_live(rows, lines.append, open_spool=spool, now_ns=cluster.runtime.wall_ns())
        assert sorted(nameless) == [f"{file.id:016x}", f"{directory.id:016x}"]
        found = paths(await loaded(cluster, lines))
        assert {"/calm", f"(trash)/{file.id:016x}", f"(trash)/{directory.id:016x}/leaf"} < found.keys()

    simulate(main)
