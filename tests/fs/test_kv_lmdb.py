"""The LMDB engine: the suite, and each of its rules."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from emberfs.errors import NoSpace, StoreBusy, StoreFormat
from emberfs.kv.lmdb import LmdbConfig, LmdbKV
from emberfs.kv.types import decode_int
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.kv import KVConformance, put_rows

Run = Callable[[Coroutine[Any, Any, Any]], Any]
TMPFS_BYTES = 4 << 20
FORK_IS_MEANT = "ignore:This process:DeprecationWarning"
"""Python 3.12 warns of a fork beside threads, and that is what the test is about."""


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture
def run(runtime: AsyncioRuntime) -> Run:
    return Portal(runtime).run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def python(program: str, *arguments: str) -> str:
    """Run a program in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-W", "error", "-W", FORK_IS_MEANT, "-c", PRELUDE + textwrap.dedent(program), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


PRELUDE = """
import os, sys
from emberfs.errors import StoreClosed
from emberfs.kv.lmdb import LmdbKV
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime

async def put(kv, key, value):
    transaction = kv.begin()
    transaction.put(key, value)
    await transaction.commit()

async def get(kv, key):
    return await kv.begin().get(key)

"""


class TestLmdbKV(KVConformance):
    @pytest.fixture
    def make_kv(self, runtime: AsyncioRuntime, tmp_path: Path) -> Callable[[], LmdbKV]:
        return lambda: LmdbKV.open(tmp_path / "kv", runtime)


async def get(kv: LmdbKV, key: bytes) -> bytes | None:
    return await kv.begin().get(key)


def test_reopening_finds_every_commit(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime)
    run(put_rows(kv, {b"a": b"1"}))
    run(kv.close())
    kv = LmdbKV.open(tmp_path, runtime)
    assert run(get(kv, b"a")) == b"1"
    run(kv.close())


def test_an_empty_store_takes_less_than_a_mebibyte(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime)
    run(put_rows(kv, {b"%d" % number: b"v" * 100 for number in range(10)}))
    run(kv.close())
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 1 << 20


def test_one_environment_per_process(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "link").symlink_to("kv")
    kv = LmdbKV.open(tmp_path / "kv", runtime)
    with pytest.raises(StoreBusy):
        LmdbKV.open(tmp_path / "link", runtime)
    run(put_rows(kv, {b"a": b"1"}))
    run(kv.close())
    run(LmdbKV.open(tmp_path / "link", runtime).close())


