"""A namespace at its limit: what goes, what is moved, and what must not stop it from taking more.

Run: pytest tests/kvcache/test_making_room.py
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from emberfs.errors import EmberError, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv import compaction
from emberkv.keys import ROOT
from emberkv.page import HEADER_BYTES
from emberkv.pool import Pool
from emberkv.pools import LOOK_S
from emberkv.puts import STORED
from emberkv.room import AGAIN_LOOKS, GROWS_LOOKS, Room
from emberkv.segments import SECTOR_BYTES
from emberkv.strangers import STUCK_S

from tests.kvcache.test_pool import MIB, PAGE, TENANT, Bench, chain, run
from tests.kvcache.test_room import Lab


async def fill(bench: Bench, pool: Pool, share: float, pages: int = 20) -> int:
    """Chains of so many pages until so much of what may be alive is. How many."""
    count = 0
    while pool.table.live_bytes < share * pool.space.live_bytes_max(PAGE):
        await bench.put(pool, chain(count, pages), durable=False)
        count += 1
    return count


def test_writers_that_take_turns_fill_their_segments() -> None:
    """At the limit room is made by compaction, and not by taking a segment from who is about to go on."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=32 * MIB)
        pool = await bench.open()
        made, create = [], bench.files.create

        async def note(path: str, size_bytes: int) -> None:
            made.append(path)
            await create(path, size_bytes)

        bench.files.create = note  # type: ignore[method-assign]
        for prompt in range(4000):
            assert await bench.put(pool, chain(prompt, 2), writer=1 + prompt % 3, durable=False) == [STORED] * 2
            await runtime.sleep(0.01)
        assert pool.space.counts.evicted_pages > 0
        written = 4000 * 2 * PAGE / pool.index.segments.segment_bytes
        assert len(made) < 2.5 * written, "a put or two each, were they taken away"
        await pool.close()

    run(work)


@pytest.mark.parametrize("writers", [1, 3])
def test_what_a_full_namespace_moves_is_a_fraction_of_what_it_is_given(writers: int) -> None:
    """Chains are asked for as an engine does, some much more often than others; what is missing of them is put."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=128 * MIB)
        pool = await bench.open()
        rolled, prompts = random.Random(90), 4000
        lengths = [rolled.randint(1, 32) for _ in range(prompts)]
        weights = [1 / rank**0.9 for rank in range(1, prompts + 1)]
        put_bytes, moved_bytes = 0, list[int]()
        for prompt in rolled.choices(range(prompts), weights, k=9_000):
            await runtime.sleep(0.01)
            keys = chain(prompt, lengths[prompt])
            if (known := len(pool.match(TENANT, b"".join(keys), 0)[0])) < len(keys):
                parent, writer = keys[known - 1] if known else ROOT, rolled.randint(1, writers)
                states = await bench.put(pool, keys[known:], parent=parent, writer=writer, durable=False)
                assert set(states) == {STORED}
                put_bytes += len(states) * PAGE
            if put_bytes > 128 * MIB:
                moved_bytes.append(pool.space.counts.moved_bytes)
        assert put_bytes > 384 * MIB
        assert pool.table.live_bytes > 0.87 * 128 * MIB
        assert 0 < moved_bytes[-1] - moved_bytes[0] < 0.2 * (put_bytes - 128 * MIB)
        await pool.close()

    run(work)


def test_files_do_not_get_smaller_and_smaller() -> None:
    """Of pages that are used at random whatever is moved is soon torn again."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=32 * MIB)
        pool = await bench.open()
        rolled, lengths, there = random.Random(7), dict[int, int](), list[int]()
        for number in range(8000):
            await runtime.sleep(0.01)
            lengths[number] = rolled.randint(1, 2)
            await bench.put(pool, chain(number, lengths[number]), durable=False)
            there.append(number)
            for _ in range(3):
                at = rolled.randrange(len(there))
                if not len(pool.match(TENANT, b"".join(chain(there[at], lengths[there[at]])), 0)[0]):
                    there[at] = there[-1]
                    there.pop()
        segments = pool.index.segments
        assert segments.disk_bytes > 0.45 * segments.segment_bytes * len(segments.by_id)
        await pool.close()

    run(work)


