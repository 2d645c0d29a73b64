"""The simulated disk: what is synced survives a crash, what is not may survive in part, faults come to order."""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from emberfs.disk import Disk
from emberfs.kv.memory import MemoryKV
from emberfs.runtime import Runtime
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.testing.sim.volume import BLOCK_BYTES, SECTOR_BYTES, Mark, Volume, crash_points, crash_states

BLOCK = BLOCK_BYTES


async def put(disk: Disk, file: int, payload: bytes, offset: int = 0) -> None:
    await disk.write([(file, memoryview(payload), offset)])


async def get(disk: Disk, file: int, length: int, offset: int = 0) -> bytes:
    buffer = bytearray(length)
    (count,) = await disk.read([(file, [memoryview(buffer)], offset)])
    return bytes(buffer[:count])


def on_disk(work: Callable[[SimDisk], Awaitable[Any]], *, seed: int = 0, **options: Any) -> Any:
    """Run `work` on a new disk."""

    async def main(runtime: SimRuntime) -> Any:
        return await work(SimDisk(runtime, **options))

    return run(seed, main)


async def synced_file(disk: SimDisk, content: bytes = b"") -> int:
    """A file whose name and content are durable."""
    file = disk.open("file")
    await put(disk, file, content)
    await disk.sync([file])
    await disk.sync_directory()
    return file


def expect_errno(number: int) -> Any:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


# ---- an ordinary disk


def test_a_file_reads_as_a_bytearray_would(seeds: Sequence[int]) -> None:
    async def work(disk: SimDisk) -> None:
        rng = random.Random(0)
        file, model = disk.open("file"), bytearray()
        for _ in range(60):
            offset, length = rng.randrange(4 * BLOCK), rng.randrange(1, 2 * BLOCK)
            end = offset + length
            match rng.randrange(3):
                case 0:
                    payload = rng.randbytes(length)
                    await put(disk, file, payload, offset)
                    model.extend(bytes(max(end - len(model), 0)))
                    model[offset:end] = payload
                case 1:
                    disk.punch(file, offset, length)
                    end = min(end, len(model))
                    model[offset:end] = bytes(max(end - offset, 0))
                case 2:
                    disk.allocate(file, offset, length)
                    model.extend(bytes(max(end - len(model), 0)))
            assert disk.size(file) == len(model)
            assert await get(disk, file, 8 * BLOCK) == model
            assert await get(disk, file, length, offset) == model[offset : offset + length]

    for seed in seeds:
        on_disk(work, seed=seed)


def test_one_read_fills_several_buffers_and_counts_what_is_there() -> None:
    async def work(disk: SimDisk) -> None:
        file = disk.open("file")
        await put(disk, file, b"abcdef")
        first, second, third = bytearray(2), bytearray(3), bytearray(b"...")
        counts = await disk.read([(file, [memoryview(each) for each in (first, second, third)], 0), (file, [], 0)])
        assert (counts, first, second, third) == ([6, 0], b"ab", b"cde", b"f..")
        assert await get(disk, file, 10, 100) == b""

    on_disk(work)


def test_a_closed_file_is_gone_until_it_is_opened_again() -> None:
    async def work(disk: SimDisk) -> None:
        file = disk.open("file")
        await put(disk, file, b"x")
        disk.close()
        with expect_errno(errno.EBADF):
            await get(disk, file, 1)
        assert disk.open("file") == file
        assert await get(disk, file, 1) == b"x"

    on_disk(work)


def test_space_runs_out_and_comes_back() -> None:
    async def work(disk: SimDisk) -> None:
        file = disk.open("file")
        disk.allocate(file, 0, 6 * BLOCK)
        disk.allocate(file, 0, 6 * BLOCK)
        assert disk.free_bytes() == 2 * BLOCK
        with expect_errno(errno.ENOSPC):
            disk.allocate(file, 6 * BLOCK, 3 * BLOCK)
        assert (disk.free_bytes(), disk.size(file)) == (2 * BLOCK, 6 * BLOCK)
        with expect_errno(errno.ENOSPC):
            await put(disk, file, b"x" * 4 * BLOCK, 5 * BLOCK)
        assert await get(disk, file, 9 * BLOCK, 5 * BLOCK) == b"x" * 3 * BLOCK
        disk.punch(file, 100, 3 * BLOCK)
        assert disk.free_bytes() == 2 * BLOCK
        await put(disk, file, b"y" * BLOCK, 8 * BLOCK)

    on_disk(work, capacity_bytes=8 * BLOCK)


# ---- faults to order


def test_a_flipped_bit_is_read_at_once_or_after_the_cache_is_dropped() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, bytes(2 * BLOCK))
        disk.flip_bit(file, 700, bit=3)
        assert await get(disk, file, 3, 699) == b"\x00\x08\x00"
        disk.flip_bit(file, 5000, is_cached=True)
        for offset in (4990, 5000, 5001):
            assert not any(await get(disk, file, 1000, offset))
        disk.drop_cache(file, 4096, BLOCK)
        assert await get(disk, file, 3, 4999) == b"\x00\x01\x00"
        assert disk.crash(random.Random(0))["file"].read(5000, 1) == b"\x01"

    on_disk(work)


