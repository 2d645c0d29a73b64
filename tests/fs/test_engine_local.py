"""The chunk engine on a real directory and LMDB."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from emberfs import connect
from emberfs.disk import LocalDisk
from emberfs.engine.scrub import scrub
from emberfs.kv.lmdb import LmdbKV
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.stores import acquire, release, resolve
from emberfs.testing.engine import MIB, Bench, EngineConformance, Run, chunk, pattern
from emberfs.testing.replica import ReplicaConformance


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture
def bench(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "index").mkdir()
    index = LmdbKV.open(tmp_path / "index", runtime)
    yield Bench(runtime, LocalDisk(str(tmp_path), runtime), index)
    run(index.close())


class TestLocalEngine(EngineConformance):
    pass


class TestLocalReplica(ReplicaConformance):
    pass


class TestLocalEngineOnTheLoopThread(EngineConformance):
    """The same when a loop drives the engine: every cold read and every write goes to a worker."""

    @pytest.fixture
    def run(self, runtime: AsyncioRuntime) -> Run:
        async def on_the_loop(work: Coroutine[Any, Any, Any]) -> Any:
            await runtime.sleep(0)  # Suspends, and so hands the call over.
            return await work

        portal = Portal(runtime)
        return lambda work: portal.run(on_the_loop(work))


def used_bytes(directory: Path) -> int:
    return sum(os.stat(path).st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def on_bench(test: Callable[[Bench, Path], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test outside the suite."""

    def driven_test(bench: Bench, run: Run, tmp_path: Path) -> None:
        async def body() -> None:
            await bench.open()
            await test(bench, tmp_path)
            await bench.engine.close()

        run(body())

    return driven_test


@on_bench
async def test_an_empty_target_takes_less_than_a_megabyte(bench: Bench, tmp_path: Path) -> None:
    assert used_bytes(tmp_path) < MIB
    assert not list(tmp_path.glob("blocks-*"))


@on_bench
async def test_a_small_target_is_small(bench: Bench, tmp_path: Path) -> None:
    await bench.write(0, b"x")
    assert used_bytes(tmp_path) < 2 * MIB


@on_bench
async def test_free_blocks_take_no_space_after_trim(bench: Bench, tmp_path: Path) -> None:
    await bench.write(0, pattern(16 * MIB))
    await bench.remove()
    before = used_bytes(tmp_path)
    bench.engine.trim(16 * MIB)
    assert used_bytes(tmp_path) <= before - 16 * MIB


@on_bench
async def test_trim_knows_of_free_blocks_after_a_restart(bench: Bench, tmp_path: Path) -> None:
    await bench.write(0, pattern(16 * MIB))
    await bench.remove()
    before = used_bytes(tmp_path)
    bench.disk = LocalDisk(str(tmp_path), bench.runtime)
    await bench.reopen()
    bench.engine.trim(16 * MIB)
    assert used_bytes(tmp_path) <= before - 16 * MIB


def test_nothing_of_the_store_runs_while_blocks_are_punched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block handed out between the look at its group and the punch would lose its bytes."""
    punch = LocalDisk.punch
    punched: list[bool] = []

    def watched_punch(disk: LocalDisk, *args: int) -> bool:
        punched.append(store.runtime.is_inline())
        return punch(disk, *args)

    monkeypatch.setattr(LocalDisk, "punch", watched_punch)
    with connect(f"ember://{tmp_path / 'store'}") as client:
        store = acquire(resolve(f"ember://{tmp_path / 'store'}"), None)
        client.put("/a", pattern(MIB))
        client.remove("/a", trash=False)
        client.collect_garbage(force=True)
        assert client.maintenance.trim() > 0
        release(store)
    assert punched and all(punched), "by whoever holds the baton"


@on_bench
async def test_scrub_does_not_trust_the_page_cache(bench: Bench, tmp_path: Path) -> None:
    """It asks for each block, with its sums, before it reads it."""
    await bench.write(0, pattern(2 * MIB), granule_log2=12)
    await bench.write(0, pattern(100), name=chunk(1))
    dropped: list[tuple[int, int]] = []
    drop_cache = bench.disk.drop_cache

    def noted(file: int, offset: int, length: int) -> None:
        dropped.append((offset, length))
        drop_cache(file, offset, length)

    bench.disk.drop_cache = noted  # type: ignore[method-assign]
    await scrub(bench.engine, runtime=bench.runtime)
    assert dropped == [(0, 2 * MIB + 8192), (0, 65536)]