def test_what_all_share_stays_when_many_writers_begin() -> None:
    """Each of them opens a segment; no page is cold."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        pool = await bench.open()
        shared = chain(10**6, 2)
        await bench.put(pool, shared, durable=False)
        for prompt in range(215):
            await bench.put(pool, chain(prompt, 20), parent=shared[-1], durable=False)
        pool.space.end_segment(1)
        await runtime.sleep(10)
        for prompt in range(1, 215):  # All but one chain: the first segment has what is cold, and what all share.
            pool.match(TENANT, b"".join([*shared, *chain(prompt, 20)]), 0)
        await runtime.sleep(10)
        for writer in range(106):
            await pool.reserve(100 + writer, TENANT, 0, chain(10**7 + writer, 1), [shared[-1]], [PAGE])
        assert 0 < pool.space.counts.evicted_pages < 200
        assert await bench.readable(pool, shared) == 2
        await pool.close()

    run(work)


@pytest.mark.parametrize("moved_bytes_max", [None, 8 * MIB])
def test_what_was_used_since_victims_were_chosen_is_not_cold(moved_bytes_max: int | None) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        pool = await bench.open()
        shared = [chain(10**6 + number, 3) for number in range(4)]
        beside = [chain(5000 + number, 24) for number in range(4)]
        for prefix, keys in zip(shared, beside, strict=True):
            await bench.put(pool, prefix, durable=False)
            await bench.put(pool, keys, durable=False)
        await runtime.sleep(1)
        await fill(bench, pool, 0.85)
        await pool.remove(TENANT, [keys[0] for keys in beside])
        pool.space.end_segment(1)
        pool.space.compaction._rank(moved_bytes_max)
        assert set(pool.space.compaction._victims) & {1, 2, 3, 4}
        await runtime.sleep(100)
        for number in range(10):
            for prefix in shared:
                again = chain(20_000 + 10 * shared.index(prefix) + number, 3)
                await bench.put(pool, again, parent=prefix[-1], durable=False)
                assert len(pool.match(TENANT, b"".join([*prefix, *again]), 0)[0]) == 6
        before = pool.table.count
        for _ in range(3):
            assert await pool.space.compaction.compact_one(moved_bytes_max)
        assert pool.table.count == before
        await pool.close()

    run(work)


def test_a_compaction_that_was_cut_off_is_no_room_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One write fails in the middle; then others fill the store."""
    monkeypatch.setattr(compaction, "COMPACT_BYTES", MIB)

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=2048 * MIB)
        pool = await lab.serve()
        for prompt in range(6000):
            await lab.put(pool, chain(prompt, 2), durable=False)
        order = list(range(6000))
        random.Random(3).shuffle(order)
        for prompt in order[:2400]:
            pool.match(TENANT, b"".join(chain(prompt, 2)), 0)
        await pool.remove(TENANT, [chain(prompt, 2)[0] for prompt in order[2400:4000]])
        pool.space.end_segment(1)
        failed = []

        def fails(operation: str, path: str) -> EmberError | None:
            has_begun = sum(each.moved_bytes for each in pool.index.segments) > 0.9 * MIB
            if operation == "write" and "/segments/" in path and has_begun and not failed:
                failed.append(path)
                return Unavailable("for a moment")
            return None

        lab.files.fails = fails
        lab.files.left_bytes -= await lab.left() - 13 * MIB
        await runtime.sleep(30)
        assert failed
        lab.files.left_bytes -= await lab.left() - 5 * MIB // 2
        for prompt in range(10):
            await runtime.sleep(30)
            states = await lab.put(pool, chain(10**6 + prompt, 2), durable=False)
        assert states == [STORED] * 2
        assert await lab.left() > 12 * MIB
        await lab.pools.close()

    run(work)


def test_a_file_that_cannot_be_removed_keeps_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=8 * MIB)
        pool = await bench.open()
        remove = bench.files.remove

        async def refuse_one(path: str) -> None:
            if path.endswith("/00000001"):
                raise Unavailable("its chain is away")
            await remove(path)

        bench.files.remove = refuse_one  # type: ignore[method-assign]
        for prompt in range(400):
            assert await bench.put(pool, chain(prompt, 20), durable=False) == [STORED] * 20
            await runtime.sleep(0.1)
        assert pool.space.counts.removed_segments > 100
        assert [each.id for each in pool.index.segments.retired()] == [1]
        bench.files.remove = remove  # type: ignore[method-assign]
        await runtime.sleep(STUCK_S + 2)
        assert not pool.index.segments.retired()
        assert 0 < len([each for each in caplog.records if "00000001 stays for now" in each.message]) < 3
        await pool.close()

    run(work)