def test_a_bad_sector_fails_reads_until_it_is_written() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, bytes(2 * BLOCK))
        disk.fail_read(file, 1000)
        with expect_errno(errno.EIO):
            await get(disk, file, BLOCK)
        assert await get(disk, file, SECTOR_BYTES) == bytes(SECTOR_BYTES)
        await put(disk, file, b"x", 900)
        assert len(await get(disk, file, BLOCK)) == BLOCK

    on_disk(work)


def test_a_failed_write_wrote_a_part() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk)
        disk.fail_write(file)
        with expect_errno(errno.EIO):
            await put(disk, file, b"x" * 1000)
        assert disk.size(file) == 500
        await put(disk, file, b"x" * 1000)
        assert disk.size(file) == 1000

    on_disk(work)


def test_what_a_failed_sync_covered_stays_readable_and_is_never_promised_again() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, b"a" * BLOCK)
        await put(disk, file, b"b" * BLOCK)
        disk.fail_sync(file)
        with expect_errno(errno.EIO):
            await disk.sync([file])
        assert await get(disk, file, BLOCK) == b"b" * BLOCK
        await disk.sync([file])
        found = {image["file"].read(0, BLOCK) for image in states(disk, 20)}
        assert {b"a" * BLOCK, b"b" * BLOCK} < found
        # Only what is written anew and synced is sure, and the doomed write does not come back over it.
        await put(disk, file, b"c" * SECTOR_BYTES)
        await disk.sync([file])
        assert {image["file"].read(0, SECTOR_BYTES) for image in states(disk, 20)} == {b"c" * SECTOR_BYTES}

    on_disk(work, record=True)


# ---- crashes


def states(disk: SimDisk, limit: int) -> list[Any]:
    return list(crash_states(disk.operations, limit=limit, rng=random.Random(0), initial=disk.initial))


def test_what_is_synced_survives_every_crash(seeds: Sequence[int]) -> None:
    async def work(disk: SimDisk) -> None:
        content = random.Random(1).randbytes(3 * BLOCK + 100)
        file = await synced_file(disk, content)
        disk.allocate(file, 0, 9 * BLOCK)
        await put(disk, file, b"later", 8 * BLOCK)
        for image in [*states(disk, 20), disk.crash(random.Random(2))]:
            assert image["file"].read(0, len(content)) == content

    for seed in seeds:
        on_disk(work, seed=seed, record=True)


def test_what_is_not_synced_survives_in_any_subset() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, bytes(3 * BLOCK))
        for index in range(3):
            await put(disk, file, b"x" * SECTOR_BYTES, index * BLOCK)
        found = {tuple(image["file"].read(index * BLOCK, 1) for index in range(3)) for image in states(disk, 200)}
        assert len(found) == 8

    on_disk(work, record=True)


def test_a_block_tears_at_sectors_and_a_sector_never_tears() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, b"a" * BLOCK)
        await put(disk, file, b"b" * BLOCK)
        await put(disk, file, b"c" * BLOCK)
        patterns = set()
        for image in states(disk, 200):
            content = image["file"].read(0, BLOCK)
            sectors = [content[start : start + SECTOR_BYTES] for start in range(0, BLOCK, SECTOR_BYTES)]
            assert all(len(set(sector)) == 1 for sector in sectors)
            patterns.add(bytes(sector[0] for sector in sectors))
        assert {b"a" * 8, b"b" * 8, b"c" * 8} <= patterns
        assert any(len(set(pattern)) == 3 for pattern in patterns)

    on_disk(work, record=True)


def test_a_sector_holds_only_what_it_once_held() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, b"aaaa")
        await put(disk, file, b"b", 0)
        await put(disk, file, b"c", 2)
        assert {image["file"].read(0, 4) for image in states(disk, 50)} == {b"aaaa", b"baaa", b"baca"}

    on_disk(work, record=True)


def test_growth_and_holes_are_durable_only_after_a_sync() -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, b"a" * BLOCK)
        disk.allocate(file, 0, 4 * BLOCK)
        assert {image["file"].size for image in states(disk, 10)} == {BLOCK, 4 * BLOCK}
        disk.punch(file, 0, BLOCK)
        assert {image["file"].read(0, 1) for image in states(disk, 20)} == {b"a", b"\x00"}
        await disk.sync([file])
        assert [(image["file"].size, image["file"].read(0, 1)) for image in states(disk, 10)] == [(4 * BLOCK, b"\x00")]

    on_disk(work, record=True)


def test_a_name_is_durable_only_after_a_sync_of_the_directory() -> None:
    async def work(disk: SimDisk) -> None:
        file = disk.open("new")
        await put(disk, file, b"x")
        await disk.sync([file])
        assert {tuple(image) for image in states(disk, 10)} == {(), ("new",)}
        await disk.sync_directory()
        assert {tuple(image) for image in states(disk, 10)} == {("new",)}

    on_disk(work, record=True)


