"""The KV of another process: the suite, with every message as bytes on the way, and what a lost message may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from emberfs.errors import Conflict, EmberError, LimitExceeded, ProtocolError, Unavailable, UpdateUnknown
from emberfs.kv.batch import INT_MAX
from emberfs.kv.buffered import BufferedKV, BufferedTransaction
from emberfs.kv.commits import CHANNELS_MAX, OWN_BEGIN, OWN_END, SILENT_S
from emberfs.kv.lmdb import LmdbKV
from emberfs.kv.memory import MemoryKV
from emberfs.kv.remote import RemoteKV
from emberfs.kv.server import REPLY_BYTES_MAX, KvServer
from emberfs.kv.transaction import OptimisticKV
from emberfs.kv.types import KEY_BYTES_MAX, KV, decode_int, encode_int
from emberfs.messages import KvCommit, KvForget, Message, Stat
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.kv import KVConformance, Run, everything, get, put_rows, together
from emberfs.transport import MemoryConnection
from emberfs.transport.codec import decode_failure, decode_message, encode_failure, encode_message


class AgeingRuntime(AsyncioRuntime):
    """The real clock, which a sleep puts forward instead of waiting."""

    age_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.age_s

    async def sleep(self, seconds: float) -> None:
        self.age_s += seconds
        await super().sleep(0)


class Wire:
    """A service whose requests, replies and errors travel as bytes. Loses what the test says."""

    def __init__(self, service: KvServer) -> None:
        self.service = service
        self.requests: list[Message] = []
        self.lost: list[str] = []
        """What happens to the next calls: `request` or `reply` gets lost, or the peer is `down`."""

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.requests.append(request)
        fate = self.lost.pop(0) if self.lost else ""
        if fate == "down":
            raise Unavailable("down")
        if fate == "request":
            raise UpdateUnknown("lost")
        try:
            reply = encode_message(await self.service.handle(decode_message(memoryview(encode_message(request)))))
        except EmberError as error:
            raise decode_failure(memoryview(encode_failure(error, request))) from None
        if fate == "reply":
            raise UpdateUnknown("lost")
        return decode_message(memoryview(reply))  # type: ignore[no-any-return]


@pytest.fixture
def runtime() -> Iterator[AgeingRuntime]:
    runtime = AgeingRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AgeingRuntime) -> Run:
    return Portal(runtime).run


async def served(engine: OptimisticKV, runtime: AsyncioRuntime) -> tuple[RemoteKV, Wire]:
    """A client of a server of `engine`, and what is between them."""
    server = KvServer(engine, runtime)
    await server.start()
    wire = Wire(server)
    return RemoteKV(MemoryConnection(wire), runtime), wire


class TestRemoteKV(KVConformance):
    @pytest.fixture
    def engine(self, runtime: AgeingRuntime, run: Run, tmp_path: Path) -> Iterator[OptimisticKV]:
        engine = LmdbKV.open(tmp_path / "kv", runtime)
        yield engine
        run(engine.close())

    @pytest.fixture
    def make_kv(self, engine: OptimisticKV, runtime: AgeingRuntime, run: Run) -> Callable[[], KV]:
        return lambda: run(served(engine, runtime))[0]  # type: ignore[no-any-return]

    def count_applies(self, kv: Any) -> Callable[[], int]:
        return super().count_applies(kv._connection.call.__self__.service._kv)


class TestLostMessages:
    """A memory engine behind a wire that loses messages."""

    @pytest.fixture
    def engine(self, runtime: AgeingRuntime, run: Run) -> Iterator[MemoryKV]:
        engine = MemoryKV(runtime, persist=lambda: runtime.sleep(0))
        yield engine
        run(engine.close())

    @pytest.fixture
    def pair(self, engine: MemoryKV, runtime: AgeingRuntime, run: Run) -> tuple[RemoteKV, Wire]:
        return run(served(engine, runtime))  # type: ignore[no-any-return]

    @pytest.fixture
    def kv(self, pair: tuple[RemoteKV, Wire]) -> RemoteKV:
        return pair[0]

    @pytest.fixture
    def wire(self, pair: tuple[RemoteKV, Wire]) -> Wire:
        return pair[1]

    @pytest.mark.parametrize("lost", [["reply"], ["request"], ["down"], ["reply", "down", "reply", "request"]])
    def test_a_commit_is_applied_once(self, kv: RemoteKV, wire: Wire, run: Run, lost: list[str]) -> None:
        for _ in range(3):
            wire.lost += lost
            run(increment(kv))
        assert decode_int(run(get(kv, b"count"))) == 3

    def test_a_commit_that_conflicted_conflicts_when_sent_again(self, kv: RemoteKV, wire: Wire, run: Run) -> None:
        async def lose() -> None:
            loser = kv.begin()
            await loser.get(b"a")
            loser.add(b"count", 1)
            await put_rows(kv, {b"a": b"1"})
            wire.lost = ["reply"]
            await loser.commit()

        with pytest.raises(Conflict):
            run(lose())
        assert run(get(kv, b"count")) is None

    def test_a_restart_is_a_stall(self, kv: RemoteKV, wire: Wire, engine: MemoryKV, runtime: Any, run: Run) -> None:
        run(increment(kv))
        wire.lost = ["reply"]
        before = wire.service
        wire.service = KvServer(engine, runtime)

        async def restart_meanwhile() -> None:
            commit = runtime.spawn(increment(kv), "commit")
            for _ in range(20):
                await runtime.sleep(0)
            await before.close()
            await wire.service.start()
            await commit

        run(restart_meanwhile())
        assert decode_int(run(get(kv, b"count"))) == 2

    def test_a_commit_before_a_restart_is_known_after_it(self, kv: RemoteKV, wire: Wire, engine: Any, run: Run) -> None:
        async def check() -> None:
            await increment(kv)
            (commit,) = [request for request in wire.requests if isinstance(request, KvCommit)]
            await wire.service.close()
            with pytest.raises(Unavailable):
                await wire.service.handle(commit)
            wire.service = KvServer(MemoryKV(kv._runtime, rows=engine.snapshot()), kv._runtime)
            await wire.service.start()
            await wire.handle(commit)
            assert decode_int(await get(kv, b"count")) == 1

        run(check())

    def test_what_was_read_before_a_restart_conflicts(self, kv: RemoteKV, wire: Wire, engine: Any, run: Run) -> None:
        async def check() -> None:
            reader, writer = kv.begin(), kv.begin()
            for transaction in (reader, writer):
                await transaction.get(b"a")
            writer.put(b"b", b"")
            await wire.service.close()
            wire.service = KvServer(engine, kv._runtime)
            await wire.service.start()
            with pytest.raises(Conflict):
                await reader.get(b"a")
            with pytest.raises(Conflict):
                await writer.commit()
            await increment(kv)

        run(check())

    def test_nobody_answers(self, kv: RemoteKV, wire: Wire, run: Run) -> None:
        wire.lost = ["request"] * 100
        with pytest.raises(Unavailable, match="no answer"):
            run(get(kv, b"a"))
        with pytest.raises(UpdateUnknown, match="may or may not"):
            run(increment(kv))
        wire.lost = ["down"] * 100
        with pytest.raises(Unavailable, match="no answer"):
            run(increment(kv))
        wire.lost = []
        run(increment(kv))
        assert decode_int(run(get(kv, b"count"))) == 1

    def test_copies_have_one_outcome(self, kv: RemoteKV, wire: Wire, runtime: AgeingRuntime, run: Run) -> None:
        run(increment(kv))
        first = wire.requests[-1]
        assert isinstance(first, KvCommit)
        second = KvCommit(**{**{name: getattr(first, name) for name in first.__struct_fields__}, "number": 2})

        async def check() -> None:
            copies = [runtime.spawn(wire.handle(second), "copy") for _ in range(4)]
            await runtime.sleep(0)
            copies[0].cancel()  # Its connection is gone; the others must not suffer.
            for copy in copies[1:]:
                await copy
            with pytest.raises(UpdateUnknown, match="late copy"):
                await wire.handle(first)

        run(check())
        assert decode_int(run(get(kv, b"count"))) == 2

    def test_a_sender_that_is_gone_does_not_stop_its_commit(self, kv: RemoteKV, runtime: Any, run: Run) -> None:
        async def check() -> None:
            commit = runtime.spawn(increment(kv), "commit")
            while not kv._numbers:
                await runtime.sleep(0)
            commit.cancel()
            await increment(kv)
            assert decode_int(await get(kv, b"count")) in (1, 2)

        run(check())

    def test_the_rows_of_commits_are_few_and_hidden(self, kv: RemoteKV, engine: Any, runtime: Any, run: Run) -> None:
        run(together(runtime, [put_rows(kv, {b"%d" % number: b""}) for number in range(2 * CHANNELS_MAX)]))
        assert len(run(everything(kv))) == 2 * CHANNELS_MAX
        for number in range(10):
            run(put_rows(kv, {b"%d" % number: b""}))
        assert len(own_rows(engine)) == CHANNELS_MAX + 1
        run(wipe(kv))
        assert len(own_rows(engine)) == CHANNELS_MAX + 1 and run(everything(kv)) == {}
        run(kv.close())
        assert len(own_rows(engine)) == 1

    def test_the_rows_of_commits_are_in_nobodys_way(self, kv: RemoteKV, run: Run) -> None:
        async def check() -> None:
            reader = kv.begin()
            assert await reader.range(b"\xff", b"\xff\xff\xff") == []
            await put_rows(kv, {b"a": b""})
            assert await reader.range(b"\xff", b"\xff\xff\xff", reverse=True) == []
            reader.put(b"b", b"")
            await reader.commit()

        run(check())

    def test_a_silent_client_is_forgotten(self, kv: RemoteKV, wire: Wire, engine: Any, runtime: Any, run: Run) -> None:
        run(increment(kv))
        silent = own_rows(engine)
        runtime.age_s += 2 * SILENT_S
        run(increment(RemoteKV(MemoryConnection(wire), runtime)))
        assert len(own_rows(engine)) == len(silent) == 2 and own_rows(engine) != silent
        run(increment(kv))
        assert decode_int(run(get(kv, b"count"))) == 3

    def test_a_restarted_server_still_commits_when_it_has_swept(
        self, kv: RemoteKV, engine: MemoryKV, runtime: AgeingRuntime, run: Run
    ) -> None:
        """Its row of starts lies beside those of clients, and is none of them."""
        run(increment(kv))
        again, _ = run(served(engine, runtime))
        runtime.age_s += 2 * SILENT_S
        run(increment(again))
        run(increment(again))
        assert decode_int(run(get(again, b"count"))) == 3
        third, _ = run(served(engine, runtime))
        runtime.age_s += 2 * SILENT_S
        run(increment(third))
        assert len(own_rows(engine)) == 2, "its own client, and the starts"

    def test_round_trips(self, kv: RemoteKV, wire: Wire, run: Run) -> None:
        async def create(transaction: BufferedTransaction) -> None:
            await transaction.get_many([b"parent", b"entry"])
            transaction.put(b"entry", b"")
            await transaction.get(b"entry")

        run(kv.run(create))
        assert len(wire.requests) == 2

    def test_a_large_answer_comes_in_parts(self, kv: RemoteKV, wire: Wire, run: Run) -> None:
        rows = {b"%03d" % number: bytes(REPLY_BYTES_MAX // 60) for number in range(150)}
        run(put_rows(kv, rows))
        wire.requests.clear()
        assert run(everything(kv)) == rows
        reading = kv.begin().range(b"", b"\xff", limit=149, reverse=True)
        assert run(reading) == sorted(rows.items())[:0:-1]
        assert run(kv.begin().get_many(list(rows))) == list(rows.values())
        assert len(wire.requests) >= 6

    @pytest.mark.parametrize(
        ("request_", "error"),
        [
            (Stat("/"), ProtocolError),
            (KvForget(b""), ProtocolError),
            (KvCommit(b"c" * 16, CHANNELS_MAX, 1, None, [], [], [], [], []), ProtocolError),
            (KvCommit(b"c" * 16, 0, 1, None, [], [], [], [(OWN_BEGIN + b"epoch", b"")], []), LimitExceeded),
            (KvCommit(b"c" * 16, 0, 1, None, [], [], [], [(b"k" * (KEY_BYTES_MAX + 1), b"")], []), LimitExceeded),
        ],
        ids=str,
    )
    def test_what_no_client_of_ours_sends_is_refused(
        self, wire: Wire, run: Run, request_: Message, error: type[EmberError]
    ) -> None:
        with pytest.raises(error):
            run(wire.handle(request_))


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_a_sum_that_leaves_64_bits_is_refused_and_stops_nobody(
    kind: str, runtime: AgeingRuntime, run: Run, tmp_path: Path
) -> None:
    def commit(number: int, rows: dict[bytes, bytes | None], *steps: tuple[bytes, int]) -> KvCommit:
        adds: list[Any] = [(key, [("add", delta)]) for key, delta in steps]
        return KvCommit(b"c" * 16, number, 1, None, [], [], [(b"a", b"b")], list(rows.items()), adds)

    async def check() -> None:
        engine = MemoryKV(runtime) if kind == "memory" else LmdbKV.open(tmp_path / "kv", runtime)
        kv, wire = await served(engine, runtime)
        await put_rows(kv, {b"a": b"1", b"most": encode_int(INT_MAX), b"text": b"no integer"})
        refused = [
            commit(0, {b"b": b"half"}, (b"count", 1), (b"most", 1)),
            commit(1, {}, (b"text", 1)),
            commit(2, {}, (b"count", 1 << 63)),
        ]
        tasks = [runtime.spawn(wire.handle(request), "commit") for request in refused]
        tasks.append(runtime.spawn(increment(kv), "commit"))
        for task in tasks[:-1]:
            with pytest.raises(LimitExceeded, match="64 bits"):
                await task
        await tasks[-1]
        rows = dict(await kv.begin().range(b"", b"\xff"))
        assert rows == {b"a": b"1", b"most": encode_int(INT_MAX), b"text": b"no integer", b"count": encode_int(1)}
        await engine.close()

    run(check())


class OvertakenKV(BufferedKV):
    """A first read of `slow` is of version 1 and waits at the gate; all else is of version 2."""

    def __init__(self, runtime: AgeingRuntime) -> None:
        super().__init__(runtime, retry_s=1)
        self.gate = runtime.future()
        self.versions: list[int | None] = []

    async def _fetch(self, keys: Sequence[bytes], version: int | None) -> tuple[int, list[bytes | None]]:
        self.versions.append(version)
        if list(keys) != [b"slow"] or version is not None:
            return 2, [b"2"]
        await self.gate
        return 1, [b"1"]


def test_two_first_reads_at_once_agree(runtime: AgeingRuntime, run: Run) -> None:
    async def check() -> None:
        kv = OvertakenKV(runtime)
        transaction = kv.begin()
        slow = runtime.spawn(transaction.get(b"slow"), "slow")
        while not kv.versions:
            await runtime.sleep(0)
        assert await transaction.get(b"fast") == b"2"
        kv.gate.set_result(None)
        assert await slow == b"2"
        assert kv.versions == [None, None, 2]

    run(check())


async def increment(kv: RemoteKV) -> None:
    transaction = kv.begin()
    transaction.add(b"count", 1)
    await transaction.commit()


async def wipe(kv: RemoteKV) -> None:
    transaction = kv.begin()
    transaction.delete_range(b"", b"\xff" * KEY_BYTES_MAX)
    await transaction.commit()


def own_rows(engine: MemoryKV) -> list[bytes]:
    return [key for key in engine.snapshot() if OWN_BEGIN <= key < OWN_END]