def test_who_paused_or_puts_what_it_evicts_grows_for_a_while() -> None:
    shared, held = Room(), {"busy": 10 * MIB, **{f"idle {number}": MIB for number in range(31)}}
    shared.share(500 * MIB, 0, held)
    held["busy"] += MIB
    for _ in range(GROWS_LOOKS + 1):
        assert shared.share(500 * MIB, 0, held)["busy"] > 350 * MIB
        held["busy"] -= 1
    assert shared.share(500 * MIB, 0, held)["busy"] < 100 * MIB


def test_a_figure_that_stays_at_nothing_empties_nobody_in_a_day() -> None:
    shared, held, given = Room(), 1000 * MIB, 0
    for _ in range(int(86_400 / LOOK_S)):
        limit = shared.share(0, held, {"a": held})["a"]
        given += limit < held
        held = min(held, limit)
    assert held > 600 * MIB
    assert given > math.log2(86_400 / LOOK_S / AGAIN_LOOKS) - 2, "now and then it tries"


def test_what_an_owner_before_had_open_is_not_taken_for_full() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=1024 * MIB)
        pool = await bench.open()
        for writer in range(8):
            await bench.put(pool, chain(writer, 20), writer=1 + writer)
        before = pool.space.held_bytes
        bench.kill(pool)
        again = await bench.open()
        assert before - 8 * SECTOR_BYTES <= again.space.held_bytes <= before < again.index.segments.disk_bytes / 2
        assert again.index.segments.promised_bytes == again.index.segments.disk_bytes
        await again.close()  # With a snapshot.
        third = await bench.open()
        assert third.space.held_bytes == again.space.held_bytes
        await third.close()

    run(work)


def test_a_store_that_takes_its_time_to_say_what_is_left_holds_nobody_up() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=8 * MIB)

        async def space() -> tuple[int, int]:
            await runtime.sleep(3600)
            return 1, 1

        lab.files.space = space  # type: ignore[method-assign]
        began_s = runtime.now_s()
        pool = await lab.serve()
        assert runtime.now_s() - began_s < 2 * LOOK_S
        assert await lab.put(pool, chain(1, 3)) == [STORED] * 3
        await lab.pools.close()

    run(work)


def test_a_file_stays_for_grants_to_write_and_room_is_waited_for() -> None:
    """What is written under one after the file had gone would stay for ever."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=8 * MIB)
        bench.config = replace(bench.config, granted_s=60.0)
        pool = await bench.open()
        await bench.put(pool, chain(1, 3))
        assert pool.space.note_granted([1]) == {1: pool.index.segments.by_id[1].end}
        await pool.remove(TENANT, [chain(1, 3)[0]])
        pool.space.end_segment(1)
        await runtime.sleep(55)
        assert 1 in pool.index.segments.by_id
        await runtime.sleep(10)
        assert 1 not in pool.index.segments.by_id
        states: list[int] = []
        for prompt in range(400):  # All is written anew in two minutes, then in two seconds.
            states += await bench.put(pool, chain(10 + prompt, 20), durable=False)
            if (mine := pool.index.segments.of_writer(1)) is not None:
                pool.space.note_granted([mine.id])
            await runtime.sleep(3.0 if prompt < 200 else 0.05)
            assert pool.index.segments.promised_bytes <= 8 * MIB
        assert states[: 200 * 20].count(STORED) > 0.95 * 200 * 20
        assert pool.table.live_bytes > 4 * MIB, "it does not empty itself for what comes by itself"
        bench.kill(pool)
        again = await bench.open()
        await again.remove(TENANT, [key for prompt in range(400) for key in chain(10 + prompt, 20)[:1]])
        await runtime.sleep(50)
        assert again.index.segments.retired(), "the owner before may have given some"
        await runtime.sleep(20)
        assert not again.index.segments.retired()
        await again.close()

    run(work)


async def woven(bench: Bench, pool: Pool, chains: list[int], pages: int) -> random.Random:
    """Chains whose pages lie among each other's, used in another order than that in which they were written."""
    rolled = random.Random(1)
    for at in range(pages):
        for number in rolled.sample(chains, len(chains)):
            keys = chain(number, pages)
            await bench.put(pool, keys[at : at + 1], parent=keys[at - 1] if at else ROOT, durable=False)
    for number in rolled.sample(chains, len(chains)):
        await pool._runtime.sleep(0.01)
        pool.match(TENANT, b"".join(chain(number, pages)), 0)
    return rolled


