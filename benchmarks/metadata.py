"""What a file costs before its first byte: stat, list, create, rename and unlink of small files.

The peer is a plain directory on ext4. On a RAM file system an fsync costs nothing and ext4 is not what is measured, so
the goals are dropped when the work directory is on something else.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emberfs
import fsspec

from .peers import LmdbValues
from .runner import Row, Subject, compare, verify

CONTENT = bytes(range(100))
"""Of every file: small enough for its inode row."""

IN_FLIGHT = 64
STAT_GOAL = 0.4
LIST_GOAL = 1.0
CREATE_IN_FLIGHT_GOAL = 5.0
CREATE_GOAL = 0.7
LOCAL = "LocalFileSystem"
FSYNCED = "open+fsync"
"""One after the other: open, write, fsync(file), fsync(directory)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    flat_files: int
    """In one directory."""
    tree: tuple[int, int]
    """(directories, files in each)"""
    creates_in_flight: int
    """Creates per pass, 64 at a time; a multiple of 64."""
    creates: int
    """Creates per pass, one at a time, also of the peers."""
    changes: int
    """Renames and unlinks per pass."""
    rounds: int


FULL = Size(flat_files=10_000, tree=(100, 100), creates_in_flight=2048, creates=256, changes=256, rounds=7)
QUICK = Size(flat_files=10_000, tree=(100, 100), creates_in_flight=512, creates=64, changes=64, rounds=3)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    url = f"ember://{directory}/store"
    on_ext4 = file_system_of(directory) == "ext4"

    def goal(value: float) -> float | None:
        return value if on_ext4 else None

    with emberfs.connect(url) as client:
        ember, local = fsspec.filesystem("ember", url=url), fsspec.filesystem("file")
        both = {"ours": (ember, "/"), LOCAL: (local, f"{directory}/local/")}
        rows = []
        folders, each = size.tree
        for shape, names in {
            "one directory": [f"flat/{number:05}" for number in range(size.flat_files)],
            "a tree": [f"tree/{folder:03}/{number:03}" for folder in range(folders) for number in range(each)],
        }.items():
            _fill(both, names)
            rows += _stat_and_list(both, shape, names, goal, rounds=size.rounds)
        rows += _creates(directory, url, client, size, goal)
        rows += _changes(directory, both, size)
    return rows


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4"."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        if fields.split()[2] == wanted:
            return tail.split()[0]
    return "unknown"


def _fill(both: dict[str, tuple[Any, str]], names: Sequence[str]) -> None:
    for fs, prefix in both.values():
        for folder in sorted({os.path.dirname(name) for name in names}):
            fs.makedirs(prefix + folder)
        fs.pipe({prefix + name: CONTENT for name in names})


# ---- reading


def _stat_and_list(
    both: dict[str, tuple[Any, str]],
    shape: str,
    names: Sequence[str],
    goal: Callable[[float], float | None],
    rounds: int,
) -> list[Row]:
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(os.path.dirname(name), []).append(name)

    def stat(fs: Any, prefix: str) -> Subject:
        paths = [prefix + name for name in shuffled]

        def subject(check: bool) -> float:
            fs.invalidate_cache()
            for path in paths:
                info = fs.info(path)
                verify(info["size"] == len(CONTENT) and info["type"] == "file", f"info({path!r}): {info}")
            return len(paths)

        return subject

    def listing(fs: Any, prefix: str) -> Subject:
        def subject(check: bool) -> float:
            fs.invalidate_cache()
            for folder, inside in by_folder.items():
                entries = fs.ls(prefix + folder, detail=True)
                verify(len(entries) == len(inside), f"ls of {folder}: {len(entries)} entries")
                if check:
                    found = {(entry["name"], entry["size"], entry["type"]) for entry in entries}
                    verify(found == {(prefix + name, len(CONTENT), "file") for name in inside}, f"ls of {folder}")
            return len(names)

        return subject

    return [
        compare(
            f"{what} in {shape} of {len(names)}, files/s",
            make(*both["ours"]),
            peers={LOCAL: make(*both[LOCAL])},
            baseline=LOCAL,
            goal=goal(value),
            rounds=rounds,
        )
        for what, make, value in (("stat", stat, STAT_GOAL), ("list with details", listing, LIST_GOAL))
    ]


# ---- creates


