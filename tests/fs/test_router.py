"""The client's way to the chains: what belongs to an item goes with it, wherever it is sent and however often."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from emberfs.client.router import ReadFrom, RouterConfig, StorageRouter
from emberfs.errors import (
    Overloaded,
    SessionExpired,
    StaleChunk,
    StaleRouting,
    Unanswered,
    Unavailable,
    Unreachable,
    UpdateUnknown,
)
from emberfs.messages import ChunksRead, Done, ListChunks, Message, ReadChunks, RemoveChunks, TruncateChunk, WriteChunks
from emberfs.portal import Portal
from emberfs.routing import Chain, ChainTarget, Routing, TargetState
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.sim.loop import SimRuntime, run


class FakeRoutes:
    """Chain n has one target, at server n % 2. Both serve chain 100."""

    client = b"c" * 16
    routing = Routing(1)

    def chain(self, chain: int) -> Chain:
        targets = [b"0", b"1"] if chain == 100 else [b"%d" % (chain % 2)]
        return Chain(chain, 10 * chain, tuple(ChainTarget(target, TargetState.SERVING) for target in targets))

    def preferred(self, chain: Chain, targets: Sequence[ChainTarget]) -> list[ChainTarget]:
        return list(targets)

    def address(self, target: bytes) -> str:
        return target.decode()

    async def news(self, seen_version: int, timeout_s: float) -> None:
        pass

    async def renew(self, expired: bytes) -> None:
        self.client = b"d" * 16


class Servers:
    """A network to servers that keep what they are sent, and raise what the test has put for their address."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.errors: dict[str, list[Exception]] = {}
        self.stuck: set[str] = set()
        """Servers that take a request and never answer."""
        self.sleep: Callable[[float], Awaitable[None]]
        self.ended = 0
        """Calls to them that were given up."""

    def connection(self, address: str) -> Any:
        return _Connection(self, address)


class _Connection:
    def __init__(self, servers: Servers, address: str) -> None:
        self.servers, self.address = servers, address

    async def call(
        self, request: Message, buffers: Sequence[memoryview] = (), /, *, timeout_s: float | None = None
    ) -> Message:
        self.servers.sent.append((self.address, request))
        if self.address in self.servers.stuck:
            assert timeout_s is not None
            try:
                await self.servers.sleep(timeout_s)
            finally:
                self.servers.ended += 1
            raise (Unanswered if request.changes_nothing else UpdateUnknown)("in time")
        if self.servers.errors.get(self.address):
            raise self.servers.errors[self.address].pop()
        return ChunksRead([len(buffer) for buffer in buffers]) if isinstance(request, ReadChunks) else Done()


def test_expected_versions_go_with_their_chunks() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        servers.errors["1"] = [Unavailable("not now")]
        chunks = [b"a", b"b", b"c", b"d"]
        await router.call(RemoveChunks([1, 2, 3, 4], chunks, versions=[11, 12, 13, 14]))
        shares = {(address, tuple(share.chunks), tuple(share.versions)) for address, share in servers.sent}
        assert shares == {("1", (b"a", b"c"), (11, 13)), ("0", (b"b", b"d"), (12, 14))}
        assert [share.slots for address, share in servers.sent if address == "1"] == [[0, 2], [0, 2]]
        await router.call(RemoveChunks([1, 2], [b"a", b"b"]))
        assert servers.sent[-1][1].versions == []
        await router.call(TruncateChunk(1, b"a", 5, version=7))
        assert (servers.sent[-1][1].version, servers.sent[-1][1].chain_version) == (7, 10)

    run(0, main)


