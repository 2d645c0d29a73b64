"""A store that others fill: the cache gives way before it is full, and takes the room again that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emberfs
import msgspec
import pytest
from emberfs.disk import LocalDisk
from emberfs.errors import EmberError, Unavailable
from emberfs.runtime import AsyncioRuntime, Runtime
from emberfs.testing.sim.loop import SimRuntime
from emberkv import Namespace, pool, pools
from emberkv.counts import ServiceCounts
from emberkv.files import StoreFiles
from emberkv.keys import ROOT
from emberkv.pool import Pool
from emberkv.pools import LOOK_S, Pools
from emberkv.puts import REFUSED, STORED
from emberkv.room import AGAIN_LOOKS, RESERVE_BYTES_MIN, RESERVE_SHARE, VAIN_MAX, Room

from tests.kvcache.test_pool import MIB, NAMESPACE, TENANT, Bench, chain, run, run_on_this_machine

SETTLED_S = 2 * LOOK_S + 2
"""After so long what the store has left is known, and has been acted upon."""


class Lab(Bench):
    """Namespaces that share a store."""

    def __init__(self, runtime: Runtime, *, capacity_bytes: int, files: Any = None) -> None:
        super().__init__(runtime, capacity_bytes=capacity_bytes, files=files)
        self.pools = Pools(
            self.files, runtime, root="/kv", config=self.config, namespaces_max=4, counts=ServiceCounts(), events=None,
            address="here",
        )  # fmt: skip

    async def serve(self, namespace: Namespace = NAMESPACE) -> Pool:
        pool = await self.pools.get(namespace)
        assert pool.tenant("tenant") == TENANT
        return pool

    async def left(self) -> int:
        return (await self.files.space())[0]

    async def put_large(self, pool: Pool, prompt: int) -> list[int]:
        """Four pages of nearly a MiB together."""
        keys = chain(prompt, 4)
        number, states, places = await pool.reserve(1, TENANT, 0, keys, [ROOT, *keys[:-1]], [MIB // 4 - 4096] * 4)
        pool.commit(number, 1, await self.write(pool, number, places, keys))
        await pool.flush()
        return states


def test_the_coldest_go_while_others_fill_the_store_and_it_grows_again() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        lab.files.left_bytes = 100 * MIB
        pool = await lab.serve()
        assert pool.space.limit_bytes == 64 * MIB
        for prompt in range(100):
            assert await lab.put(pool, chain(prompt, 20)) == [STORED] * 20
            await runtime.sleep(0.01)
        before = pool.index.segments.disk_bytes
        assert pool.space.counts.evicted_pages == 0 and before > 16 * MIB
        lab.files.left_bytes = before // 2 + RESERVE_BYTES_MIN
        await runtime.sleep(SETTLED_S)
        limit = pool.space.limit_bytes
        assert before // 2 - MIB < limit <= before // 2
        assert pool.index.segments.promised_bytes <= limit and await lab.left() >= RESERVE_BYTES_MIN - MIB
        there = [await lab.readable(pool, chain(prompt, 20)) for prompt in range(100)]
        gone = there.count(0)
        assert 40 < gone < 75 and there[:gone] == [0] * gone and there[gone + 1 :] == [20] * (99 - gone)
        for prompt in range(100, 120):
            assert await lab.put(pool, chain(prompt, 20)) == [STORED] * 20
            assert pool.index.segments.promised_bytes <= limit
        await runtime.sleep(SETTLED_S)
        assert abs(pool.space.limit_bytes - limit) < MIB, "what it puts and evicts itself changes nothing"
        assert await lab.readable(pool, chain(119, 20)) == 20
        lab.files.left_bytes = 100 * MIB
        await runtime.sleep(SETTLED_S)
        assert pool.space.limit_bytes == 64 * MIB
        await lab.pools.close()

    run(work)


def test_what_is_warm_between_the_cold_is_moved_together() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        pool = await lab.serve()
        for prompt in range(100):
            await lab.put(pool, chain(prompt, 20))
        for prompt in range(0, 100, 4):
            assert await lab.readable(pool, chain(prompt, 20)) == 20
        pool.space.end_segment(1)
        taken = await lab.left() - RESERVE_BYTES_MIN
        lab.files.left_bytes -= taken + pool.index.segments.disk_bytes * 6 // 10
        await runtime.sleep(SETTLED_S)
        assert pool.index.segments.promised_bytes <= pool.space.limit_bytes < 8 * MIB
        assert [await lab.readable(pool, chain(prompt, 20)) for prompt in range(0, 100, 4)] == [20] * 25
        await lab.pools.close()

    run(work)


@pytest.mark.parametrize(("lease_s", "left"), [(0.0, 4), (100.0, 4), (100.0, 12)])
def test_a_prefix_that_all_share_stays_and_what_is_below_it(lease_s: float, left: int) -> None:
    """It is in the oldest segment, and nothing but what hangs below it was asked for."""

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=4 << 30)
        pool = await lab.serve()
        shared = chain(10**6, 5)
        await lab.put(pool, shared)
        for prompt in range(600):
            await lab.put(pool, chain(prompt, 20), parent=shared[-1], durable=False)
        for prompt in range(600):
            if prompt % 5:
                pool.match(TENANT, b"".join([*shared, *chain(prompt, 20)]), lease_s)
        lab.files.left_bytes -= await lab.left() - left * MIB
        least = left * MIB
        for _ in range(20):
            await runtime.sleep(0.5)
            least = min(least, await lab.left())
        assert least > MIB
        await runtime.sleep(100 + SETTLED_S)
        assert await lab.left() >= RESERVE_BYTES_MIN - MIB
        assert pool.table.count > 7000 and await lab.readable(pool, shared) == 5
        await lab.pools.close()

    run(work)


@pytest.mark.parametrize("lease_s", [0.0, 100.0])
def test_large_segments_are_not_moved_into_what_is_not_there(lease_s: float) -> None:
    """They were made when there was room: what is warm in one is more than the store has left now."""

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=2 << 30)
        pool = await lab.serve()
        for prompt in range(120):
            await lab.put(pool, chain(prompt, 100), durable=False)
        for prompt in range(0, 120, 3):
            assert pool.match(TENANT, b"".join(chain(prompt, 100)), lease_s)[0]
        lab.files.left_bytes -= await lab.left() - 4 * MIB
        least = 4 * MIB
        for _ in range(20):
            await runtime.sleep(0.5)
            least = min(least, await lab.left())
        assert least >= MIB
        await runtime.sleep(100 + SETTLED_S)
        assert await lab.left() >= RESERVE_BYTES_MIN - MIB
        assert pool.table.count > 3000
        await lab.pools.close()

    run(work)


def test_what_is_leased_between_the_cold_is_not_there_twice() -> None:
    """It is moved, and stays where it was until the lease ends: to move all would fill the store."""

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=256 * MIB)
        pool = await lab.serve()
        for prompt in range(500):
            await lab.put(pool, chain(prompt, 20), durable=False)
        for prompt in range(500):
            if prompt % 5:
                assert pool.match(TENANT, b"".join(chain(prompt, 20)), 100.0)[2]
        lab.files.left_bytes -= await lab.left() - 6 * MIB
        least = 6 * MIB
        for _ in range(50):
            await runtime.sleep(1.0)
            least = min(least, await lab.left())
        assert least > 2 * MIB and pool.space.counts.moved_bytes > 0
        await runtime.sleep(60 + SETTLED_S)
        assert await lab.left() >= RESERVE_BYTES_MIN - MIB
        there = [await lab.readable(pool, chain(prompt, 20)) for prompt in range(500)]
        assert sum(there[prompt] for prompt in range(500) if prompt % 5) > 350 * 20
        await lab.pools.close()

    run(work)


def test_what_is_leased_stays_until_the_lease_ends() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        pool = await lab.serve()
        for prompt in range(10):
            await lab.put(pool, chain(prompt, 20))
        for prompt in range(10):
            assert pool.match(TENANT, b"".join(chain(prompt, 20)), 60.0)[2]
        lab.files.left_bytes = 0
        await runtime.sleep(40)
        assert [await lab.readable(pool, chain(prompt, 20)) for prompt in range(10)] == [20] * 10
        assert set(await lab.put(pool, chain(99, 3))) == {REFUSED}
        await runtime.sleep(30 + SETTLED_S)
        assert pool.table.count == 0
        assert not [path for path in lab.files.files if "/segments/" in path]
        await lab.pools.close()

    run(work)


def test_namespaces_share_what_is_left() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        lab.files.left_bytes = 48 * MIB
        names = ("one", "two")
        one, two = [await lab.serve(msgspec.structs.replace(NAMESPACE, model=name)) for name in names]
        for prompt in range(200):
            for each in (one, two):
                assert await lab.put(each, chain(prompt, 20)) == [STORED] * 20
            assert await lab.left() > 0
        assert one.space.counts.evicted_pages > 0 < two.space.counts.evicted_pages
        await runtime.sleep(SETTLED_S)
        held = [each.index.segments.disk_bytes for each in (one, two)]
        assert sum(held) > 24 * MIB and min(held) > 8 * MIB
        await lab.pools.close()

    run(work)


def test_who_does_not_grow_leaves_most_to_who_does() -> None:
    shared, held = Room(), {"busy": 10 * MIB, **{f"idle-{number}": MIB for number in range(31)}}
    shared.share(500 * MIB, 0, held)
    held["busy"] += MIB
    limits = shared.share(500 * MIB, 0, held)
    assert limits["busy"] > 350 * MIB and limits["idle-0"] > 3 * MIB
    assert sum(limits[name] - held[name] for name in held) < 500 * MIB


def test_what_is_missing_each_gives_in_proportion() -> None:
    limits = Room().share(0, 0, {"large": 900 * MIB, "small": 100 * MIB, "none": 0})
    missing = 1000 * MIB * RESERVE_SHARE
    assert limits == {"large": 900 * MIB - missing * 0.9, "small": 100 * MIB - missing * 0.1, "none": 0}


GIB = 1 << 30


@pytest.mark.parametrize("lag_looks", [0, 1])
def test_what_is_seen_late_is_given_once(lag_looks: int) -> None:
    shared, held, other = Room(), 400 * GIB, 0
    past = [(20 * GIB, 400 * GIB)] * (lag_looks + 1)
    for look in range(200):
        other = 15 * GIB if look >= 3 else 0
        past.append((420 * GIB - held - other, held + other))
        held = min(held, shared.share(*past[-1 - lag_looks], {"a": held})["a"])
    assert 388 * GIB < held < 394 * GIB, "what was missing, and not several times that"


def test_others_that_fill_the_store_steadily_are_given_what_they_take() -> None:
    shared, held = Room(), 400 * GIB
    for look in range(45):
        other = look * 5 * GIB
        free = 420 * GIB - held - other
        assert free > GIB
        held = min(held, shared.share(free, held + other, {"a": held})["a"])
    assert held < 210 * GIB


@pytest.mark.parametrize("noise", [0, 4096])
def test_a_figure_that_does_not_follow_empties_nobody(noise: int) -> None:
    shared, held = Room(), 1000 * MIB
    for look in range(10 * AGAIN_LOOKS):
        held = min(held, shared.share((look % 2) * noise, held, {"a": held})["a"])
    assert held > 1000 * MIB * (1 - RESERVE_SHARE) ** (VAIN_MAX + 11)


def test_who_stopped_giving_begins_again_when_it_gets_worse_or_better() -> None:
    shared, held, look = Room(), 1000 * MIB, 0
    for free in (20 * MIB, 8 * MIB, 0, 12 * MIB):
        before = held
        for _ in range(50):
            held, look = min(held, shared.share(free, held, {"a": held})["a"]), look + 1
        assert held < before


def test_a_namespace_that_leaves_has_given_nothing(caplog: pytest.LogCaptureFixture) -> None:
    shared = Room()
    for look in range(20):
        held = {f"{number}": 100 * MIB for number in range(20 - look)}
        limits = shared.share(10 * MIB, sum(held.values()), held)
        assert min(limits.values()) > 80 * MIB
    assert not caplog.records


def test_a_store_that_has_no_more_however_much_is_given_is_given_no_more(caplog: pytest.LogCaptureFixture) -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=256 * MIB)
        pool = await lab.serve()
        for prompt in range(1000):
            await lab.put(pool, chain(prompt, 20), durable=False)
        before = pool.space.held_bytes

        space = lab.files.space

        async def nothing() -> tuple[int, int]:
            return 0, (await space())[1]

        lab.files.space = nothing  # type: ignore[method-assign]
        await runtime.sleep(60)
        after = pool.space.held_bytes
        given = (VAIN_MAX + 1) * RESERVE_BYTES_MIN
        assert before - given < after < before
        assert "hardly gives more" in caplog.text
        await runtime.sleep(100)
        assert pool.space.held_bytes > after - 3 * RESERVE_BYTES_MIN
        del lab.files.space  # type: ignore[attr-defined]
        await runtime.sleep(SETTLED_S)
        assert pool.space.limit_bytes == 256 * MIB
        await lab.pools.close()

    run(work)


@pytest.mark.parametrize("left", [30, 60, 150])
def test_a_little_room_is_used(left: int) -> None:
    """Segments are smaller than the capacity alone would have them."""

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=1 << 36)
        lab.files.left_bytes = left * MIB
        pool = await lab.serve()
        for prompt in range(2 * left):
            assert await lab.put(pool, chain(prompt, 40), durable=False) == [STORED] * 40
        await runtime.sleep(SETTLED_S)
        assert pool.space.held_bytes > 0.7 * (left * MIB - RESERVE_BYTES_MIN)
        assert await lab.left() > RESERVE_BYTES_MIN // 2
        await lab.pools.close()

    run(work)


def test_a_store_that_does_not_say_what_it_has_left_changes_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        lab.files.left_bytes = 56 * MIB

        def away(operation: str, path: str) -> EmberError | None:
            return Unavailable("no") if operation == "space" else None

        lab.files.fails = away
        pool = await lab.serve()
        assert pool.space.limit_bytes == 64 * MIB
        lab.files.fails = lambda operation, path: None
        await runtime.sleep(SETTLED_S)
        assert 38 * MIB < pool.space.limit_bytes < 40 * MIB
        lab.files.fails, lab.files.left_bytes = away, 0
        await runtime.sleep(SETTLED_S)
        assert 38 * MIB < pool.space.limit_bytes < 40 * MIB
        await lab.pools.close()

    run(work)


def test_a_capacity_that_the_disk_does_not_have_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store of a machine whose disk has a fifth of the capacity. Something else takes half of it later."""
    disk_bytes = 96 * MIB

    def free_bytes(disk: LocalDisk) -> int:
        return disk_bytes - sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("blocks-*"))

    monkeypatch.setattr(LocalDisk, "free_bytes", free_bytes)
    monkeypatch.setattr(pools, "LOOK_S", 0.05)
    monkeypatch.setattr(pool, "UPKEEP_S", 0.05)

    async def work(runtime: AsyncioRuntime) -> None:
        await runtime.enter_loop()
        client = emberfs.connect_async(f"ember://{tmp_path}/store", reserve_bytes=0)
        try:
            lab = Lab(runtime, capacity_bytes=512 * MIB, files=StoreFiles(client))
            served = await lab.serve()
            for prompt in range(130):
                assert await lab.put_large(served, prompt) == [STORED] * 4
            there = [await lab.readable(served, chain(prompt, 4)) for prompt in range(130)]
            assert there[-40:] == [4] * 40 and there[0] == 0
            for number in range(48):
                await client.put(f"/{number}", bytes(MIB), chunk_size_bytes=MIB)
                for _ in range(1000):
                    if await lab.left() >= 8 * MIB:
                        break
                    await runtime.sleep(0.02)
            for prompt in range(130, 160):
                assert await lab.put_large(served, prompt) == [STORED] * 4
            assert await lab.readable(served, chain(159, 4)) == 4
            assert served.index.segments.disk_bytes < 48 * MIB and not served.failure
            await lab.pools.close()
        finally:
            await client.close()

    run_on_this_machine(work)
