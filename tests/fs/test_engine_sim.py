"""The chunk engine on the simulated disk: the suite again, and what only that disk can do (fail, be slow)."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from emberfs.engine import Action, Update
from emberfs.engine.allocator import GROUP_BLOCKS, SizeClass
from emberfs.engine.limbo import Limbo
from emberfs.engine.scrub import check, scrub
from emberfs.errors import Conflict, Corruption, StoreClosed, TargetFailed, UpdateUnknown
from emberfs.kv.memory import MemoryKV
from emberfs.testing.engine import KIB, MIB, Bench, EngineConformance, Run, chunk, pattern
from emberfs.testing.replica import ReplicaConformance
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run

SEEDS = range(10)


@pytest.fixture
def runtime() -> SimRuntime:
    return SimRuntime(0)


@pytest.fixture(name="run")
def run_on_sim(runtime: SimRuntime) -> Run:
    return lambda work: runtime.run(lambda _: work)


@pytest.fixture
def bench(runtime: SimRuntime) -> Bench:
    return Bench(runtime, SimDisk(runtime), MemoryKV(runtime, persist=lambda: runtime.sleep(1e-4)))


class TestSimEngine(EngineConformance):
    pass


class TestSimReplica(ReplicaConformance):
    pass


class SimBench(Bench):
    disk: SimDisk
    runtime: SimRuntime


def on_sim(
    work: Callable[[SimBench], Awaitable[Any]],
    *,
    seed: int = 0,
    index: Callable[[SimRuntime], MemoryKV] = MemoryKV,
    reserve_bytes: int = 0,
    **options: Any,
) -> Any:
    """Run `work` on a new engine over a new simulated disk."""

    async def main(runtime: SimRuntime) -> Any:
        bench = SimBench(runtime, SimDisk(runtime, **options), index(runtime))
        await bench.open(reserve_bytes=reserve_bytes)
        result = await work(bench)
        await bench.engine.close()
        return result

    return run(seed, main)


# ---- a failing disk


@pytest.mark.parametrize("fault", ["fail_sync", "fail_write"])
def test_after_a_failed_write_or_sync_updates_are_refused_and_reads_go_on(fault: str) -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(10_000))
        file, _ = bench.engine.allocator.place((await bench.committed()).position)  # type: ignore[union-attr]
        getattr(bench.disk, fault)(file)
        with pytest.raises(TargetFailed, match="failed"):
            await bench.write(10_000, b"lost")
        for again in (bench.write(0, b"x"), bench.remove(), bench.commit(1)):
            with pytest.raises(TargetFailed, match="reopen the store"):
                await again
        assert await bench.read() == pattern(10_000)
        await bench.reopen()
        assert await bench.read() == pattern(10_000)
        assert await bench.blocks() == 1
        await bench.write(0, b"taken again")

    on_sim(work)


def test_a_sync_that_fails_fails_everyone_who_shares_it() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, b"before")
        bench.disk.fail_sync(bench.disk.open("blocks-64K"))
        tasks = [bench.runtime.spawn(bench.write(0, b"x", name=chunk(n)), "writer") for n in range(1, 9)]
        for task in tasks:
            with pytest.raises(TargetFailed):
                await task
        assert await bench.blocks() == 1

    for seed in SEEDS:
        on_sim(work, seed=seed)


@pytest.mark.parametrize("error", [TargetFailed, UpdateUnknown])
def test_an_index_commit_in_doubt_stops_updates(error: type[Exception]) -> None:
    """Whether its blocks are taken is known only after a restart."""

    class BrokenKV(MemoryKV):
        breaks = False

        async def _apply_group(self, group: Sequence[Any]) -> None:
            await super()._apply_group(group)
            if self.breaks:
                self.breaks = False
                for batch in group:
                    batch.error = error("it may have happened")

    async def work(bench: SimBench) -> None:
        await bench.write(0, b"one")
        bench.index.breaks = True  # type: ignore[attr-defined]
        with pytest.raises(TargetFailed, match="index commit failed"):
            await bench.write(0, b"two")
        with pytest.raises(TargetFailed):
            await bench.write(0, b"three")
        await bench.reopen()
        assert await bench.read() == b"two"
        assert await bench.blocks() == 1

    on_sim(work, index=BrokenKV)


class Interrupt(BaseException):
    """What asyncio's tasks hand on, unlike KeyboardInterrupt, which ends their loop."""


