"""The file of the next segment, which is made ahead: used in time, and never left behind.

Run: pytest tests/kvcache/test_spare.py
"""

from __future__ import annotations

import pytest
from emberfs import AlreadyExists
from emberfs.errors import DeadlineExceeded, EmberError, NoSpace, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv.errors import StaleOwner
from emberkv.pool import UPKEEP_S, Pool
from emberkv.puts import STORED
from emberkv.segments import State
from emberkv.space import _Spare

from tests.kvcache.test_pool import MIB, TENANT, Bench, chain, run
from tests.kvcache.test_pool_misuse import segment_names


async def begun_segments(bench: Bench, pool: Pool, count: int, *, prompt: int) -> None:
    """Put until the index names so many."""
    for each in range(1000):
        if pool.index.segments.next_id > count:
            return
        assert set(await bench.put(pool, chain(prompt + each, 5))) == {STORED}
    raise AssertionError("no segment was ever full")


def test_whoever_fills_a_segment_finds_the_file_of_the_next_one_made() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench, made = Bench(runtime, capacity_bytes=64 * MIB), list[tuple[str, bool]]()
        create = bench.files.create

        async def noted(path: str, size_bytes: int) -> None:
            number = int(path.rpartition("/")[2], 16)
            made.append((path, number in pool.index.segments.by_id))
            await create(path, size_bytes)

        pool = await bench.open()
        bench.files.create = noted  # type: ignore[method-assign]
        await begun_segments(bench, pool, 3, prompt=1)
        await runtime.sleep(1)
        assert made == [(pool.space.path(number), number == 1) for number in (1, 2, 3, 4)]
        await pool.close()
        pool = await bench.open()
        await runtime.sleep(UPKEEP_S + 1)
        assert pool.space.path(4) not in bench.files.files
        assert set(await bench.files.names("/ns/segments")) == {f"{each.id:08x}" for each in pool.index.segments}

    run(work)


def test_a_spare_that_a_crash_left_goes_and_one_that_could_not_be_made_is_missed_by_nobody() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        pool = await bench.open()
        await begun_segments(bench, pool, 1, prompt=1)
        await runtime.sleep(1)
        spare = pool.space.path(2)
        assert spare in bench.files.files
        bench.kill(pool)
        pool = await bench.open()
        await runtime.sleep(UPKEEP_S + 1)
        assert spare not in bench.files.files
        await begun_segments(bench, pool, 3, prompt=50)
        assert set(await bench.files.names("/ns/segments")) == {f"{number:08x}" for number in (1, 3, 4)}
        pool.end_writer(1)
        await pool.erase(TENANT)
        await runtime.sleep(UPKEEP_S + 1)
        assert await bench.files.names("/ns/segments") == []
        refused = ("create", pool.space.path(6))
        bench.files.fails = lambda *asked: NoSpace("full") if asked == refused else None
        await begun_segments(bench, pool, 5, prompt=100)
        await runtime.sleep(1)
        assert refused[1] not in bench.files.files
        bench.files.fails = lambda operation, path: None
        await begun_segments(bench, pool, 7, prompt=200)
        assert await bench.readable(pool, chain(200, 5)) == 5

    run(work)


def test_a_spare_whose_number_somebody_else_took_is_not_used() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        pool = await bench.open()
        await bench.files.put(pool.space.path(2), b"of an owner that is over")
        await begun_segments(bench, pool, 3, prompt=1)
        assert bench.files.files[pool.space.path(2)] == b"of an owner that is over"
        assert pool.index.segments.by_id[2].end == 0 and pool.index.segments.by_id[2].state is State.SEALED
        assert await bench.readable(pool, chain(1, 5)) == 5

    run(work)


def test_a_spare_of_another_size_goes_and_its_number_is_not_used() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=256 * MIB)
        pool = await bench.open()
        await begun_segments(bench, pool, 1, prompt=1)
        await runtime.sleep(1)
        size_bytes = pool.index.segments.by_id[1].size_bytes
        segment = await pool.space.add_segment(7, 2 * size_bytes)
        assert segment.id == 3
        await runtime.sleep(UPKEEP_S + 1)
        assert pool.space.path(2) not in bench.files.files
        assert all(each.state is not State.SEALED or each.end for each in pool.index.segments)

    run(work)


