"""What a client, an owner that is over, or a store that is away must not be able to do to a namespace."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from emberfs import AlreadyExists, NotFound
from emberfs.errors import ProtocolError, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv.errors import ReadOnly, StaleOwner
from emberkv.keys import ROOT
from emberkv.pool import SNAPSHOT_S, Pool
from emberkv.puts import KNOWN, REFUSED, RESERVATION_S, STORED
from emberkv.segments import State

from tests.kvcache.test_pool import MIB, NAMESPACE, PAGE, TENANT, Bench, chain, run


def segment_names(bench: Bench) -> set[str]:
    return {path for path in bench.files.files if "/segments/" in path}


def test_pages_that_hang_on_themselves_end_nothing_and_go() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        one, two, three = (chain(prompt, 1)[0] for prompt in range(3))
        for key, parent in ((one, one), (two, three), (three, two)):
            number, _, places = await pool.reserve(1, TENANT, 0, [key], [parent], [PAGE])
            pool.commit(number, 1, await bench.write(pool, number, places, [key]))
        assert len(pool.match(TENANT, b"".join([two, three]), 0)[0]) == 0
        await runtime.sleep(120)  # They are orphans.
        assert pool.table.count == 0 and pool.table.live_bytes == 0
        assert await bench.put(pool, [two, three]) == [STORED] * 2
        assert await bench.readable(pool, [two, three]) == 2
        assert await pool.remove(TENANT, [two]) == 1
        assert pool.table.count == 0

    run(work)


def test_a_commit_of_too_few_checksums_holds_nothing_for_ever() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 3)
        number, _, _ = await pool.reserve(1, TENANT, 0, keys, [ROOT, *keys[:-1]], [PAGE] * 3)
        for crcs in ([1, 2], [1, 2, 1 << 32]):
            with pytest.raises(ProtocolError):
                pool.commit(number, 1, crcs)
        await runtime.sleep(RESERVATION_S + 3)
        assert await bench.put(pool, keys, writer=2) == [STORED] * 3
        assert not pool.space.pending_bytes.total()

    run(work)


def test_an_owner_that_is_over_removes_no_segment() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        await bench.put(old, chain(1, 20))
        for task in old._tasks:  # It is stopped, and so it beats no more.
            task.cancel()
        new = await bench.open()
        await bench.put(new, chain(2, 20))
        before = segment_names(bench)
        # It goes on where it was, and knows of nothing.
        old._wal.is_lost = False
        await old.remove(TENANT, chain(1, 20))
        for segment in list(old.index.segments):
            old.index.segments.seal(segment)
        for _ in range(2):
            with pytest.raises(StaleOwner):
                await old.keep_up()
        assert segment_names(bench) == before
        assert await bench.readable(new, chain(1, 20)) == await bench.readable(new, chain(2, 20)) == 20

    run(work)


@pytest.mark.parametrize("phase_s", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("cut", ["before it looks", "while it looks"])
def test_an_owner_that_was_cut_off_takes_no_file_of_the_next_one_for_a_stranger(cut: str, phase_s: float) -> None:
    """Its snapshot is due meanwhile, and with it a look at which files the index does not name."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=1e6)
        await runtime.sleep(phase_s)
        away = Away(bench.files, runtime)
        old = await Pool.open(away, runtime, "/ns", NAMESPACE, config=bench.config, address="old")  # type: ignore[arg-type]
        old.tenant("tenant")
        await bench.put(old, chain(1, 20))
        await runtime.sleep(SNAPSHOT_S - 30)
        away.is_cut = cut == "before it looks"
        away.is_cut_by_look = not away.is_cut
        while not away.is_cut:
            await runtime.sleep(0.1)
        new = await bench.open()
        await bench.put(new, chain(2, 20))
        await runtime.sleep(40)
        away.is_cut = False
        await runtime.sleep(90)
        assert old.is_lost
        # The spare of the old one may be gone: the new one does not name it.
        assert {new.space.path(each.id) for each in new.index.segments} <= segment_names(bench)
        assert await bench.readable(new, chain(2, 20)) == 20

    run(work)


