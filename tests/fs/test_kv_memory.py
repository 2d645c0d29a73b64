"""The memory engine, and through it the layer that all engines share: what happens while a commit is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
from emberfs.errors import Conflict, LimitExceeded, NoSpace, StoreClosed, TargetFailed
from emberfs.kv.batch import Batch
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import TRANSACTION_TIME_MAX_S, VALUE_BYTES_MAX, Transaction
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.kv import KVConformance, driven, put_rows

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class AgeingRuntime(AsyncioRuntime):
    """The real clock, put forward by hand."""

    age_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.age_s


@pytest.fixture
def runtime() -> Iterator[AgeingRuntime]:
    runtime = AgeingRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AgeingRuntime) -> Run:
    return Portal(runtime).run


class TestMemoryKV(KVConformance):
    @pytest.fixture
    def make_kv(self, runtime: AgeingRuntime) -> Callable[[], MemoryKV]:
        return lambda: MemoryKV(runtime, persist=lambda: runtime.sleep(0))


class TestFlights:
    """A slow disk: each commit waits until the test lets it land."""

    @pytest.fixture
    def kv(self, runtime: AgeingRuntime, run: Run) -> Iterator[SlowKV]:
        kv = SlowKV(runtime)
        yield kv
        kv.land_all()
        run(kv.close())

    @driven
    async def test_a_crash_keeps_what_was_applied_and_nothing_else(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        await kv.take_off(put_rows(kv, {b"c": b"2"}))
        rows = kv.snapshot()
        await kv.land()
        assert rows == {b"a": b"1", b"b": b"1"}
        assert kv.snapshot() == {**rows, b"c": b"2"}
        assert await MemoryKV(runtime, rows=rows).begin().range(b"", b"z") == [(b"a", b"1"), (b"b", b"1")]

    @driven
    async def test_readers_neither_wait_nor_see_it_early(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        await kv.take_off(put_rows(kv, {b"a": b"2", b"c": b"2"}))
        # The engine may show the new rows before the flight has landed.
        kv._rows.update({b"a": b"2", b"c": b"2"})
        reader = kv.begin()
        assert await reader.get_many([b"a", b"b", b"c"]) == [b"1", b"1", None]
        assert await reader.range(b"a", b"z") == [(b"a", b"1"), (b"b", b"1")]
        assert await reader.range(b"a", b"z", reverse=True, limit=1) == [(b"b", b"1")]
        await reader.commit()
        await kv.land()
        assert await kv.begin().get_many([b"a", b"c"]) == [b"2", b"2"]

    @driven
    async def test_what_is_queued_or_in_flight_conflicts(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        await kv.take_off(put_rows(kv, {b"a": b"2"}))
        queued = runtime.spawn(put_rows(kv, {b"b": b"2"}), "queued")
        await runtime.sleep(0)
        for key in (b"a", b"b"):
            by_key, by_range = kv.begin(), kv.begin()
            assert await by_key.get(key) == b"1"
            assert await by_range.range(key, key + b"\x00") == [(key, b"1")]
            for transaction in (by_key, by_range):
                transaction.put(b"z", b"")
                with pytest.raises(Conflict):
                    await transaction.commit()
        await kv.land()
        await kv.land()
        await queued

    @driven
    async def test_a_range_being_deleted_is_waited_for(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        eraser = kv.begin()
        eraser.delete_range(b"a", b"b")
        await kv.take_off(eraser.commit())
        for reading in (kv.begin().get(b"a"), kv.begin().range(b"", b"z")):
            with pytest.raises(Conflict):
                await reading
        assert await kv.begin().get(b"b") == b"1"

        async def read(transaction: Transaction) -> bytes | None:
            return await transaction.get(b"a")

        reading = runtime.spawn(kv.run(read), "reader")
        await runtime.sleep(0)
        await kv.land()
        assert await reading is None

    @driven
    async def test_a_cancelled_committer_leaves_nobody_behind(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        first = await kv.take_off(put_rows(kv, {b"c": b"first"}))
        second = runtime.spawn(put_rows(kv, {b"d": b"second"}), "second")
        await runtime.sleep(0)
        first.cancel()
        await kv.land()
        await kv.land()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        assert kv.snapshot() == {b"a": b"1", b"b": b"1", b"c": b"first", b"d": b"second"}

    @driven
    async def test_of_a_group_only_what_does_not_fit_fails(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        await kv.take_off(put_rows(kv, {b"c": b"2"}))
        commits = [runtime.spawn(put_rows(kv, {key: b"2"}), "commit") for key in (b"d", b"full", b"e")]
        await runtime.sleep(0)
        for _ in range(5):  # the one in flight, the three together, and each alone
            await kv.land()
        await commits[0]
        await commits[2]
        with pytest.raises(NoSpace):
            await commits[1]
        assert kv.sizes == [1, 3, 1, 1, 1]
        assert kv.snapshot() == {b"a": b"1", b"b": b"1", b"c": b"2", b"d": b"2", b"e": b"2"}

    @driven
    async def test_a_failed_disk_takes_no_more_commits(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        commit = await kv.take_off(put_rows(kv, {b"broken": b""}))
        await kv.land()
        with pytest.raises(TargetFailed, match="may or may not"):
            await commit
        with pytest.raises(TargetFailed, match="open it again"):
            await put_rows(kv, {b"c": b"2"})
        assert await kv.begin().get(b"a") == b"1"

    @driven
    async def test_a_long_queue_takes_several_flights(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        large = {b"%d" % number: b"v" * VALUE_BYTES_MAX for number in range(15)}
        await kv.take_off(put_rows(kv, {b"c": b"2"}))
        commits = [runtime.spawn(put_rows(kv, large), "commit") for _ in range(3)]
        await runtime.sleep(0)
        for _ in range(3):
            await kv.land()
        for commit in commits:
            await commit
        assert kv.sizes == [1, 2, 1]

    @driven
    async def test_close_waits_and_refuses_what_comes_later(self, kv: SlowKV, runtime: AgeingRuntime) -> None:
        commit = await kv.take_off(put_rows(kv, {b"c": b"2"}))
        closing = runtime.spawn(kv.close(), "close")
        await runtime.sleep(0)
        with pytest.raises(StoreClosed):
            kv.begin()
        assert not closing.done()
        await kv.land()
        await commit
        await closing
        assert kv.snapshot()[b"c"] == b"2"


class SlowKV(MemoryKV):
    """Commits land when told. One that writes `full` does not fit, one that writes `broken` breaks the disk."""

    def __init__(self, runtime: AgeingRuntime) -> None:
        super().__init__(runtime, rows={b"a": b"1", b"b": b"1"}, persist=self._wait)
        self.sizes: list[int] = []
        self._flights: list[asyncio.Future[None]] = []
        self._is_fast = False

    async def _wait(self) -> None:
        if self._is_fast:
            return
        self._flights.append(self._runtime.future())
        await self._flights[-1]

    async def _apply_group(self, group: Sequence[Batch]) -> None:
        self.sizes.append(len(group))
        await self._wait()
        if any(b"full" in batch.writes for batch in group):
            raise NoSpace("full")
        if any(b"broken" in batch.writes for batch in group):
            raise OSError("broken")
        self._apply(group)

    async def take_off(self, commit: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a commit, and return once it is in flight."""
        task = self._runtime.spawn(commit, "commit")
        while not self._flights:
            await self._runtime.sleep(0)
        return task

    def land_all(self) -> None:
        """Wait for nothing any more: a test that failed half way must end, too."""
        self._is_fast = True
        for flight in self._flights:
            flight.get_loop().call_soon_threadsafe(flight.set_result, None)

    async def land(self) -> None:
        """Let the present flight land, once there is one."""
        while not self._flights:
            await self._runtime.sleep(0)
        self._flights.pop().set_result(None)
        await self._runtime.sleep(0)


