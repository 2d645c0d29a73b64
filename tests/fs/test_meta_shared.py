"""Several metadata servers on one KV: whatever one did the others know, and what the dead leave is taken care of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from emberfs.errors import (
    Conflict,
    EmberError,
    NotFound,
    SessionExpired,
    StaleChunk,
    Unavailable,
    UpdateUnknown,
)
from emberfs.messages import (
    Abandon,
    AdoptChunks,
    CloseSession,
    DropTail,
    List,
    Message,
    Mkdir,
    Promote,
    Remove,
    ReportLength,
    Reserve,
    Truncate,
    Usage,
    WriteInline,
)
from emberfs.meta import ClientChunkOps, MetaConfig, MetaService, gc
from emberfs.meta.claims import LEASE_S, TAKEOVER_S, Claims
from emberfs.meta.clients import HEAR_POLL_S
from emberfs.meta.keys import rows_of
from emberfs.settings import Config
from emberfs.testing.sim import SimRuntime, run
from emberfs.testing.sim.process import SimProcess
from emberfs.types import CHUNK_SIZE_BYTES_DEFAULT, Chunks, Inline

from tests.fs.meta_cluster import Client, Cluster, SlowKV, commit, open_file, simulate
from tests.fs.meta_fakes import CHUNK, FakeStorage

SEEDS = range(12)


# ---- what one did the others know


def test_a_length_is_seen_at_every_server() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        opened = await client(0, open_file("/file"))
        await client(0, ReportLength(opened.session, file.id, 5 * CHUNK, 0, False))
        await client(1, ReportLength(opened.session, file.id, 3 * CHUNK, 0, False))
        assert (await client.stat(1, "/file")).length == 5 * CHUNK
        assert (await client(1, List("/", "", 10))).entries[0][1].length == 5 * CHUNK
        assert (await client(1, open_file("/file"))).inode.length == 5 * CHUNK
        await client(1, CloseSession(opened.session, file.id, 0, 0))
        assert (await client.stat(0, "/file")).length == 5 * CHUNK
        with pytest.raises(NotFound):
            await client(0, ReportLength(opened.session, file.id, 9 * CHUNK, 0, False))
        assert not await cluster.kv.begin().range(*rows_of(b"E"))

    simulate(main)


@pytest.mark.parametrize("seed", SEEDS)
def test_reports_of_writers_at_two_servers_do_not_meet(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        opened = [await client(server, open_file("/file")) for server in (0, 1)]
        ends = [[(2 * turn + server) * CHUNK for turn in range(1, 9)] for server in (0, 1)]

        async def write(server: int) -> None:
            session = opened[server].session
            for end in ends[server]:
                await client(server, ReportLength(session, file.id, end, 0, False))
            await client(1 - server, CloseSession(session, file.id, ends[server][-1], 0))

        assert await cluster.both(write(0), write(1)) == [None, None]
        assert (await client.stat(0, "/file")).length == ends[1][-1]

    simulate(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_report_and_a_truncate_at_two_servers(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        opened = await client(0, open_file("/file"))
        cluster.chunks.write(file.id, 3 * CHUNK)
        answers = await cluster.both(
            client(0, ReportLength(opened.session, file.id, 3 * CHUNK, 0, False)), client(1, Truncate("/file", 0, 10))
        )
        assert isinstance(answers[0], StaleChunk) or not isinstance(answers[0], EmberError)
        assert (await client.stat(0, "/file")).length == 10
        assert cluster.chunks.of(file.id) == {0: 10}

    simulate(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dropped_tail_takes_no_reported_bytes(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        failed, other = [await client(server, open_file("/file")) for server in (0, 1)]
        cluster.chunks.write(file.id, 3 * CHUNK)
        report = ReportLength(other.session, file.id, 3 * CHUNK, 0, False)
        reported, _ = await cluster.both(client(1, report), client(0, DropTail(failed.session, file.id)))
        kept = 1 if isinstance(reported, StaleChunk) else 3
        assert (await client.stat(0, "/file")).length == kept * CHUNK
        assert len(cluster.chunks.of(file.id)) == kept

    simulate(main, seed)


def test_what_one_server_reserved_another_commits() -> None:
    async def main(cluster: Cluster) -> None:
        client, stranger = await cluster.client(), await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        assert await client.stat(0, "/file") == file
        reserved = await client(0, Reserve(CHUNK))
        with pytest.raises(StaleChunk):
            await stranger(1, commit(reserved, "/stolen", 7))
        cluster.chunks.write(reserved.inode, CHUNK)
        await client(1, Abandon(reserved.inode, reserved.layout))
        assert not cluster.chunks.of(reserved.inode)
        with pytest.raises(StaleChunk):
            await client(0, commit(reserved, "/late", 7))
        await client(1, Abandon(file.id, reserved.layout))
        assert cluster.chunks.of(file.id), "it was committed"

    simulate(main)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_a_commit_and_an_abandon_one_wins(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        reserved = await client(0, Reserve(CHUNK))
        cluster.chunks.write(reserved.inode, CHUNK)
        committed, _ = await cluster.both(
            client(0, commit(reserved, "/file", CHUNK)), client(1, Abandon(reserved.inode, reserved.layout))
        )
        assert bool(cluster.chunks.of(reserved.inode)) == (not isinstance(committed, StaleChunk))

    simulate(main, seed)


def test_blocks_whose_ids_are_all_files_are_let_go() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        for number in range(200):
            reserved = await client(0, Reserve(CHUNK))
            await client(0, commit(reserved, f"/{number}", 0))
        assert len(await cluster.kv.begin().range(*rows_of(b"L"))) <= 2

    simulate(main)


def test_a_move_to_chunks_over_two_servers() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        first, second = await client(0, open_file("/file")), await client(1, open_file("/file"))
        inode = first.inode.id
        await client(1, WriteInline(first.session, inode, 0, b"abc"))
        granted = await client(0, Promote(inode, CHUNK, first.session))
        waiting = cluster.runtime.spawn(client(1, Promote(inode, CHUNK, second.session)), "second")
        await cluster.runtime.sleep(0.5)
        assert not waiting.done()
        cluster.chunks.write(inode, 2 * CHUNK)
        adopted = await client(1, AdoptChunks(first.session, inode, granted.inode.revision, granted.layout, 2 * CHUNK))
        assert (await waiting).layout == granted.layout == adopted.inode.layout
        assert (await client.stat(0, "/file")).length == 2 * CHUNK

    simulate(main)


def test_a_move_that_is_given_up_at_another_server_leaves_nothing() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        first, second = await client(0, open_file("/file")), await client(1, open_file("/file"))
        inode = first.inode.id
        granted = await client(0, Promote(inode, CHUNK, first.session))
        cluster.chunks.write(inode, CHUNK)
        await client(1, DropTail(second.session, inode))
        assert cluster.chunks.of(inode), "the grant is not the second's"
        await client(1, DropTail(first.session, inode))
        cluster.chunks.write(inode, CHUNK)  # was still on its way
        with pytest.raises(StaleChunk):
            await client(0, AdoptChunks(first.session, inode, granted.inode.revision, granted.layout, CHUNK))
        assert not cluster.chunks.of(inode)
        await client(1, Promote(inode, CHUNK, second.session))
        cluster.chunks.write(inode, CHUNK)
        await client(0, CloseSession(second.session, inode, 0, 0))
        assert not cluster.chunks.of(inode)
        assert isinstance((await client.stat(1, "/file")).layout, Inline)

    simulate(main)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_move_is_adopted_or_given_up_never_both(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        opened = await client(0, open_file("/file"))
        inode = opened.inode.id
        granted = await client(0, Promote(inode, CHUNK, opened.session))
        cluster.chunks.write(inode, 2 * CHUNK)
        adopt = AdoptChunks(opened.session, inode, granted.inode.revision, granted.layout, 2 * CHUNK)

        async def adopt_later() -> Any:
            await cluster.runtime.sleep(0.001 * seed)
            return await client(0, adopt)

        adopted, _ = await cluster.both(adopt_later(), client(1, DropTail(opened.session, inode)))
        assert bool(cluster.chunks.of(inode)) == (not isinstance(adopted, StaleChunk))
        assert isinstance((await client.stat(1, "/file")).layout, Inline) == isinstance(adopted, StaleChunk)

    simulate(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_appender_over_all_servers(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await client(0, open_file("/log"))
        requests = [client(server, open_file("/log", append=True)) for server in (0, 1)]
        answers = await cluster.both(*requests)
        assert sorted(isinstance(answer, Conflict) for answer in answers) == [False, True]

    simulate(main, seed)


def test_new_files_use_the_chains_that_there_are() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        server = cluster.servers[0]
        for chains, stripe, expected in (
            (range(1, 101), None, (100, 16)),
            (range(1, 4), None, (3, 3)),
            ([1, 2, 4], 2, (2, 2)),
        ):
            server.chains_changed(list(chains), stripe)
            layout = (await client(0, Reserve(CHUNK_SIZE_BYTES_DEFAULT))).layout
            assert (layout.chain_count, layout.stripe) == expected
        server.chains_changed([])
        with pytest.raises(Unavailable):
            await client(0, Reserve(CHUNK_SIZE_BYTES_DEFAULT))

    simulate(main)


# ---- the end of a client


def test_what_a_client_left_is_taken_care_of_when_its_session_has_ended() -> None:
    async def main(cluster: Cluster) -> None:
        client, other = await cluster.client(), await cluster.client()
        file = await client.put(0, "/file", CHUNK)
        unnamed = await client(0, Reserve(CHUNK))
        kept = await other(0, Reserve(CHUNK))
        opened = await client(0, open_file("/file", append=True))
        moving = await client(1, open_file("/moving"))
        await client(1, Promote(moving.inode.id, CHUNK, moving.session))
        for inode, length in ((file.id, 3), (unnamed.inode, 2), (kept.inode, 2), (moving.inode.id, 2)):
            cluster.chunks.write(inode, length * CHUNK)
        await cluster.runtime.sleep(100)
        assert (await other.stat(0, "/file")).length == CHUNK, "it lives"
        await cluster.tell({other.id})
        await cluster.runtime.sleep(60)
        assert (await other.stat(0, "/file")).length == 3 * CHUNK
        assert {inode for inode, _ in cluster.chunks.lengths} == {file.id, kept.inode}
        for request in (
            Mkdir("/late", 0o755, False, False),
            commit(unnamed, "/late", CHUNK),
            Reserve(CHUNK),
            open_file("/file"),
        ):
            with pytest.raises(SessionExpired):
                await client(1, request)
        with pytest.raises(NotFound):
            await client(1, ReportLength(opened.session, file.id, 9 * CHUNK, 0, True))
        await other(1, open_file("/file", append=True))
        await other(1, commit(kept, "/kept", 2 * CHUNK))
        assert [len(await cluster.kv.begin().range(*rows_of(letter))) for letter in (b"L", b"P")] == [1, 0]

    simulate(main)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_a_client_happens_after_its_end(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client, other = await cluster.client(), await cluster.client()
        for number in range(5):
            await client(number % 2, open_file(f"/before{number}"))

        async def go_on(server: int) -> None:
            while True:
                await client(server, open_file(f"/file{client.number}"))
                await client.put(server, f"/put{client.number}", CHUNK)

        await cluster.tell({other.id})
        assert {type(end) for end in await cluster.both(go_on(0), go_on(1))} == {SessionExpired}
        await cluster.runtime.sleep(10)
        for letter in (b"S", b"L", b"A", b"O"):
            assert not await cluster.kv.begin().range(*rows_of(letter)), letter
        assert await cluster.servers[0].check() == []

    simulate(main, seed)


def test_a_client_that_ended_is_left_alone_as_long_as_a_lease_may_last() -> None:
    async def main(cluster: Cluster) -> None:
        client, other = await cluster.client(), await cluster.client()
        await client(0, open_file("/file"))
        for server in cluster.servers:
            server.configure(Config(2, {"dead_after_s": 3.0, "gc_interval_s": 1.0}, (), 20.0))
        await cluster.tell({other.id})
        await cluster.runtime.sleep(20.0)
        assert await cluster.kv.begin().range(*rows_of(b"S")), "a storage node may still take its writes"
        await cluster.runtime.sleep(7.0)
        assert not await cluster.kv.begin().range(*rows_of(b"S"))

    simulate(main)


def test_nothing_goes_by_the_defaults_before_the_settings_are_known() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        for name in ("/old", "/new"):
            await client.put(0, name, CHUNK)
        await client(0, Remove("/old", False, True, "any"))
        for server in cluster.servers:
            await server.close()
        await cluster.runtime.sleep(8 * 86400.0)  # The default keeps it for 7 days.
        restarted = MetaService(cluster.kv, cluster.runtime, cluster.chunks, config=MetaConfig(shared=True))
        cluster.servers[:] = [restarted, restarted]
        await restarted.start()
        await restarted.sessions_changed({client.id})
        with pytest.raises(Unavailable, match="configuration"):
            await client(0, Remove("/new", False, False, "any"))
        await cluster.runtime.sleep(300.0)
        removing = cluster.runtime.spawn(client(0, Remove("/new", False, False, "any")), "call")
        await cluster.runtime.sleep(1.0)
        restarted.configure(Config(2, {"trash_s": 90 * 86400.0, "gc_delay_s": 86400.0}, (), 3.0))
        await removing
        await cluster.runtime.sleep(300.0)
        usage = await client(0, Usage())
        assert (usage.trash_entries, usage.gc_pending) == (1, 1), "the settings keep both"
        restarted.configure(Config(3, {"trash_s": 86400.0, "gc_delay_s": 86400.0}, (), 3.0))
        await cluster.runtime.sleep(300.0)
        usage = await client(0, Usage())
        assert (usage.trash_entries, usage.gc_pending) == (0, 2)

    simulate(main)


def test_a_session_that_a_server_has_not_heard_of_yet_is_waited_for() -> None:
    async def main(cluster: Cluster) -> None:
        client = Client(cluster, b"new".ljust(16))
        asking = cluster.runtime.spawn(client(0, Mkdir("/dir", 0o755, False, False)), "call")
        await cluster.runtime.sleep(0.5)
        assert not asking.done() and cluster.asked == 1
        before_s = cluster.runtime.now_s()
        await cluster.servers[0].sessions_changed({client.id})
        await asking
        assert cluster.runtime.now_s() - before_s < HEAR_POLL_S, "news are waited for, not looked for"
        await client(1, Mkdir("/other", 0o755, False, False))
        with pytest.raises(Unavailable):
            await Client(cluster, b"unknown".ljust(16))(0, Mkdir("/x", 0o755, False, False))
        await cluster.runtime.sleep(60)
        await client(1, Mkdir("/more", 0o755, False, False))

    simulate(main)


# ---- one at a time


def test_a_claim_is_held_by_one_and_goes_on_when_its_holder_dies() -> None:
    async def whole(runtime: SimRuntime) -> None:
        kv = SlowKV(runtime)
        processes = [SimProcess(runtime, str(number)) for number in range(2)]
        taken: list[tuple[int, float]] = []

        async def work(number: int) -> None:
            async with Claims(kv, processes[number]).of("work") as claim:
                taken.append((number, runtime.now_s()))
                while claim.is_held and not (number and len(taken) == 2):
                    await processes[number].sleep(0.1)

        processes[0].spawn(work(0), "work")
        await runtime.sleep(1)
        second = processes[1].spawn(work(1), "work")
        await runtime.sleep(60)
        assert [number for number, _ in taken] == [0]
        processes[0].kill()
        killed_s = runtime.now_s()
        await second
        number, taken_s = taken[1]
        assert number == 1
        assert LEASE_S <= taken_s - killed_s <= TAKEOVER_S + 1
        assert not await kv.begin().range(*rows_of(b"W"))

    run(0, whole)


def test_a_claim_of_a_holder_that_stood_still_is_not_held_any_more() -> None:
    async def whole(runtime: SimRuntime) -> None:
        kv = SlowKV(runtime)
        sleeper = SimProcess(runtime, "sleeper")
        was_held: list[bool] = []

        async def work() -> None:
            async with Claims(kv, sleeper).of("work") as claim:
                await sleeper.sleep(1)
                was_held.append(claim.is_held)
                await sleeper.sleep(0.001)
                was_held.append(claim.is_held)

        task = sleeper.spawn(work(), "work")
        await runtime.sleep(0.9)
        sleeper.pause()
        async with Claims(kv, runtime).of("work") as claim:
            sleeper.resume()
            await task
            assert claim.is_held, "what the sleeper let go was not ours"
            assert len(await kv.begin().range(*rows_of(b"W"))) == 1
        assert was_held[0] is False

    run(0, whole)


class Way:
    """A server's way to the chunks. Requests to change them stay in the air once `is_slow`, until the test delivers."""

    def __init__(self, cluster: Cluster, server: int, storage: FakeStorage) -> None:
        self.storage, self.process = storage, cluster.processes[server]
        self.is_slow = self.pauses = False
        self.in_the_air: list[Message] = []
        cluster.servers[server]._state.chunks = ClientChunkOps(dict.fromkeys(range(1, 5), self))

    async def call(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        await self.process.sleep(0.001)
        if self.is_slow and not request.changes_nothing:
            self.in_the_air.append(request)
            await self.process.future()
        reply = await self.storage.handle(request)
        if self.pauses:
            self.process.pause()
        await self.process.sleep(0.001)
        return reply


async def chunked(client: Client, storage: FakeStorage, length: int) -> tuple[int, Chunks]:
    reserved = await client(0, Reserve(CHUNK))
    storage.write(reserved.inode, length, reserved.layout)
    await client(1, commit(reserved, "/file", length))
    return reserved.inode, reserved.layout


@pytest.mark.parametrize("length", [0, 10, CHUNK + 10])
def test_a_cut_that_arrives_after_another_server_took_over_changes_nothing(length: int) -> None:
    async def main(cluster: Cluster) -> None:
        storage = FakeStorage()
        first, _ = [Way(cluster, server, storage) for server in (0, 1)]
        client = await cluster.client()
        inode, layout = await chunked(client, storage, 2 * CHUNK)
        first.is_slow = True
        cutting = cluster.processes[0].spawn(client(0, Truncate("/file", 0, length)), "truncate")
        while not first.in_the_air:
            await cluster.runtime.sleep(0.001)
        cluster.processes[0].kill()
        assert (await client(1, open_file("/file"))).inode.length == length
        assert sum(storage.of(inode).values()) == length
        storage.write(inode, 2 * CHUNK, layout)
        for late in first.in_the_air:
            with pytest.raises(StaleChunk):
                await storage.handle(late)
        assert sum(storage.of(inode).values()) == 2 * CHUNK
        assert not cutting.done()

    simulate(main)


def test_the_end_of_a_move_that_arrives_after_another_server_took_over_changes_nothing() -> None:
    async def main(cluster: Cluster) -> None:
        storage = FakeStorage()
        first, _ = [Way(cluster, server, storage) for server in (0, 1)]
        client = await cluster.client()
        opened = await client(0, open_file("/file"))
        inode = opened.inode.id
        granted = await client(0, Promote(inode, CHUNK, opened.session))
        storage.write(inode, CHUNK, granted.layout)
        first.is_slow = True
        cluster.processes[0].spawn(client(0, DropTail(opened.session, inode)), "drop")
        while not first.in_the_air:
            await cluster.runtime.sleep(0.001)
        cluster.processes[0].kill()
        await client(1, Promote(inode, CHUNK, opened.session))
        assert not storage.of(inode)
        storage.write(inode, CHUNK, granted.layout)  # as if the new layout had the same chain
        for late in first.in_the_air:
            with pytest.raises(StaleChunk):
                await storage.handle(late)
        assert storage.of(inode) == {0: CHUNK}

    simulate(main)


def test_a_server_that_stood_still_while_it_looked_changes_nothing() -> None:
    async def main(cluster: Cluster) -> None:
        storage = FakeStorage()
        first, _ = [Way(cluster, server, storage) for server in (0, 1)]
        client = await cluster.client()
        inode, layout = await chunked(client, storage, CHUNK)
        first.pauses = True
        cutting = cluster.processes[0].spawn(client(0, Truncate("/file", 0, 10)), "truncate")
        await cluster.runtime.sleep(1)
        await client(1, open_file("/file"))
        storage.write(inode, CHUNK, layout)
        first.pauses = False
        cluster.processes[0].resume()
        with pytest.raises(UpdateUnknown, match="it happened"):
            await cutting
        assert storage.of(inode) == {0: CHUNK}

    simulate(main)


@pytest.mark.parametrize("killed", [0, 1])
def test_whichever_server_dies_another_does_the_background_work(killed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        for number in range(2):
            await client.put(number, f"/{number}", CHUNK)
        cluster.processes[killed].kill()
        await client(1 - killed, Remove("/0", False, False, "any"))
        await cluster.runtime.sleep(130)
        assert len(cluster.chunks.lengths) == 1

    simulate(main)


@pytest.mark.parametrize("seed", SEEDS)
def test_garbage_that_two_collect_is_counted_once(seed: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        for number in range(5):
            await client.put(0, f"/{number}", CHUNK)
            await client(0, Remove(f"/{number}", False, False, "any"))
        # As if one of them had been stopped for so long that the other took its claim over.
        await cluster.both(*(gc._collect(server._state, force=True) for server in cluster.servers))
        assert (await client(0, Usage())).gc_pending == 0
        assert not cluster.chunks.lengths

    simulate(main, seed)
