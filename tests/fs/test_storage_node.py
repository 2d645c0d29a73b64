"""A storage node and its manager: heartbeats, lease, routing, sessions, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from emberfs.engine import ChunkEngine, EngineConfig
from emberfs.errors import (
    AccessDenied,
    ProtocolError,
    SessionExpired,
    StaleChunk,
    StaleRouting,
    TargetFailed,
    Unavailable,
)
from emberfs.kv.memory import MemoryKV
from emberfs.messages import (
    ChunksRead,
    ChunksScrubbed,
    Done,
    GetRouting,
    Heartbeat,
    HeartbeatReply,
    Message,
    ReadChunks,
    RemoveChunks,
    RoutingReply,
    ScrubChunks,
    TruncateChunk,
    WriteChunks,
)
from emberfs.routing import Chain, ChainTarget, LocalState, Node, Role, Routing, Target, TargetState
from emberfs.settings import Config
from emberfs.storage import StorageNode
from emberfs.storage.node import BEAT_REST_S, FAILED_REST_S, FOLLOW_REST_S
from emberfs.storage.sessions import Departed, Sessions
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.waiting import finish, pause

from tests.fs.chain_fakes import CHUNK, CLIENT, OTHER, Wire

TARGET, SECOND = b"t" * 16, b"u" * 16
SERVER = Node("s1", Role.STORAGE, "s1", b"incarnation")


class FakeManager:
    """Answers every heartbeat with what the test has put here, and holds questions for a newer routing."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.news: asyncio.Future[None] = runtime.future()
        self.routing = Routing(1, (SERVER,), (Target(TARGET, "s1", 1), Target(SECOND, "s1", 2)))
        self.sessions: list[bytes] = []
        self.heartbeats: list[Heartbeat] = []
        self.error: Exception | None = None
        self.nonsense = 0
        """So many questions for a newer routing have an answer that is none."""
        self.is_deaf = False
        """Heartbeats are refused."""
        self.lease_s = 2.5
        self.config_version = 1
        self.settings: dict[str, float] = {"tombstone_s": 10.0}

    def put(self, *chains: Chain, targets: Sequence[Target] | None = None, node: Node = SERVER) -> None:
        kept = self.routing.targets if targets is None else tuple(targets)
        self.routing = Routing(self.routing.version + 1, (node,), kept, chains)
        finish(self.news)
        self.news = self.runtime.future()

    async def handle(self, request: Message, _: Sequence[memoryview]) -> Message:
        if self.error is not None:
            raise self.error
        if isinstance(request, GetRouting):
            if request.version >= self.routing.version:
                await pause(self.runtime, request.wait_s, self.news)
            if request.wait_s and self.nonsense:
                self.nonsense -= 1
                return Done()
            return RoutingReply(self.routing if request.version < self.routing.version else None)
        assert isinstance(request, Heartbeat)
        if self.is_deaf:
            raise Unavailable("what?")
        self.heartbeats.append(request)
        config = Config(self.config_version, self.settings)
        return HeartbeatReply(self.routing, len(self.sessions), list(self.sessions), self.lease_s, config)


