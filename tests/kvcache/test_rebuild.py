"""An index made anew from the pages, after its files are gone."""

from __future__ import annotations

import asyncio
import random

import pytest
from emberfs.checksum import crc32c
from emberfs.errors import Corruption, EmberError, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv.keys import ROOT
from emberkv.page import HEADER_BYTES, Place, encode_header
from emberkv.pool import Pool
from emberkv.puts import STORED
from emberkv.rebuild import Rebuild, Rebuilt, scan_segment

from tests.kvcache.test_pool import MIB, NAMESPACE, TENANT, Bench, chain, content, run


class Lab(Bench):
    """Pages that know their parents, and what an operator does."""

    async def write(self, pool: Pool, number: int, places: list[Place | None], keys: list[bytes]) -> list[int]:
        crcs = []
        parents = pool._puts._reservations[number].parents
        for key, parent, place in zip(keys, parents, places, strict=True):
            assert place is not None
            payload = content(key, place.length)
            crcs.append(crc32c(payload))
            head = encode_header(place._replace(crc=crcs[-1]), key=key, parent=parent, kind=0, tenant=TENANT)
            await self.files.write(pool.space.path(place.segment), place.offset, head + payload)
        return crcs

    async def filled(self, prompts: int) -> Pool:
        """A pool that has evicted and compacted, if the prompts are many."""
        pool = await self.open()
        for prompt in range(prompts):
            assert set(await self.put(pool, chain(prompt, 5), durable=False)) == {STORED}
            for warm in range(0, prompt, 4):
                pool.match(TENANT, b"".join(chain(warm, 5)), 0)
        await pool.flush()
        return pool

    def lose_index(self) -> None:
        for path in list(self.files.files):
            if path.startswith("/ns/index/"):
                del self.files.files[path]

    async def rebuild(self, *, writes: bool = True, tenants: tuple[str, ...] = ()) -> Rebuilt:
        rebuild = Rebuild(self.files, self.runtime, "/ns", NAMESPACE, tenants=tenants)
        assert await rebuild.is_needed()
        report = await rebuild.scan()
        if writes:
            await rebuild.write()
        return report

    def damage(self, pool: Pool, key: bytes, at: int) -> None:
        place = pool.table.place(pool.table.any_slot(TENANT, key) or 0, 0)
        assert place is not None
        self.files.files[pool.space.path(place.segment)][place.offset + at] ^= 1


@pytest.mark.parametrize("prompts", [20, 160])
def test_every_page_is_there_again(prompts: int) -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime, capacity_bytes=4 * MIB)
        pool = await lab.filled(prompts)
        assert (pool.space.counts.moved_bytes > 0) == (prompts > 100)
        pool.set_quota(TENANT, 3 * MIB)
        await pool.flush()
        before = [await lab.readable(pool, chain(prompt, 5)) for prompt in range(prompts)]
        lab.kill(pool)
        lab.lose_index()
        with pytest.raises(Corruption, match="emberline kv rebuild"):
            await lab.open()
        await runtime.sleep(5)
        report = await lab.rebuild()
        assert report.pages >= sum(before) and not report.damaged_pages and not report.nameless
        pool = await lab.open()
        after = [await lab.readable(pool, chain(prompt, 5)) for prompt in range(prompts)]
        assert all(now >= then for now, then in zip(after, before, strict=True))
        assert pool.index.quotas == [3 * MIB]
        assert sum(segment.live_bytes for segment in pool.index.segments) == pool.table.live_bytes
        assert set(await lab.put(pool, chain(999, 5))) == {STORED}
        assert await lab.readable(pool, chain(999, 5)) == 5
        assert pool.index.segments.promised_bytes <= lab.config.capacity_bytes

    run(work)


def test_what_is_damaged_is_left_out_and_counted() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        pool = await lab.filled(6)
        lab.damage(pool, chain(1, 5)[2], HEADER_BYTES + 4000)
        lab.damage(pool, chain(2, 5)[0], 30)  # The header, of a page that others of the same write lie behind.
        lab.damage(pool, chain(3, 5)[4], 0)  # Not even its first bytes are right.
        lab.kill(pool)
        lab.lose_index()
        report = await lab.rebuild()
        assert report.pages == 27 and report.damaged_pages == 2
        assert report.orphans == 6, "what hung on a page that is not there"
        pool = await lab.open()
        assert [await lab.readable(pool, chain(prompt, 5)) for prompt in range(6)] == [5, 2, 0, 4, 5, 5]
        assert await lab.put(pool, chain(1, 5)[2:3], parent=chain(1, 5)[1]) == [STORED]
        assert await lab.readable(pool, chain(1, 5)) == 5, "what came after it is found again"

    run(work)


