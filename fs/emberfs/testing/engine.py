"""The conformance suite of the chunk engine, over any disk and any KV that keep their contracts.

    class TestMyDisk(EngineConformance):
        @pytest.fixture
        def bench(self, ...) -> Bench: ...            # a new, empty disk and index

It needs one more fixture: `run`, a function that runs a coroutine of the bench's runtime to its end. Each test runs
in one such call.

Does not know: which disk it is.
"""

from __future__ import annotations

import pytest

from ..engine import Action, Request, Update
from ..engine.allocator import CLASS_LOG2_MAX, CLASS_LOG2_MIN, GROUP_BLOCKS, position_class
from ..engine.scrub import check, scrub
from ..errors import Corruption, StaleChunk, StoreFormat
from .bench import KIB, MIB, Bench, Run, chunk, driven, pattern

__all__ = ["KIB", "MIB", "Bench", "EngineConformance", "Run", "chunk", "driven", "pattern"]

FLUSHES_MAX = 16
"""Of 64 concurrent updates. How many share one depends on how long each one's data takes; alone would be 64."""
CLIENT, OTHER_CLIENT = b"c" * 16, b"d" * 16


class EngineConformance:
    """What `ChunkEngine` promises, sentence by sentence."""

    # ---- what an update makes of a chunk

    @driven
    async def test_an_absent_chunk_reads_as_nothing(self, bench: Bench) -> None:
        assert await bench.read() == b""
        assert await bench.engine.record(chunk()) is None

    @driven
    async def test_what_was_written_is_read_back_and_still_there_after_a_restart(self, bench: Bench) -> None:
        payload = pattern(100_000)
        assert await bench.write(0, payload) == 1
        assert await bench.read() == payload
        await bench.reopen()
        assert await bench.read() == payload
        assert await bench.blocks() == 1

    @driven
    async def test_a_read_is_short_at_the_end_and_empty_behind_it(self, bench: Bench) -> None:
        await bench.write(0, pattern(20_000))
        assert await bench.read(19_990, 100) == pattern(20_000)[19_990:]
        assert await bench.read(20_000, 100) == b""
        assert await bench.read(90_000, 100) == b""
        assert await bench.read(5, 0) == b""
        buffer = bytearray(b"?" * 100)
        assert await bench.engine.read([chunk()], [19_990], [memoryview(buffer)]) == [10]
        assert buffer[10:] == b"?" * 90

    @driven
    async def test_appends_overwrites_and_gaps_are_bytes_of_one_sequence(self, bench: Bench) -> None:
        model = bytearray()
        steps = [
            *((0, 10), (10, 90), (100, 3996), (4096, 4096), (8192, 1), (8193, 70_000)),  # appends
            *((0, 1), (5000, 3000), (16_384, 16_384), (78_000, 500)),  # inside, and over the end
            *((90_000, 10), (131_072, 4096), (200_000, 1)),  # behind a gap
        ]
        for number, (offset, length) in enumerate(steps):
            payload = pattern(length, number)
            model.extend(bytes(max(offset + length - len(model), 0)))
            model[offset : offset + length] = payload
            await bench.write(offset, payload)
            assert await bench.read() == model, (offset, length)
        await bench.reopen()
        assert await bench.read() == model
        assert await bench.blocks() == 1

    @driven
    async def test_a_chunk_may_begin_with_a_hole(self, bench: Bench) -> None:
        await bench.write(70_000, b"end")
        assert await bench.read() == bytes(70_000) + b"end"

    @driven
    async def test_a_write_of_nothing_makes_an_empty_chunk(self, bench: Bench) -> None:
        assert await bench.write(0, b"") == 1
        committed = await bench.committed()
        assert committed is not None and committed.length == 0
        await bench.write(0, b"now")
        assert await bench.read() == b"now"

    @driven
    async def test_a_write_of_nothing_changes_no_byte(self, bench: Bench) -> None:
        for length in (4096, 5000, 16_384, 65_536):
            await bench.replace(pattern(length))
            for offset in (0, 100, length):
                await bench.write(offset, b"")
                assert await bench.read() == pattern(length), (length, offset)

    @driven
    async def test_truncate_shortens_and_never_extends(self, bench: Bench) -> None:
        payload = pattern(100_000)
        await bench.write(0, payload)
        for length in (99_999, 81_920, 81_921, 65_536, 5000, 4096):
            await bench.truncate(length)
            payload = payload[:length]
            assert await bench.read() == payload
        version = await bench.truncate(4096)
        assert version == await bench.truncate(1 << 20)
        assert await bench.read() == payload
        await bench.write(4096, b"more")
        assert await bench.read() == payload + b"more"
        await bench.truncate(0)
        assert await bench.read() == b""
        await bench.write(10, b"again")
        assert await bench.read() == bytes(10) + b"again"
        assert await bench.blocks() == 1

    @driven
    async def test_truncate_of_an_absent_chunk_makes_none(self, bench: Bench) -> None:
        assert await bench.truncate(0) == 0
        assert await bench.engine.record(chunk()) is None

    @driven
    async def test_replace_leaves_nothing_of_the_old_bytes(self, bench: Bench) -> None:
        await bench.write(0, pattern(100_000))
        await bench.replace(pattern(10, 1))
        assert await bench.read() == pattern(10, 1)
        await bench.replace(b"")
        assert await bench.read() == b""
        assert await bench.blocks() == 1

    @driven
    async def test_a_removed_chunk_is_gone_and_its_block_is_used_again(self, bench: Bench) -> None:
        await bench.write(0, pattern(100_000))
        before = await bench.committed()
        assert await bench.remove() == 2
        assert await bench.engine.record(chunk()) is None
        assert await bench.read() == b""
        assert await bench.blocks() == 0
        assert await bench.remove() == 0, "removing what is not there is nothing"
        await bench.write(0, pattern(100_000), name=chunk(1))
        after = await bench.committed(chunk(1))
        assert before is not None and after is not None and after.position == before.position

    @driven
    async def test_a_batch_updates_many_chunks_in_one_flush(self, bench: Bench) -> None:
        flushes = bench.engine.counters.flushes
        updates = [
            Update(chunk(number), Action.WRITE, 0, memoryview(pattern(3000 + number, number))) for number in range(100)
        ]
        prepared = await bench.engine.prepare(updates, publish=True)
        assert [each.version for each in prepared] == [1] * 100
        assert bench.engine.counters.flushes == flushes + 1
        buffers = [bytearray(4000) for _ in range(100)]
        counts = await bench.engine.read(
            [chunk(number) for number in range(100)], [0] * 100, [memoryview(buffer) for buffer in buffers]
        )
        assert counts == [3000 + number for number in range(100)]
        assert all(bytes(buffers[i][: 3000 + i]) == pattern(3000 + i, i) for i in range(100))

    @driven
    async def test_the_callers_buffer_may_change_once_the_update_returned(self, bench: Bench) -> None:
        payload = bytearray(pattern(5000))
        await bench.engine.prepare([Update(chunk(), Action.WRITE, 0, memoryview(payload))], publish=True)
        payload[:] = bytes(5000)
        assert await bench.read() == pattern(5000)

    @driven
    async def test_records_are_listed_in_order(self, bench: Bench) -> None:
        for number in (3, 1, 2):
            await bench.write(0, b"x", name=chunk(number))
        assert [name async for name, _ in bench.engine.records()] == [chunk(1), chunk(2), chunk(3)]
        assert [name for name, _ in await bench.engine.scan(chunk(2), chunk(9), limit=1)] == [chunk(2)]
        last = await bench.engine.scan(chunk(0), chunk(9), limit=1, reverse=True)
        assert [name for name, _ in last] == [chunk(3)]

    # ---- prepare and commit

    @driven
    async def test_the_committed_version_is_read_until_the_pending_one_is_published(self, bench: Bench) -> None:
        first, second = pattern(10_000), pattern(12_000, 1)
        assert await bench.replace(first, publish=False) == 1
        assert await bench.read() == b""
        await bench.commit(1)
        assert await bench.read() == first
        assert await bench.replace(second, publish=False) == 2
        assert await bench.read() == first
        await bench.reopen()
        assert await bench.read() == first
        pending = await bench.pending()
        assert pending is not None and pending.version == 2
        await bench.commit(2)
        assert await bench.read() == second
        assert await bench.blocks() == 1

    @driven
    async def test_every_update_may_be_prepared(self, bench: Bench) -> None:
        model = pattern(20_480)
        await bench.write(0, model)
        steps: list[tuple[Action, int, bytes, bytes]] = [
            (Action.WRITE, 20_480, b"in place", model + b"in place"),
            (Action.TRUNCATE, 20_480, b"", model),
            (Action.WRITE, 5, b"copy", model[:5] + b"copy" + model[9:]),
            (Action.TRUNCATE, 7, b"", model[:5] + b"co"),
            (Action.REPLACE, 0, b"new", b"new"),
            (Action.REMOVE, 0, b"", b""),
        ]
        before = model
        for action, offset, payload, after in steps:
            version = await bench.update(action, offset, payload, publish=False)
            assert await bench.read() == before, action
            await bench.commit(version)
            assert await bench.read() == after, action
            before = after
        assert await bench.blocks() == 0

    @driven
    async def test_a_version_must_follow_the_committed_one(self, bench: Bench) -> None:
        await bench.write(0, b"one", version=1)
        for version in (0, 1, 3):
            with pytest.raises(StaleChunk):
                await bench.write(0, b"two", version=version)
        assert await bench.write(0, b"two", version=2) == 2
        assert await bench.read() == b"two"

    @driven
    async def test_commit_takes_the_pending_version_or_one_that_is_committed(self, bench: Bench) -> None:
        await bench.write(0, b"one")
        await bench.write(0, b"two", publish=False)
        await bench.commit(1)
        assert await bench.read() == b"one", "a commit that comes again publishes nothing new"
        with pytest.raises(StaleChunk):
            await bench.commit(3)
        await bench.commit(2)
        await bench.commit(2)
        assert await bench.read() == b"two"
        with pytest.raises(StaleChunk):
            await bench.commit(3)

    @driven
    async def test_a_commit_that_comes_again_does_not_publish_a_removal(self, bench: Bench) -> None:
        await bench.write(0, b"one")
        assert await bench.remove(publish=False) == 2
        await bench.commit(1)
        assert await bench.read() == b"one"
        await bench.commit(2)
        await bench.commit(2)
        assert await bench.engine.record(chunk()) is None

    @driven
    async def test_a_pending_version_is_replaced_by_the_next_one_prepared(self, bench: Bench) -> None:
        base = pattern(8192)
        await bench.write(0, base)
        await bench.write(8192, pattern(5000, 1), publish=False)
        assert await bench.write(8192, pattern(3000, 2), publish=False) == 2
        assert await bench.blocks() == 2
        assert await bench.truncate(4096, publish=False) == 2
        assert await bench.write(8192, pattern(100, 3), publish=False) == 2
        assert await bench.read() == base
        await bench.commit(2)
        assert await bench.read() == base + pattern(100, 3)
        assert await bench.blocks() == 1

    @driven
    async def test_what_replaces_a_prepared_append_does_not_write_over_it(self, bench: Bench) -> None:
        """Until it is durable itself, a crash would leave the older one, damaged."""
        await bench.write(0, pattern(8192))
        await bench.write(8192, pattern(4096, 1), publish=False)
        pending = await bench.pending()
        assert pending is not None
        bench.note_writes()
        await bench.write(8192, pattern(4096, 2), publish=False)
        _, block = bench.engine.allocator.place(pending.position)
        overlap = [at for _, payload, at in bench.writes if at < block + pending.length and at + len(payload) > block]
        assert bench.writes and not overlap

    @driven
    async def test_a_publishing_update_takes_the_pending_ones_place(self, bench: Bench) -> None:
        await bench.write(0, b"one")
        await bench.write(0, pattern(70_000), publish=False)
        await bench.write(0, b"two")
        assert await bench.read() == b"two"
        assert await bench.blocks() == 1

    @driven
    async def test_a_chunk_that_was_only_prepared_can_be_removed(self, bench: Bench) -> None:
        await bench.write(0, b"one", publish=False)
        assert await bench.remove() == 1
        assert await bench.engine.record(chunk()) is None
        await bench.write(0, b"one", publish=False)
        await bench.commit(await bench.remove(publish=False))
        assert await bench.engine.record(chunk()) is None
        assert await bench.blocks() == 0

    # ---- requests that come again

    @driven
    async def test_a_repeated_request_is_not_applied_twice(self, bench: Bench) -> None:
        request = Request(CLIENT, 1, 5)
        assert await bench.write(0, b"first", request=request) == 1
        assert await bench.write(0, b"again", request=request) == 1
        with pytest.raises(StaleChunk, match="late copy"):
            await bench.write(0, b"older", request=Request(CLIENT, 1, 4))
        await bench.reopen()
        assert await bench.write(0, b"again", request=request) == 1
        assert await bench.read() == b"first"
        assert await bench.write(0, b"newer", request=Request(CLIENT, 1, 6)) == 2
        assert await bench.write(0, b"other", request=Request(CLIENT, 2, 1)) == 3
        assert await bench.write(0, b"whose", request=Request(OTHER_CLIENT, 2, 1)) == 4
        assert await bench.read() == b"whose"

    @driven
    async def test_a_repeated_prepare_returns_the_version_to_commit(self, bench: Bench) -> None:
        await bench.write(0, b"one")
        for action in (Action.WRITE, Action.REMOVE):
            request = Request(CLIENT, 1, action is Action.REMOVE)
            version = await bench.update(action, 0, b"", request=request, publish=False)
            assert await bench.update(action, 0, b"", request=request, publish=False) == version
            await bench.commit(version)
        assert await bench.engine.record(chunk()) is None

    @driven
    async def test_an_update_without_a_request_does_not_make_an_older_one_look_new(self, bench: Bench) -> None:
        request = Request(CLIENT, 1, 5)
        await bench.write(0, b"written", request=request)
        await bench.truncate(3)
        assert await bench.write(0, b"written", request=request) == 2
        assert await bench.read() == b"wri"

    @driven
    async def test_updates_without_a_request_are_never_taken_for_repeated(self, bench: Bench) -> None:
        assert [await bench.write(0, b"x") for _ in range(3)] == [1, 2, 3]

    # ---- shapes: size classes, granules, unaligned ends

    @pytest.mark.parametrize("class_log2", range(CLASS_LOG2_MIN, CLASS_LOG2_MAX + 1))
    @driven
    async def test_every_size_class(self, bench: Bench, class_log2: int) -> None:
        size = 1 << class_log2
        granule_log2 = 14 if class_log2 <= 22 else 16
        payload = pattern(size - 8192, class_log2)
        await bench.write(0, payload, granule_log2=granule_log2)
        await bench.write(size - 8192, pattern(4096, 1))
        await bench.write(size - 4096, pattern(4095, 2))
        whole = payload + pattern(4096, 1) + pattern(4095, 2)
        committed = await bench.committed()
        assert committed is not None and position_class(committed.position) == class_log2
        await bench.reopen()
        for offset in (0, size // 2 - 100, size - 8200):
            assert await bench.read(offset, 8200) == whole[offset : offset + 8200]
        assert await bench.read() == whole
        await bench.write(7, b"seven")
        await bench.truncate(size - 5000)
        assert await bench.read() == (whole[:7] + b"seven" + whole[12:])[: size - 5000]
        assert await bench.blocks() == 1

    @pytest.mark.parametrize("granule_log2", [12, 14, 16])
    @driven
    async def test_unaligned_ranges_of_every_granule(self, bench: Bench, granule_log2: int) -> None:
        payload = pattern(200_001)
        await bench.write(0, payload, granule_log2=granule_log2)
        granule = 1 << granule_log2
        edges = sorted({0, 1, granule - 1, granule, granule + 1, 2 * granule, 131_071, 196_608, 200_000, 200_001})
        for begin in edges:
            for end in edges:
                if begin < end:
                    assert await bench.read(begin, end - begin) == payload[begin:end], (begin, end)

    @pytest.mark.parametrize("size_mib", [2, 32, 64])
    @driven
    async def test_sums_beside_the_block_alternate_between_two_slots(self, bench: Bench, size_mib: int) -> None:
        model = bytearray(pattern(size_mib * MIB // 2 + 4096))
        await bench.write(0, bytes(model), granule_log2=12)
        slots = []
        for number in range(3):
            committed = await bench.committed()
            assert committed is not None and committed.sums == b""
            slots.append(committed.slot)
            await bench.write(len(model), pattern(4096, number))
            model += pattern(4096, number)
        assert slots == [0, 1, 0]
        await bench.truncate(len(model) - 6000)
        del model[-6000:]
        await bench.reopen()
        assert await bench.read() == model
        assert (await scrub(bench.engine, runtime=bench.runtime)).findings == []
        await bench.truncate(100)
        committed = await bench.committed()
        assert committed is not None and committed.slot is None, "few sums fit into the record"
        assert await bench.read() == model[:100]

    @driven
    async def test_a_chunk_keeps_the_granule_it_was_made_with(self, bench: Bench) -> None:
        await bench.write(0, b"x", granule_log2=12)
        await bench.replace(b"y", granule_log2=16)
        record = await bench.engine.record(chunk())
        assert record is not None and record.granule_log2 == 12

    # ---- damage

    @pytest.mark.parametrize("offset", [0, 1, 16_383, 16_384, 50_000, 65_535, 65_536, 70_000])
    @driven
    async def test_a_flipped_bit_is_found_and_named(self, bench: Bench, offset: int) -> None:
        payload = pattern(70_001)
        await bench.write(0, payload)
        committed = await bench.committed()
        assert committed is not None
        await bench.damage(committed, offset)
        begin = offset - offset % 16_384
        for length in (1, 70_001 - offset):
            with pytest.raises(Corruption) as caught:
                await bench.read(offset, length)
            assert (caught.value.chunk, caught.value.offset) == ("7.0", begin)
        with pytest.raises(Corruption, match=f"chunk 7.0 at offset {begin}") as caught:
            await bench.read()
        assert await bench.read(0, begin) == payload[:begin], "what lies before is still to be had"
        end = min(begin + 16_384, 70_001)
        assert await bench.read(end, 70_001) == payload[end:], "and what lies behind"

    @driven
    async def test_a_corrupt_item_leaves_the_others_of_its_batch_right(self, bench: Bench) -> None:
        for number in range(4):
            await bench.write(0, pattern(30_000, number), name=chunk(number))
        extent = await bench.committed(chunk(1))
        assert extent is not None
        await bench.damage(extent, 20_000)
        await bench.damage_record(chunk(2))
        buffers = [bytearray(30_000) for _ in range(5)]
        counts = await bench.engine.read(
            [chunk(number) for number in range(5)], [0] * 5, [memoryview(buffer) for buffer in buffers]
        )
        data, record = counts[1], counts[2]
        assert isinstance(data, Corruption) and (data.chunk, data.offset) == ("7.1", 16_384)
        assert isinstance(record, Corruption) and record.chunk == "7.2"
        assert (counts[0], counts[3], counts[4]) == (30_000, 30_000, 0)
        assert [bytes(buffers[0]), bytes(buffers[3])] == [pattern(30_000, 0), pattern(30_000, 3)]

    @driven
    async def test_damaged_sums_beside_the_block_are_found(self, bench: Bench) -> None:
        await bench.write(0, pattern(2 * MIB), granule_log2=12)
        committed = await bench.committed()
        assert committed is not None and committed.slot == 0
        await bench.damage(committed, 2 * MIB + 100)
        with pytest.raises(Corruption, match=r"checksums beside the block of chunk 7\.0"):
            await bench.read(0, 1)

    @driven
    async def test_a_partial_write_over_damaged_bytes_is_refused_and_a_whole_one_heals(self, bench: Bench) -> None:
        await bench.write(0, pattern(30_001))
        committed = await bench.committed()
        assert committed is not None
        await bench.damage(committed, 3)
        with pytest.raises(Corruption):
            await bench.write(20_000, b"part")
        with pytest.raises(Corruption):
            await bench.read()
        await bench.replace(b"whole")
        assert await bench.read() == b"whole"
        assert await bench.blocks() == 1

    @driven
    async def test_a_newer_format_is_refused(self, bench: Bench) -> None:
        txn = bench.index.begin()
        row = await txn.get(b"f")
        assert row is not None
        txn.put(b"f", row.replace(b"\x01", b"\x02", 1))
        await txn.commit()
        with pytest.raises(StoreFormat, match="upgrade"):
            await bench.open()

    # ---- scrub and check

    @driven
    async def test_scrub_reads_every_byte_and_goes_on_after_a_finding(self, bench: Bench) -> None:
        for number in range(4):
            await bench.write(0, pattern(5 * MIB, number), name=chunk(number))
        await bench.replace(pattern(MIB), name=chunk(3), publish=False)
        progress: list[tuple[int, int]] = []
        clean = await scrub(bench.engine, runtime=bench.runtime, progress=lambda *done: progress.append(done))
        assert (clean.chunks, clean.read_bytes, clean.findings) == (4, 21 * MIB, [])
        assert [done for done, _ in progress] == [1, 2, 3, 4]
        first, last, pending = (
            await bench.committed(chunk(0)),
            await bench.committed(chunk(3)),
            await bench.pending(chunk(3)),
        )
        assert first is not None and last is not None and pending is not None
        await bench.damage(first, 100)
        await bench.damage(first, 5 * MIB - 1)
        await bench.damage(pending, 70_000)
        await bench.damage_record(chunk(2))
        report = await scrub(bench.engine, runtime=bench.runtime)
        assert [(found.kind, found.chunk, found.offset) for found in report.findings] == [
            ("data", "7.0", 0),
            ("data", "7.0", 5 * MIB - 16_384),
            ("record", "7.2", 0),
            ("data", "7.3", 65_536),
        ]

    @driven
    async def test_check_finds_leaks_and_repair_frees_them(self, bench: Bench) -> None:
        await bench.write(0, b"kept")
        await bench.write(0, b"lost", name=chunk(1))
        txn = bench.index.begin()
        txn.delete(b"c" + chunk(1))
        await txn.commit()
        report = await check(bench.engine)
        assert [(found.kind, found.repaired) for found in report.findings] == [("leaked", False)]
        report = await check(bench.engine, repair=True)
        assert [(found.kind, found.repaired) for found in report.findings] == [("leaked", True)]
        assert await bench.blocks() == 1
        await bench.reopen()
        assert await bench.blocks() == 1
        await bench.write(0, b"next", name=chunk(2))
        assert await bench.read(name=chunk(2)) == b"next"
        assert await bench.read() == b"kept"

    @driven
    async def test_check_frees_nothing_while_a_record_is_damaged(self, bench: Bench) -> None:
        await bench.write(0, b"whose block is it")
        await bench.damage_record()
        report = await check(bench.engine, repair=True)
        assert [(found.kind, found.repaired) for found in report.findings] == [("record", False), ("leaked", False)]

    @driven
    async def test_check_finds_blocks_that_are_owned_twice_unmarked_or_outside(self, bench: Bench) -> None:
        await bench.write(0, pattern(100))
        record = await bench.engine.record(chunk())
        assert record is not None and record.committed is not None
        outside = record.committed._replace(position=record.committed.position + 5 * GROUP_BLOCKS)
        txn = bench.index.begin()
        txn.put(b"c" + chunk(1), record.encode(chunk(1)))
        txn.put(b"c" + chunk(2), record._replace(committed=outside).encode(chunk(2)))
        await txn.commit()
        report = await check(bench.engine)
        assert [(found.kind, found.chunk) for found in report.findings] == [
            ("owned twice", "7.1"),
            ("unmarked", "7.2"),
            ("outside", "7.2"),
        ]

    # ---- what it costs

    @driven
    async def test_concurrent_updates_share_flushes(self, bench: Bench) -> None:
        await bench.write(0, b"makes the file", name=chunk(99))
        flushes = bench.engine.counters.flushes
        tasks = [
            bench.runtime.spawn(bench.write(0, pattern(5000, number), name=chunk(number)), "writer")
            for number in range(64)
        ]
        for task in tasks:
            await task
        assert bench.engine.counters.flushes - flushes <= FLUSHES_MAX
        for number in range(64):
            assert await bench.read(name=chunk(number)) == pattern(5000, number)

    @driven
    async def test_an_aligned_append_writes_its_bytes_and_nothing_else(self, bench: Bench) -> None:
        length = MIB // 2 + 4096
        await bench.write(0, pattern(length))
        before = bench.engine.counters.block_bytes
        for number in range(7):
            await bench.write(length + number * 64 * KIB, pattern(64 * KIB, number))
        assert (bench.engine.counters.block_bytes - before) / (7 * 64 * KIB) == 1.0
        assert await bench.blocks() == 1

    @driven
    async def test_an_append_rewrites_no_sector_that_holds_committed_bytes(self, bench: Bench) -> None:
        await bench.write(0, pattern(2 * MIB - 40_960), granule_log2=12)
        bench.note_writes()
        appended = [4096, 100, 5000, 8192, 3, 4096]
        for number, length in enumerate(appended):
            before = await bench.committed()
            assert before is not None
            bench.writes.clear()
            await bench.write(before.length, pattern(length, number))
            file, block = bench.engine.allocator.place(before.position)
            sectors_end = block + -(-before.length // 4096) * 4096
            for written_file, payload, at in bench.writes:
                ends_before = at + len(payload) <= block
                assert written_file != file or at >= sectors_end or ends_before, (number, at - block)

    @driven
    async def test_freed_blocks_are_given_back_to_the_file_system(self, bench: Bench) -> None:
        for number in range(3):
            await bench.write(0, pattern(MIB), name=chunk(number))
        for number in range(3):
            await bench.remove(name=chunk(number))
        punched = 0
        while found := bench.engine.allocator.trim(MIB + 4096):
            assert found == MIB, "no more than was asked for"
            punched += found
        assert punched >= 3 * MIB
        await bench.write(0, pattern(MIB, 5))
        assert await bench.read() == pattern(MIB, 5)
