"""`LocalDisk`: real files, and what the system calls may do to them."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from emberfs.disk import START_BYTES_MIN, Disk, LocalDisk
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class CountingRuntime(AsyncioRuntime):
    """Keeps the threads that blocking work was done in."""

    def __init__(self) -> None:
        super().__init__()
        self.offloads: list[Any] = []

    async def offload(self, blocking: Callable[..., Any], *args: Any) -> Any:
        def noted() -> Any:
            self.offloads.append((blocking.__name__, threading.get_ident()))
            return blocking(*args)

        return await super().offload(noted)

    offload_read = offload


@pytest.fixture
def runtime() -> Iterator[CountingRuntime]:
    runtime = CountingRuntime()
    yield runtime
    runtime.stop()


@pytest.fixture(params=["inline", "on the loop"])
def run(request: pytest.FixtureRequest, runtime: CountingRuntime) -> Run:
    return Portal(runtime).run if request.param == "inline" else on_the_loop(runtime)


def on_the_loop(runtime: CountingRuntime) -> Run:
    async def handed_over(work: Coroutine[Any, Any, Any]) -> Any:
        await runtime.sleep(0)
        return await work

    return lambda work: Portal(runtime).run(handed_over(work))


@pytest.fixture
def disk(runtime: CountingRuntime, tmp_path: Path) -> Iterator[LocalDisk]:
    disk = LocalDisk(str(tmp_path), runtime)
    yield disk
    disk.close()


async def read(disk: Disk, file: int, offset: int, *lengths: int) -> list[bytes]:
    """One item with a destination of each length; the destinations, cut at what was read."""
    buffers = [bytearray(b"?" * length) for length in lengths]
    (count,) = await disk.read([(file, [memoryview(buffer) for buffer in buffers], offset)])
    parts = []
    for buffer in buffers:
        taken = min(count, len(buffer))
        assert buffer[taken:] == b"?" * (len(buffer) - taken)
        parts.append(bytes(buffer[:taken]))
        count -= taken
    return parts


def write(disk: Disk, run: Run, payload: bytes, offset: int = 0, *, name: str = "file") -> int:
    file = disk.open(name)
    run(disk.write([(file, memoryview(payload), offset)]))
    return file


def test_what_was_written_is_read_into_the_destinations_in_order(disk: LocalDisk, run: Run) -> None:
    file = write(disk, run, b"0123456789")
    assert run(read(disk, file, 1, 2, 0, 3)) == [b"12", b"", b"345"]
    assert disk.size(file) == 10


def test_a_batch_goes_to_many_files(disk: LocalDisk, run: Run) -> None:
    files = [disk.open(name) for name in ("a", "b")]
    run(
        disk.write(
            [(files[0], memoryview(b"one"), 0), (files[1], memoryview(b"two"), 5), (files[0], memoryview(b"!"), 3)]
        )
    )
    run(disk.sync(files))
    run(disk.sync_directory())
    buffers = [bytearray(10), bytearray(10), bytearray(10)]
    items = [(file, [memoryview(buffer)], 0) for file, buffer in zip([*files, files[0]], buffers, strict=True)]
    assert run(disk.read(items)) == [4, 8, 4]
    assert (buffers[0][:4], buffers[1][:8]) == (b"one!", b"\0\0\0\0\0two")


def test_a_read_is_short_at_the_end_of_the_file(disk: LocalDisk, run: Run) -> None:
    file = write(disk, run, b"0123456789")
    assert run(read(disk, file, 8, 1, 5)) == [b"8", b"9"]
    assert run(read(disk, file, 10, 5)) == [b""]
    assert run(read(disk, file, 99, 5)) == [b""]


def test_a_file_is_opened_once_and_kept(disk: LocalDisk, run: Run, tmp_path: Path) -> None:
    file = write(disk, run, b"x")
    assert disk.open("file") == file
    disk.close()
    disk.close()
    assert run(read(disk, disk.open("file"), 0, 5)) == [b"x"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_allocated_space_reads_as_zeros(disk: LocalDisk, run: Run, tmp_path: Path) -> None:
    file = write(disk, run, b"begin")
    disk.allocate(file, 5, 1 << 20)
    assert disk.size(file) == (1 << 20) + 5
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20
    assert run(read(disk, file, 0, 10)) == [b"begin" + bytes(5)]


def test_a_punched_range_reads_as_zeros_and_takes_no_space(disk: LocalDisk, run: Run, tmp_path: Path) -> None:
    file = write(disk, run, b"x" * (1 << 20))
    before = (tmp_path / "file").stat().st_blocks
    assert disk.allocated_bytes(file) == before * 512 >= 1 << 20
    assert disk.punch(file, 65_536, 262_144)
    assert run(read(disk, file, 65_530, 12)) == [b"x" * 6 + bytes(6)]
    assert disk.size(file) == 1 << 20
    assert disk.allocated_bytes(file) == (tmp_path / "file").stat().st_blocks * 512 < before * 512


def test_a_failed_punch_raises_unless_the_file_system_cannot(
    disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(disk, run, b"x" * 8192)
    with pytest.raises(OSError, match="Invalid argument"):
        disk.punch(file, 0, 0)
    errors = [errno.EINTR, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EIO]

    class Libc:
        @staticmethod
        def fallocate(*_: int) -> int:
            ctypes.set_errno(errors.pop(0))
            return -1

    monkeypatch.setattr("emberfs.disk._libc", Libc)
    assert [disk.punch(file, 0, 4096) for _ in range(3)] == [False] * 3
    with pytest.raises(OSError, match="Input/output"):
        disk.punch(file, 0, 4096)


def test_holes_are_what_takes_no_space(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(disk, run, b"x" * (1 << 20))
    disk.allocate(file, 1 << 20, 1 << 20)
    run(disk.sync([file]))
    if not (disk.punch(file, 65_536, 131_072) and disk.holes(file)):
        pytest.skip("a file system without holes, or that does not tell of them")
    assert disk.holes(file) == [(65_536, 196_608)], "what was reserved and never written is no hole"
    disk.punch(file, 1 << 20, 1 << 20)
    disk.punch(file, 0, 65_536)
    assert disk.holes(file) == [(0, 196_608), (1 << 20, 2 << 20)]
    for number in range(600):
        disk.allocate(file, (4 << 20) + number * 16_384, 4096)
    assert len(disk.holes(file)) >= 600, "more than one answer has"
    disk.punch(file, 0, 16 << 20)
    assert disk.holes(file) == [(0, disk.size(file))]

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    assert disk.holes(file) == []


def test_free_bytes_and_drop_cache(disk: LocalDisk, run: Run) -> None:
    file = write(disk, run, b"x" * 8192)
    run(disk.sync([file]))
    disk.drop_cache(file, 0, 8192)
    assert run(read(disk, file, 0, 8192)) == [b"x" * 8192]
    assert disk.free_bytes() > 0


# ---- who reads


@pytest.fixture
def loop_run(runtime: CountingRuntime) -> Run:
    return on_the_loop(runtime)


def test_a_warm_read_needs_no_worker(disk: LocalDisk, loop_run: Run, runtime: CountingRuntime) -> None:
    file = write(disk, loop_run, b"x" * 100_000)
    runtime.offloads.clear()
    assert loop_run(read(disk, file, 5, 1000, 2000)) == [b"x" * 1000, b"x" * 2000]
    assert runtime.offloads == []


@pytest.mark.parametrize("warm_bytes", [None, 0, 700])
def test_only_what_is_cold_goes_to_a_worker(
    disk: LocalDisk, loop_run: Run, runtime: CountingRuntime, monkeypatch: pytest.MonkeyPatch, warm_bytes: int | None
) -> None:
    """The kernel says EAGAIN, or stops where its cache ends."""
    warm, cold = write(disk, loop_run, b"w" * 1000, name="warm"), write(disk, loop_run, b"c" * 1000, name="cold")
    runtime.offloads.clear()
    preadv, cold_reads = os.preadv, []

    def sometimes_cold(file: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if file != cold:
            return preadv(file, buffers, offset, flags)
        cold_reads.append(flags)
        if flags != os.RWF_NOWAIT:
            return preadv(file, buffers, offset, flags)
        if warm_bytes is None:
            raise BlockingIOError(errno.EAGAIN, "cold")
        return preadv(file, [buffers[0][:warm_bytes]], offset, flags)

    monkeypatch.setattr(os, "preadv", sometimes_cold)
    buffers = [bytearray(1000) for _ in range(3)]
    files = [warm, cold, warm]
    items = [(file, [memoryview(buffer)], 0) for file, buffer in zip(files, buffers, strict=True)]
    assert loop_run(disk.read(items)) == [1000] * 3
    assert buffers == [b"w" * 1000, b"c" * 1000, b"w" * 1000]
    assert cold_reads == [os.RWF_NOWAIT, 0]
    ((name, ident),) = runtime.offloads
    assert name == "_read_all" and ident not in (threading.get_ident(), runtime.loop.thread_ident)


def test_an_inline_caller_reads_in_its_own_thread(disk: LocalDisk, runtime: CountingRuntime) -> None:
    run = Portal(runtime).run
    file = write(disk, run, b"x" * 100)
    run(read(disk, file, 0, 100))
    run(disk.sync([file]))
    assert {ident for _, ident in runtime.offloads} == {threading.get_ident()}


def test_a_read_error_is_raised(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(disk, run, b"x" * 100)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "medium error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="medium error"):
        run(read(disk, file, 0, 100))


# ---- the kernel does less than it was asked for


def test_a_write_goes_on_until_all_is_written(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, payload, offset: pwrite(file, bytes(payload)[:300], offset))
    payload = bytes(range(256)) * 5
    file = write(disk, run, payload, 10)
    assert run(read(disk, file, 10, 2000)) == [payload]


def test_a_read_goes_on_until_the_end(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = bytes(range(256)) * 5
    file = write(disk, run, payload)
    preadv = os.preadv

    def short(file: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return preadv(file, [buffers[0][:300]], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    assert b"".join(run(read(disk, file, 3, 10, 500, 0, 700))) == payload[3:1213]
    assert b"".join(run(read(disk, file, 1000, 200, 400))) == payload[1000:]


def test_a_large_write_is_begun_and_not_waited_for(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, ...]] = []

    class Libc:
        def sync_file_range(self, *asked: int) -> int:
            begun.append(asked)
            return 0

    monkeypatch.setattr("emberfs.disk._libc", Libc())
    write(disk, run, bytes(START_BYTES_MIN - 1), 7)
    assert begun == []
    file = write(disk, run, bytes(START_BYTES_MIN), 7)
    # SYNC_FILE_RANGE_WRITE alone: the others wait, and what they find the next fdatasync does not tell any more.
    assert begun == [(file, 7, START_BYTES_MIN, 2)]


def test_a_failed_write_or_sync_is_raised(disk: LocalDisk, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    file = disk.open("file")
    monkeypatch.setattr(os, "pwrite", broken)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="full"):
        write(disk, run, b"x")
    with pytest.raises(OSError, match="full"):
        run(disk.sync([file]))


def test_what_is_mounted_over_the_directory_later_is_left_alone(
    run: Run, runtime: CountingRuntime, tmp_path: Path
) -> None:
    """A rename stands for the mount: the path leads to another directory afterwards."""
    blank, other, path = tmp_path / "blank", tmp_path / "other", tmp_path / "disk1"
    path.mkdir()
    other.mkdir()
    (other / "file").write_bytes(b"another disk")
    disk = LocalDisk(str(path), runtime)
    path.rename(blank)
    other.rename(path)
    file = write(disk, run, b"ours")
    run(disk.sync([file]))
    run(disk.sync_directory())
    assert disk.free_bytes() > 0
    disk.close()
    assert (path / "file").read_bytes() == b"another disk"
    assert (blank / "file").read_bytes() == b"ours"