def test_a_part_of_a_segment_that_the_store_cannot_read_costs_what_lies_there() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        pool = await lab.filled(6)
        place = pool.table.place(pool.table.any_slot(TENANT, chain(3, 5)[1]) or 0, 0)
        assert place is not None
        hole, real_read = range(place.offset + 5000, place.offset + 5100), lab.files.read

        async def read(path: str, ranges: list[tuple[int, int]]) -> list[bytes | None]:
            pieces = await real_read(path, ranges)
            is_hit = [begin < hole.stop and begin + size > hole.start for begin, size in ranges]
            here = path.endswith(f"{place.segment:08x}")
            return [None if hit and here else piece for hit, piece in zip(is_hit, pieces, strict=True)]

        lab.files.read = read  # type: ignore[method-assign,assignment]
        lab.kill(pool)
        lab.lose_index()
        report = await lab.rebuild()
        assert report.pages == 29 and report.damaged_pages == 1

    run(work)


def test_a_dry_run_and_one_that_was_ended_write_nothing() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        lab.kill(await lab.filled(6))
        lab.lose_index()
        before = dict(lab.files.files)
        assert (await lab.rebuild(writes=False)).pages == 30
        assert lab.files.files == before
        for steps in range(5, 60, 9):
            writing = runtime.spawn(lab.rebuild(), "rebuild")
            await runtime.sleep(steps * 0.05)
            writing.cancel()
            await asyncio.wait([writing])
            lab.lose_index()  # Should it have been done by then.
        assert (await lab.rebuild()).pages == 30
        pool = await lab.open()
        assert [await lab.readable(pool, chain(prompt, 5)) for prompt in range(6)] == [5] * 6

    run(work)


def test_a_namespace_that_is_served_is_left_alone() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        pool = await lab.filled(3)
        lab.lose_index()
        with pytest.raises(Unavailable, match="is served at here"):
            await lab.rebuild()
        assert not pool.is_lost

    run(work)


def test_an_index_that_can_be_read_needs_none() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        pool = await lab.filled(3)
        await pool.close()
        assert not await Rebuild(lab.files, runtime, "/ns", NAMESPACE).is_needed()
        (path,) = (path for path in lab.files.files if path.endswith(".snapshot"))
        del lab.files.files[path][20:]
        assert await Rebuild(lab.files, runtime, "/ns", NAMESPACE).is_needed()

    run(work)


def test_pages_of_tenants_without_a_name_wait_for_one() -> None:
    async def work(runtime: SimRuntime) -> None:
        lab = Lab(runtime)
        lab.kill(await lab.filled(3))
        lab.lose_index()
        for path in [path for path in lab.files.files if "/tenants/" in path]:
            del lab.files.files[path]
        report = await lab.rebuild(writes=False)
        assert report.pages == 0 and report.nameless == {TENANT: 15}
        assert (await lab.rebuild(tenants=("tenant",))).tenants == {"tenant": 15}

    run(work)


def test_the_newest_page_of_a_key_counts_and_what_a_payload_holds_is_none() -> None:
    key, other = chain(1, 1)[0], chain(2, 1)[0]
    data = bytearray(1 << 16)

    def lay(at: int, payload: bytes, name: bytes, *, crc: int | None = None, place_at: int | None = None) -> int:
        place = Place(7, at if place_at is None else place_at, len(payload), crc32c(payload) if crc is None else crc)
        page = encode_header(place, key=name, parent=ROOT, kind=0, tenant=0) + payload
        data[at : at + len(page)] = page
        return at + len(page)

    end = lay(0, b"a" * 1000, key)
    end = lay(end, b"b" * 5000, key)
    forged = encode_header(Place(7, end + HEADER_BYTES, 10, 0), key=other, parent=ROOT, kind=0, tenant=0)
    end = lay(end, forged + b"c" * 500, key)
    lay(8192, b"d" * 100, other, place_at=4096)  # Moved from elsewhere.
    lay(12288, b"e" * 100, other, crc=1)
    scanned = scan_segment(data, 7)
    assert [page.place.length for page in scanned.pages] == [1000, 5000, 596]
    assert scanned.damaged == 1
    assert scanned.end == 16384


@pytest.mark.parametrize("seed", range(8))
def test_after_crashes_all_that_was_acknowledged_is_found_by_a_scan(seed: int) -> None:
    async def work(runtime: SimRuntime) -> None:
        rng = random.Random(seed)
        lab = Lab(runtime, capacity_bytes=64 * MIB)
        acknowledged: list[list[bytes]] = []
        for life in range(3):
            pool = await lab.open()
            for prompt in range(10):
                keys = chain(100 * life + prompt, rng.randrange(1, 6))
                putting = runtime.spawn(lab.put(pool, keys, writer=rng.randrange(1, 4)), "put")
                await runtime.sleep(rng.random() * 0.05)
                if putting.done() and not putting.cancelled():
                    acknowledged.append(keys)
            lab.kill(pool)
            lab.files.fails = lambda operation, path: EmberError("dead")
            await runtime.sleep(1)
            lab.files.fails = lambda operation, path: None
            lab.lose_index()
            report = await lab.rebuild()
            assert report.pages >= sum(map(len, acknowledged))
        pool = await lab.open()
        for keys in acknowledged:
            assert await lab.readable(pool, keys) == len(keys)

    run(work, seed)