class Away:
    """The same files, over a network that may be cut."""

    def __init__(self, files: Any, runtime: SimRuntime) -> None:
        self._files, self._runtime = files, runtime
        self.is_cut = self.is_cut_by_look = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._files, name)

        async def over(*args: Any) -> Any:
            if name == "names" and self.is_cut_by_look:
                self.is_cut_by_look, self.is_cut = False, True
                await self._runtime.sleep(60)  # The answer takes so long.
                return await call(*args)
            if self.is_cut:
                await self._runtime.sleep(0.01)
                raise Unavailable("there is no way to the store")
            return await call(*args)

        return over


def test_a_request_that_is_cancelled_leaves_no_removal_undone_in_the_log() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 20))
        for segment in list(pool.index.segments):
            pool.space.seal(segment)
        await pool.remove(TENANT, chain(1, 20))
        before = segment_names(bench)
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "append" else None
        collecting = runtime.spawn(pool.space.collect(), "collect")
        await runtime.sleep(0)
        collecting.cancel()
        await asyncio.wait([collecting])
        with pytest.raises(ReadOnly):
            await pool.space.collect()
        assert segment_names(bench) == before, "no file goes before its tombstone is durable"

    run(work)


def test_numbers_of_segments_come_once() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        seen: set[str] = set()
        for prompt in range(4):
            pool = await bench.open()
            await pool.reserve(1, TENANT, 0, chain(prompt, 2), [ROOT] * 2, [PAGE] * 2)
            mine = {pool.space.path(segment.id) for segment in pool.index.segments}
            assert not mine & seen
            seen |= mine
            bench.kill(pool)  # Before the log has heard of them.
            await runtime.sleep(5)

    run(work)


def test_a_number_that_an_owner_before_has_taken_meanwhile_is_left_to_it() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        taken = pool.space.path(pool.index.segments.next_id)
        await bench.files.create(taken, MIB)
        assert await bench.put(pool, chain(1, 3)) == [STORED] * 3
        assert await bench.readable(pool, chain(1, 3)) == 3
        assert {pool.space.path(s.id) for s in pool.index.segments if s.state is State.OPEN}.isdisjoint({taken})
        with pytest.raises(AlreadyExists):
            await bench.files.create(pool.space.path(pool.index.segments.next_id - 1), 1)

    run(work)


def test_writers_that_are_idle_hold_no_room_from_others() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        for writer in range(1, 400):  # Each has a segment, and there is room for fewer.
            assert await bench.put(pool, chain(writer, 1), writer=writer) == [STORED]
        assert await bench.readable(pool, chain(399, 1)) == 1
        assert pool.index.segments.promised_bytes <= bench.config.capacity_bytes

    run(work)


def test_upkeep_goes_on_after_a_store_that_was_away() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "remove" else None
        keys = chain(1, 2)
        await pool.reserve(1, TENANT, 0, keys, [ROOT, keys[0]], [PAGE] * 2)
        await runtime.sleep(10)
        bench.files.fails = lambda operation, path: None
        await runtime.sleep(RESERVATION_S)
        assert not pool._puts._pending and not pool.is_lost
        assert await bench.put(pool, keys, writer=2) == [STORED] * 2

    run(work)


def test_a_slow_recovery_is_not_taken_for_silence() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        await (await bench.open()).close()
        real_get = bench.files.get

        async def slow_get(path: str) -> bytes:
            if path.endswith(".snapshot"):
                await runtime.sleep(20)
            return await real_get(path)

        bench.files.get = slow_get  # type: ignore[method-assign]
        one = runtime.spawn(bench.open(), "one")
        two = runtime.spawn(bench.open(), "two")
        await asyncio.wait([one, two], return_when=asyncio.FIRST_COMPLETED)
        first = (one if one.done() else two).result()
        await runtime.sleep(30)
        assert not first.is_lost
        assert await bench.put(first, chain(1, 2)) == [STORED] * 2

    run(work)


def test_a_quota_holds_for_writers_at_the_same_time() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        pool.set_quota(TENANT, 3 * (PAGE + 96))

        async def one(writer: int) -> int:
            _, states, _ = await pool.reserve(writer, TENANT, 0, chain(writer, 1), [ROOT], [PAGE])
            return states[0]

        states = await asyncio.gather(*(one(writer) for writer in range(1, 11)))
        assert sorted(states) == [STORED] * 3 + [REFUSED] * 7

    run(work)