@pytest.mark.parametrize("doubt", [UpdateUnknown, TargetFailed, Interrupt])
def test_blocks_that_a_commit_in_doubt_may_name_are_not_given_away(doubt: type[BaseException]) -> None:
    class DoubtfulKV(MemoryKV):
        breaks = False

        async def _apply_group(self, group: Sequence[Any]) -> None:
            await super()._apply_group(group)
            if self.breaks:
                self.breaks = False
                raise doubt("it may have happened")

    async def work(bench: SimBench) -> None:
        await bench.write(0, b"one")
        bench.index.breaks = True  # type: ignore[attr-defined]
        with pytest.raises(Interrupt if doubt is Interrupt else TargetFailed):
            await bench.write(0, b"two", name=chunk(1))
        with pytest.raises(TargetFailed, match="reopen the store"):
            await bench.write(0, b"three")
        named = await bench.engine.record(chunk(1))
        assert named is not None and named.committed is not None, "it did happen"
        assert bench.engine.allocator.allocate(3) != named.committed.position

    on_sim(work, index=DoubtfulKV)


def test_an_update_in_the_air_does_not_write_once_the_target_has_failed() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(9000))
        read = bench.disk.read

        async def read_while_the_target_fails(items: Any, landed: Any = None) -> list[int]:
            bench.disk.fail_sync(bench.disk.open("blocks-64K"))
            with pytest.raises(TargetFailed):
                await bench.write(0, b"x", name=chunk(1))
            bench.note_writes()
            return await read(items, landed)

        bench.disk.read = read_while_the_target_fails  # type: ignore[method-assign]
        with pytest.raises(TargetFailed, match="reopen the store"):
            await bench.write(100, b"into the middle: it has to read the rest")
        assert bench.writes == []

    on_sim(work)


def test_a_disk_that_fails_to_reserve_space_fails_the_target() -> None:
    async def work(bench: SimBench) -> None:
        def fail(*_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        allocate, bench.disk.allocate = bench.disk.allocate, fail  # type: ignore[method-assign]
        with pytest.raises(TargetFailed, match="space could not be reserved"):
            await bench.write(0, b"x")
        bench.disk.allocate = allocate  # type: ignore[method-assign]
        with pytest.raises(TargetFailed, match="reopen the store"):
            await bench.write(0, b"x")
        await bench.reopen()
        await bench.write(0, b"taken again")
        assert await bench.blocks() == 1

    on_sim(work)


def test_a_sector_that_cannot_be_read_is_found_by_scrub() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(5 * MIB))
        await bench.write(0, pattern(100), name=chunk(1))
        committed = await bench.committed()
        assert committed is not None
        file, block = bench.engine.allocator.place(committed.position)
        bench.disk.fail_read(file, block + 100)
        report = await scrub(bench.engine, runtime=bench.runtime)
        assert [(found.chunk, found.offset) for found in report.findings] == [("7.0", 0)]
        assert "cannot be read" in report.findings[0].message

    on_sim(work)


def test_scrub_finds_what_the_page_cache_hides() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(100_000))
        committed = await bench.committed()
        assert committed is not None
        file, block = bench.engine.allocator.place(committed.position)
        bench.disk.flip_bit(file, block + 50_000, is_cached=True)
        assert await bench.read() == pattern(100_000)
        report = await scrub(bench.engine, runtime=bench.runtime)
        assert [(found.chunk, found.offset) for found in report.findings] == [("7.0", 49_152)]

    on_sim(work)


# ---- closing


