"""The scrub of a storage node: what nobody reads is looked at in time, mended, counted; and it hurries nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from emberfs.engine import Action
from emberfs.errors import StaleRouting
from emberfs.messages import ChunksScrubbed, ScrubChunks
from emberfs.settings import Settings
from emberfs.storage import StorageConfig
from emberfs.storage.scrubber import LOOK_S, SPARE, Scrubber
from emberfs.types import chunk_id
from emberfs.waiting import finish

from tests.fs.chain_fakes import CHUNK, OFFLINE, SERVING, ReplicaChain, on_chain

INTERVAL_S = 1000.0
TEXT = b"precious" * 1000


class Host:
    """The node of one member of a chain, as far as the scrub is concerned."""

    def __init__(self, chain: ReplicaChain, name: str, *, settings: Settings | None = None) -> None:
        self.chain, self.member = chain, chain[name]
        self.closing = chain.runtime.future()
        self.settings = settings or Settings(scrub_interval_s=INTERVAL_S)
        self.scrubber = Scrubber(
            {1: self.member.replica},
            chain.runtime,
            settings=lambda: self.settings,
            config=StorageConfig(),
            closing=self.closing,
        )
        runs = (self.scrubber.run(), self.scrubber.run_again())
        self.running = [chain.runtime.spawn(each, "scrub") for each in runs]

    async def close(self) -> None:
        finish(self.closing)
        for task in self.running:
            await task

    async def damage(self, chunk: bytes = CHUNK, *, offset: int = 100) -> None:
        """Turn a bit on the medium; the page cache does not know."""
        record = await self.member.engine.record(chunk)
        assert record is not None and record.committed is not None
        file, block = self.member.engine.allocator.place(record.committed.position)
        self.member.disk.flip_bit(file, block + offset, is_cached=True)

    async def page(self, after: bytes = b"", *, bytes_max: int = 1 << 30, target: bytes = b"") -> ChunksScrubbed:
        return await self.scrubber.serve(ScrubChunks(1, target or self.member.target, after, bytes_max))


def on_host(
    work: Callable[[Host], Awaitable[None]],
    *,
    names: str = "abc",
    seed: int = 0,
    chunks: int = 10,
    settings: Settings | None = None,
) -> None:
    """Run `work` on the host of b (or a, if it is alone), in a chain that holds so many chunks."""

    async def main(chain: ReplicaChain) -> None:
        for number in range(chunks):
            await chain.write("a", TEXT, chunk=chunk_id(7, number))
        host = Host(chain, "b" if "b" in names else "a", settings=settings)
        await work(host)
        await host.close()

    on_chain(main, names=names, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_that_nobody_reads_is_mended_within_the_interval(seed: int) -> None:
    async def work(host: Host) -> None:
        for number in (0, 4, 9):
            await host.damage(chunk_id(7, number))
        await host.chain.runtime.sleep(INTERVAL_S)
        counts = host.scrubber.counts
        assert (counts.damaged, counts.repaired, counts.unrepairable) == (3, 3, 0)
        assert await host.chain.equal("abc")
        assert (await host.page()).damaged == []

    on_host(work, seed=seed)


def test_a_round_takes_its_time_and_sees_each_chunk_once() -> None:
    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(10 * INTERVAL_S)
        counts = host.scrubber.counts
        assert counts.chunks == pytest.approx(10 * 10 / SPARE, abs=10)
        assert counts.read_bytes == counts.chunks * len(TEXT)

    on_host(work)


def test_where_a_round_begins_is_drawn() -> None:
    begins = set()

    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(INTERVAL_S)
        begins.update(host.scrubber._begins.values())

    for seed in range(8):
        on_host(work, seed=seed)
    assert len(begins) > 3
    assert begins <= {chunk_id(7, number) for number in range(10)}


def test_it_never_reads_faster_than_it_may() -> None:
    settings = Settings(scrub_interval_s=1.0, scrub_bytes_per_s=1000)

    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(100.0)
        assert 0.8 * 100_000 < host.scrubber.counts.read_bytes < 1.2 * 100_000

    on_host(work, settings=settings)


def test_another_limit_holds_in_the_middle_of_a_pause() -> None:
    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(100.0)
        assert host.scrubber.counts.chunks == 0, "the first piece of it waits for hours"
        host.settings = Settings(scrub_interval_s=1.0, scrub_bytes_per_s=1 << 20)
        await host.chain.runtime.sleep(LOOK_S + 1.0)
        assert host.scrubber.counts.chunks > 0

    on_host(work, settings=Settings(scrub_interval_s=1.0, scrub_bytes_per_s=1))


def test_a_second_look_shares_the_limit() -> None:
    settings = Settings(scrub_interval_s=1.0, scrub_bytes_per_s=1000, tombstone_s=5.0)

    async def work(host: Host) -> None:
        host.member.replica.repairer.unmended.update((chunk_id(7, number), None) for number in range(10))
        await host.chain.runtime.sleep(200.0)
        assert not host.member.replica.repairer.unmended
        assert 0.8 * 200_000 < host.scrubber.counts.read_bytes < 1.2 * 200_000

    on_host(work, settings=settings)


def test_it_can_be_turned_off_and_on() -> None:
    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(2 * INTERVAL_S)
        host.settings = Settings(scrub_interval_s=0.0)
        await host.chain.runtime.sleep(INTERVAL_S)
        chunks = host.scrubber.counts.chunks
        await host.chain.runtime.sleep(10 * INTERVAL_S)
        assert host.scrubber.counts.chunks == chunks > 0
        host.settings = Settings(scrub_interval_s=INTERVAL_S)
        await host.chain.runtime.sleep(2 * INTERVAL_S)
        assert host.scrubber.counts.chunks >= chunks + 10

    on_host(work)


def test_a_node_without_data_waits_for_some() -> None:
    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(INTERVAL_S)
        await host.chain.write("a", TEXT)
        await host.damage()
        await host.chain.runtime.sleep(INTERVAL_S)
        assert host.scrubber.counts.repaired == 1

    on_host(work, chunks=0)


def test_what_nobody_can_mend_is_kept_in_mind_until_it_is_written_again() -> None:
    async def work(host: Host) -> None:
        repairer = host.member.replica.repairer
        await host.damage()
        (found,) = (await host.page()).damaged
        assert (found.chunk, found.repaired) == (CHUNK, False)
        assert "checksum mismatch in chunk 7.0" in found.detail
        assert list(repairer.unmended) == [CHUNK]
        assert host.scrubber.gauges()["storage_unmended_chunks"] == 1
        await host.scrubber.look_again()
        assert list(repairer.unmended) == [CHUNK]
        await host.chain.send("a", host.chain.update(Action.REPLACE, TEXT))
        await host.scrubber.look_again()
        assert not repairer.unmended

    on_host(work, names="a")


@pytest.mark.parametrize("by_operator", [False, True])
def test_a_chunk_that_was_removed_is_no_damage_any_more(by_operator: bool) -> None:
    async def work(host: Host) -> None:
        await host.damage()
        await host.page()
        await host.chain.send("a", host.chain.update(Action.REMOVE))
        await (host.page() if by_operator else host.scrubber.look_again())
        assert not host.member.replica.repairer.unmended

    on_host(work, names="a")


def test_what_could_not_be_mended_is_mended_when_a_replica_is_back() -> None:
    async def work(host: Host) -> None:
        service = {name: host.chain.wire.services.pop(name) for name in "ac"}
        await host.damage()
        assert [found.repaired for found in (await host.page()).damaged] == [False]
        host.chain.wire.services.update(service)
        await host.scrubber.look_again()
        assert not host.member.replica.repairer.unmended
        assert host.scrubber.counts.repaired == 1

    on_host(work)


def test_pages_follow_each_other_to_the_end() -> None:
    async def work(host: Host) -> None:
        for number in (3, 8):
            await host.damage(chunk_id(7, number))
        pages = [await host.page(bytes_max=2 * len(TEXT))]
        while pages[-1].after is not None:
            pages.append(await host.page(pages[-1].after, bytes_max=2 * len(TEXT)))
        assert [page.chunks for page in pages] == [2] * 5 + [0]
        assert sum(page.read_bytes for page in pages) == 10 * len(TEXT)
        found = [each for page in pages for each in page.damaged]
        assert [(each.chunk, each.repaired) for each in found] == [(chunk_id(7, 3), True), (chunk_id(7, 8), True)]
        assert (await host.page(bytes_max=-1)).chunks == 1

    on_host(work)


def test_damage_in_an_index_row_is_mended_too() -> None:
    async def work(host: Host) -> None:
        txn = host.member.index.begin()
        txn.put(b"c" + CHUNK, b"nonsense")
        await txn.commit()
        (found,) = (await host.page()).damaged
        assert found.repaired
        assert await host.member.committed() == TEXT

    on_host(work)


def test_only_what_serves_is_scrubbed() -> None:
    async def work(host: Host) -> None:
        with pytest.raises(StaleRouting, match="is not here"):
            await host.page(target=b"x" * 16)
        host.chain.change({"a": SERVING, "c": SERVING, "b": OFFLINE})
        with pytest.raises(StaleRouting, match="does not serve"):
            await host.page()
        await host.damage()
        await host.chain.runtime.sleep(INTERVAL_S)
        assert host.scrubber.counts.chunks == 0

    on_host(work)


def test_what_is_written_meanwhile_is_not_taken_for_damage() -> None:
    settings = Settings(scrub_interval_s=0.1, scrub_bytes_per_s=1 << 30)

    async def work(host: Host) -> None:
        for number in range(200):
            await host.chain.write("a", bytes([number]) * 5000, chunk=chunk_id(7, number % 3), offset=number)
        assert host.scrubber.counts.chunks > 20
        assert host.scrubber.counts.damaged == 0

    on_host(work, chunks=3, settings=settings)


def test_closing_does_not_wait_for_a_large_chunk() -> None:
    settings = Settings(scrub_interval_s=1.0, scrub_bytes_per_s=1000)

    async def work(host: Host) -> None:
        await host.chain.runtime.sleep(1.0)
        before_s = host.chain.runtime.now_s()
        await host.close()
        assert host.chain.runtime.now_s() - before_s < 0.5

    on_host(work, settings=settings)


def test_a_reader_that_spoils_its_own_memory_spoils_nothing_else() -> None:
    """Its read failed its checksum: it shares the memory with the server, and wrote there. The chunk is well."""

    async def work(host: Host) -> None:
        replica = host.member.replica
        assert replica.view is not None
        replica.repairer.order(replica.view, CHUNK)
        await host.chain.runtime.sleep(5.0)
        assert (replica.repairer.repaired, replica.repairer.failed) == (0, 0)
        assert not replica.repairer.unmended

    on_host(work)
    on_host(work, names="a")