def test_what_is_above_a_pin_is_not_moved_round_and_round() -> None:
    """It is cold, and it cannot go."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        pool = await bench.open()
        total = int(0.93 * pool.space.live_bytes_max(PAGE) / (PAGE + HEADER_BYTES) / 20)
        for number in range(total // 5):
            await bench.put(pool, chain(number, 20), durable=False)
        pool.pin(TENANT, [chain(number, 20)[-1] for number in range(total // 5)], 86_400.0)
        await runtime.sleep(100)
        await woven(bench, pool, list(range(total // 5, total)), 20)
        before, states = pool.space.counts.moved_bytes, list[int]()
        for number in range(total, total + 40):
            putting = runtime.spawn(bench.put(pool, chain(number, 20), durable=False), "put")
            while not putting.done():
                await runtime.sleep(0.01)
                assert pool.space.counts.moved_bytes - before < 64 * MIB
            states += putting.result()
        assert states.count(STORED) > 0.95 * len(states)
        await pool.close()

    run(work)


def test_a_restart_with_grants_costs_no_pages() -> None:
    """What was written long ago goes, as ever; the files of the last minute wait."""

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=16 * MIB)
        bench.config = replace(bench.config, granted_s=60.0)
        pool = await bench.open()
        total = int(0.93 * pool.space.live_bytes_max(PAGE) / (PAGE + HEADER_BYTES) / 4)
        await woven(bench, pool, list(range(total)), 4)
        for number in range(total, total + 300):
            await runtime.sleep(0.5)
            await bench.put(pool, chain(number, 4), durable=False)
            if (mine := pool.index.segments.of_writer(1)) is not None:
                pool.space.note_granted([mine.id])
        pages = pool.table.count
        await pool.close()
        again, states = await bench.open(), list[int]()
        assert again.index.segments.promised_bytes <= 16 * MIB, "what had gone does not count"
        for number in range(10**5, 10**5 + 80):
            await runtime.sleep(0.5)
            states += await bench.put(again, chain(number, 4), durable=False)
        assert states.count(STORED) > 0.95 * len(states) and again.table.count > 0.75 * pages
        await again.close()

    run(work)


def test_large_pages_are_moved_too() -> None:
    """Whose segments are larger than those of others."""

    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        pool = await lab.serve()
        for number in range(54):
            assert await lab.put_large(pool, number) == [STORED] * 4
        await pool.remove(TENANT, [chain(number, 4)[1] for number in range(0, 54, 2)])
        assert pool.table.live_bytes < 42 * MIB
        for number in range(100, 118):
            assert await lab.put_large(pool, number) == [STORED] * 4
        assert pool.space.counts.moved_bytes > MIB and pool.space.counts.evicted_pages < 16
        await lab.pools.close()

    run(work)


@pytest.mark.parametrize("left", [3, 6])
def test_what_grants_keep_is_not_there_twice_on_a_store_that_fills(left: int) -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=256 * MIB)
        pool = await lab.serve()
        object.__setattr__(pool.space.config, "granted_s", 60.0)
        rolled = random.Random(3)
        for number in range(1000):
            await lab.put(pool, chain(number, 10), durable=False)
        for number in rolled.sample(range(1000), 1000):
            pool.match(TENANT, b"".join(chain(number, 10)), 0)
        await pool.remove(TENANT, [chain(number, 10)[0] for number in rolled.sample(range(1000), 350)])
        pool.space.note_granted([each.id for each in pool.index.segments])
        lab.files.left_bytes -= await lab.left() - left * MIB
        least = left * MIB
        for _ in range(100):
            await runtime.sleep(1.0)
            least = min(least, await lab.left())
        assert least > left * MIB / 3 and await lab.left() > 12 * MIB
        await lab.pools.close()

    run(work)


def test_a_file_of_an_owner_before_that_cannot_be_removed_holds_up_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, capacity_bytes=64 * MIB)
        pool = await bench.open()
        remove, stranger = bench.files.remove, f"{pool.directory}/segments/000f0001"

        async def refuse(path: str) -> None:
            if path == stranger:
                raise Unavailable("its chain is away")
            await remove(path)

        bench.files.remove = refuse  # type: ignore[method-assign]
        bench.files.files[stranger] = bytearray(5)
        await pool.space.look_for_strangers(pool.ownership.check)
        assert len(pool.space.strangers) == 1
        await bench.put(pool, chain(1, 20))
        await pool.remove(TENANT, chain(1, 20)[:1])
        pool.space.end_segment(1)
        await runtime.sleep(10)
        assert not pool.index.segments.by_id
        bench.files.remove = remove  # type: ignore[method-assign]
        await runtime.sleep(STUCK_S + 2)
        assert not len(pool.space.strangers) and stranger not in bench.files.files
        await pool.close()

    run(work)