def test_close_waits_for_what_is_in_the_air_and_refuses_what_comes_later() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(MIB))
        await bench.write(0, b"pending", name=chunk(1), publish=False)
        calls = [
            bench.read(0, MIB),
            bench.write(100, b"into the middle: it has to read the rest"),
            bench.write(0, pattern(MIB), name=chunk(2), publish=False),
            bench.commit(1, name=chunk(1)),
            scrub(bench.engine, runtime=bench.runtime, bytes_per_s_max=MIB),
        ]
        tasks = [bench.runtime.spawn(call, "call") for call in calls]
        in_the_air = 0
        read, close = bench.disk.read, bench.disk.close

        async def counted_read(items: Any, landed: Any = None) -> list[int]:
            nonlocal in_the_air
            in_the_air += 1
            try:
                return await read(items, landed)
            finally:
                in_the_air -= 1

        def checked_close() -> None:
            assert in_the_air == 0 and all(task.done() for task in tasks[:4])
            close()

        bench.disk.read, bench.disk.close = counted_read, checked_close  # type: ignore[method-assign]
        await bench.runtime.sleep(1e-9)  # All of them have begun.
        for closing in [bench.runtime.spawn(bench.engine.close(), "close") for _ in range(2)]:
            await closing
        for task in tasks[:4]:
            await task
        with pytest.raises(StoreClosed):
            await tasks[4]
        for late in (bench.read(), bench.write(0, b"x"), bench.commit(1), scrub(bench.engine, runtime=bench.runtime)):
            with pytest.raises(StoreClosed):
                await late
        with pytest.raises(StoreClosed):
            bench.engine.trim(MIB)

    for seed in SEEDS:
        on_sim(work, seed=seed)


# ---- reads and updates at the same time


def reuse_at_once(self: Limbo, positions: Sequence[int]) -> None:
    """Bug: gives a freed block away although a read of it may be in the air."""
    for position in positions:
        self._release(position)


async def read_while_replacing(bench: SimBench) -> None:
    """Long reads (the disk is slow) beside updates that free blocks and want new ones."""
    contents = [pattern(9000, number) for number in range(30)]
    await bench.replace(contents[0])

    async def reader() -> None:
        for _ in range(20):
            assert await bench.read(0, 16 * KIB) in contents

    readers = [bench.runtime.spawn(reader(), "reader") for _ in range(4)]
    for content in contents[1:]:
        await bench.replace(content)
        await bench.write(0, content[::-1], name=chunk(1))
    for task in readers:
        await task


def test_a_freed_block_is_not_written_to_while_a_read_of_it_is_in_the_air() -> None:
    """Reads verify and try again, so a reader would not notice: the test looks at the blocks themselves."""

    async def work(bench: SimBench) -> None:
        in_the_air: list[tuple[int, int, int]] = []
        read, write = bench.disk.read, bench.disk.write

        async def watched_read(items: Any, landed: Any = None) -> list[int]:
            ranges = [(file, at, at + sum(map(len, pieces))) for file, pieces, at in items]
            in_the_air.extend(ranges)
            try:
                return await read(items, landed)
            finally:
                for each in ranges:
                    in_the_air.remove(each)

        async def watched_write(items: Any) -> None:
            for file, payload, at in items:
                hit = [each for each in in_the_air if each[0] == file and each[1] < at + len(payload) and at < each[2]]
                assert not hit, "a block was given away during a read"
            await write(items)

        bench.disk.read, bench.disk.write = watched_read, watched_write  # type: ignore[method-assign]
        await read_while_replacing(bench)
        bench.disk.read, bench.disk.write = read, write  # type: ignore[method-assign]
        assert await bench.blocks() == 2, "and in the end they are all given back"
        assert bench.engine.allocator.classes[16].taken[0].bit_count() == 2

    for seed in SEEDS:
        on_sim(work, seed=seed)
    with pytest.raises(AssertionError, match="given away"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Limbo, "add", reuse_at_once)
        for seed in SEEDS:
            on_sim(work, seed=seed)


