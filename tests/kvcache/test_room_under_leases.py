"""A namespace at its limit while leases keep some of its files: what goes, and who may still put.

Run: pytest tests/kvcache/test_room_under_leases.py
"""

from __future__ import annotations

import random

import pytest
from emberfs.testing.sim.loop import SimRuntime
from emberkv.page import HEADER_BYTES
from emberkv.puts import STORED

from tests.kvcache.test_making_room import woven
from tests.kvcache.test_pool import MIB, PAGE, TENANT, Bench, chain, run


@pytest.mark.parametrize("lease_s", [60.0, 600.0])
def test_a_lease_that_is_kept_keeps_its_own_pages_and_no_others(lease_s: float) -> None:
    """One client extends it for ever; others take theirs and let them end."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=8 * MIB)
        pool = await bench.open()
        await bench.put(pool, chain(10**6, 2))
        lease, rolled = pool.match(TENANT, b"".join(chain(10**6, 2)), lease_s)[2], random.Random(2)
        states: list[int] = []
        for prompt in range(1200):
            if prompt % 20 == 0:
                assert pool.leases.extend(lease, owner=TENANT, duration_s=lease_s, now_s=runtime.now_s())
            await runtime.sleep(1.0)
            states += await bench.put(pool, chain(prompt, 3), durable=False)
            recent = max(0, prompt - int(rolled.expovariate(1 / 100)))
            pool.match(TENANT, b"".join(chain(recent, 3)), 20.0)
        assert pool.space.counts.moved_bytes > 0
        late = states[len(states) // 2 :]
        assert late.count(STORED) > 0.95 * len(late)
        assert await bench.readable(pool, chain(10**6, 2)) == 2
        await pool.close()

    run(work)


def test_a_file_stays_for_who_may_read_there_and_goes_with_the_last_of_them() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        pool = await bench.open()
        shared, others = chain(1, 2), [chain(number, 20) for number in range(2, 6)]
        await bench.put(pool, shared)
        for keys in others:
            await bench.put(pool, keys)
        pool.space.end_segment(1)
        segment = pool.table.place(pool.table.slot(TENANT, shared[0]) or 0, 0)
        assert segment is not None
        source = pool.index.segments.by_id[segment.segment]
        unrelated = pool.match(TENANT, b"".join(others[0]), 100.0)[2]
        mine = pool.match(TENANT, b"".join(shared), 10.0)[2]
        moved = [slot for slot, _ in pool.table.in_segment(source.id) if pool.table.keys[slot] in shared]
        await pool.remove(TENANT, [keys[0] for keys in others[1:]])
        assert moved and await pool.space.compaction.compact(source)
        assert source.leases >= {mine}
        reached = {mine, unrelated} if unrelated in source.leases else {mine}
        later = pool.match(TENANT, b"".join(shared), 100.0)[2]
        assert later not in source.leases, "it was told the new place"
        await pool.space.collect()
        assert source.id in pool.index.segments.by_id
        pool.leases.release(reached, owner=TENANT)
        await pool.space.collect()
        assert source.id not in pool.index.segments.by_id
        await pool.close()

    run(work)


@pytest.mark.parametrize("leased_share", [0.1, 1.0])
def test_short_leases_of_some_are_no_reason_to_refuse_what_others_put(leased_share: float) -> None:
    """While a cache is rewritten about once in the time of a lease."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        pool = await bench.open()
        rolled, states = random.Random(5), list[int]()
        for number in range(3000):
            await runtime.sleep(0.02)
            states += await bench.put(pool, chain(number, 1 + number % 4), durable=False)
            asked = rolled.randint(max(0, number - 600), number)
            pool.match(TENANT, b"".join(chain(asked, 4)), 30.0 if rolled.random() < leased_share else 0)
        late = states[len(states) // 2 :]
        assert late.count(STORED) > 0.98 * len(late)
        assert pool.table.live_bytes > 0.8 * 16 * MIB
        await pool.close()

    run(work)


@pytest.mark.parametrize(("leased_share", "stored_share"), [(0.1, 0.9), (0.25, 0.0)])
def test_no_pages_go_from_files_that_long_leases_keep(leased_share: float, stored_share: float) -> None:
    """Of chains that are everywhere: with a tenth of them leased some files can go, with a quarter none."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=128 * MIB)
        pool = await bench.open()
        total = int(0.93 * pool.space.live_bytes_max(PAGE) / (PAGE + HEADER_BYTES) / 4)
        rolled = await woven(bench, pool, list(range(total)), 4)
        for number in rolled.sample(range(total), int(leased_share * total)):
            pool.match(TENANT, b"".join(chain(number, 4)), 3600.0)
        states = list[int]()
        for number in range(total, total + 500):
            await runtime.sleep(0.5)
            states += await bench.put(pool, chain(number, 4), durable=False)
        assert states.count(STORED) >= stored_share * len(states)
        assert pool.table.live_bytes > 0.6 * 128 * MIB
        await pool.close()

    run(work)


@pytest.mark.parametrize("leased_share", [0.05, 0.2])
def test_nor_do_they_where_the_store_has_less_than_the_capacity(leased_share: float) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=32 * MIB)
        pool = await bench.open()
        limit_bytes = int(0.95 * 32 * MIB)
        pool.space.heed(limit_bytes, 32 * MIB)
        total = int(0.93 * pool.space.live_bytes_max(PAGE) / (PAGE + HEADER_BYTES) / 4)
        rolled = await woven(bench, pool, list(range(total)), 4)
        for number in rolled.sample(range(total), int(leased_share * total)):
            pool.match(TENANT, b"".join(chain(number, 4)), 3600.0)
        for number in range(total, total + 300):
            await runtime.sleep(0.5)
            await bench.put(pool, chain(number, 4), durable=False)
            assert pool.index.segments.promised_bytes < 1.01 * limit_bytes
        assert pool.table.live_bytes > 0.6 * 32 * MIB
        await pool.close()

    run(work)


@pytest.mark.parametrize("leased", [10, 60])
def test_long_leases_on_some_chains_leave_others_to_go(leased: int) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        pool = await bench.open()
        total = int(0.93 * pool.space.live_bytes_max(PAGE) / (PAGE + HEADER_BYTES) / 4)
        rolled = await woven(bench, pool, list(range(total)), 4)
        kept = rolled.sample(range(total), leased)
        leases = [pool.match(TENANT, b"".join(chain(number, 4)), 600.0)[2] for number in kept]
        states, names = list[int](), list(range(total))
        for number in range(total, total + 800):
            await runtime.sleep(0.5)
            for lease in filter(None, leases if number % 200 == 0 else ()):
                assert pool.leases.extend(lease, owner=TENANT, duration_s=600.0, now_s=runtime.now_s())
            evicted = pool.space.counts.evicted_pages
            states += await bench.put(pool, chain(number, 4), durable=False)
            assert pool.space.counts.evicted_pages - evicted < 300, "at once"
            names.append(number)
            for _ in range(2):
                pool.match(TENANT, b"".join(chain(rolled.choice(names[-total:]), 4)), 0)
            assert pool.index.segments.promised_bytes <= 16 * MIB
        late = states[len(states) // 2 :]
        assert late.count(STORED) == len(late)
        await pool.close()

    run(work)
