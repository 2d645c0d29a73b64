"""What `emberline bench` measures: each job as an operation on the store, and as the plain system calls for the same.

Invariants: both sides move the same bytes, in the same pieces, with the same durability, at the same places. What the
store returned or holds is compared with what was written, outside of the time that is measured.

Does not know: time, ceilings, or what limits an operation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..client.sync import Client
from ..errors import Corruption
from .ceilings import Side
from .output import human_bytes

MIB = 1 << 20
PUT_BYTES = 32 * MIB
"""The corpus comes into the store in files that are not larger than this at once."""
SMALL_BYTES = 4 << 10
FILES_MAX = 20_000
"""Small files that are made on each side at most."""
CHECKED_MAX = 64
"""Operations whose bytes are compared, per job."""
STRIDE = 7919
"""A prime: multiples of it visit the pieces of a file in no order that anybody reads ahead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One line of the result."""

    name: str
    unit: str
    """B/s, or what is counted per second."""
    amount: int
    """Of an operation, in that unit."""
    store: Side
    plain: Side
    plain_name: str
    verify: Callable[[], None]
    """Raises Corruption if the store holds something else than was written, or returned it."""
    size: int = 0
    """Bytes of a piece; 0 where only names are moved."""
    pieces: int = 1
    reads: bool = False


class Work:
    """The jobs, on a directory of the store and one of the local disk."""

    def __init__(self, client: Client, scratch: str, directory: Path, *, size: int, threads: int) -> None:
        self._client = client
        self._scratch = scratch
        self._directory = directory
        self._threads = threads
        self._data = memoryview(os.urandom(size))
        self._closing = ExitStack()

    @contextmanager
    def jobs(self) -> Iterator[list[Callable[[], Job]]]:
        """Functions that prepare one job each, to be called in this order. Files are closed at the end."""
        chunk = min(4 * MIB, len(self._data) // 2)
        large, small = min(MIB, chunk), min(64 << 10, chunk)
        files = _SmallFiles(self._client, f"{self._scratch}/small", self._directory / "small", self._threads)
        with self._closing:
            yield [
                lambda: self._write(f"write {human_bytes(chunk)}, in order", chunk, 1, chunk),
                lambda: self._write("write 4.0 KiB, anywhere", SMALL_BYTES, 1, chunk, stride=STRIDE),
                lambda: self._write(f"write {human_bytes(small)} x 16, a batch", small, 16, small, stride=STRIDE),
                lambda: self._read(f"read {human_bytes(chunk)}, in order", chunk, 1),
                lambda: self._read(f"read {human_bytes(large)}, anywhere", large, 1, stride=STRIDE),
                lambda: self._read("read 4.0 KiB, anywhere", SMALL_BYTES, 1, stride=STRIDE),
                lambda: self._read(f"read {human_bytes(small)} x 16, a batch", small, 16, stride=STRIDE),
                files.create,
                files.stat,
                files.list,
                files.remove,
            ]

    def _places(self, size: int, pieces: int, stride: int) -> Callable[[int, int], list[int]]:
        """(thread, turn) -> where the pieces of that operation begin, each within the data; threads have their own."""
        slots = len(self._data) // size

        def places(thread: int, turn: int) -> list[int]:
            first = (turn * self._threads + thread) * pieces
            return [(first + piece) * stride % slots * size for piece in range(pieces)]

        return places

    def _write(self, name: str, size: int, pieces: int, chunk_size_bytes: int, *, stride: int = 1) -> Job:
        data, places = self._data, self._places(size, pieces, stride)
        path = f"{self._scratch}/write-{size}"
        self._client.put(path, b"")
        target = self._closing.enter_context(self._client.open(path, "r+b", chunk_size_bytes=chunk_size_bytes))
        for begin in range(0, len(data), PUT_BYTES):  # Both sides write over what is there.
            self._client.batch_write([(target, begin, bytes(min(PUT_BYTES, len(data) - begin)))])
        file = self._open(f"write-{size}", os.O_RDWR | os.O_CREAT)
        os.pwrite(file, bytes(len(data)), 0)
        os.fsync(file)
        written: set[int] = set()

        def store(thread: int, turn: int) -> None:
            begins = places(thread, turn)
            self._client.batch_write([(target, begin, data[begin : begin + size]) for begin in begins])
            written.update(begins)

        def plain(thread: int, turn: int) -> None:
            for begin in places(thread, turn):
                os.pwrite(file, data[begin : begin + size], begin)
            os.fsync(file)

        def verify() -> None:
            for begin in sorted(written)[:CHECKED_MAX]:
                _check(self._client.get(path, begin, size) == data[begin : begin + size], path, begin)

        return Job(
            name=name, unit="B/s", amount=size * pieces, store=store, plain=plain, plain_name="pwrite, fsync",
            verify=verify, size=size, pieces=pieces,
        )  # fmt: skip

    def _read(self, name: str, size: int, pieces: int, *, stride: int = 1) -> Job:
        data, places, path = self._data, self._places(size, pieces, stride), f"{self._scratch}/read"
        if not self._client.exists(path):
            self._fill(path)
        source = self._closing.enter_context(self._client.open(path))
        file = self._open("read", os.O_RDONLY)
        # A destination for every operation in turn: one that stays in a CPU's cache would flatter both sides.
        area = max(len(data) // self._threads // (size * pieces), 1)
        memory = [self._client.buffer(area * size * pieces) for _ in range(self._threads)]

        def views(thread: int, turn: int) -> list[memoryview]:
            begin = turn % area * size * pieces
            return [memory[thread][begin + at * size :][:size] for at in range(pieces)]

        def store(thread: int, turn: int) -> None:
            into = views(thread, turn)
            self._client.batch_read([(source, begin, size) for begin in places(thread, turn)], into)

        def plain(thread: int, turn: int) -> None:
            for begin, view in zip(places(thread, turn), views(thread, turn), strict=True):
                os.preadv(file, [view], begin)

        def verify() -> None:
            for turn in range(CHECKED_MAX // pieces):
                store(0, turn)
                for begin, view in zip(places(0, turn), views(0, turn), strict=True):
                    _check(view == data[begin : begin + size], path, begin)

        return Job(
            name=name, unit="B/s", amount=size * pieces, store=store, plain=plain, plain_name="preadv",
            verify=verify, size=size, pieces=pieces, reads=True,
        )  # fmt: skip

    def _fill(self, path: str) -> None:
        with self._client.open(path, "wb") as target:
            for begin in range(0, len(self._data), PUT_BYTES):
                target.write(self._data[begin : begin + PUT_BYTES])
        (self._directory / "read").write_bytes(self._data)

    def _open(self, name: str, flags: int) -> int:
        file = os.open(self._directory / name, flags)
        self._closing.callback(os.close, file)
        return file


class _SmallFiles:
    """Files of 4 KiB, made, looked at and removed again by the jobs one after the other."""

    def __init__(self, client: Client, path: str, directory: Path, threads: int) -> None:
        self._client = client
        self._path = path
        self._directory = directory
        self._data = os.urandom(SMALL_BYTES)
        self._made: list[list[list[str]]] = [[[] for _ in range(threads)] for _ in range(2)]
        """Side -> thread -> names."""

    def _job(self, name: str, amount: int, store: Side, plain: Side, plain_name: str, *, size: int = 0) -> Job:
        return Job(
            name=name, unit="files/s", amount=amount, store=store, plain=plain, plain_name=plain_name,
            verify=self._verify, size=size,
        )  # fmt: skip

    def _verify(self) -> None:
        for name in self._made[0][0][:CHECKED_MAX]:
            _check(self._client.get(f"{self._path}/{name}") == self._data, f"{self._path}/{name}", 0)

    def create(self) -> Job:
        self._client.mkdir(self._path)
        self._directory.mkdir()

        def store(thread: int, turn: int) -> bool:
            names = self._made[0][thread]
            if len(names) >= FILES_MAX:
                return False
            name = f"{thread}-{len(names)}"
            self._client.put(f"{self._path}/{name}", self._data)
            names.append(name)
            return True

        def plain(thread: int, turn: int) -> bool:
            names = self._made[1][thread]
            if len(names) >= FILES_MAX:
                return False
            name = f"{thread}-{len(names)}"
            file = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT)
            os.write(file, self._data)
            os.fsync(file)
            os.close(file)
            self._sync_names()
            names.append(name)
            return True

        how = "open, write, fsync file and directory"
        return self._job("create a 4.0 KiB file", 1, store, plain, how, size=SMALL_BYTES)

    def stat(self) -> Job:
        def store(thread: int, turn: int) -> None:
            names = self._made[0][thread]
            self._client.stat(f"{self._path}/{names[turn % len(names)]}")

        def plain(thread: int, turn: int) -> None:
            names = self._made[1][thread]
            os.stat(self._directory / names[turn % len(names)])

        return self._job("stat", 1, store, plain, "stat")

    def list(self) -> Job:
        """A directory with as many files on one side as on the other, so that a listing is the same work."""
        count = min(sum(map(len, side)) for side in self._made)
        lists = f"{self._path}-list"
        self._client.mkdir(lists)
        (self._directory / "list").mkdir()
        count = min(count, 1000)
        for number in range(count):
            self._client.put(f"{lists}/{number}", b"")
            (self._directory / "list" / str(number)).touch()

        def store(thread: int, turn: int) -> None:
            _check(len(self._client.list(lists)) == count, lists, 0)

        def plain(thread: int, turn: int) -> None:
            with os.scandir(self._directory / "list") as entries:
                sum(entry.stat().st_size for entry in entries)

        return self._job(f"list {count} files with what stat says", count, store, plain, "scandir, stat")

    def remove(self) -> Job:
        def store(thread: int, turn: int) -> bool:
            if not self._made[0][thread]:
                return False
            self._client.remove(f"{self._path}/{self._made[0][thread].pop()}", trash=False)
            return True

        def plain(thread: int, turn: int) -> bool:
            if not self._made[1][thread]:
                return False
            os.unlink(self._directory / self._made[1][thread].pop())
            self._sync_names()
            return True

        return self._job("remove a file", 1, store, plain, "unlink, fsync directory")

    def _sync_names(self) -> None:
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check(right: bool, path: str, offset: int) -> None:
    if not right:
        raise Corruption("the store holds or returned something else than was written", path, offset=offset)
