"""The conformance suite of the ordered KV: every engine passes it, ours and yours.

    class TestMyKV(KVConformance):
        @pytest.fixture
        def make_kv(self, runtime, tmp_path): ...     # a function that makes a new, empty KV

It needs two more fixtures, in the class or around it: `runtime`, a `Runtime`, and `run`, a function that runs a
coroutine of that runtime to its end (`Portal(runtime).run`, or the simulator's).

Does not know: asyncio plugins, engines; but two tests ask how often the engine wrote (`count_applies`).
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any

import pytest

from ..errors import Conflict, LimitExceeded, StoreClosed
from ..kv.types import (
    KEY_BYTES_MAX,
    KV,
    RANGE_ROWS_MAX,
    RUN_ATTEMPTS_MAX,
    TRANSACTION_BYTES_MAX,
    VALUE_BYTES_MAX,
    Transaction,
    decode_int,
    encode_int,
)
from ..runtime import Runtime

Run = Callable[[Coroutine[Any, Any, Any]], Any]
APPLIES_MAX = 4
"""64 concurrent commits: one that came first, one for those that queued meanwhile, and some slack."""


def driven(test: Callable[[Any, KV, Runtime], Awaitable[None]]) -> Callable[..., None]:
    """Make a test that pytest can call of an async one, run by the fixture `run`."""

    def driven_test(self: KVConformance, kv: KV, runtime: Runtime, run: Run) -> None:
        async def body() -> None:
            await test(self, kv, runtime)

        run(body())

    driven_test.__name__ = test.__name__
    return driven_test


async def together(runtime: Runtime, works: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Run coroutines concurrently."""
    tasks = [runtime.spawn(work, f"together-{number}") for number, work in enumerate(works)]
    for task in tasks:
        await task


async def put_rows(kv: KV, rows: dict[bytes, bytes]) -> None:
    transaction = kv.begin()
    for key, value in rows.items():
        transaction.put(key, value)
    await transaction.commit()


async def get(kv: KV, key: bytes) -> bytes | None:
    return await kv.begin().get(key)


async def everything(kv: KV) -> dict[bytes, bytes]:
    return dict(await kv.begin().range(b"", b"\xff" * (KEY_BYTES_MAX + 1)))


def letters(word: str) -> dict[bytes, bytes]:
    """A row for each letter, whose value is the letter twice."""
    return {letter.encode(): letter.encode() * 2 for letter in word}


