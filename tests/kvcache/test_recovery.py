"""Taking a namespace over: what is read while the silence of the owner lasts, and what only then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from emberfs.errors import EmberError
from emberfs.testing.sim.loop import SimRuntime
from emberkv.ownership import LEASE_S
from emberkv.pool import Pool
from emberkv.puts import STORED

from tests.kvcache.test_pool import TENANT, Bench, chain, run


def gets_of(bench: Bench) -> Counter[str]:
    """Counts what is read from now on, by the end of its name."""
    counts: Counter[str] = Counter()

    def count(operation: str, path: str) -> EmberError | None:
        counts[path.rpartition(".")[2]] += operation == "get"
        return None

    bench.files.fails = count
    return counts


def test_what_an_owner_left_is_read_while_its_silence_lasts() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        for prompt in range(30):
            await bench.put(old, chain(prompt, 3))
        bench.kill(old)
        gets, real_get = gets_of(bench), bench.files.get

        async def slow_get(path: str) -> bytes:
            await runtime.sleep(0.8 if path.endswith(".snapshot") else 0.0)
            return await real_get(path)

        bench.files.get = slow_get  # type: ignore[method-assign]
        begin_s = runtime.now_s()
        new = await bench.open()
        assert runtime.now_s() - begin_s < LEASE_S + 0.3
        assert gets["snapshot"] == 1
        for prompt in range(30):
            assert await bench.readable(new, chain(prompt, 3)) == 3

    run(work)


async def _more_of_the_log(bench: Bench, old: Pool) -> None:
    assert await bench.put(old, chain(2, 3)) == [STORED] * 3
    await old.remove(TENANT, chain(1, 3)[2:])
    await old.flush()


async def _a_snapshot(bench: Bench, old: Pool) -> None:
    await _more_of_the_log(bench, old)
    old._wal.want_snapshot()
    await old.flush()


@pytest.mark.parametrize(("happens", "snapshots"), [(_more_of_the_log, 1), (_a_snapshot, 2)])
def test_what_a_silent_owner_still_writes_is_read_too(
    happens: Callable[[Bench, Pool], Awaitable[None]], snapshots: int
) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        await bench.put(old, chain(1, 3))

        async def no_beat(*, released: bool = False) -> None:
            pass

        old.ownership.beat = no_beat  # type: ignore[method-assign]
        gets = gets_of(bench)
        opening = runtime.spawn(bench.open(), "opening")
        await runtime.sleep(LEASE_S - 0.4)
        assert gets["snapshot"] == 1 and not opening.done()
        await happens(bench, old)
        new = await opening
        assert gets["snapshot"] == snapshots
        assert await bench.readable(new, chain(1, 3)) == 2
        assert await bench.readable(new, chain(2, 3)) == 3
        assert await bench.put(new, chain(1, 3)[2:], parent=chain(1, 3)[1]) == [STORED]

    run(work)


def test_an_owner_that_was_only_slow_goes_on_and_nothing_of_it_is_kept() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        old = await bench.open()
        await bench.put(old, chain(1, 3))
        beats, real_put = 0, bench.files.put

        async def slow_put(path: str, data: bytes) -> None:
            nonlocal beats
            if path.endswith("/beat"):
                beats += 1
                await runtime.sleep(1.2 if beats % 4 == 0 else 0.0)
            await real_put(path, data)

        bench.files.put = slow_put  # type: ignore[method-assign]
        gets = gets_of(bench)
        opening = runtime.spawn(bench.open(), "opening")
        await runtime.sleep(20)
        assert not opening.done() and gets["snapshot"] > 2, "it is ready each time, and begins anew"
        assert await bench.put(old, chain(2, 3)) == [STORED] * 3
        bench.kill(old)
        new = await opening
        assert await bench.readable(new, chain(1, 3)) == await bench.readable(new, chain(2, 3)) == 3

    run(work)
