"""A storage node and its manager: heartbeats, lease, routing, sessions, reports."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from emberfs.engine import ChunkEngine
from emberfs.errors import (
    AccessDenied,
    ProtocolError,
    SessionExpired,
    StaleChunk,
    StaleRouting,
    TargetFailed,
    Unavailable,
)
from emberfs.messages import (
    ChunksRead,
    ChunksScrubbed,
    GetRouting,
    HeartbeatReply,
    Message,
    ReadChunks,
    RemoveChunks,
    RoutingReply,
    ScrubChunks,
    TruncateChunk,
)
from emberfs.routing import LocalState, Node, Role, Target
from emberfs.storage.node import BEAT_REST_S, FAILED_REST_S, FOLLOW_REST_S
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.chain_fakes import CHUNK, CLIENT, OTHER
from tests.fs.node_host import SECOND, TARGET, Host, on_host


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
