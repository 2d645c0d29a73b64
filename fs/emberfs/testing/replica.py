"""The conformance suite of what replicas ask of a chunk engine; used as `EngineConformance` is.

Does not know: which disk it is, or what a chain does with it.
"""

from __future__ import annotations

import pytest

from ..checksum import crc32c
from ..engine import NO_REQUEST, Action, ChunkState, InstallItem, Prepared, Request, Update
from ..engine.allocator import position_class
from ..engine.scrub import check, scrub
from ..errors import Corruption, StaleChunk, StoreFormat
from ..messages import ChunkVersion
from .bench import KIB, MIB, Bench, chunk, driven, pattern

CLIENT, OTHER_CLIENT = b"c" * 16, b"d" * 16


def installed(number: int, payload: bytes | None, version: int, **options: object) -> InstallItem:
    """Chunk `number` as chain version 9 has it."""
    view = memoryview(payload) if payload is not None else None
    return InstallItem(chunk(number), version, 9, view, **options)  # type: ignore[arg-type]


async def state(bench: Bench) -> ChunkState | None:
    (found,) = await bench.engine.states([chunk()])
    return found


async def content(bench: Bench, *, pending: bool = True) -> bytes | None:
    found = await bench.engine.content(chunk(), pending=pending)
    if found is None:
        return None
    assert (found.length, found.crc) == (len(found.payload), crc32c(found.payload))
    return bytes(found.payload)