class Host:
    """A node with two targets, one for each of the chains 1 and 2."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime, self.wire, self.manager = runtime, Wire(), FakeManager(runtime)
        self.indexes: dict[bytes, MemoryKV] = {}
        self.disks: dict[bytes, SimDisk] = {}
        self.dropped: list[bytes] = []
        self.wire.services["m1"] = self.refuse
        self.wire.services["m2"] = self.manager.handle
        self.node = StorageNode(
            SERVER,
            runtime,
            self.wire,
            ["m1", "m2"],
            self.open_target,
            drop_target=self.drop_target,
        )

    async def refuse(self, request: Message, _: Sequence[memoryview]) -> Message:
        raise StaleRouting("the primary is m2")

    async def open_target(self, target: bytes) -> ChunkEngine:
        self.disks.setdefault(target, SimDisk(self.runtime))
        self.indexes.setdefault(target, MemoryKV(self.runtime))
        config = EngineConfig(reserve_bytes=0, keeps_tombstones=True, target=target)
        return await ChunkEngine.open(self.disks[target], self.indexes[target], self.runtime, config=config)

    async def drop_target(self, target: bytes) -> None:
        self.dropped.append(target)

    def chain(self, number: int, target: bytes, *, version: int = 1) -> Chain:
        generation = self.node.replicas[number].engine.identity.generation
        return Chain(number, version, (ChainTarget(target, TargetState.SERVING, generation),))

    async def serve(self) -> None:
        """Both chains serve, and the client has a session."""
        await self.beats()
        self.manager.put(self.chain(1, TARGET), self.chain(2, SECOND))
        self.manager.sessions.append(CLIENT)
        await self.beats()

    async def beats(self, seconds: float = 2.0) -> None:
        await self.runtime.sleep(seconds)

    async def write(self, payload: bytes, *, sequence: int = 1, client: bytes = CLIENT) -> None:
        request = WriteChunks(
            client, 0, sequence, [1, 2], [CHUNK, OTHER], [0, 0], 1 << 20, chain_versions=[1, 1], slots=[0, 1]
        )
        await self.node.handle(request, [memoryview(payload), memoryview(payload[::-1])])

    async def read(self) -> list[bytes]:
        buffers = [memoryview(bytearray(100)) for _ in range(2)]
        reply = await self.node.handle(ReadChunks([1, 2], [CHUNK, OTHER], [0, 0], [1, 1]), buffers)
        assert isinstance(reply, ChunksRead)
        return [bytes(buffer[:count]) for buffer, count in zip(buffers, reply.counts, strict=True)]

    def states(self) -> list[LocalState]:
        return [report.state for report in self.manager.heartbeats[-1].reports]


def on_host(work: Callable[[Host], Awaitable[None]]) -> None:
    async def main(runtime: SimRuntime) -> None:
        host = Host(runtime)
        await host.node.start()
        await work(host)
        await host.node.close()
        for index in host.indexes.values():
            await index.close()

    run(0, main)


def test_a_new_node_opens_its_targets_and_serves_once_the_routing_says_so() -> None:
    async def work(host: Host) -> None:
        await host.beats()
        assert host.states() == [LocalState.FRESH] * 2
        with pytest.raises(StaleRouting):
            await host.read()
        await host.serve()
        assert host.states() == [LocalState.UP_TO_DATE] * 2
        await host.write(b"abc")
        assert await host.read() == [b"abc", b"cba"]

    on_host(work)


def test_a_routing_of_another_incarnation_is_not_for_us() -> None:
    async def work(host: Host) -> None:
        await host.beats()
        old = Node("s1", Role.STORAGE, "s1", b"the last one")
        host.manager.put(host.chain(1, TARGET), host.chain(2, SECOND), node=old)
        await host.beats()
        with pytest.raises(StaleRouting):
            await host.read()

    on_host(work)


def test_a_chain_change_is_known_before_the_next_heartbeat() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        beats = len(host.manager.heartbeats)
        host.manager.put(host.chain(1, TARGET, version=2), host.chain(2, SECOND))
        await host.runtime.sleep(0.001)
        reply = await host.node.handle(ReadChunks([1], [CHUNK], [0], [2]), [memoryview(bytearray(3))])
        assert isinstance(reply, ChunksRead)
        assert reply.counts == [3]
        assert len(host.manager.heartbeats) == beats

    on_host(work)


def test_a_manager_that_holds_no_question_is_not_asked_without_a_pause() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        asked = []

        async def at_once(request: Message, buffers: Sequence[memoryview]) -> Message:
            if isinstance(request, GetRouting):
                asked.append(request)
                assert len(asked) < 1000
                return RoutingReply(host.manager.routing)
            return await host.manager.handle(request, buffers)

        host.wire.services["m2"] = at_once
        host.manager.put(host.chain(1, TARGET), host.chain(2, SECOND))
        await host.beats(5.0)
        assert 10 < len(asked) <= 5.0 / FOLLOW_REST_S + 2
        assert host.node.routing == host.manager.routing

    on_host(work)


def test_what_the_manager_said_while_a_question_waited_renews_no_lease() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        known = host.node.routing.version
        host.manager.is_deaf = True
        for version in range(2, 12):
            host.manager.put(host.chain(1, TARGET, version=version), host.chain(2, SECOND))
            await host.beats(0.5)
        assert host.node.routing.version > known
        assert not host.node.lease.is_valid

    on_host(work)


def test_without_a_manager_the_lease_ends_and_with_one_it_begins_again() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        host.manager.error = Unavailable("gone")
        await host.beats(3.1)
        with pytest.raises(StaleRouting, match="manager"):
            await host.read()
        host.manager.error = None
        await host.beats()
        assert await host.read() == [b"abc", b"cba"]

    on_host(work)


def test_a_node_that_is_not_let_in_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work(host: Host) -> None:
        await host.serve()
        caplog.clear()
        host.manager.error = AccessDenied("another server's certificate")
        await host.beats(10.0)
        assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
            "no manager answers, and without one nothing is served once the lease is over: another server's certificate"
        ]
        host.manager.error = None
        await host.beats()
        assert host.node.lease.is_valid

    on_host(work)


def test_a_lease_is_as_long_as_the_manager_says() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        host.manager.lease_s = 8.0
        await host.beats()
        host.manager.error = Unavailable("gone")
        await host.beats(7.0)
        assert await host.read() == [b"abc", b"cba"]
        await host.beats(1.1)
        with pytest.raises(StaleRouting, match="manager"):
            await host.read()

    on_host(work)


def test_a_manager_may_take_its_time_however_often_it_is_asked() -> None:
    async def work(host: Host) -> None:
        host.manager.settings = {"heartbeat_s": 0.1}
        await host.serve()

        async def slowly(request: Message, buffers: Sequence[memoryview]) -> Message:
            await host.runtime.sleep(0.4)
            return await host.manager.handle(request, buffers)

        host.wire.services["m2"] = slowly
        await host.beats(10.0)
        assert host.node.lease.is_valid

    on_host(work)


def test_other_settings_are_in_force_at_once() -> None:
    async def work(host: Host) -> None:
        await host.beats()
        assert host.manager.heartbeats[-1].config_version == 1
        host.manager.config_version = 2
        host.manager.settings = {
            "heartbeat_s": 2.0,
            "tombstone_s": 1000.0,
            "colour": 7,
            "migration_bytes_per_s": 1 << 20,
        }
        await host.beats()
        assert host.node.settings.heartbeat_s == 2.0
        before = len(host.manager.heartbeats)
        await host.beats(20.0)
        assert 9 <= len(host.manager.heartbeats) - before <= 11
        assert host.manager.heartbeats[-1].config_version == 2

    on_host(work)


def test_a_client_without_a_session_is_refused_and_a_new_one_is_asked_for() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        with pytest.raises(SessionExpired):
            await host.write(b"x", client=b"n" * 16)
        host.manager.sessions.append(b"n" * 16)
        await host.write(b"x", client=b"n" * 16)
        host.manager.sessions[:] = [CLIENT]
        await host.beats()
        with pytest.raises(SessionExpired):
            await host.write(b"y", client=b"n" * 16, sequence=2)
        assert await host.read() == [b"x", b"x"]

    on_host(work)


def test_request_rows_of_ended_sessions_are_dropped() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"x")
        engine = host.node.replicas[1].engine
        assert [row.client for row in await engine.request_rows()] == [CLIENT]
        host.manager.sessions[:] = [b"o" * 16, b"p" * 16]
        await host.beats(25.0)
        assert await engine.request_rows() == []

    on_host(work)


def test_rows_of_a_client_that_came_while_no_manager_answered_stay() -> None:
    """Another server was told of it; here the lease goes on, and looks follow each other without news between them."""

    async def work(host: Host) -> None:
        host.manager.lease_s, host.manager.settings = 50.0, {"tombstone_s": 2.0, "heartbeat_s": 0.5}
        await host.serve()
        host.manager.is_deaf = True
        engine = host.node.replicas[1].engine
        await engine.install_requests([(b"n" * 16, 1, 1)], engine.floor)
        host.manager.sessions.append(b"n" * 16)
        await host.beats(20.0)
        assert host.node.lease.is_valid
        assert [row.client for row in await engine.request_rows()] == [b"n" * 16]
        host.manager.is_deaf = False
        await host.beats(20.0)
        assert [row.client for row in await engine.request_rows()] == [b"n" * 16]

    on_host(work)


def test_what_was_asked_before_a_look_does_not_count_after_it() -> None:
    sessions, departed = Sessions(), Departed()
    sessions.ask()
    sessions.take(1, [])
    sessions.ask()  # On its way, with an answer that was made before the client came.
    assert departed.look([CLIENT], sessions) == []
    sessions.take(1, None)
    assert departed.look([CLIENT], sessions) == []
    sessions.ask()
    assert departed.look([CLIENT], sessions) == []
    sessions.take(1, None)
    assert departed.look([CLIENT], sessions) == [CLIENT]


def test_a_failed_disk_is_reported_and_serves_nothing() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        replica = host.node.replicas[1]
        record = await replica.engine.record(CHUNK)
        assert record is not None and record.committed is not None
        file, _ = replica.engine.allocator.place(record.committed.position)
        host.disks[TARGET].fail_sync(file)
        with pytest.raises(Exception, match="disk failed"):
            await host.write(b"xyz", sequence=2)
        await host.beats()
        assert host.states() == [LocalState.OFFLINE, LocalState.UP_TO_DATE]
        with pytest.raises(StaleRouting):
            await host.read()

    on_host(work)


def failing_at_first(host: Host, *, tries: int) -> list[bytes]:
    """Let the first `tries` openings of TARGET fail. Returns what lists all openings of it."""
    opened: list[bytes] = []

    async def open_target(target: bytes) -> ChunkEngine:
        if target == TARGET:
            opened.append(target)
            if len(opened) <= tries:
                raise TargetFailed("somebody else holds the disk")
        return await host.open_target(target)

    host.node._open_target = open_target
    return opened


def test_a_target_that_cannot_be_opened_is_offline_until_the_server_starts_again() -> None:
    """The report may be acted on late: others would take writes that a reader here does not see."""

    async def work(host: Host) -> None:
        failing_at_first(host, tries=1000)
        await host.beats(5.0)
        assert set(host.states()) == {LocalState.OFFLINE, LocalState.FRESH}
        opened = failing_at_first(host, tries=0)
        await host.beats(5.0)
        assert (set(host.states()), opened) == ({LocalState.OFFLINE, LocalState.FRESH}, [])

    on_host(work)


def test_a_disk_that_the_process_before_lets_go_of_in_time_is_not_reported_offline() -> None:
    async def work(host: Host) -> None:
        failing_at_first(host, tries=3)
        await host.beats(5.0)
        assert {report.state for beat in host.manager.heartbeats for report in beat.reports} == {LocalState.FRESH}

    on_host(work)


def test_clients_that_nobody_knows_make_few_heartbeats() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        before = len(host.manager.heartbeats)
        started_s = host.runtime.now_s()
        for _ in range(20):
            with pytest.raises(SessionExpired):
                await host.write(b"x", client=b"n" * 16)
        passed_s = host.runtime.now_s() - started_s
        assert len(host.manager.heartbeats) - before <= passed_s / BEAT_REST_S + 2

    on_host(work)


def test_an_error_of_our_own_does_not_end_the_heartbeats_and_many_stop_the_server() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        take = host.node._take
        fails = [True]

        async def broken(reply: HeartbeatReply, sent_s: float) -> None:
            if fails.pop() if fails else False:
                raise KeyError("our own mistake")
            await take(reply, sent_s)

        host.node._take = broken  # type: ignore[method-assign]
        await host.beats(5.0)
        await host.write(b"abc")
        assert host.node.stopped_because is None
        fails += [True] * 1000
        await host.beats(10.0)
        assert host.node.stopped_because is not None and "our own mistake" in host.node.stopped_because

    on_host(work)


def test_a_chain_change_is_known_soon_after_an_error_of_our_own(caplog: pytest.LogCaptureFixture) -> None:
    async def work(host: Host) -> None:
        host.manager.settings = {"heartbeat_s": 20.0}
        await host.serve()
        host.manager.nonsense = 1
        host.manager.put(host.chain(1, TARGET), host.chain(2, SECOND))
        await host.beats(FAILED_REST_S / 2)
        host.manager.put(host.chain(1, TARGET, version=2), host.chain(2, SECOND))
        beats = len(host.manager.heartbeats)
        await host.beats(FAILED_REST_S)
        assert host.node.routing == host.manager.routing
        assert len(host.manager.heartbeats) == beats, "it was not a heartbeat that brought it"

    on_host(work)
    assert [each.getMessage() for each in caplog.records] == ["the task routing failed, and begins anew"]


def test_the_scrub_goes_on_after_an_error_of_our_own() -> None:
    async def work(host: Host) -> None:
        run_scrub, begun = host.node.scrubber.run, list[float]()

        async def broken_once() -> None:
            begun.append(host.runtime.now_s())
            if len(begun) == 1:
                raise KeyError("our own mistake")
            await run_scrub()

        host.node.scrubber.run = broken_once  # type: ignore[method-assign]
        await host.beats(5.0)
        assert len(begun) == 2

    on_host(work)


def test_all_targets_are_closed_although_one_of_them_cannot_be() -> None:
    async def main(runtime: SimRuntime) -> None:
        host = Host(runtime)
        await host.node.start()
        await host.serve()
        first, second = (host.node.replicas[number].engine for number in (1, 2))
        close, closed = second.close, list[bytes]()

        async def broken() -> None:
            raise OSError("input/output error")

        async def whole() -> None:
            await close()
            closed.append(SECOND)

        async def failing() -> None:
            raise KeyError("our own mistake")

        first.close, second.close = broken, whole  # type: ignore[method-assign]
        host.node._applying = runtime.spawn(failing(), "apply-routing")
        with pytest.raises(KeyError):
            await host.node.close()
        assert closed == [SECOND]

    run(0, main)


def test_a_target_that_was_taken_away_is_closed_and_dropped() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        host.manager.put(host.chain(1, TARGET), targets=[Target(TARGET, "s1", 1)])
        await host.beats()
        assert (host.dropped, list(host.node.replicas)) == ([SECOND], [1])

    on_host(work)


def test_what_is_no_chunk_request_is_refused() -> None:
    async def work(host: Host) -> None:
        with pytest.raises(ProtocolError):
            await host.node.handle(GetRouting())
        with pytest.raises(ProtocolError):
            await host.node.handle(ReadChunks([1], [CHUNK], [0]), [memoryview(bytearray(1))])

    on_host(work)


def test_versions_go_with_their_chunks() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        await host.write(b"def", sequence=2)
        removal = RemoveChunks([1, 2], [CHUNK, OTHER], CLIENT, 7, 1, [1, 1], versions=[1, 2])
        with pytest.raises(StaleChunk):
            await host.node.handle(removal)
        assert await host.read() == [b"def", b""]
        with pytest.raises(StaleChunk):
            await host.node.handle(TruncateChunk(1, CHUNK, 1, CLIENT, 8, 1, 1, version=1))
        await host.node.handle(TruncateChunk(1, CHUNK, 1, CLIENT, 8, 2, 1, version=2))
        assert await host.read() == [b"d", b""]
        with pytest.raises(ProtocolError):
            await host.node.handle(RemoveChunks([1, 2], [CHUNK, OTHER], CLIENT, 7, 2, [1, 1], versions=[3]))

    on_host(work)


def test_reports_say_how_much_space_there_is() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        before = host.manager.heartbeats[-1].reports[0]
        await host.write(bytes(1 << 10))
        await host.beats()
        after = host.manager.heartbeats[-1].reports[0]
        assert before.used_bytes == 0 < after.used_bytes
        assert 0 < after.free_bytes <= before.free_bytes

    on_host(work)


def test_damage_that_is_alone_in_its_chain_is_found_and_reported() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        record = await host.node.replicas[1].engine.record(CHUNK)
        assert record is not None and record.committed is not None
        file, block = host.node.replicas[1].engine.allocator.place(record.committed.position)
        host.disks[TARGET].flip_bit(file, block)
        reply = await host.node.handle(ScrubChunks(1, TARGET))
        assert isinstance(reply, ChunksScrubbed)
        assert [each.repaired for each in reply.damaged] == [False]
        await host.beats()
        assert [report.unmended for report in host.manager.heartbeats[-1].reports] == [1, 0]
        await host.write(b"xyz", sequence=2)  # A whole chunk: nothing of the old one is needed.
        await host.beats(11.0)
        assert [report.unmended for report in host.manager.heartbeats[-1].reports] == [0, 0]

    on_host(work)


def test_old_tombstones_are_purged_and_leave_the_floor() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        await host.node.handle(RemoveChunks([1], [CHUNK], CLIENT, 0, 2, [1]))
        engine = host.node.replicas[1].engine
        assert await engine.tombstones() == [(CHUNK, 2)]
        await host.beats(10.0)
        assert await engine.tombstones() == [(CHUNK, 2)], "not before it is tombstone_s old"
        await host.beats(10.0)
        assert (await engine.states([CHUNK]), engine.floor) == ([None], 2)
        host.manager.config_version, host.manager.settings = 2, {"tombstone_s": 1000.0}
        await host.beats()
        await host.write(b"abc", sequence=3)
        await host.node.handle(RemoveChunks([1], [CHUNK], CLIENT, 0, 4, [1]))
        await host.beats(100.0)
        assert len(await engine.tombstones()) == 1
        host.manager.config_version, host.manager.settings = 3, {"tombstone_s": 5.0}
        await host.beats(8.0)
        assert await engine.tombstones() == [], "the long time is not slept to its end"

    on_host(work)


def test_a_long_look_at_damaged_chunks_keeps_no_upkeep_from_its_time() -> None:
    async def work(host: Host) -> None:
        await host.serve()
        await host.write(b"abc")
        host.node.replicas[2].repairer.unmended[OTHER] = None
        host.manager.config_version, host.manager.settings = 2, {"tombstone_s": 10.0, "scrub_bytes_per_s": 1e-3}
        await host.beats(15.0)
        assert host.node.scrubber._turn.locked(), "it waits because of the limit"
        await host.node.handle(RemoveChunks([1], [CHUNK], CLIENT, 0, 2, [1]))
        await host.beats(25.0)
        assert await host.node.replicas[1].engine.tombstones() == []

    on_host(work)


def test_that_no_manager_answers_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main(sim: SimRuntime) -> None:
        host = Host(sim)
        host.manager.error = AccessDenied("another authority")
        await host.node.start()
        await sim.sleep(60.0)
        host.manager.error = None
        await sim.sleep(60.0)
        await host.node.close()

    caplog.set_level("INFO", logger="emberline")
    run(0, main)
    assert [record.getMessage() for record in caplog.records if "manager" in record.getMessage()] == [
        "no manager answers, and without one nothing is served once the lease is over: another authority",
        "a manager answers again",
    ]