def test_readers_beside_appends_and_truncates_see_whole_versions() -> None:
    """A truncated tail is written over by the next append: a read that began before must try again."""

    async def work(bench: SimBench) -> None:
        base = pattern(8192)
        contents = {base, *(base + pattern(4096, number) for number in range(20))}
        await bench.write(0, base)

        async def reader() -> None:
            for _ in range(30):
                assert await bench.read(0, 16 * KIB) in contents

        async def writer() -> None:
            for number in range(20):
                await bench.write(8192, pattern(4096, number))
                await bench.truncate(8192)

        for task in [bench.runtime.spawn(each, "task") for each in (reader(), reader(), writer())]:
            await task

    for seed in SEEDS:
        on_sim(work, seed=seed)


def test_scrub_beside_writers_finds_nothing() -> None:
    async def work(bench: SimBench) -> None:
        async def writer() -> None:
            for number in range(30):
                await bench.replace(pattern(9000, number))
                await bench.write(9000, b"x", name=chunk(number % 3))

        task = bench.runtime.spawn(writer(), "writer")
        while not task.done():
            await bench.runtime.sleep(1e-4)
            assert (await scrub(bench.engine, runtime=bench.runtime)).findings == []
        await task

    for seed in SEEDS:
        on_sim(work, seed=seed)


def test_check_refuses_a_target_that_is_written_to() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, b"x")
        at, now = bench.engine.snapshot(), bench.engine.snapshot
        await bench.write(0, b"y")
        once = iter([at])
        bench.engine.snapshot = lambda: next(once, None) or now()  # type: ignore[method-assign]
        assert (await check(bench.engine)).findings == [], "a try that met a write is made again"
        bench.engine.snapshot = lambda: at  # type: ignore[method-assign]
        with pytest.raises(Conflict, match="nobody writes"):
            await check(bench.engine)

    on_sim(work)


def test_scrub_keeps_to_its_rate() -> None:
    async def work(bench: SimBench) -> None:
        for number in range(8):
            await bench.write(0, pattern(MIB), name=chunk(number))
        began_s = bench.runtime.now_s()
        await scrub(bench.engine, runtime=bench.runtime, bytes_per_s_max=2 * MIB)
        assert 4.0 <= bench.runtime.now_s() - began_s < 4.1

    on_sim(work)


def test_flushes_that_would_not_fit_one_index_transaction_are_cut() -> None:
    async def work(bench: SimBench) -> None:
        def batch(first: int) -> list[Update]:
            payload = memoryview(bytes(256 * 4096))
            return [Update(chunk(n), Action.WRITE, 0, payload, granule_log2=12) for n in range(first, first + 24)]

        # Each record is 1.1 KiB; a limit of 64 KiB stands for the real one.
        bench.engine._flushes._weight_max = 64 << 10
        tasks = [bench.runtime.spawn(bench.engine.prepare(batch(24 * n), publish=True), "batch") for n in range(10)]
        for task in tasks:
            await task
        assert bench.engine.counters.flushes >= 5
        assert await bench.blocks() == 240

    on_sim(work)


def test_a_chunk_with_a_damaged_record_can_be_removed_and_its_block_found_again() -> None:
    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(9000))
        await bench.damage_record()
        with pytest.raises(Corruption):
            await bench.write(4096, b"x")
        await bench.remove()
        assert await bench.read() == b""
        report = await check(bench.engine, repair=True)
        assert [found.kind for found in report.findings] == ["leaked"]
        assert not (await check(bench.engine)).findings

    on_sim(work)


def test_blocks_that_come_and_go_in_a_nearly_full_group_take_no_memory() -> None:
    size_class = SizeClass(16, SimDisk(SimRuntime(0)))
    for _ in range(GROUP_BLOCKS - 1):
        size_class.allocate(reserve_bytes=0)
    for _ in range(100):
        size_class.release(size_class.allocate(reserve_bytes=0))
    assert len(size_class._open_groups) == 1
    assert [size_class.allocate(reserve_bytes=0) for _ in range(2)] == [GROUP_BLOCKS - 1, GROUP_BLOCKS]
    size_class.release(7)
    assert size_class.allocate(reserve_bytes=0) == 7, "a group that was full is looked at again"