class ReplicaConformance:
    """What `ChunkEngine` promises to a chain, sentence by sentence."""

    @pytest.fixture(autouse=True)
    def keep_tombstones(self, bench: Bench) -> None:
        bench.settings["keeps_tombstones"] = True

    # ---- room

    @driven
    async def test_a_chunk_that_was_given_room_grows_in_its_block(self, bench: Bench) -> None:
        step, options = 48 * KIB, {"room_bytes": MIB, "granule_log2": 12}
        before = bench.engine.counters.block_bytes
        for number in range(21):
            await bench.write(number * step, pattern(step, number), **options)
            committed = await bench.committed()
            assert committed is not None and position_class(committed.position) == 20
        assert bench.engine.counters.block_bytes - before == 21 * step
        await bench.reopen()
        assert await bench.read() == b"".join(pattern(step, number) for number in range(21))
        assert bench.engine.space()[0] == MIB, "what is taken is told, whether it is written or not"
        # One that was not given any is as small as it can be; so is what comes in place of the first.
        await bench.write(0, pattern(step), name=chunk(1))
        await bench.replace(pattern(step))
        assert bench.engine.space()[0] == 2 * 64 * KIB
        # A copy is given room as well: here of a write that does not begin where a sector does.
        await bench.write(step - 5, pattern(100), **options)
        assert bench.engine.space()[0] == MIB + 64 * KIB
        assert await bench.blocks() == 2

    # ---- what an update made

    @pytest.mark.parametrize("granule_log2", [12, 14])
    @driven
    async def test_an_update_says_length_and_crc_of_what_it_made(self, bench: Bench, granule_log2: int) -> None:
        """With the sums in the record, and (of 4 KiB granules) beside the block."""
        model = pattern(2 * MIB)
        steps: list[tuple[Action, int, bytes, bytes]] = [
            (Action.WRITE, 0, model, model),
            (Action.WRITE, 2 * MIB, b"appended", model + b"appended"),
            (Action.WRITE, 5, b"copy", model[:5] + b"copy" + model[9:] + b"appended"),
            (Action.TRUNCATE, MIB + 1, b"", (model[:5] + b"copy" + model[9:])[: MIB + 1]),
            (Action.REPLACE, 0, b"", b""),
            (Action.REMOVE, 0, b"", b""),
        ]
        for version, (action, offset, payload, after) in enumerate(steps, 1):
            update = Update(chunk(), action, offset, memoryview(payload), granule_log2=granule_log2)
            expected = [Prepared(version, len(after), crc32c(after))]
            assert await bench.engine.prepare([update]) == expected, action
            assert await bench.engine.summaries([chunk()], pending=True) == expected
            await bench.commit(version)
            assert await bench.engine.summaries([chunk()]) == expected

    @driven
    async def test_a_repeated_request_gets_the_same_answer(self, bench: Bench) -> None:
        payload = pattern(2 * MIB)
        update = Update(chunk(), Action.WRITE, 0, memoryview(payload), request=Request(CLIENT, 1, 1), granule_log2=12)
        answer = [Prepared(1, len(payload), crc32c(payload))]
        for _ in range(2):
            assert await bench.engine.prepare([update]) == answer
        await bench.commit(1)
        bench.note_writes()
        assert await bench.engine.prepare([update]) == answer
        assert not bench.writes and not await bench.engine.pending()

    # ---- versions that a head gives

    @driven
    async def test_a_version_is_the_next_one_or_a_higher_one_of_a_whole_chunk(self, bench: Bench) -> None:
        assert await bench.write(0, b"first", version=7) == 7
        for action, version in ((Action.WRITE, 9), (Action.TRUNCATE, 9), (Action.WRITE, 7), (Action.REPLACE, 7)):
            with pytest.raises(StaleChunk, match="does not follow committed version 7"):
                await bench.update(action, 0, b"", version=version)
        assert await bench.write(5, b" next", version=8) == 8
        assert await bench.replace(b"whole", version=20, publish=False) == 20
        with pytest.raises(StaleChunk):
            await bench.commit(9)
        await bench.commit(20)
        assert await bench.remove(version=30) == 30
        assert await bench.write(0, b"over a tombstone", version=40) == 40
        assert await bench.read() == b"over a tombstone"
        assert await bench.write(0, b"OVER") == 41

    @driven
    async def test_an_update_with_a_version_is_always_carried_out(self, bench: Bench) -> None:
        await bench.write(0, pattern(10_000))
        assert await bench.truncate(20_000, version=2) == 2
        assert await bench.read() == pattern(10_000)
        assert await bench.remove(version=3) == 3
        assert await bench.remove(version=4) == 4
        assert await bench.remove() == 4, "without one there is nothing to do"
        assert await bench.update(Action.REMOVE, name=chunk(1), version=5) == 5
        assert await bench.engine.tombstones() == [(chunk(0), 4), (chunk(1), 5)]

    @driven
    async def test_a_pending_version_is_overwritten_by_another_of_the_same_number(self, bench: Bench) -> None:
        await bench.write(0, b"committed")
        await bench.replace(pattern(200_000), version=2, publish=False, chain_version=3)
        await bench.write(0, b"C", version=2, publish=False, chain_version=4)
        assert await bench.blocks() == 2
        found = await state(bench)
        assert found is not None and (found.pending_version, found.pending_chain_version) == (2, 4)
        await bench.commit(2)
        assert await bench.read() == b"Committed"
        assert await bench.blocks() == 1

    @driven
    async def test_a_discarded_version_leaves_what_was_committed(self, bench: Bench) -> None:
        await bench.write(0, pattern(8192), name=chunk(0))
        await bench.write(8192, b"in place", name=chunk(0), publish=False)
        await bench.replace(b"new", name=chunk(1), publish=False)
        await bench.write(0, b"removed", name=chunk(2))
        await bench.remove(name=chunk(2), publish=False)
        await bench.remove(name=chunk(3), version=4)
        await bench.replace(b"over a tombstone", name=chunk(3), publish=False)
        await bench.replace(b"another version", name=chunk(4), publish=False)
        names = [chunk(number) for number in range(6)]
        await bench.engine.discard(names, [2, 1, 2, 5, 2, 1])
        assert [await bench.read(name=name) for name in names] == [pattern(8192), b"", b"removed", b"", b"", b""]
        assert await bench.engine.pending() == [chunk(4)]
        assert await bench.engine.tombstones() == [(chunk(3), 4)]
        assert await bench.engine.states([chunk(1)]) == [None]
        assert await bench.blocks() == 3

    # ---- states and pending versions

    @driven
    async def test_states_say_what_is_committed_and_what_is_pending(self, bench: Bench) -> None:
        assert await state(bench) is None
        request = Request(CLIENT, 3, 4)
        await bench.write(0, b"one", publish=False, chain_version=2, request=request)
        expected = ChunkState(pending_version=1, pending_chain_version=2, pending_length=3)
        assert await state(bench) == expected._replace(request=request, granule_log2=14)
        await bench.commit(1)
        expected = ChunkState(1, 2, 3, granule_log2=14)
        assert await state(bench) == expected
        await bench.remove(publish=False, chain_version=5)
        assert await state(bench) == expected._replace(pending_version=2, pending_chain_version=5, pending_removes=True)
        await bench.reopen()
        await bench.commit(2)
        assert await state(bench) == ChunkState(2, 5, 0, removed=True, granule_log2=14)
        await bench.damage_record()
        found = await state(bench)
        assert found is not None and found.damaged

    @driven
    async def test_pending_versions_are_listed_until_they_are_settled(self, bench: Bench) -> None:
        for number in range(5):
            await bench.write(0, b"x", name=chunk(number), publish=False)
        await bench.write(0, b"committed at once", name=chunk(9))
        await bench.commit(1, name=chunk(0))
        await bench.write(0, b"takes its place", name=chunk(1))
        await bench.engine.install([installed(2, b"y", 1)])
        assert await bench.engine.pending() == [chunk(3), chunk(4)]
        await bench.reopen()
        assert await bench.engine.pending(chunk(3)) == [chunk(4)]
        assert await bench.engine.pending(b"", 1) == [chunk(3)]
        await bench.remove(name=chunk(3))
        await bench.engine.forget([chunk(4)])
        assert await bench.engine.pending() == []

    @driven
    async def test_a_read_takes_the_pending_version_of_the_items_that_ask_for_it(self, bench: Bench) -> None:
        for number in range(4):
            await bench.write(0, pattern(30_000, number), name=chunk(number))
        await bench.write(30_000, b"pending", name=chunk(0), publish=False)
        await bench.write(10, b"pending", name=chunk(1), publish=False)
        await bench.remove(name=chunk(2), publish=False)

        async def read(pending: list[bool]) -> list[bytes | None]:
            buffers = [bytearray(40_000) for _ in range(5)]
            views = [memoryview(buffer) for buffer in buffers]
            counts = await bench.engine.read([chunk(n) for n in range(5)], [0] * 5, views, pending=pending)
            return [
                bytes(buffer[:count]) if isinstance(count, int) else None
                for buffer, count in zip(buffers, counts, strict=True)
            ]

        committed = [*(pattern(30_000, number) for number in range(4)), b""]
        copied = bytearray(committed[1])
        copied[10:17] = b"pending"
        assert await read([False] * 5) == committed
        assert await read([True] * 5) == [committed[0] + b"pending", copied, b"", committed[3], b""]
        assert await read([False, True, False, True, False]) == [committed[0], copied, *committed[2:]]
        extent = await bench.pending(chunk(1))
        assert extent is not None
        await bench.damage(extent, 20_000)
        assert await read([True] * 5) == [committed[0] + b"pending", None, b"", committed[3], b""]
        assert await read([False] * 5) == committed

    @driven
    async def test_content_is_the_whole_of_a_version_verified(self, bench: Bench) -> None:
        assert await content(bench) is None
        await bench.write(0, pattern(3 * MIB), granule_log2=12)
        await bench.write(3 * MIB, b"pending", publish=False)
        assert await content(bench) == pattern(3 * MIB) + b"pending"
        assert await content(bench, pending=False) == pattern(3 * MIB)
        await bench.remove(publish=False)
        assert await content(bench) is None
        extent = await bench.committed()
        assert extent is not None
        await bench.damage(extent, 2 * MIB)
        with pytest.raises(Corruption, match="offset 2097152"):
            await content(bench, pending=False)
        await bench.commit(2)
        assert await content(bench) is None

    # ---- tombstones and the floor

    @driven
    async def test_a_removed_chunk_reads_as_absent_and_its_versions_go_on(self, bench: Bench) -> None:
        await bench.write(0, pattern(100_000))
        assert await bench.remove() == 2
        await bench.reopen()
        assert await bench.read() == b""
        assert await bench.blocks() == 0
        assert await bench.engine.scan(chunk(0), chunk(9)) == []
        assert await bench.engine.tombstones() == [(chunk(), 2)]
        assert (await scrub(bench.engine, runtime=bench.runtime)).chunks == 0
        assert (await check(bench.engine)).chunks == 0
        assert await bench.write(0, b"again", publish=False) == 3
        assert await bench.read() == b""
        assert await bench.engine.tombstones() == [(chunk(), 2)]
        await bench.commit(3)
        assert await bench.read() == b"again"
        assert await bench.engine.tombstones() == []

    @driven
    async def test_a_scan_finds_chunks_behind_any_number_of_tombstones(self, bench: Bench) -> None:
        for number in range(12):
            await bench.write(0, b"x", name=chunk(number))
        for number in range(1, 11):
            await bench.remove(name=chunk(number))
        for limit in (1, 2, 3, 100):
            found = [name for name, _ in await bench.engine.scan(chunk(0), chunk(99), limit=limit)]
            assert found == [chunk(0), chunk(11)][:limit]
            found = [name for name, _ in await bench.engine.scan(chunk(0), chunk(99), limit=limit, reverse=True)]
            assert found == [chunk(11), chunk(0)][:limit]

    @driven
    async def test_purged_tombstones_leave_their_version_in_the_floor(self, bench: Bench) -> None:
        for number, version in ((0, 5), (1, 9), (2, 3)):
            await bench.remove(name=chunk(number), version=version)
        await bench.write(0, b"over it", name=chunk(2), publish=False)
        await bench.write(0, b"alive", name=chunk(3))
        await bench.engine.purge([chunk(number) for number in range(5)])
        assert await bench.engine.tombstones() == [(chunk(2), 3)], "something is pending over it"
        assert await bench.engine.states([chunk(0), chunk(1)]) == [None, None]
        assert await bench.read(name=chunk(3)) == b"alive"
        for _ in range(2):
            assert bench.engine.floor == 9
            await bench.reopen()
        assert await bench.write(0, b"new", name=chunk(0)) == 10
        assert await bench.write(0, b"alive and well", name=chunk(3)) == 2
        # The floor of a head may be lower than ours.
        assert await bench.write(0, b"told so", name=chunk(1), version=4, publish=False) == 4
        await bench.commit(4, name=chunk(1))
        assert await bench.read(name=chunk(1)) == b"told so"

    @driven
    async def test_check_compares_the_lists_with_the_records(self, bench: Bench) -> None:
        for number in range(6):
            await bench.write(0, b"x", name=chunk(number), publish=number % 2 == 0)
        await bench.remove(name=chunk(2))
        await bench.remove(name=chunk(4))
        assert (await check(bench.engine)).findings == []
        txn = bench.index.begin()
        txn.delete(b"p" + chunk(3))
        txn.delete(b"t" + chunk(4))
        txn.put(b"p" + chunk(0), b"")
        await txn.commit()
        findings = (await check(bench.engine)).findings
        assert [(found.kind, found.chunk) for found in findings] == [("misfiled", f"7.{n}") for n in (0, 3, 4)]

    # ---- requests

    @driven
    async def test_a_request_is_known_once_its_update_is_published(self, bench: Bench) -> None:
        request = Request(CLIENT, 1, 5)
        await bench.write(0, b"one", request=request, publish=False)
        assert await bench.engine.last_sequences([request]) == [None]
        await bench.commit(1)
        assert await bench.engine.last_sequences([request, Request(CLIENT, 2, 5)]) == [5, None]
        await bench.remove(request=Request(CLIENT, 1, 6))
        await bench.reopen()
        assert await bench.remove(request=Request(CLIENT, 1, 6)) == 2
        with pytest.raises(StaleChunk, match="late copy"):
            await bench.write(0, b"late", name=chunk(1), request=request)
        assert await bench.engine.request_rows() == [Request(CLIENT, 1, 6)]

    @driven
    async def test_a_repeated_request_is_published_if_it_was_only_pending(self, bench: Bench) -> None:
        request = Request(CLIENT, 1, 1)
        await bench.write(0, b"one", request=request, publish=False)
        assert await bench.write(0, b"one", request=request) == 1
        assert await bench.read() == b"one"

    @driven
    async def test_a_request_that_is_pending_makes_older_ones_late(self, bench: Bench) -> None:
        await bench.write(0, b"newer", request=Request(CLIENT, 1, 6), publish=False)
        with pytest.raises(StaleChunk, match="late copy"):
            await bench.write(0, b"older", request=Request(CLIENT, 1, 5), publish=False)
        assert await content(bench) == b"newer"

    @driven
    async def test_settling_an_older_request_does_not_make_a_newer_one_look_new(self, bench: Bench) -> None:
        older, newer = Request(CLIENT, 1, 5), Request(CLIENT, 1, 6)
        await bench.write(0, b"given up", request=older, publish=False)
        await bench.write(0, b"went on", name=chunk(1), request=newer)
        await bench.commit(1)
        assert await bench.engine.last_sequences([newer]) == [6]

    @driven
    async def test_a_replica_carries_out_what_it_is_told_whatever_the_request(self, bench: Bench) -> None:
        await bench.engine.install_requests([(CLIENT, 1, 6)], 0)
        for number, sequence in enumerate((5, 6, 6), 1):
            request = Request(CLIENT, 1, sequence)
            await bench.replace(b"told", request=request, version=number, publish=False, checks_requests=False)
            await bench.commit(number)
        assert await bench.read() == b"told"
        assert await bench.engine.last_sequences([Request(CLIENT, 1, 0)]) == [6]

    @driven
    async def test_updates_without_a_client_leave_no_request_row(self, bench: Bench) -> None:
        await bench.write(0, b"x")
        await bench.write(0, b"x", request=NO_REQUEST._replace(sequence=3), publish=False)
        await bench.commit(2)
        assert await bench.engine.request_rows() == []

    @driven
    async def test_request_rows_are_paged_taken_over_and_dropped(self, bench: Bench) -> None:
        rows = [Request(client, channel, channel + 10) for client in (CLIENT, OTHER_CLIENT) for channel in (1, 70_000)]
        await bench.engine.install_requests(rows, 20)
        await bench.engine.install_requests([(CLIENT, 1, 3), (OTHER_CLIENT, 1, 90)], 7)
        rows[2] = Request(OTHER_CLIENT, 1, 90)
        for _ in range(2):
            assert bench.engine.floor == 20
            assert await bench.engine.request_rows() == rows
            assert await bench.engine.request_rows(rows[0], 2) == rows[1:3]
            await bench.reopen()
        await bench.engine.drop_requests([CLIENT])
        assert await bench.engine.request_rows() == rows[2:]
        await bench.engine.install_requests(rows, 0)
        await bench.engine.drop_requests_except({CLIENT})
        assert await bench.engine.request_rows() == rows[:2]
        await bench.engine.drop_requests_except(set())
        await bench.reopen()
        assert await bench.engine.request_rows() == []

    # ---- copies

    @driven
    async def test_install_makes_a_chunk_exactly_so_over_anything(self, bench: Bench) -> None:
        await bench.replace(pattern(100_000), name=chunk(0), version=50)
        await bench.write(0, b"pending", name=chunk(1), publish=False)
        await bench.remove(name=chunk(2), version=50)
        await bench.write(0, b"shared", name=chunk(3))
        await bench.truncate(2, name=chunk(3), publish=False)
        await bench.write(0, b"removed", name=chunk(4), publish=False)
        payloads = [b"older", pattern(3 * MIB), b"", b"whole", None]
        request = Request(CLIENT, 1, 2)
        items = [
            installed(number, payload, 7, request=request._replace(channel=number), granule_log2=12)
            for number, payload in enumerate(payloads)
        ]
        expected = [Prepared(7, len(payload or b""), crc32c(payload or b"")) for payload in payloads]
        assert await bench.engine.install(items) == expected
        for _ in range(2):
            names = [chunk(number) for number in range(5)]
            assert await bench.engine.summaries(names) == expected
            states = await bench.engine.states(names)
            assert {each and (each.chain_version, each.granule_log2, each.pending_version) for each in states} == {
                (9, 12, 0)
            }
            assert [await bench.read(name=name) for name in names] == [payload or b"" for payload in payloads]
            assert await bench.engine.tombstones() == [(chunk(4), 7)]
            assert await bench.engine.pending() == []
            assert await bench.blocks() == 4
            assert await bench.engine.last_sequences([each.request for each in items]) == [2] * 5
            await bench.reopen()

    @driven
    async def test_install_and_forget_do_not_mind_a_damaged_record(self, bench: Bench) -> None:
        for number in range(3):
            await bench.write(0, b"whose", name=chunk(number), publish=number != 1)
            await bench.damage_record(chunk(number))
        with pytest.raises(Corruption):
            await bench.replace(b"whole")
        with pytest.raises(Corruption):
            await bench.remove()
        await bench.engine.install([installed(0, b"whole", 4), installed(1, None, 5)])
        await bench.engine.forget([chunk(2)])
        assert await bench.read() == b"whole"
        assert await bench.engine.states([chunk(2)]) == [None]
        assert await bench.engine.pending() == []
        assert {found.kind for found in (await check(bench.engine, repair=True)).findings} == {"leaked"}
        assert await bench.blocks() == 1

    @driven
    async def test_forget_leaves_nothing_but_the_floor(self, bench: Bench) -> None:
        await bench.write(0, pattern(100_000), name=chunk(0), version=5)
        await bench.replace(b"pending", name=chunk(0), version=8, publish=False)
        await bench.remove(name=chunk(1), version=6)
        await bench.engine.forget([chunk(0), chunk(1), chunk(2)])
        assert await bench.engine.versions() == []
        assert await bench.engine.tombstones() == []
        assert await bench.blocks() == 0
        assert bench.engine.floor == 8
        assert await bench.write(0, b"new") == 9

    @driven
    async def test_versions_describe_every_row(self, bench: Bench) -> None:
        await bench.write(0, b"small", name=chunk(0), chain_version=3)
        await bench.write(0, pattern(2 * MIB), name=chunk(1), granule_log2=12)
        await bench.write(0, b"more", name=chunk(1), publish=False)
        await bench.remove(name=chunk(2), version=4, chain_version=5)
        await bench.write(0, b"new", name=chunk(3), publish=False)
        await bench.write(0, b"bad", name=chunk(4))
        await bench.damage_record(chunk(4))
        await bench.write(0, pattern(2 * MIB), name=chunk(5), granule_log2=12)
        extent = await bench.committed(chunk(5))
        assert extent is not None
        await bench.damage(extent, 2 * MIB)  # the first byte of the sums beside the block
        expected = [
            ChunkVersion(chunk(0), 1, 3, 5, crc32c(b"small")),
            ChunkVersion(chunk(1), 1, 1, 2 * MIB, crc32c(pattern(2 * MIB)), pending=True),
            ChunkVersion(chunk(2), 4, 5, 0, 0, removed=True),
            ChunkVersion(chunk(3), 0, 0, 0, 0, pending=True),
            ChunkVersion(chunk(4), 0, 0, 0, 0, damaged=True),
            ChunkVersion(chunk(5), 0, 0, 0, 0, damaged=True),
        ]
        assert await bench.engine.versions() == expected
        assert await bench.engine.versions(chunk(1), 2) == expected[2:4]

    # ---- who it is

    @driven
    async def test_a_target_keeps_its_id_and_a_new_index_is_a_new_generation(self, bench: Bench) -> None:
        first = bench.engine.identity
        assert len(first.target) == len(first.generation) == 16
        assert (await bench.reopen()).identity == first
        txn = bench.index.begin()
        txn.delete(b"f")
        await txn.commit()
        bench.settings["target"] = first.target
        await bench.reopen()
        second = bench.engine.identity
        assert second.target == first.target and second.generation != first.generation
        with pytest.raises(StoreFormat, match="holds target"):
            await bench.open(target=b"another target's")

    @driven
    async def test_an_index_of_before_generations_gets_one(self, bench: Bench) -> None:
        txn = bench.index.begin()
        txn.put(b"f", b"\x92\x01\xc4\x10" + b"t" * 16)
        await txn.commit()
        first = (await bench.reopen()).identity
        assert first.target == b"t" * 16 and len(first.generation) == 16
        assert (await bench.reopen()).identity == first
