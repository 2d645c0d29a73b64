"""The chunk engine on a disk that fills up, in simulation: what is refused, what is left, and what comes back."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from emberfs.engine import Action, Update
from emberfs.engine.scrub import scrub
from emberfs.errors import NoSpace, TargetFailed
from emberfs.testing.engine import KIB, MIB, chunk, pattern
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.volume import Allocate

from tests.fs.test_engine_sim import SimBench, on_sim


def test_a_full_disk_refuses_cleanly_and_takes_updates_again_after_a_removal() -> None:
    async def work(bench: SimBench) -> None:
        count = 0
        with pytest.raises(NoSpace, match="disk is full: 65536 bytes left"):
            while True:
                await bench.write(0, pattern(MIB, count), name=chunk(count))
                count += 1
        assert count == 8
        assert await bench.blocks() == count
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(2 * MIB), name=chunk(count))
        for number in range(count):
            assert await bench.read(name=chunk(number)) == pattern(MIB, number)
        await bench.truncate(10, name=chunk(1))
        await bench.remove(name=chunk(0))
        await bench.write(0, pattern(MIB, 99), name=chunk(99))
        assert await bench.read(name=chunk(99)) == pattern(MIB, 99)
        await bench.reopen()
        assert await bench.blocks() == count

    on_sim(work, capacity_bytes=8 * MIB + 64 * KIB)


def test_the_reserve_is_left_free() -> None:
    async def work(bench: SimBench) -> None:
        with pytest.raises(NoSpace, match="above the reserve of 4194304"):
            for count in range(100):
                await bench.write(0, pattern(MIB, count), name=chunk(count))
        assert 4 * MIB <= bench.disk.free_bytes() < 5 * MIB

    on_sim(work, capacity_bytes=16 * MIB, reserve_bytes=4 * MIB)


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_what_blocks_of_one_size_leave_blocks_of_another_take(kept: int) -> None:
    """Of every `kept` chunks one stays: what is between the others is room, too."""

    async def fill(bench: SimBench, size: int, begin: int) -> range:
        count = begin
        with pytest.raises(NoSpace, match="disk is full"):
            while True:
                await bench.write(0, pattern(size, count), name=chunk(count))
                count += 1
        return range(begin, count)

    async def work(bench: SimBench) -> None:
        there = list(await fill(bench, MIB, 0))
        assert len(there) == 30
        begin = 100
        for size in (64 * KIB, 4 * MIB, 128 * KIB, MIB):
            for number in [number for number in there if not kept or number % kept]:
                await bench.remove(name=chunk(number))
                there.remove(number)
            used_bytes, free_bytes, idle_bytes = bench.engine.space()
            assert used_bytes + free_bytes + idle_bytes >= 29 * MIB, "what was removed is room"
            new = await fill(bench, size, begin)
            assert 0 <= free_bytes + idle_bytes - len(new) * size < size + MIB
            assert bench.disk.free_bytes() >= 2 * MIB, "the reserve"
            there += new
            begin += 1000
            for number in there:
                assert len(await bench.read(name=chunk(number))) in (MIB, 64 * KIB, 4 * MIB, 128 * KIB)
            await bench.reopen()
        report = await scrub(bench.engine, runtime=bench.runtime)
        assert report.findings == [] and report.chunks == len(there)

    on_sim(work, capacity_bytes=32 * MIB + 64 * KIB, reserve_bytes=2 * MIB)


def test_a_hole_is_taken_before_the_file_grows() -> None:
    async def work(bench: SimBench) -> None:
        for number in range(6):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        for number in (1, 2, 4):
            await bench.remove(name=chunk(number))
        size_class = bench.engine.allocator.classes[20]
        before = size_class.file_bytes
        assert bench.engine.trim(64 * MIB) >= 3 * MIB
        assert bench.engine.space().idle_bytes < MIB
        for number in range(6, 9 + (before >> 20) - 6):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        assert size_class.file_bytes == before
        await bench.write(0, pattern(MIB), name=chunk(99))
        assert size_class.file_bytes > before
        for number in (0, 3, 5, 6, 7, 8):
            assert await bench.read(name=chunk(number)) == pattern(MIB, number)

    on_sim(work)


def test_after_a_restart_it_is_known_which_free_blocks_have_space() -> None:
    """Somebody else fills the disk below the reserve: what has space is taken nonetheless, and no hole is."""

    async def work(bench: SimBench) -> None:
        for number in range(8):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        for number in range(3):
            await bench.remove(name=chunk(number))
        assert bench.engine.trim(64 * MIB) >= 3 * MIB
        for number in (4, 5):
            await bench.remove(name=chunk(number))
        await bench.reopen()
        bench.disk.allocate(bench.disk.open("another"), 0, bench.disk.free_bytes() - 4 * MIB)
        for number in (4, 5):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(MIB), name=chunk(9))
        assert bench.engine.trim(64 * MIB) == 0, "what is a hole already gives nothing"
        await bench.reopen()
        assert bench.engine.trim(64 * MIB) == 0, "nor if that is the first that is asked"
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(MIB), name=chunk(9))

    on_sim(work, capacity_bytes=64 * MIB, reserve_bytes=8 * MIB)


def test_a_disk_that_does_not_say_where_it_has_space_fails_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[tuple[int, int]]:
        raise OSError(errno.EIO, "the medium is gone")

    async def work(bench: SimBench) -> None:
        await bench.write(0, pattern(MIB))
        await bench.reopen()
        monkeypatch.setattr(SimDisk, "holes", fail)
        with pytest.raises(TargetFailed, match="does not say where"):
            await bench.write(0, pattern(MIB), name=chunk(1))

    on_sim(work)


def test_a_file_system_too_full_to_give_space_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    punch = SimDisk.punch

    def refuse(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, "no room for that")

    async def work(bench: SimBench) -> None:
        for number in range(8):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        for number in range(4):
            await bench.remove(name=chunk(number))
        monkeypatch.setattr(SimDisk, "punch", refuse)
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(2 * MIB), name=chunk(9))
        monkeypatch.setattr(SimDisk, "punch", punch)
        await bench.write(0, pattern(2 * MIB), name=chunk(9))

    on_sim(work, capacity_bytes=8 * MIB + 64 * KIB)


@pytest.mark.parametrize("scattered", [False, True])
def test_what_is_given_back_for_a_write_takes_a_moment(monkeypatch: pytest.MonkeyPatch, scattered: bool) -> None:
    punch, lengths = SimDisk.punch, list[int]()

    def counted(disk: SimDisk, file: int, offset: int, length: int) -> bool:
        lengths.append(length)
        return punch(disk, file, offset, length)

    monkeypatch.setattr(SimDisk, "punch", counted)

    async def work(bench: SimBench) -> None:
        for number in range(1000):
            await bench.write(0, b"x", name=chunk(number))
        for number in range(0, 1000, 2 if scattered else 1):
            await bench.remove(name=chunk(number))
        bench.disk.allocate(bench.disk.open("another"), 0, bench.disk.free_bytes() - MIB // 2)
        for count in range(1, 4):
            await bench.write(0, pattern(MIB, count), name=chunk(1000 + count))
            assert sum(lengths) <= 16 * MIB and len(lengths) <= 256

    on_sim(work, capacity_bytes=128 * MIB)


def test_a_file_system_that_gives_nothing_back_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimDisk, "punch", lambda *_: False)

    async def work(bench: SimBench) -> None:
        for number in range(7):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        await bench.remove(name=chunk(0))
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(2 * MIB), name=chunk(9))
        await bench.write(0, pattern(MIB, 9), name=chunk(9))
        assert await bench.read(name=chunk(9)) == pattern(MIB, 9)

    on_sim(work, capacity_bytes=8 * MIB + 64 * KIB)


def test_what_would_not_do_stays_with_the_store() -> None:
    """Somebody else has filled the disk: its free blocks are all that the store can still use."""

    async def work(bench: SimBench) -> None:
        for number in range(8):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        for number in range(4):
            await bench.remove(name=chunk(number))
        other = bench.disk.open("another")
        bench.disk.allocate(other, 0, bench.disk.free_bytes() - MIB)
        with pytest.raises(NoSpace):
            await bench.write(0, pattern(2 * MIB), name=chunk(9))
        for number in range(4):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        assert bench.engine.space().idle_bytes < MIB

    on_sim(work, capacity_bytes=64 * MIB, reserve_bytes=8 * MIB)


def test_space_that_cannot_be_given_back_fails_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise OSError(errno.EIO, "the medium is gone")

    monkeypatch.setattr(SimDisk, "punch", fail)

    async def work(bench: SimBench) -> None:
        for number in range(8):
            await bench.write(0, pattern(MIB, number), name=chunk(number))
        for number in range(3):
            await bench.remove(name=chunk(number))
        with pytest.raises(TargetFailed, match="could not be given back"):
            await bench.write(0, pattern(2 * MIB), name=chunk(9))

    on_sim(work, capacity_bytes=8 * MIB + 64 * KIB)


def test_of_a_batch_that_does_not_fit_nothing_is_left() -> None:
    async def work(bench: SimBench) -> None:
        batch = [Update(chunk(number), Action.WRITE, 0, memoryview(pattern(MIB, number))) for number in range(10)]
        with pytest.raises(NoSpace):
            await bench.engine.prepare(batch, publish=True)
        assert await bench.blocks() == 0
        await bench.engine.prepare(batch[:8], publish=True)
        assert await bench.blocks() == 8

    on_sim(work, capacity_bytes=8 * MIB + 64 * KIB)


def test_space_is_reserved_in_steps_of_at_most_64_mib() -> None:
    async def work(bench: SimBench) -> list[int]:
        for number in range(10):
            for class_log2 in (16, 20, 23, 26):
                await bench.write(0, b"x" * ((1 << class_log2) - 1), name=chunk(100 * class_log2 + number))
        return [each.length for each in bench.disk.operations if isinstance(each, Allocate)]

    steps = on_sim(work, record=True)
    one_block = (64 << 20) + 2 * (64 << 10)
    assert max(steps) == one_block and all(step <= 64 << 20 for step in steps if step != one_block)
    assert min(steps) == 1 << 20