@pytest.mark.parametrize("content", [b"x", b"no database at all" * 1000])
def test_a_foreign_file_is_refused(runtime: AsyncioRuntime, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(StoreFormat, match="damaged or not"):
        LmdbKV.open(tmp_path, runtime)
    assert (tmp_path / "data.mdb").read_bytes() == content


def test_a_file_cut_short_is_refused(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime)
    run(put_rows(kv, {b"%d" % number: b"v" * 10_000 for number in range(100)}))
    run(kv.close())
    os.truncate(tmp_path / "data.mdb", 100_000)
    for _ in range(2):  # the refusal leaves nothing open
        with pytest.raises(StoreFormat, match="shorter"):
            LmdbKV.open(tmp_path, runtime)


def test_the_map_grows(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime, LmdbConfig(map_size_bytes=1 << 18))
    reader = kv.begin()
    for number in range(4):
        run(put_rows(kv, {b"%d-%d" % (number, row): b"v" * 100_000 for row in range(20)}))
    assert run(reader.get(b"never written")) is None
    assert len(run(kv.begin().range(b"", b"z"))) == 80
    run(kv.close())


def test_finished_transactions_take_no_reader_slots(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime)
    run(put_rows(kv, {b"a": b"1"}))
    kept = [kv.begin() for _ in range(500)]
    for transaction in kept:
        assert run(transaction.get(b"a")) == b"1"
        assert run(transaction.range(b"a", b"b")) == [(b"a", b"1")]
    run(kv.close())


def test_threads_commit_through_one_store(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    kv = LmdbKV.open(tmp_path, runtime)

    async def add() -> None:
        transaction = kv.begin()
        transaction.add(b"n", 1)
        await transaction.commit()

    def work() -> None:
        for _ in range(50):
            run(add())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decode_int(run(get(kv, b"n"))) == 200
    run(kv.close())


def test_a_forked_child_opens_its_own(tmp_path: Path) -> None:
    program = """
        runtime = AsyncioRuntime()
        kv = LmdbKV.open(sys.argv[1], runtime)
        Portal(runtime).run(put(kv, b"a", b"parent"))
        transaction = kv.begin()
        child = os.fork()
        if child == 0:
            for use in (kv.begin, lambda: transaction.get(b"a").send(None), lambda: transaction.commit().send(None)):
                try:
                    use()
                except StoreClosed as error:
                    print(error)
            runtime = AsyncioRuntime()
            own = LmdbKV.open(sys.argv[1], runtime)
            print(Portal(runtime).run(get(own, b"a")))
            Portal(runtime).run(put(own, b"b", b"child"))
            Portal(runtime).run(own.close())
            runtime.stop()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(Portal(runtime).run(get(kv, b"b")))
        Portal(runtime).run(put(kv, b"c", b"parent"))
        Portal(runtime).run(kv.close())
        runtime.stop()
    """
    refusal = "this store was opened before a fork: open it again in the child process"
    assert python(program, str(tmp_path)).splitlines() == [refusal] * 3 + ["b'parent'", "b'child'"]


def test_a_killed_writer_loses_nothing_acknowledged(runtime: AsyncioRuntime, run: Run, tmp_path: Path) -> None:
    program = """
        runtime = AsyncioRuntime()
        kv = LmdbKV.open(sys.argv[1], runtime)
        for number in range(1_000_000):
            Portal(runtime).run(put(kv, b"%07d" % number, b"v" * 500))
            print(number, flush=True)
    """
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(50):
            writer.stdout.readline()
        writer.kill()
        acknowledged = 50 + len(writer.stdout.read().split())
    kv = LmdbKV.open(tmp_path, runtime)
    rows = run(kv.begin().range(b"", b"z"))
    assert [key for key, _ in rows] == [b"%07d" % number for number in range(len(rows))]
    assert len(rows) >= acknowledged
    run(put_rows(kv, {b"after": b""}))
    run(kv.close())


async def delete(kv: LmdbKV, key: bytes) -> None:
    transaction = kv.begin()
    transaction.delete(key)
    await transaction.commit(reclaims=True)


def fill(kv: LmdbKV, run: Run, value: bytes, *, first: int = 0) -> int:
    """Put rows, numbered from `first`, until there is no space; return the number after the last."""
    for number in range(first, 100_000):
        try:
            run(put_rows(kv, {b"%06d" % number: value}))
        except NoSpace:
            return number
    raise AssertionError("the disk was never full")


@pytest.mark.parametrize("value_bytes", [100, 3000, 300_000])
def test_deletes_commit_on_a_full_disk(runtime: AsyncioRuntime, run: Run, small_disk: Path, value_bytes: int) -> None:
    kv = LmdbKV.open(small_disk / "kv", runtime)
    count = fill(kv, run, b"v" * value_bytes)
    assert count > 0
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    count = fill(kv, run, b"", first=count)
    allocated_bytes = (small_disk / "kv" / "data.mdb").stat().st_blocks * 512
    assert allocated_bytes - kv._used_end() >= LmdbConfig().reserve_bytes
    for number in range(count):
        run(delete(kv, b"%06d" % number))
    assert run(kv.begin().range(b"", b"z")) == []
    filler.unlink()
    run(put_rows(kv, {b"small": b""}))
    run(kv.close())


def test_a_full_disk_refuses_a_new_store(runtime: AsyncioRuntime, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(NoSpace):
        LmdbKV.open(small_disk / "kv", runtime)


def test_a_store_opens_on_a_full_disk(runtime: AsyncioRuntime, run: Run, small_disk: Path) -> None:
    kv = LmdbKV.open(small_disk / "kv", runtime)
    count = fill(kv, run, b"v" * 3000)
    run(kv.close())
    kv = LmdbKV.open(small_disk / "kv", runtime)
    for number in range(count):
        run(delete(kv, b"%06d" % number))
    run(kv.close())
