"""A store that is full, or does not take the index for another reason: what is there is served, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import emberfs
import pytest
from emberfs.disk import LocalDisk
from emberfs.errors import EmberError, NoSpace, Unavailable
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.sim.loop import SimRuntime
from emberkv import wal
from emberkv.errors import ReadOnly, StaleOwner
from emberkv.files import StoreFiles
from emberkv.pool import UPKEEP_S
from emberkv.puts import STORED
from emberkv.wal import RETRY_S_MAX

from tests.kvcache.test_pool import MIB, TENANT, Bench, chain, run, run_on_this_machine

WRITES = ("append", "put", "claim")


def is_full(operation: str, path: str) -> EmberError | None:
    """To what makes the index, what the chunks of a store say; small files such as the owner's go with the metadata."""
    is_index = operation in WRITES and "/owner/" not in path and "/segments/" not in path
    return NoSpace("the disk is full") if is_index else None


def has_room(operation: str, path: str) -> EmberError | None:
    return None


def test_a_full_store_serves_refuses_and_recovers_by_itself() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3))
        bench.files.fails = is_full
        with pytest.raises(ReadOnly, match="takes no pages now: the disk is full"):
            await bench.put(pool, chain(2, 3))
        for _ in range(20):
            await runtime.sleep(3)
            with pytest.raises(ReadOnly):
                await bench.put(pool, chain(3, 3))
            with pytest.raises(ReadOnly):
                await pool.flush()
            assert not pool.is_lost and "full" in pool.failure
            assert await bench.readable(pool, chain(1, 3)) == 3
        bench.files.fails = has_room
        await runtime.sleep(RETRY_S_MAX + 1)
        assert await bench.put(pool, chain(3, 3)) == [STORED] * 3
        assert not pool.failure
        assert not pool._puts._reservations and not pool._puts._pending
        bench.kill(pool)
        pool = await bench.open()
        assert await bench.readable(pool, chain(1, 3)) == await bench.readable(pool, chain(3, 3)) == 3

    run(work)