def test_a_sync_covers_what_was_written_before_it_began() -> None:
    async def main(runtime: SimRuntime) -> bool:
        disk = SimDisk(runtime, record=True)
        file = await synced_file(disk, b"a")
        sync = runtime.spawn(disk.sync([file]), "sync")
        write = runtime.spawn(put(disk, file, b"b"), "write")
        await asyncio.gather(sync, write)
        return {image["file"].read(0, 1) for image in states(disk, 10)} == {b"b"}

    assert {run(seed, main) for seed in range(50)} == {True, False}


def test_after_a_crash_the_old_disk_is_dead_and_a_new_one_starts_from_the_image(seeds: Sequence[int]) -> None:
    async def main(runtime: SimRuntime) -> None:
        disk = SimDisk(runtime, capacity_bytes=16 * BLOCK)
        file = await synced_file(disk, b"durable")
        await put(disk, file, b"volatile", 2 * BLOCK)
        late = runtime.spawn(put(disk, file, b"too late"), "late")
        image = disk.crash(runtime.random("crash"))
        with expect_errno(errno.EIO):
            await get(disk, file, 1)
        with expect_errno(errno.EIO):
            await late
        reopened = SimDisk.from_image(runtime, image, capacity_bytes=16 * BLOCK)
        assert reopened.names() == ["file"]
        assert await get(reopened, reopened.open("file"), 7) == b"durable"
        assert reopened.free_bytes() in (14 * BLOCK, 15 * BLOCK)

    for seed in seeds:
        run(seed, main)


# ---- enumeration


def test_the_log_played_again_gives_the_same_disk(seeds: Sequence[int]) -> None:
    async def work(disk: SimDisk) -> None:
        file = await synced_file(disk, b"a" * BLOCK)
        disk.flip_bit(file, 0)
        await put(disk, file, b"b" * BLOCK, 100)
        disk.fail_sync(file)
        with expect_errno(errno.EIO):
            await disk.sync([file])
        disk.punch(file, 0, BLOCK)
        replayed = Volume()
        for operation in disk.operations:
            replayed.apply(operation)
        assert replayed.view("file").read(0, 9 * BLOCK) == await get(disk, file, 9 * BLOCK)
        fates = dict.fromkeys(replayed.unsynced(), 3)
        assert replayed.crash(fates) == disk._volume.crash(fates)

    for seed in seeds:
        on_disk(work, seed=seed, record=True)


def test_every_point_between_two_operations_is_a_crash_point() -> None:
    async def work(disk: SimDisk) -> None:
        await synced_file(disk, b"x" * 2 * BLOCK)
        points = list(crash_points(disk.operations, limit=5, rng=random.Random(0)))
        counts = Counter(point.operations_count for point in points)
        # Nothing yet; the name; the name and the write; the name again, as the write is synced; nothing.
        assert {count: counts[count] for count in (0, 1, 3, 4)} == {0: 1, 1: 2, 3: 2, 4: 1}
        assert 3 <= counts[2] <= 5

    on_disk(work, record=True)


class LoggedKV(MemoryKV):
    """A KV whose commits are marks in the log of a disk."""

    def __init__(self, runtime: Runtime, disk: SimDisk, **options: Any) -> None:
        super().__init__(runtime, **options)
        self._disk = disk

    def _apply(self, group: Any) -> None:
        super()._apply(group)
        self._disk.record_mark(self.snapshot())


async def journal(runtime: SimRuntime, *, syncs: bool) -> None:
    """Write records to a file and, once they are durable, their count to a KV; then die at every point."""
    disk = SimDisk(runtime, record=True)
    kv = LoggedKV(runtime, disk)
    file = await synced_file(disk)
    for number in range(1, 6):
        await put(disk, file, bytes([number]) * BLOCK, (number - 1) * BLOCK)
        if syncs:
            await disk.sync([file])
        transaction = kv.begin()
        transaction.put(b"count", bytes([number]))
        await transaction.commit()
    for point in crash_points(disk.operations, limit=10, rng=runtime.random("crash"), initial=disk.initial):
        rows = point.mark.label if isinstance(point.mark, Mark) else {}
        reopened = SimDisk.from_image(runtime, point.image)
        for number in range(1, rows.get(b"count", b"\x00")[0] + 1):
            content = await get(reopened, reopened.open("file"), BLOCK, (number - 1) * BLOCK)
            assert content == bytes([number]) * BLOCK, f"record {number} is lost at {point.operations_count}"


def test_a_journal_that_syncs_before_it_commits_loses_nothing(seeds: Sequence[int]) -> None:
    for seed in seeds:
        run(seed, lambda runtime: journal(runtime, syncs=True))


def test_a_journal_that_does_not_sync_is_caught() -> None:
    with pytest.raises(AssertionError, match="is lost at"):
        run(0, lambda runtime: journal(runtime, syncs=False))