def test_an_attempt_that_failed_lets_go_of_the_callers_memory() -> None:
    """At once, and not when garbage in circles is looked for: the memory may be large."""

    class Memory(bytearray):
        pass

    async def main(runtime: AsyncioRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        servers.errors["0"], servers.errors["1"] = [Unavailable("not now")], [UpdateUnknown("reset")]
        memory = Memory(b"payload")
        watch = weakref.ref(memory)
        write = WriteChunks(b"", 0, 0, [2, 1], [b"b", b"a"], [0, 0], 1 << 16)
        await router.call(write, [memoryview(memory), memoryview(memory)])
        assert len(servers.sent) == 4
        del memory
        assert watch() is None

    runtime = AsyncioRuntime()
    gc.disable()
    try:
        Portal(runtime).run(main(runtime))
    finally:
        gc.enable()
        runtime.stop()


def test_a_chunk_that_changed_is_said_to_have() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        servers.errors["1"] = [StaleChunk("it changed")]
        with pytest.raises(StaleChunk):
            await router.call(RemoveChunks([1, 2], [b"a", b"b"], versions=[1, 1]))
        assert len(servers.sent) == 2, "and is not sent again"

    run(0, main)


def test_what_is_written_in_a_session_ends_with_it() -> None:
    """Its files were closed when it ended: under another session the write would go over somebody else's."""

    async def main(runtime: SimRuntime) -> None:
        servers, routes = Servers(), FakeRoutes()
        router = StorageRouter(runtime, servers, routes)  # type: ignore[arg-type]
        servers.errors["1"] = [SessionExpired("over"), SessionExpired("over")]
        payload = [memoryview(b"payload")]
        with pytest.raises(SessionExpired):
            await router.call(WriteChunks(b"c" * 16, 0, 0, [1], [b"a"], [0], 1 << 16), payload)
        assert [request.client for _, request in servers.sent] == [b"c" * 16]
        await router.call(WriteChunks(b"", 0, 0, [1], [b"a"], [0], 1 << 16), payload)
        assert {request.client for _, request in servers.sent[1:]} == {b"d" * 16}

    run(0, main)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ReadChunks([1], [b"a"], [0]), Unavailable),
        (ReadChunks([2, 1], [b"b", b"a"], [0, 0]), Unavailable),
        (ListChunks(1, b"a", b"b"), Unavailable),
        (WriteChunks(b"", 0, 0, [1], [b"a"], [0], 1 << 16), UpdateUnknown),
        (WriteChunks(b"", 0, 0, [2, 1], [b"b", b"a"], [0, 0], 1 << 16), UpdateUnknown),
        (TruncateChunk(1, b"a", 5), UpdateUnknown),
    ],
)
def test_a_server_that_never_answers_is_waited_for_until_the_deadline(
    request_: Message, error: type[Exception]
) -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        servers.stuck, servers.sleep = {"0", "1"}, runtime.sleep
        router = StorageRouter(runtime, servers, FakeRoutes(), config=RouterConfig(deadline_s=3.0))  # type: ignore[arg-type]
        buffers = [memoryview(bytearray(4)) for _ in getattr(request_, "offsets", [])]
        started_s = runtime.now_s()
        with pytest.raises(error, match="not done after 3 s"):
            await router.call(request_, buffers)
        assert 3.0 <= runtime.now_s() - started_s < 3.1

    run(0, main)


READ = ReadChunks([100], [b"a"], [0])


async def read_times(runtime: SimRuntime, router: StorageRouter, count: int) -> list[float]:
    """How long each of `count` reads of chain 100 takes, one second apart."""
    times_s = []
    for _ in range(count):
        started_s = runtime.now_s()
        await router.call(READ, [memoryview(bytearray(4))])
        times_s.append(runtime.now_s() - started_s)
        await runtime.sleep(1.0)
    return times_s


def test_a_read_does_not_wait_long_for_a_server_where_another_one_has_the_bytes() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        servers.stuck, servers.sleep = {"1"}, runtime.sleep
        config = RouterConfig(read_from=ReadFrom.TAIL, read_patience_s=0.5, suspect_s=3.0, suspect_max_s=6.0)
        router = StorageRouter(runtime, servers, FakeRoutes(), config=config)  # type: ignore[arg-type]
        times_s = await read_times(runtime, router, 20)
        slow = [index for index, time_s in enumerate(times_s) if time_s > 0.1]
        assert max(times_s) < 0.6
        assert slow == [0, 3, 9, 15], "a server that goes on failing is asked less often"
        servers.stuck.clear()
        await runtime.sleep(6.0)
        await read_times(runtime, router, 2)
        assert [address for address, _ in servers.sent[-2:]] == ["1", "1"], "one that answers is asked first again"

    run(0, main)


def test_the_last_replica_is_waited_for() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        servers.stuck, servers.sleep = {"0", "1"}, runtime.sleep
        config = RouterConfig(deadline_s=10.0, read_patience_s=0.5)
        router = StorageRouter(runtime, servers, FakeRoutes(), config=config)  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match="not done after 10 s"):
            await router.call(READ, [memoryview(bytearray(4))])
        assert len(servers.sent) == 2, "the second one is waited for"

    run(0, main)


