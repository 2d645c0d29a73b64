"""fsck of a simulated cluster that is in use: it finds what is wrong, and nothing of what is just being done."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from emberfs.client.core import NewFile
from emberfs.client.file import open_file
from emberfs.client.namespace import Namespace
from emberfs.cluster import fsck as fsck_module
from emberfs.cluster.fsck import fsck
from emberfs.cluster.rows import ClusterRows
from emberfs.cluster.store import EveryChain
from emberfs.errors import EmberError
from emberfs.messages import WriteChunks
from emberfs.meta.check import Finding
from emberfs.meta.chunks import ClientChunkOps
from emberfs.meta.keys import entry_key, entry_value, pack_id
from emberfs.striping import chains_of
from emberfs.testing.sim.cluster import ClusterConfig, SimClient, SimCluster
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.types import CHUNK_SIZE_BYTES_MIN, Chunks, Inode, Kind, chunk_id

SHAPE = ClusterConfig(managers=1, storage_nodes=3, metas=2)
NEW = NewFile(chunk_size_bytes=CHUNK_SIZE_BYTES_MIN)
LARGE = memoryview(bytes(10_000))
"""Too large for an inode row."""


async def look(client: SimClient) -> list[Finding]:
    """What fsck says, asked for by this client."""
    chunks = ClientChunkOps(EveryChain(client.routes, client.router))
    rows = ClusterRows(client.meta, client.process)
    return await client.process.spawn(fsck(rows, chunks, client.process), "fsck")  # type: ignore[no-any-return]


async def play(client: SimClient, rng: random.Random, until_s: float) -> None:
    """Make, append to, rename, replace, truncate and remove files."""
    names = Namespace(client.core)
    while client.process.now_s() < until_s:
        a, b = f"/{rng.randrange(8)}", f"/{rng.randrange(8)}"
        try:
            match rng.randrange(5):
                case 0:
                    await client.core.put(a, LARGE[: rng.randrange(10_000)], NEW)
                case 1:
                    await names.rename(a, b, True)
                case 2:
                    await names.remove(a, False, rng.random() < 0.5, "any")
                case 3:
                    await client.core.truncate(a, rng.randrange(200_000))
                case _:
                    file = await open_file(client.core, a, "r+b", NEW)
                    for _ in range(3):
                        await file.write(rng.randrange(200_000), LARGE[:3000])
                        await client.process.sleep(rng.random() * 2)
                    await file.close()
        except (EmberError, OSError):
            pass
        await client.process.sleep(rng.random() * 0.05)


def test_nothing_is_found_in_a_cluster_in_use(seeds: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    at_first: list[int] = []
    look_once = fsck_module._look

    async def counted(*arguments: Any) -> list[Finding]:
        found = await look_once(*arguments)
        at_first.append(len(found))
        return found

    monkeypatch.setattr(fsck_module, "_look", counted)

    async def main(world: SimRuntime) -> None:
        cluster = SimCluster(world, config=SHAPE)
        await cluster.start()
        clients = [await cluster.client(f"c{number}") for number in range(3)]
        end_s = world.now_s() + 20.0
        playing = [
            client.process.spawn(play(client, world.random(client.name), client.process.now_s() + 20.0), "play")
            for client in clients[:2]
        ]
        while world.now_s() < end_s:
            assert await look(clients[2]) == []
        for task in playing:
            await task
        cluster.stop()

    for seed in seeds:
        run(seed, main)
    assert any(at_first), "nothing looked like damage: then the second look proves nothing"


async def write(client: SimClient, chain: int, chunk: bytes, offset: int = 0) -> None:
    """A chunk behind the back of the metadata."""
    request = WriteChunks(client.routes.client, 0, 0, [chain], [chunk], [offset], CHUNK_SIZE_BYTES_MIN)
    await client.router.call(request, [memoryview(b"stray")])


def test_what_is_wrong_is_found(seeds: Sequence[int]) -> None:
    async def break_it(cluster: SimCluster, client: SimClient) -> Inode:
        inode = await client.core.put("/file", LARGE, NEW)
        await client.core.put("/inline", LARGE[:10], NEW)
        layout = inode.layout
        assert isinstance(layout, Chunks)
        chains = chains_of(layout)
        await write(client, 1, chunk_id(12, 0))
        await write(client, chains[5 % len(chains)], chunk_id(inode.id, 5))
        await write(client, chains[1 % len(chains)] % layout.chain_count + 1, chunk_id(inode.id, 1))
        await write(client, 1, chunk_id((await client.core.file("/inline")).id, 0))
        assert cluster.kv.kv is not None
        txn = cluster.kv.kv.begin()
        txn.put(entry_key(pack_id(1), b"ghost"), entry_value(14, Kind.FILE))
        await txn.commit()
        return inode

    async def main(world: SimRuntime) -> None:
        cluster = SimCluster(world, config=SHAPE)
        await cluster.start()
        client = await cluster.client("c1")
        inode = await client.process.spawn(break_it(cluster, client), "break")
        details = sorted(f"{finding.path} {finding.detail}" for finding in await look(client))
        behind = 5 * CHUNK_SIZE_BYTES_MIN + len(b"stray")
        expected = [
            r" chunk \w+\.0 on chain 1 is of a file that has no chunks",
            rf" chunk {inode.id:x}\.1 on chain \d+ is not where its file looks for it, on chain \d+",
            rf" chunk {inode.id:x}\.5 on chain \d+ reaches to {behind}, and its file ends at 10000",
            r" there are chunks of inode c, which does not exist",
            r"/ghost it names inode e, which does not exist",
        ]
        assert len(details) == len(expected), details
        for pattern in expected:
            assert any(re.fullmatch(pattern, detail) for detail in details), (pattern, details)
        cluster.stop()

    run(seeds[0], main)