def test_an_interrupted_commit_leaves_the_store_usable(runtime: AgeingRuntime, run: Run) -> None:
    class InterruptedKV(MemoryKV):
        interrupted = False

        async def _apply_group(self, group: Sequence[Batch]) -> None:
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            await super()._apply_group(group)

    kv = InterruptedKV(runtime)
    with pytest.raises(KeyboardInterrupt):
        run(put_rows(kv, {b"a": b"1"}))
    run(put_rows(kv, {b"b": b"2"}))
    run(kv.close())
    assert kv.snapshot() == {b"b": b"2"}


def test_an_old_transaction_conflicts_once_its_time_is_forgotten(runtime: AgeingRuntime, run: Run) -> None:
    kv = MemoryKV(runtime, rows={b"a": b"1"})
    old = kv.begin()
    runtime.age_s += 10 * TRANSACTION_TIME_MAX_S
    assert run(old.get(b"a")) == b"1", "age alone is no reason"
    run(put_rows(kv, {b"b": b"2"}))
    runtime.age_s += 2 * TRANSACTION_TIME_MAX_S
    run(put_rows(kv, {b"c": b"2"}))
    with pytest.raises(Conflict):
        run(old.get(b"a"))
    old.put(b"d", b"")
    with pytest.raises(Conflict):
        run(old.commit())
    assert len(kv._history._last_write) == 1, "a forgotten version is let go"
    run(kv.close())


def test_integers_do_not_wrap(runtime: AgeingRuntime, run: Run) -> None:
    kv = MemoryKV(runtime)
    transaction = kv.begin()
    transaction.put(b"n", b"\xff" * 7 + b"\x7f")
    with pytest.raises(LimitExceeded):
        transaction.add(b"n", 1)
    run(kv.close())