def make_slowly(bench: Bench, path: str, wait_s: float, error: EmberError | None = None) -> None:
    """That file takes so long from now on, and then there is an error, though the file is there."""
    create = bench.files.create

    async def slow(asked: str, size_bytes: int) -> None:
        await bench.runtime.sleep(wait_s if asked == path else 0)
        await create(asked, size_bytes)
        if asked == path and error is not None:
            raise error

    bench.files.create = slow  # type: ignore[method-assign]


ENDS = [None, DeadlineExceeded("nobody knows"), AlreadyExists("of another owner")]


@pytest.mark.parametrize("error", ENDS)
@pytest.mark.parametrize("larger", [1, 2])
def test_of_a_spare_nothing_is_left_whatever_became_of_it_and_whoever_waits(
    larger: int, error: EmberError | None
) -> None:
    """It is asked for, and a put that needs it, or a larger one, comes whose client dies before the answer."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=256 * MIB)
        pool = await bench.open()
        spare = pool.space.path(2)
        make_slowly(bench, spare, 5, error)
        await begun_segments(bench, pool, 1, prompt=1)
        adding = runtime.spawn(pool.space.add_segment(7, larger * pool.index.segments.by_id[1].size_bytes), "put")
        await runtime.sleep(0)
        adding.cancel()
        await runtime.sleep(20)
        assert adding.cancelled()
        named = {pool.space._spare.number} if pool.space._spare else set()
        named |= {each.id for each in pool.index.segments}
        assert spare not in bench.files.files
        assert set(await bench.files.names("/ns/segments")) == {f"{number:08x}" for number in named}
        await pool.close()
        pool = await bench.open()
        assert pool.index.segments.next_id > 2, "its number is used, and whoever comes next knows"

    run(work)


def test_who_is_over_does_not_wait_for_its_spare() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=256 * MIB)
        old = await bench.open()
        make_slowly(bench, old.space.path(2), 60)
        await begun_segments(bench, old, 1, prompt=1)
        for task in old._tasks:
            task.cancel()
        await bench.open()
        began_s = runtime.now_s()
        await old.close()
        assert runtime.now_s() - began_s < 1
        await runtime.sleep(100)
        assert old.space.path(2) not in bench.files.files

    run(work)


def test_no_spare_comes_after_the_end() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=256 * MIB)
        pool = await bench.open()
        make_slowly(bench, pool.space.path(2), 5)
        await begun_segments(bench, pool, 1, prompt=1)
        await pool.space.add_segment(7, 2 * pool.index.segments.by_id[1].size_bytes)
        await pool.close()
        after = set(bench.files.files)
        await runtime.sleep(10)
        assert set(bench.files.files) == after

    run(work)


@pytest.mark.parametrize("is_known", [False, True])
def test_an_owner_that_is_over_removes_no_spare_whose_number_the_next_one_used(is_known: bool) -> None:
    """It could not tell whether it was made, and was stopped before it dropped it, or just before it removed it."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "create" else None
        old.space._spare = _Spare(1, MIB, old.space._begin_making(1, MIB))
        await runtime.sleep(0.1)
        bench.files.fails = lambda operation, path: None
        if is_known:
            old.space.drop_spare()
            remove = bench.files.remove

            async def late(path: str) -> None:
                if path == old.space.path(1):
                    await runtime.sleep(30)
                await remove(path)

            bench.files.remove = late  # type: ignore[method-assign]
            await runtime.sleep(2)
        for task in old._tasks[:1] if is_known else old._tasks:  # It is stopped, and so it beats no more.
            task.cancel()
        new = await bench.open()
        await bench.put(new, chain(2, 20))
        assert (new.space.path(1) in segment_names(bench)) != is_known
        if not is_known:
            old._wal.is_lost = False
            old.space.drop_spare()
            with pytest.raises(StaleOwner):
                await old.keep_up()
        await runtime.sleep(60)
        assert {new.space.path(each.id) for each in new.index.segments} <= segment_names(bench)
        assert await bench.readable(new, chain(2, 20)) == 20

    run(work)