def test_an_update_is_waited_for() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        servers.stuck, servers.sleep = {"0"}, runtime.sleep
        router = StorageRouter(runtime, servers, FakeRoutes(), config=RouterConfig(deadline_s=10.0))  # type: ignore[arg-type]
        with pytest.raises(UpdateUnknown):
            await router.call(WriteChunks(b"", 0, 0, [100], [b"a"], [0], 1 << 16), [memoryview(b"payload")])
        assert len(servers.sent) == 1

    run(0, main)


def test_a_read_that_is_cancelled_leaves_no_share_behind_that_still_writes() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        servers.stuck, servers.sleep = {"0", "1"}, runtime.sleep
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        buffers = [memoryview(bytearray(4)) for _ in range(2)]
        reading = runtime.spawn(router.call(ReadChunks([1, 2], [b"a", b"b"], [0, 0]), buffers), "read")
        await runtime.sleep(0.1)
        assert len(servers.sent) == 2
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert servers.ended == 2

    run(0, main)


def test_a_slow_read_is_not_begun_again_and_again() -> None:
    """Everybody needs 16 s for it: it is asked once of each replica and answered by the last."""

    class Slow(Servers):
        def connection(self, address: str) -> Any:
            connection = _Connection(self, address)

            async def call(request: Message, buffers: Sequence[memoryview] = (), /, *, timeout_s: float) -> Message:
                await self.runtime.sleep(min(timeout_s, 16.0))
                if timeout_s < 16.0:
                    raise Unanswered("in time")
                return await connection.call(request, buffers)

            return type("Connection", (), {"call": staticmethod(call)})()

    async def main(runtime: SimRuntime) -> None:
        servers = Slow()
        servers.runtime = runtime  # type: ignore[attr-defined]
        router = StorageRouter(runtime, servers, FakeRoutes())  # type: ignore[arg-type]
        await router.call(READ, [memoryview(bytearray(4))])
        assert runtime.now_s() < 18.0
        assert len(servers.sent) == 1

    run(0, main)


def test_a_server_with_too_much_to_do_is_asked_again_when_it_said() -> None:
    """Each client at a time of its own."""

    async def main(runtime: SimRuntime) -> set[float]:
        times_s = set()
        for _ in range(20):
            servers = Servers()
            routes = SlowNews(runtime)
            router = StorageRouter(runtime, servers, routes)  # type: ignore[arg-type]
            servers.errors["1"] = [Overloaded("busy", retry_after_s=4.0)]
            began_s = runtime.now_s()
            await router.call(ReadChunks([1], [b"a"], [0]), [memoryview(bytearray(4))])
            times_s.add(runtime.now_s() - began_s)
        assert all(2.0 <= each <= 6.1 for each in times_s)
        return times_s

    class SlowNews(FakeRoutes):
        def __init__(self, runtime: SimRuntime) -> None:
            self.runtime = runtime

        async def news(self, seen_version: int, timeout_s: float) -> None:
            await self.runtime.sleep(timeout_s)

    assert len(run(0, main)) > 10


def test_others_are_asked_before_a_server_with_too_much_to_do() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes(), config=RouterConfig(read_from=ReadFrom.TAIL))  # type: ignore[arg-type]
        servers.errors["1"] = [Overloaded("busy", retry_after_s=2.0)]
        await router.call(READ, [memoryview(bytearray(4))])
        await router.call(READ, [memoryview(bytearray(4))])
        await runtime.sleep(2.1)
        await router.call(READ, [memoryview(bytearray(4))])
        assert [address for address, _ in servers.sent] == ["1", "0", "0", "1"]

    run(0, main)


def test_a_server_that_answers_is_no_suspect_whatever_it_says() -> None:
    async def main(runtime: SimRuntime) -> None:
        servers = Servers()
        router = StorageRouter(runtime, servers, FakeRoutes(), config=RouterConfig(read_from=ReadFrom.TAIL))  # type: ignore[arg-type]
        servers.errors["1"] = [StaleRouting("not now"), Unreachable("lost")]
        await router.call(READ, [memoryview(bytearray(4))])
        assert [address for address, _ in servers.sent] == ["1", "0"]
        await runtime.sleep(6.0)
        for _ in range(2):
            await router.call(READ, [memoryview(bytearray(4))])
        assert [address for address, _ in servers.sent[2:]] == ["1", "1", "1"]

    run(0, main)
