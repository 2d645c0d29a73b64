"""What a storage node does now and then: tombstones are purged, rows of clients that are gone dropped, in time."""

from __future__ import annotations

from emberfs.messages import (
    RemoveChunks,
)
from emberfs.storage.sessions import Departed, Sessions

from tests.fs.chain_fakes import CHUNK, CLIENT, OTHER
from tests.fs.node_host import Host, on_host


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