def test_a_page_that_never_fits_evicts_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 5))
        pool.set_quota(TENANT, 6 * (PAGE + 96))
        _, states, _ = await pool.reserve(1, TENANT, 0, chain(2, 1), [ROOT], [7 * PAGE])
        assert states == [REFUSED] and pool.table.count == 5

    run(work)


def test_what_was_reserved_before_an_erasure_does_not_come_after_it() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3))
        keys = chain(2, 1)
        number, _, places = await pool.reserve(1, TENANT, 0, keys, [ROOT], [PAGE])
        assert await pool.erase(TENANT) == (3, 3 * (PAGE + 96))
        crcs = await bench.write(pool, number, places, keys)
        with pytest.raises(NotFound):
            pool.commit(number, 1, crcs)
        assert pool.table.count == 0

    run(work)


def test_a_page_that_waits_for_a_parent_is_not_renewed_for_ever() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        (key,), (missing,) = chain(1, 1), chain(2, 1)
        assert await bench.put(pool, [key], parent=missing) == [STORED]
        for _ in range(10):
            assert await bench.put(pool, [key], parent=ROOT) in ([KNOWN], [STORED])
            await runtime.sleep(15)
        assert await bench.readable(pool, [key]) == 1

    run(work)


def test_pages_that_do_not_hang_together_are_all_leased() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 3)
        for key in keys:
            await bench.put(pool, [key])  # Each is a root.
        slots, _, _ = pool.match(TENANT, b"".join(keys), 30)
        assert all(pool.table.held[slot] for slot in slots)
        await bench.put(pool, chain(2, 4))
        slots, _, _ = pool.match(TENANT, b"".join(chain(2, 4)), 30)
        assert [pool.table.held[slot] for slot in slots] == [0, 0, 0, 1]

    run(work)


def test_a_namespace_that_is_closed_answers_nobody() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        number, _, places = await pool.reserve(1, TENANT, 0, chain(1, 1), [ROOT], [PAGE])
        crcs = await bench.write(pool, number, places, chain(1, 1))
        await pool.close()
        assert pool.is_lost
        with pytest.raises(StaleOwner):
            pool.commit(number, 1, crcs)
        with pytest.raises(StaleOwner):
            await pool.flush()

    run(work)


def test_others_have_their_turn_while_a_large_tenant_is_erased() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        pool = await bench.open()
        root = chain(1, 1)
        await bench.put(pool, root)
        for prompt in range(100):  # All of them hang on one page.
            await bench.put(pool, chain(prompt, 50), parent=root[0], durable=False)
        await bench.put(pool, chain(999, 50))
        pool.match(TENANT, b"".join(chain(999, 50)), 5)
        count, turns = pool.table.count, 0
        erasing = runtime.spawn(pool.erase(TENANT), "erase")
        while not erasing.done():
            turns += 1
            await runtime.sleep(0)
        assert turns > 2 * count / 1000
        assert pool.table.live_bytes == 0 and pool.table.count == 50, "what is held stays, without its pages"
        await runtime.sleep(8)
        assert pool.table.count == 0

    run(work)


def test_slots_that_were_held_when_their_pages_went_go_later() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 4))
        pool.match(TENANT, b"".join(chain(1, 3)), 50)
        assert await pool.erase(TENANT) == (4, 4 * (PAGE + 96))
        assert pool.table.count == 3 and pool.table.live_bytes == 0
        await pool.flush()
        bench.kill(pool)
        pool = await bench.open()  # Leases end with the process.
        await runtime.sleep(5)
        assert pool.table.count == 0

    run(work)


def test_small_pages_evict_others_before_they_are_refused() -> None:
    """Each takes two sectors, of which it fills little more than one: segments are full before live pages are."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=MIB)
        pool = await bench.open()
        for prompt in range(600):
            keys = chain(prompt, 1)
            number, states, places = await pool.reserve(1, TENANT, 0, keys, [ROOT], [4096])
            assert states == [STORED]
            pool.commit(number, 1, await bench.write(pool, number, places, keys))
            assert pool.index.segments.promised_bytes <= bench.config.capacity_bytes
        assert await bench.readable(pool, chain(599, 1)) == 1

    run(work)
