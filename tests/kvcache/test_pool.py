"""A namespace in a simulated loop: what a clock, a crash, a second owner and a full capacity do to it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from emberfs import NotFound
from emberfs.checksum import crc32c
from emberfs.errors import Unavailable
from emberfs.messages import Foreign
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime, Runtime
from emberfs.testing.sim.loop import SimRuntime
from emberkv.compaction import page_header
from emberkv.errors import StaleOwner
from emberkv.keys import ROOT, page_keys
from emberkv.messages import Open, encode_ask
from emberkv.namespace import Kind, Namespace
from emberkv.page import HEADER_BYTES, Place, encode_header
from emberkv.pool import RECHECK_S, SNAPSHOT_S, Pool
from emberkv.puts import KNOWN, PATIENCE_S, PENDING, REFUSED, RESERVATION_S, STORED
from emberkv.segments import State
from emberkv.service import KvService
from emberkv.space import SpaceConfig
from emberkv.survey import bytes_by_segment
from msgspec.structs import replace

from tests.kvcache.memory_files import MemoryFiles

NAMESPACE = Namespace(model="m", dtype="bf16", layout="mla", page_tokens=1, kinds=(Kind("kv"),))
MIB = 1 << 20
PAGE = 9000
TENANT = 0


def chain(prompt: int, pages: int) -> list[bytes]:
    return page_keys(NAMESPACE, [prompt, *range(pages - 1)])


class Bench:
    """Pools of one namespace on the same files, and what a client does with them."""

    def __init__(
        self, runtime: Runtime, *, capacity_bytes: int = 4 * MIB, ttl_s: float = 3600.0, files: Any = None
    ) -> None:
        self.runtime = runtime
        self.files = MemoryFiles(runtime) if files is None else files
        self.config = SpaceConfig(capacity_bytes=capacity_bytes, ttl_s=ttl_s)

    async def open(self) -> Pool:
        pool = await Pool.open(self.files, self.runtime, "/ns", NAMESPACE, config=self.config, address="here")
        assert pool.tenant("tenant") == TENANT
        return pool

    def kill(self, pool: Pool) -> None:
        """Its process is gone: nothing of it runs any more."""
        for task in [*pool._tasks, pool._wal._work]:
            assert task is not None
            task.cancel()
        pool.space.forget_spare()

    async def write(self, pool: Pool, number: int, places: list[Place | None], keys: list[bytes]) -> list[int]:
        crcs = []
        for key, place in zip(keys, places, strict=True):
            if place is not None:
                payload = content(key, place.length)
                crcs.append(crc32c(payload))
                whole = place._replace(crc=crcs[-1])
                head = encode_header(whole, key=key, parent=ROOT, kind=0, tenant=TENANT)
                await self.files.write(pool.space.path(place.segment), place.offset, head + payload)
        return crcs

    async def put(
        self, pool: Pool, keys: list[bytes], *, parent: bytes = ROOT, writer: int = 1, durable: bool = True
    ) -> list[int]:
        parents = [parent, *keys[:-1]]
        number, states, places = await pool.reserve(writer, TENANT, 0, keys, parents, [PAGE] * len(keys))
        if number:
            crcs = await self.write(pool, number, places, keys)
            pool.commit(number, writer, crcs)
            if durable:
                await pool.flush()
        return states

    async def readable(self, pool: Pool, keys: list[bytes]) -> int:
        """How many pages a match finds; each of them is read and right."""
        slots, _, _ = pool.match(TENANT, b"".join(keys), 0)
        for key, slot in zip(keys, slots, strict=False):
            place = pool.table.place(slot, 0)
            assert place is not None
            (page,) = await self.files.read(
                pool.space.path(place.segment), [(place.offset, HEADER_BYTES + place.length)]
            )
            assert page is not None and page_header(page, place, key) is not None
            assert page[HEADER_BYTES:] == content(key, place.length)
        return len(slots)


def content(key: bytes, length: int) -> bytes:
    return (key * (length // len(key) + 1))[:length]


def run(work: Callable[[SimRuntime], Awaitable[None]], seed: int = 0) -> None:
    async def main(runtime: SimRuntime) -> None:
        try:
            await work(runtime)
        finally:
            await runtime.cancel_others()

    SimRuntime(seed).run(main)


def run_on_this_machine(work: Callable[[AsyncioRuntime], Coroutine[Any, Any, None]]) -> None:
    """On a store of it, in real time."""
    runtime = AsyncioRuntime("test")
    try:
        Portal(runtime).run(work(runtime))
    finally:
        runtime.stop()


def test_a_reservation_runs_out_and_its_pages_may_be_put_by_others() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 3)
        number, states, places = await pool.reserve(1, TENANT, 0, keys, [ROOT, *keys[:-1]], [PAGE] * 3)
        assert states == [STORED] * 3
        assert await bench.put(pool, keys, writer=2) == [PENDING] * 3
        crcs = await bench.write(pool, number, places, keys)
        await runtime.sleep(RESERVATION_S + 2)
        with pytest.raises(NotFound):
            pool.commit(number, 1, crcs)
        assert await bench.put(pool, keys, writer=2) == [STORED] * 3
        assert await bench.readable(pool, keys) == 3
        assert not pool._puts._pending and not pool.space.pending_bytes.total()
        await runtime.sleep(2)
        assert len(pool.index.segments.by_id) == 1, "the segment of who was late is given back"

    run(work)


def test_what_is_used_keeps_what_it_hangs_on() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=100)
        pool = await bench.open()
        used, idle = chain(1, 4), chain(2, 4)
        await bench.put(pool, used)
        await bench.put(pool, idle)
        for _ in range(4):
            await runtime.sleep(40)
            assert await bench.readable(pool, used[:2]) == 2
        assert await bench.readable(pool, used) == 2
        assert await bench.readable(pool, idle) == 0
        assert pool.space.counts.expired_pages == 6

    run(work)


def test_a_page_whose_parent_does_not_come_goes() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 4)
        await bench.put(pool, keys[2:], parent=keys[1])
        assert pool.table.count == 2
        await runtime.sleep(bench.config.orphan_s + 2)
        assert pool.table.count == 0 and pool.table.live_bytes == 0

    run(work)


def test_use_is_remembered_by_the_snapshot_of_each_hour() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=2 * SNAPSHOT_S)
        pool = await bench.open()
        keys = chain(1, 2)
        await bench.put(pool, keys)
        await runtime.sleep(SNAPSHOT_S - 10)
        await bench.readable(pool, keys)
        await runtime.sleep(20)
        bench.kill(pool)
        await runtime.sleep(SNAPSHOT_S + 100)  # By now it is older than that since it was put.
        pool = await bench.open()
        await runtime.sleep(5)
        assert await bench.readable(pool, keys) == 2

    run(work)


def test_who_was_overtaken_acknowledges_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        before, after = chain(1, 3), chain(2, 3)
        await bench.put(old, before)
        for task in old._tasks:
            task.cancel()  # It does not beat any more, and does not know it.
        new = await bench.open()
        with pytest.raises(StaleOwner):
            await bench.put(old, after)
        with pytest.raises(StaleOwner):
            await bench.put(old, chain(3, 1))
        assert old.is_lost
        assert await bench.readable(new, before) == 3
        assert await bench.readable(new, after) == 0
        await bench.put(new, after, writer=2)
        bench.kill(new)
        last = await bench.open()
        assert await bench.readable(last, after) == 3
        assert last.ownership.epoch == 3

    run(work)


def test_an_owner_that_is_closed_is_followed_at_once() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3), durable=False)
        await pool.close()
        begin_s = runtime.now_s()
        pool = await bench.open()
        assert runtime.now_s() - begin_s < 0.5
        assert await bench.readable(pool, chain(1, 3)) == 3

    run(work)


def test_a_segment_that_could_not_be_made_is_not_written_to() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "create" else None
        with pytest.raises(Unavailable):
            await bench.put(pool, chain(1, 3))
        bench.files.fails = lambda operation, path: None
        assert not pool._puts._pending
        assert await bench.put(pool, chain(1, 3)) == [STORED] * 3
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "create" else None
        with pytest.raises(Unavailable):
            await bench.put(pool, chain(2, 60))  # The first of them fit.
        bench.files.fails = lambda operation, path: None
        assert not pool._puts._pending and not pool.space.pending_bytes.total()
        assert await bench.readable(pool, chain(1, 3)) == 3

    run(work)


def test_a_store_that_is_away_makes_no_page_damaged() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 3)
        await bench.put(pool, keys)
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "read" else None
        with pytest.raises(Unavailable):
            await pool.report(TENANT, 0, keys)
        bench.files.fails = lambda operation, path: None
        assert await pool.report(TENANT, 0, keys) == 0
        place = pool.table.place(pool.table.any_slot(TENANT, keys[1]) or 0, 0)
        assert place is not None
        bench.files.files[pool.space.path(place.segment)][place.offset + HEADER_BYTES + 17] ^= 1
        assert await pool.report(TENANT, 0, keys) == 0, "it was looked at a moment ago"
        await runtime.sleep(RECHECK_S)
        assert await pool.report(TENANT, 0, keys) == 1
        assert len(pool.match(TENANT, b"".join(keys), 0)[0]) == 1

    run(work)


async def interleave(bench: Bench, pool: Pool, prompts: int) -> list[int]:
    """Prompts of few pages by turns with prompts of which only the last one is kept warm. What became of the pages."""
    states: list[int] = []
    for prompt in range(prompts):
        states += await bench.put(pool, chain(prompt, 5), durable=False)
        for warm in range(0, prompt, 4):
            pool.match(TENANT, b"".join(chain(warm, 5)), 0)
        assert pool.index.segments.promised_bytes <= bench.config.capacity_bytes
        # What was never written to takes no space.
        on_disk = sum(len(data.rstrip(b"\0")) for path, data in bench.files.files.items() if "/segments/" in path)
        assert on_disk <= bench.config.capacity_bytes
    return states


def test_compaction_keeps_what_is_warm_within_the_capacity() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=4 * MIB)
        pool = await bench.open()
        assert set(await interleave(bench, pool, 160)) == {STORED}
        assert pool.space.counts.moved_bytes > 0 and pool.space.counts.removed_segments > 10
        for warm in range(0, 160, 4):
            assert await bench.readable(pool, chain(warm, 5)) == 5
        bench.kill(pool)
        pool = await bench.open()
        for warm in range(0, 156, 4):  # What was not durable yet may be gone.
            assert await bench.readable(pool, chain(warm, 5)) == 5

    run(work)


def test_a_moved_page_is_readable_where_it_was_until_the_lease_ends() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=4 * MIB)
        pool = await bench.open()
        keys = chain(0, 5)
        await bench.put(pool, keys)
        slots, _, lease = pool.match(TENANT, b"".join(keys), 30)
        places = [pool.table.place(slot, 0) for slot in slots]
        assert lease and places[0] is not None
        segment = pool.index.segments.by_id[places[0].segment]
        pool.index.segments.seal(segment)
        assert await pool.space.compaction.compact(segment)
        assert [pool.table.place(slot, 0) for slot in slots] != places
        await runtime.sleep(20)
        assert segment.state is State.RETIRED
        for key, place in zip(keys, places, strict=True):
            assert place is not None
            (page,) = await bench.files.read(
                pool.space.path(place.segment), [(place.offset, HEADER_BYTES + place.length)]
            )
            assert page is not None and page_header(page, place, key) is not None
        await runtime.sleep(15)
        assert pool.space.path(segment.id) not in bench.files.files
        assert await bench.readable(pool, keys) == 5

    run(work)


def test_leases_hold_space_back_and_never_take_more() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=4 * MIB)
        pool = await bench.open()
        for prompt in range(200):
            await bench.put(pool, chain(prompt, 5), durable=False)
            pool.match(TENANT, b"".join(chain(prompt, 5)), 600)
            assert pool.index.segments.promised_bytes <= bench.config.capacity_bytes
        assert set(await bench.put(pool, chain(999, 5))) == {REFUSED}
        await runtime.sleep(601)
        assert set(await bench.put(pool, chain(999, 5))) == {STORED}

    run(work)


def test_a_put_waits_for_leases_that_end_soon() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=4 * MIB)
        pool = await bench.open()
        for lease_s, state, least_s in ((5.0, REFUSED, 0.0), (PATIENCE_S / 2, STORED, PATIENCE_S / 4)):
            await runtime.sleep(10)
            for prompt in range(100):
                await bench.put(pool, chain(prompt, 5), durable=False)
            for prompt in range(100):
                pool.match(TENANT, b"".join(chain(prompt, 5)), lease_s)
            begin_s = runtime.now_s()
            assert set(await bench.put(pool, chain(999, 5), durable=False)) == {state}
            assert least_s <= runtime.now_s() - begin_s < PATIENCE_S

    run(work)


def test_compaction_under_leases_stays_within_the_capacity() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=4 * MIB)
        pool = await bench.open()
        states = []
        for prompt in range(400):
            states += await bench.put(pool, chain(prompt, 5), durable=False)
            if prompt % 4 == 0 and prompt < 240:
                pool.match(TENANT, b"".join(chain(prompt, 5)), 600)
            assert pool.index.segments.promised_bytes <= bench.config.capacity_bytes
        assert pool.space.counts.moved_bytes > 0, "there was nothing to compact"
        assert states.count(STORED) > 0.95 * len(states), "what leases reach is left alone, and others go"
        await runtime.sleep(601)
        assert set(await bench.put(pool, chain(999, 5))) == {STORED}

    run(work)


def test_the_log_ends_under_a_load_that_never_does() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        pool._wal.log_bytes_max = 3000
        keys = chain(1, 1)
        await bench.put(pool, keys)
        for _ in range(2000):  # Several within the time of one append.
            pool.pin(TENANT, keys, 10)
            runtime.spawn(pool.flush(), "flush")  # Or the writer would wait for more.
            await runtime.sleep(0.0002)
            assert pool._wal._log_bytes < 10_000

    run(work)


def test_a_namespace_that_another_serves_holds_up_no_other() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await Pool.open(
            bench.files, runtime, f"/kv/{NAMESPACE.name}", NAMESPACE, config=bench.config, address="there"
        )
        service = KvService(bench.files, runtime, root="/kv", store="ember:///s", config=bench.config, address="here")
        waits = runtime.spawn(service.handle(encode_ask(Open(NAMESPACE, "tenant"))), "waits")
        await runtime.sleep(1)
        other = replace(NAMESPACE, model="other")
        begin_s = runtime.now_s()
        assert isinstance(await service.handle(encode_ask(Open(other, "tenant"))), Foreign)
        assert runtime.now_s() - begin_s < 1
        await runtime.sleep(5)
        assert not waits.done(), "the other one lives"
        waits.cancel()
        await runtime.sleep(1)
        bench.kill(pool)
        await runtime.sleep(4)
        assert NAMESPACE.name in service.pools.opened, "it goes on when who asked is tired of waiting"
        await service.close()

    run(work)


@pytest.mark.parametrize("seed", range(12))
def test_crashes_lose_nothing_that_was_acknowledged(seed: int) -> None:
    async def work(runtime: SimRuntime) -> None:
        rng = random.Random(seed)
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        acknowledged: dict[int, int] = {}
        for _ in range(6):
            pool = await bench.open()
            pool._wal.log_bytes_max = 3000
            for prompt, pages in acknowledged.items():
                assert await bench.readable(pool, chain(prompt, pages)) == pages
            for writer in range(rng.randrange(5, 25)):
                prompt = rng.randrange(12)
                pages = acknowledged.get(prompt, 0) + rng.randrange(1, 4)
                keys, durable = chain(prompt, pages), rng.random() < 0.6
                states = await bench.put(pool, keys, writer=writer % 3, durable=durable)
                assert set(states) <= {STORED, KNOWN}
                passing = chain(100 + writer, 3)
                await bench.put(pool, passing, writer=9, durable=False)
                flush = runtime.spawn(pool.flush(), "flush")
                await runtime.sleep(rng.random() * 0.006)  # Somewhere in the write of a batch, or of a snapshot.
                assert await pool.remove(TENANT, passing[:1]) == 1
                await flush
                if durable:
                    await pool.flush()
                    acknowledged[prompt] = max(pages, acknowledged.get(prompt, 0))
            bench.kill(pool)
            names = [name for name in await bench.files.names("/ns/index") if not name.startswith("head")]
            assert len(names) <= 6, "what a snapshot replaced is removed"
        pool = await bench.open()
        await runtime.sleep(3)
        live = sum(segment.live_bytes for segment in pool.index.segments)
        assert live == pool.table.live_bytes == sum(pool.table.tenant_bytes)

    run(work, seed)


def test_a_compaction_lets_go_of_what_is_cold_and_moves_what_is_warm() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=8 * MIB)
        bench.config = dataclasses.replace(bench.config, cold_share=0.2)
        pool = await bench.open()
        warm = [chain(prompt, 3) for prompt in range(1000, 1020)]
        for prompt in range(600):
            if prompt < len(warm):
                await bench.put(pool, warm[prompt], durable=False)
            await bench.put(pool, chain(prompt, 3), durable=False)
            for keys in warm[: prompt + 1]:
                assert len(pool.match(TENANT, b"".join(keys), 0)[0]) == 3
        for keys in warm:
            assert await bench.readable(pool, keys) == 3
        assert pool.space.counts.moved_bytes < pool.counts.put_bytes / 10

    run(work)


def test_the_stamps_of_a_prefix_are_those_of_its_pages_below() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        old, new = chain(1, 3), chain(2, 3)
        await bench.put(pool, old)
        await runtime.sleep(10)
        await bench.put(pool, new)
        await runtime.sleep(10)
        pool.match(TENANT, b"".join(old), 0)
        pool.table.spread_stamps()
        stamps = {key: pool.table.used_s[pool.table.slot(TENANT, key) or 0] for key in (*old, *new)}
        assert min(stamps[key] for key in old) > max(stamps[key] for key in new)
        assert bytes_by_segment(pool.table, stamps[old[0]], 0, set()) == {1: 3 * (PAGE + HEADER_BYTES)}

    run(work)