def _creates(directory: Path, url: str, client: Any, size: Size, goal: Callable[[float], float | None]) -> list[Row]:
    """Every create is durable before it counts; each pass makes new names in a new directory."""
    values = LmdbValues(directory / "lmdb")
    payload = memoryview(CONTENT)
    fresh = itertools.count()

    def fsynced(check: bool) -> float:
        folder = directory / f"create-{next(fresh)}"
        folder.mkdir()
        for number in range(size.creates):
            create_durably(folder, f"{number:05}", CONTENT)
        if check:
            verify(all(path.read_bytes() == CONTENT for path in folder.iterdir()), "open+fsync: wrong content")
        return size.creates

    def in_flight(check: bool) -> float:
        folder = f"/create-{next(fresh)}"
        client.mkdir(folder)
        asyncio.run(_put_in_flight(url, folder, size.creates_in_flight))
        if check:
            _verify_created(client, folder, size.creates_in_flight)
        return size.creates_in_flight

    def one_by_one(check: bool) -> float:
        folder = f"/create-{next(fresh)}"
        client.mkdir(folder)
        for number in range(size.creates):
            client.put(f"{folder}/{number:05}", CONTENT)
        if check:
            _verify_created(client, folder, size.creates)
        return size.creates

    def lmdb_puts(batch: int, count: int) -> Subject:
        def subject(check: bool) -> float:
            for _ in range(0, count, batch):
                values.write([next(fresh) for _ in range(batch)], [payload] * batch)
            return count

        return subject

    rows = [
        compare(
            f"durable create, {IN_FLIGHT} in flight, files/s",
            in_flight,
            peers={FSYNCED: fsynced, "LMDB": lmdb_puts(IN_FLIGHT, size.creates_in_flight)},
            baseline=FSYNCED,
            goal=goal(CREATE_IN_FLIGHT_GOAL),
            rounds=size.rounds,
        ),
        compare(
            "durable create, one in flight, files/s",
            one_by_one,
            peers={FSYNCED: fsynced, "LMDB": lmdb_puts(1, size.creates)},
            baseline=FSYNCED,
            goal=goal(CREATE_GOAL),
            rounds=size.rounds,
        ),
    ]
    values.close()
    return rows


async def _put_in_flight(url: str, folder: str, count: int) -> None:
    """`IN_FLIGHT` writers, each with the next name as soon as its last file is durable."""
    names = iter([f"{folder}/{number:05}" for number in range(count)])
    async with emberfs.connect_async(url) as client:

        async def writer() -> None:
            for name in names:
                await client.put(name, CONTENT)

        await asyncio.gather(*(writer() for _ in range(IN_FLIGHT)))


def _verify_created(client: Any, folder: str, count: int) -> None:
    for number in range(count):
        verify(client.get(f"{folder}/{number:05}") == CONTENT, f"{folder}/{number:05}: wrong content")


def create_durably(folder: Path, name: str, content: bytes) -> None:
    """What a program does that must not lose a file it made."""
    file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(file, content)
    os.fsync(file)
    os.close(file)
    sync_directory(folder)


def sync_directory(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- changes


def _changes(directory: Path, both: dict[str, tuple[Any, str]], size: Size) -> list[Row]:
    """Rename there and back, then unlink. Ours is durable at return; LocalFileSystem gets the fsync that it lacks."""
    names = [f"{number:05}" for number in range(size.changes)]
    folders = [f"change-{number}" for number in range(size.rounds + 1)]
    _fill(both, [f"{folder}/{name}" for folder in ("rename", *folders) for name in names])

    def renames(fs: Any, prefix: str) -> Subject:
        folder = f"{prefix}rename"
        here, there = [f"{folder}/{name}" for name in names], [f"{folder}/to-{name}" for name in names]
        turns = itertools.cycle([(here, there), (there, here)])

        def subject(check: bool) -> float:
            sources, targets = next(turns)
            for source, target in zip(sources, targets, strict=True):
                fs.mv(source, target)
                _settle(fs, target)
            if check:
                verify(sorted(fs.ls(folder, detail=False)) == targets, "rename: wrong names")
            return len(names)

        return subject

    def unlinks(fs: Any, prefix: str) -> Subject:
        left = iter(folders)

        def subject(check: bool) -> float:
            folder = prefix + next(left)
            for name in names:
                fs.rm_file(f"{folder}/{name}")
                _settle(fs, f"{folder}/{name}")
            if check:
                verify(fs.ls(folder, detail=False) == [], "unlink: names left")
            return len(names)

        return subject

    return [
        compare(
            f"durable {what}, files/s",
            make(*both["ours"]),
            peers={LOCAL: make(*both[LOCAL])},
            baseline=LOCAL,
            rounds=size.rounds,
        )
        for what, make in (("rename", renames), ("unlink", unlinks))
    ]


def _settle(fs: Any, path: str) -> None:
    """Make a change of the name `path` durable where the file system did not."""
    if fs.protocol[0] == "file":
        sync_directory(Path(path).parent)