@pytest.mark.parametrize("nth", range(40))
def test_from_any_write_on_the_store_is_full_and_nothing_acknowledged_is_lost(nth: int) -> None:
    """And a piece of what a log refused is there."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        count, until_s = 0, 0.0

        def fails(operation: str, path: str) -> EmberError | None:
            nonlocal count, until_s
            if operation != "create" and is_full(operation, path) is None:
                return None
            count += 1
            if count == nth:
                until_s = runtime.now_s() + 5
            return NoSpace("the disk is full") if runtime.now_s() < until_s else None

        bench.files.fails = fails
        acknowledged = []
        for life in range(3):
            while True:
                try:
                    pool = await bench.open()
                    break
                except NoSpace:  # There was nothing yet that could be served.
                    assert not life
                    await runtime.sleep(1)
            pool._wal.log_bytes_max = 2000
            for prompt in range(8):
                keys = chain(10 * life + prompt + 1, 3)
                try:
                    await bench.put(pool, keys)
                    acknowledged.append(keys)
                except (ReadOnly, NoSpace):
                    pass
                for there in acknowledged:
                    assert await bench.readable(pool, there) == 3
                await pool.remove(TENANT, chain(10 * life + prompt, 3)[2:])
                acknowledged = [keys for keys in acknowledged if keys != chain(10 * life + prompt, 3)]
                await runtime.sleep(0.6 if life == 1 else 0.0)
            bench.kill(pool)
        pool = await bench.open()
        for there in acknowledged:
            assert await bench.readable(pool, there) == 3
        await runtime.sleep(RETRY_S_MAX + 1)
        assert not pool.failure and len(acknowledged) >= 2
        assert await bench.put(pool, chain(99, 2)) == [STORED] * 2

    run(work, nth)


def test_who_is_overtaken_while_the_store_is_full_is_over() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        await bench.put(old, chain(1, 3))
        bench.files.fails = is_full
        with pytest.raises(ReadOnly):
            await bench.put(old, chain(2, 3))
        for task in old._tasks:
            task.cancel()  # It does not beat any more.
        new = await bench.open()
        bench.files.fails = has_room
        assert await bench.put(new, chain(3, 3)) == [STORED] * 3
        await runtime.sleep(RETRY_S_MAX + 1)
        assert old.is_lost
        with pytest.raises(StaleOwner):
            await bench.put(old, chain(4, 3))
        bench.kill(new)
        new = await bench.open()
        assert await bench.readable(new, chain(3, 3)) == 3
        assert await bench.readable(new, chain(2, 3)) == 0

    run(work)


def test_a_namespace_is_opened_on_a_full_store() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3))
        bench.kill(pool)
        bench.files.fails = is_full
        pool = await bench.open()
        await runtime.sleep(60)
        assert await bench.readable(pool, chain(1, 3)) == 3
        with pytest.raises(ReadOnly):
            await bench.put(pool, chain(2, 3))
        await pool.close()
        pool = await bench.open()
        bench.files.fails = has_room
        await runtime.sleep(RETRY_S_MAX + 1)
        assert await bench.put(pool, chain(2, 3)) == [STORED] * 3
        assert await bench.readable(pool, chain(1, 3)) == 3

    run(work)


def test_what_is_evicted_on_a_full_store_leaves_its_file_until_that_is_known() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 20))
        pool.space.end_segment(1)
        before = {path for path in bench.files.files if "/segments/" in path}
        bench.files.fails = is_full
        await pool.remove(TENANT, chain(1, 20))
        await runtime.sleep(30)
        assert before <= set(bench.files.files)
        bench.files.fails = has_room
        await runtime.sleep(RETRY_S_MAX + 3)
        assert not before & set(bench.files.files)

    run(work)


def test_a_store_that_cannot_say_who_owns_is_asked_again_and_the_log_goes_on() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await pool.flush()
        bench.files.fails = lambda operation, path: Unavailable("no") if operation == "exists" else None
        with pytest.raises(Unavailable):
            await bench.put(pool, chain(1, 3))
        bench.files.fails = has_room
        assert not pool.failure
        assert await bench.put(pool, chain(2, 3)) == [STORED] * 3
        assert sum(path.endswith(".snapshot") for path in bench.files.files) == 1 == pool._wal._number

    run(work)


def test_a_head_that_comes_late_is_not_gone_by() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3))
        (late,) = (path for path in bench.files.files if "/head-" in path)
        data = bench.files.files[late]
        pool._wal.want_snapshot()
        await pool.flush()
        assert late not in bench.files.files
        bench.files.files[late] = data
        bench.kill(pool)
        assert await bench.readable(await bench.open(), chain(1, 3)) == 3

    run(work)


def test_a_small_store_fills_and_is_given_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of a machine: what its disk says is free is what the test leaves it."""
    left_bytes = 12 * MIB

    def free_bytes(disk: LocalDisk) -> int:
        return left_bytes - sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.setattr(LocalDisk, "free_bytes", free_bytes)
    monkeypatch.setattr(wal, "RETRY_S", 0.1)
    monkeypatch.setattr(wal, "RETRY_S_MAX", 0.1)

    async def work(runtime: AsyncioRuntime) -> None:
        nonlocal left_bytes
        await runtime.enter_loop()
        client = emberfs.connect_async(f"ember://{tmp_path}/store", reserve_bytes=0)
        try:
            bench = Bench(runtime, capacity_bytes=64 * MIB, files=StoreFiles(client))
            pool = await bench.open()
            acknowledged, refused = 0, 0
            while not refused:
                try:
                    await bench.put(pool, chain(acknowledged, 20))
                    acknowledged += 1
                except (ReadOnly, NoSpace):
                    refused = acknowledged
            assert 10 < acknowledged < 400
            left_bytes = 0
            with pytest.raises((ReadOnly, NoSpace)):  # In the room that the log's last block has some entries may go.
                for prompt in range(5000, 10000):
                    await pool.remove(TENANT, chain(prompt % acknowledged, 20)[19:])
                    pool.pin(TENANT, chain(0, 1), 60)
                    await pool.flush()
            with pytest.raises(ReadOnly):
                await bench.put(pool, chain(9999, 1))
            there = [await bench.readable(pool, chain(prompt, 20)) for prompt in range(acknowledged)]
            assert min(there) >= 19
            left_bytes = 64 * MIB
            while pool.failure:
                await runtime.sleep(0.05)
            assert await bench.put(pool, chain(9999, 5)) == [STORED] * 5
            bench.kill(pool)
            await pool._wal._end_log()  # The process goes on, and would miss it.
            pool = await bench.open()
            assert [await bench.readable(pool, chain(prompt, 20)) for prompt in range(acknowledged)] == there
            assert await bench.readable(pool, chain(9999, 5)) == 5
            await pool.close()
        finally:
            await client.close()

    run_on_this_machine(work)


def test_a_put_that_needs_a_segment_waits_for_the_removal_of_one_file_not_of_all() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 40))
        pool.end_writer(1)
        await pool.remove(TENANT, chain(1, 40))
        count = len(pool.index.segments.by_id)
        remove = bench.files.remove

        async def slowly(path: str) -> None:
            await runtime.sleep(10.0)
            await remove(path)

        bench.files.remove = slowly  # type: ignore[method-assign]
        await runtime.sleep(2 * UPKEEP_S)
        began_s = runtime.now_s()
        assert pool._making_room.locked()
        assert await bench.put(pool, chain(2, 1), writer=2) == [STORED]
        assert runtime.now_s() - began_s < 11.0 < 10.0 * (count - 1)
        await runtime.sleep(10.0 * count)
        assert pool.space.counts.removed_segments == count

    run(work)