class KVConformance:
    """What `types.KV` promises, sentence by sentence."""

    @pytest.fixture
    def kv(self, make_kv: Callable[[], KV], run: Run) -> Iterator[KV]:
        kv = make_kv()
        yield kv
        run(kv.close())

    def count_applies(self, kv: Any) -> Callable[[], int]:
        """A function that tells how many write transactions the engine made since now."""
        applied: list[int] = []
        apply_group = kv._apply_group

        async def counted(group: Any) -> None:
            applied.append(len(group))
            await apply_group(group)

        kv._apply_group = counted
        return lambda: len(applied)

    # Rows and their order.

    @driven
    async def test_a_committed_row_is_read_back(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, {b"a": b"1", b"empty": b""})
        assert await get(kv, b"a") == b"1"
        assert await get(kv, b"empty") == b""
        assert await get(kv, b"missing") is None
        assert await kv.begin().get_many([b"missing", b"empty", b"a"]) == [None, b"", b"1"]

    @driven
    async def test_keys_are_ordered_as_unsigned_bytes(self, kv: KV, runtime: Runtime) -> None:
        keys = [b"\x00", b"\x00\x00", b"\x00\xff", b"A", b"a", b"a\x00", b"aa", b"\x7f", b"\x80", b"\xff", b"\xff\xff"]
        await put_rows(kv, dict.fromkeys(reversed(keys), b""))
        rows = await kv.begin().range(b"", b"\xff" * KEY_BYTES_MAX)
        assert [key for key, _ in rows] == keys

    @driven
    async def test_values_are_bytes_of_their_own(self, kv: KV, runtime: Runtime) -> None:
        buffer = bytearray(b"before")
        transaction = kv.begin()
        transaction.put(b"key", buffer)  # type: ignore[arg-type]
        buffer[:] = b"after!"
        await transaction.commit()
        value = await get(kv, b"key")
        (row,) = await kv.begin().range(b"key", b"kez")
        await put_rows(kv, {b"key": b"another"})
        assert (type(value), value) == (bytes, b"before")
        assert (type(row[0]), type(row[1]), row) == (bytes, bytes, (b"key", b"before"))

    # Limits.

    @driven
    async def test_the_largest_key_and_value_fit(self, kv: KV, runtime: Runtime) -> None:
        key, value = b"\xff" * KEY_BYTES_MAX, b"v" * VALUE_BYTES_MAX
        await put_rows(kv, {key: value})
        assert await get(kv, key) == value
        assert await kv.begin().range(key, key + b"\x00") == [(key, value)]
        assert await kv.begin().range(key + b"\x00", b"\xff" * (KEY_BYTES_MAX + 1)) == []

    @driven
    async def test_a_key_over_the_limit_is_refused(self, kv: KV, runtime: Runtime) -> None:
        transaction = kv.begin()
        for key in (b"", b"k" * (KEY_BYTES_MAX + 1)):
            with pytest.raises(LimitExceeded):
                transaction.put(key, b"")
            with pytest.raises(LimitExceeded):
                transaction.delete(key)
            for change in (transaction.add, transaction.max):
                with pytest.raises(LimitExceeded):
                    change(key, 1)
            with pytest.raises(LimitExceeded):
                await transaction.get(key)
            with pytest.raises(LimitExceeded):
                await transaction.get_many([b"fine", key])

    @driven
    async def test_a_range_end_over_the_limit_is_refused(self, kv: KV, runtime: Runtime) -> None:
        end = b"k" * (KEY_BYTES_MAX + 2)
        with pytest.raises(LimitExceeded):
            await kv.begin().range(b"a", end)
        with pytest.raises(LimitExceeded):
            kv.begin().delete_range(b"a", end)

    @driven
    async def test_a_value_over_the_limit_is_refused(self, kv: KV, runtime: Runtime) -> None:
        with pytest.raises(LimitExceeded):
            kv.begin().put(b"key", b"v" * (VALUE_BYTES_MAX + 1))

    @driven
    async def test_a_transaction_over_the_limit_is_refused(self, kv: KV, runtime: Runtime) -> None:
        transaction = kv.begin()
        values = TRANSACTION_BYTES_MAX // VALUE_BYTES_MAX
        with pytest.raises(LimitExceeded):
            for number in range(values):
                transaction.put(b"%d" % number, b"v" * VALUE_BYTES_MAX)
        assert await everything(kv) == {}

    @driven
    async def test_a_range_limit_is_one_to_the_maximum(self, kv: KV, runtime: Runtime) -> None:
        for limit in (0, -1, RANGE_ROWS_MAX + 1):
            with pytest.raises(LimitExceeded):
                await kv.begin().range(b"a", b"b", limit=limit)

    # Ranges.

    @driven
    async def test_a_range_has_its_begin_and_not_its_end(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("abcd"))
        assert await kv.begin().range(b"b", b"d") == [(b"b", b"bb"), (b"c", b"cc")]
        assert await kv.begin().range(b"b", b"d", reverse=True) == [(b"c", b"cc"), (b"b", b"bb")]
        assert await kv.begin().range(b"b", b"b") == []
        assert await kv.begin().range(b"d", b"a") == []

    @driven
    async def test_ranges_page_both_ways(self, kv: KV, runtime: Runtime) -> None:
        keys = [b"%03d" % number for number in range(50)]
        await put_rows(kv, dict.fromkeys(keys, b"v"))
        transaction = kv.begin()
        forward: list[bytes] = []
        while page := await transaction.range(forward[-1] + b"\x00" if forward else b"", b"\xff", limit=7):
            forward += [key for key, _ in page]
        backward: list[bytes] = []
        while page := await transaction.range(b"", backward[-1] if backward else b"\xff", limit=7, reverse=True):
            backward += [key for key, _ in page]
        assert forward == keys
        assert backward == keys[::-1]

    @driven
    async def test_a_reverse_range_ends_at_the_last_row(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        assert await kv.begin().range(b"a", b"z", reverse=True, limit=1) == [(b"b", b"bb")]
        assert await kv.begin().range(b"", b"a", reverse=True) == []

    @driven
    async def test_delete_range_removes_just_the_range(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("abcdef"))
        transaction = kv.begin()
        transaction.delete_range(b"b", b"e")
        transaction.delete_range(b"f", b"a")
        transaction.delete(b"never there")
        await transaction.commit()
        assert await everything(kv) == letters("aef")
        transaction = kv.begin()
        transaction.delete_range(b"", b"\xff")
        await transaction.commit()
        assert await everything(kv) == {}

    # A transaction sees its own writes.

    @driven
    async def test_own_writes_are_read(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("abcdef"))
        transaction = kv.begin()
        transaction.delete_range(b"b", b"e")
        transaction.put(b"c", b"new")
        transaction.put(b"g", b"new")
        transaction.delete(b"f")
        assert await transaction.get_many([b"a", b"b", b"c", b"f", b"g"]) == [b"aa", None, b"new", None, b"new"]
        seen = [(b"a", b"aa"), (b"c", b"new"), (b"e", b"ee"), (b"g", b"new")]
        for limit in range(1, 6):
            assert await transaction.range(b"a", b"z", limit=limit) == seen[:limit]
            assert await transaction.range(b"a", b"z", limit=limit, reverse=True) == seen[::-1][:limit]
        assert await everything(kv) == letters("abcdef")
        await transaction.commit()
        assert await everything(kv) == dict(seen)

    @driven
    async def test_own_arithmetic_is_read(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, {b"n": encode_int(5), b"gone": encode_int(9)})
        transaction = kv.begin()
        transaction.add(b"n", 2)
        transaction.max(b"n", 3)
        transaction.add(b"n", -10)
        transaction.delete(b"gone")
        transaction.add(b"gone", 1)
        transaction.max(b"new", 4)
        expected = {b"gone": encode_int(1), b"n": encode_int(-3), b"new": encode_int(4)}
        assert decode_int(await transaction.get(b"n")) == -3
        assert dict(await transaction.range(b"a", b"z")) == expected
        await transaction.commit()
        assert await everything(kv) == expected

    # Isolation.

    @driven
    async def test_nothing_is_seen_before_the_commit(self, kv: KV, runtime: Runtime) -> None:
        transaction = kv.begin()
        transaction.put(b"a", b"1")
        assert await get(kv, b"a") is None
        assert await everything(kv) == {}
        await transaction.commit()
        assert await get(kv, b"a") == b"1"

    @driven
    async def test_a_read_is_as_of_the_first_or_a_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        reader = kv.begin()
        assert await reader.get(b"b", snapshot=True) == b"bb"
        await put_rows(kv, {b"a": b"later"})
        await self.expect_old_or_conflict(reader.get(b"a"), b"aa")
        await self.expect_old_or_conflict(reader.range(b"a", b"b"), [(b"a", b"aa")])
        assert await reader.get(b"b") == b"bb"

    @driven
    async def test_a_deleted_range_is_read_as_of_the_first_or_a_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        reader = kv.begin()
        assert await reader.range(b"b", b"c") == [(b"b", b"bb")]
        eraser = kv.begin()
        eraser.delete_range(b"a", b"b")
        await eraser.commit()
        await self.expect_old_or_conflict(reader.get(b"a"), b"aa")
        await self.expect_old_or_conflict(reader.range(b"", b"b"), [(b"a", b"aa")])
        assert await reader.get(b"b") == b"bb"

    async def expect_old_or_conflict(self, reading: Awaitable[Any], old: Any) -> None:
        try:
            assert await reading == old
        except Conflict:
            pass

    @driven
    async def test_a_changed_key_is_a_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        first, second = kv.begin(), kv.begin()
        for transaction in (first, second):
            assert await transaction.get(b"a") == b"aa"
        first.put(b"a", b"first")
        second.put(b"b", b"second")
        await first.commit()
        with pytest.raises(Conflict):
            await second.commit()
        assert await everything(kv) == {b"a": b"first", b"b": b"bb"}

    @driven
    async def test_a_key_found_absent_is_a_conflict_once_it_is_there(self, kv: KV, runtime: Runtime) -> None:
        transactions = [kv.begin(), kv.begin()]
        for transaction in transactions:
            assert await transaction.get_many([b"name"]) == [None]
            transaction.put(b"name", b"mine")
        await transactions[1].commit()
        with pytest.raises(Conflict):
            await transactions[0].commit()

    @driven
    async def test_a_phantom_is_a_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ace"))
        for change in (b"b", b"a", b"e"):
            reader, writer = kv.begin(), kv.begin()
            await reader.range(b"a", b"f")
            reader.put(b"z", b"")
            writer.put(change, b"")
            await writer.commit()
            with pytest.raises(Conflict):
                await reader.commit()

    @driven
    async def test_a_deleted_range_is_a_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("abc"))
        key_reader, range_reader, eraser = kv.begin(), kv.begin(), kv.begin()
        await key_reader.get(b"b")
        await range_reader.range(b"c", b"d")
        eraser.delete_range(b"b", b"d")
        await eraser.commit()
        for reader in (key_reader, range_reader):
            reader.put(b"z", b"")
            with pytest.raises(Conflict):
                await reader.commit()

    @driven
    async def test_only_what_was_looked_at_conflicts(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("abcde"))
        for reverse, far in ((False, b"d"), (True, b"b")):
            reader, writer = kv.begin(), kv.begin()
            assert len(await reader.range(b"a", b"f", limit=2, reverse=reverse)) == 2
            reader.put(b"z", b"")
            writer.put(far, b"changed")
            await writer.commit()
            await reader.commit()

    @driven
    async def test_snapshot_reads_do_not_conflict(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        reader = kv.begin()
        assert await reader.get(b"a", snapshot=True) == b"aa"
        assert await reader.get_many([b"a"], snapshot=True) == [b"aa"]
        assert len(await reader.range(b"a", b"c", snapshot=True)) == 2
        reader.put(b"z", b"")
        await put_rows(kv, letters("abc"))
        await reader.commit()

    @driven
    async def test_blind_writes_do_not_conflict(self, kv: KV, runtime: Runtime) -> None:
        first, second, third = kv.begin(), kv.begin(), kv.begin()
        first.put(b"a", b"first")
        second.put(b"a", b"second")
        third.delete_range(b"b", b"c")
        for transaction in (first, third, second):
            await transaction.commit()
        assert await everything(kv) == {b"a": b"second"}

    @driven
    async def test_a_read_of_an_own_write_does_not_conflict(self, kv: KV, runtime: Runtime) -> None:
        transaction = kv.begin()
        transaction.put(b"a", b"mine")
        assert await transaction.get(b"a") == b"mine"
        await put_rows(kv, {b"a": b"other"})
        await transaction.commit()
        assert await get(kv, b"a") == b"mine"

    @driven
    async def test_readers_see_whole_commits_only(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, {b"left": b"0", b"right": b"0"})

        async def write(number: int) -> None:
            await put_rows(kv, dict.fromkeys((b"left", b"right"), b"%d" % number))

        async def read() -> None:
            async def look(transaction: Transaction) -> None:
                left = await transaction.get(b"left")
                await runtime.sleep(0)
                assert await transaction.get(b"right") == left
                assert {value for _, value in await transaction.range(b"left", b"s")} == {left}

            for _ in range(20):
                await kv.run(look)

        await together(runtime, [*(write(number) for number in range(40)), read(), read()])

    # Arithmetic, retries, groups.

    @driven
    async def test_add_and_max_never_conflict(self, kv: KV, runtime: Runtime) -> None:
        async def work(number: int) -> None:
            transaction = kv.begin()
            transaction.add(b"sum", number)
            transaction.max(b"max", number)
            await transaction.commit()

        await together(runtime, (work(number) for number in range(64)))
        assert decode_int(await get(kv, b"sum")) == sum(range(64))
        assert decode_int(await get(kv, b"max")) == 63

    @driven
    async def test_run_repeats_until_nothing_conflicts(self, kv: KV, runtime: Runtime) -> None:
        async def increment(transaction: Transaction) -> None:
            value = decode_int(await transaction.get(b"count"))
            await runtime.sleep(0)
            transaction.put(b"count", encode_int(value + 1))

        await together(runtime, (kv.run(increment) for _ in range(16)))
        assert decode_int(await get(kv, b"count")) == 16

    @driven
    async def test_run_gives_up_in_the_end(self, kv: KV, runtime: Runtime) -> None:
        attempts = itertools.count()

        async def lose(transaction: Transaction) -> None:
            await transaction.get(b"key")
            await put_rows(kv, {b"key": b"%d" % next(attempts)})
            transaction.put(b"other", b"")

        with pytest.raises(Conflict):
            await kv.run(lose)
        assert next(attempts) == RUN_ATTEMPTS_MAX
        assert await get(kv, b"other") is None

    @driven
    async def test_run_returns_the_result_and_passes_errors_on(self, kv: KV, runtime: Runtime) -> None:
        async def fail(transaction: Transaction) -> None:
            transaction.put(b"key", b"")
            raise KeyError("mine")

        async def read(transaction: Transaction) -> bytes | None:
            return await transaction.get(b"key")

        with pytest.raises(KeyError, match="mine"):
            await kv.run(fail)
        assert await kv.run(read) is None

    @driven
    async def test_concurrent_commits_are_applied_together(self, kv: KV, runtime: Runtime) -> None:
        applies = self.count_applies(kv)
        await together(runtime, (put_rows(kv, {b"%02d" % number: b""}) for number in range(64)))
        assert len(await everything(kv)) == 64
        assert 1 <= applies() <= APPLIES_MAX

    @driven
    async def test_a_commit_that_wrote_nothing_does_no_io(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("ab"))
        applies = self.count_applies(kv)
        transaction = kv.begin()
        await transaction.get(b"a")
        await transaction.range(b"a", b"c")
        await transaction.commit()
        assert applies() == 0

    # The end.

    @driven
    async def test_a_closed_store_says_so(self, kv: KV, runtime: Runtime) -> None:
        await put_rows(kv, letters("a"))
        before, writing = kv.begin(), kv.begin()
        writing.put(b"b", b"")
        await kv.close()
        for call in (before.get(b"a"), before.range(b"a", b"b"), before.get_many([b"a"]), writing.commit()):
            with pytest.raises(StoreClosed):
                await call
        with pytest.raises(StoreClosed):
            kv.begin()
        await kv.close()

    @driven
    async def test_close_waits_for_commits_in_flight(self, kv: KV, runtime: Runtime) -> None:
        commits = [runtime.spawn(put_rows(kv, {b"%d" % number: b""}), "commit") for number in range(8)]
        await runtime.sleep(0)
        await kv.close()
        for commit in commits:
            await commit
