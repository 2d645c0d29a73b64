"""Erasure of a tenant: a server says that it is done only where it knows of all that there is.

Run: pytest tests/kvcache/test_erase.py
"""

from __future__ import annotations

import msgspec
import pytest
from emberfs.errors import Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv import messages
from emberkv.errors import StaleOwner
from emberkv.namespace import Kind, Namespace
from emberkv.service import KvService
from emberkv.space import SpaceConfig

from tests.kvcache.test_pool import MIB, Bench, run

NAMESPACES = [Namespace(model=each, dtype="bf16", layout="mla", page_tokens=1, kinds=(Kind("kv"),)) for each in "ab"]


def service(bench: Bench) -> KvService:
    return KvService(
        bench.files, bench.runtime, root="/kv", store="memory", config=SpaceConfig(capacity_bytes=64 * MIB)
    )


async def erased(server: KvService, name: str) -> list[str]:
    answer = await server._erase(messages.Erase("tenant", namespace=name))
    return sorted(msgspec.json.decode(answer.json))


async def begun(bench: Bench) -> list[str]:
    """Two namespaces with that tenant, which nobody serves. Their names."""
    server = service(bench)
    names = []
    for namespace in NAMESPACES:
        pool = await server.pools.get(namespace)
        pool.tenant("tenant")
        await pool.flush()
        names.append(namespace.name)
    await server.pools.close()
    return names


def test_what_is_not_open_here_is_not_erased() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        first, second = await begun(bench)
        server = service(bench)
        for name in ("", first, second):
            with pytest.raises(Unavailable, match="not open here"):
                await erased(server, name)
        await server.pools.get(NAMESPACES[0])
        assert await erased(server, first) == [first]
        for name in ("", second):
            with pytest.raises(Unavailable, match=second):
                await erased(server, name)
        opening = runtime.spawn(server.pools.open_all(), "open")
        while not opening.done():
            try:
                assert await erased(server, "") == sorted([first, second])
            except Unavailable:
                await runtime.sleep(0.0005)
        assert await erased(server, "") == sorted([first, second])
        assert await erased(server, "one that never was") == []

    run(work)


def test_a_server_that_is_over_does_not_say_that_there_is_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old, new = service(bench), service(bench)
        (old_pool, name) = await old.pools.get(NAMESPACES[0]), NAMESPACES[0].name
        for task in old_pool._tasks:  # It is stopped, and knows of nothing.
            task.cancel()
        pool = await new.pools.get(NAMESPACES[0])
        pool.tenant("tenant")
        old_pool._wal.is_lost = False
        with pytest.raises(StaleOwner):
            await erased(old, name)
        assert await erased(new, name) == [name]

    run(work)
