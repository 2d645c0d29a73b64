"""`bench`: what a store does on this machine, beside what the machine could do at most.

Every row is measured beside its ceiling in the same run, in turns, on the same disk: the plain system calls for the
same bytes and the same durability. Reads are warm (from the page cache) on both sides, and the store verifies its
checksums. A quick look, not a benchmark to quote: `python -m benchmarks` in the repository is that.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from ..client.sync import Client
from .output import human_bytes, json_option, note, print_columns, print_json
from .store import directory_of

_DATA_BYTES = 64 << 20
"""Each side reads and writes inside this much."""
_ROUNDS = 3
"""Turns each side gets; the best counts, because what disturbs a run only ever slows it."""
_SMALL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One question: the store's rate, and its ceiling's."""

    name: str
    unit: str
    """B/s or files/s."""
    store: float | None
    """None for a row that is only a ceiling."""
    ceiling: float
    ceiling_name: str


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline bench\n"
    "  emberline bench ember:///srv/store\n"
    "  emberline bench --seconds 2 --json"
)
@click.argument("store", required=False)
@click.option("--seconds", type=click.FloatRange(0.01, 60), default=0.3, show_default=True, help="Per measurement.")
@json_option
def bench(store: str | None, seconds: float, as_json: bool) -> None:
    """Measure a store, by default a temporary one in this directory, beside the ceilings of the machine.

    It writes about 200 MiB under a directory of its own and removes that again.
    """
    with _workplace(store) as (client, directory, scratch):
        data = os.urandom(_DATA_BYTES)
        client.put(f"{scratch}/read", data)
        (directory / "read").write_bytes(data)
        note(f"measuring {client.url}, about {seconds * _ROUNDS * 2 * 7:.0f} s")
        rows = [
            _memcpy(seconds),
            *(_writes(client, directory, scratch, size, count, seconds) for size, count in _SHAPES),
            *(_reads(client, directory, scratch, size, count, seconds) for size, count in _SHAPES),
            _creates(client, directory, scratch, seconds),
        ]
    for row in rows if as_json else ():
        ratio = None if row.store is None else round(row.store / row.ceiling, 4)
        print_json({
            "name": row.name, "unit": row.unit, "store": row.store, "ceiling": row.ceiling,
            "ceiling_name": row.ceiling_name, "ratio": ratio,
        })  # fmt: skip
    if not as_json:
        table = [(row.name, _rate(row.store, row.unit), _rate(row.ceiling, row.unit), _ratio(row), row.ceiling_name)
                 for row in rows]  # fmt: skip
        print_columns([("", "store", "ceiling", "ratio", "ceiling is"), *table], right=(1, 2, 3))


_SHAPES = ((1 << 20, 16), (64 << 10, 16))
"""(bytes of an item, items of a batch)"""


@contextmanager
def _workplace(store: str | None) -> Iterator[tuple[Client, Path, str]]:
    """(client, a directory on the same disk, a fresh directory in the store); all of it is gone afterwards."""
    parent = directory_of(store) if store else Path.cwd()
    with tempfile.TemporaryDirectory(prefix=".emberline-bench-", dir=parent if parent.exists() else None) as plain:
        url = store and f"ember://{parent}"
        with Client(url or f"ember://{plain}/store") as client:
            scratch = f"/{Path(plain).name}"
            client.mkdir(scratch)
            try:
                yield client, Path(plain), scratch
            finally:
                client.remove(scratch, recursive=True, trash=False)
                client.collect_garbage(force=True)
        if url is None:
            shutil.rmtree(f"{plain}/store", ignore_errors=True)


def _memcpy(seconds: float) -> Row:
    source, target = memoryview(bytearray(os.urandom(1 << 20))), memoryview(bytearray(_DATA_BYTES))

    def copy(turn: int) -> None:
        begin = turn % (_DATA_BYTES >> 20) << 20
        target[begin : begin + len(source)] = source

    return Row("copy 1 MiB in memory", "B/s", None, _best([copy], seconds)[0] * len(source), "memcpy")


def _writes(client: Client, directory: Path, scratch: str, size: int, count: int, seconds: float) -> Row:
    payload = memoryview(os.urandom(size * count))
    views = [payload[index * size : (index + 1) * size] for index in range(count)]
    turns = _DATA_BYTES // len(payload)

    # Whole chunks: the unit that a store writes atomically.
    name = f"{scratch}/write-{size}"
    client.put(name, b"")
    target = client.open(name, "r+b", chunk_size_bytes=size)

    def write_store(turn: int) -> None:
        base = turn % turns * len(payload)
        client.batch_write([(target, base + index * size, view) for index, view in enumerate(views)])

    file = os.open(directory / f"write-{size}", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(file, 0, _DATA_BYTES)

    def write_plain(turn: int) -> None:
        for index, view in enumerate(views):
            os.pwrite(file, view, turn % turns * len(payload) + index * size)
        os.fsync(file)

    try:
        store, ceiling = (rate * len(payload) for rate in _best([write_store, write_plain], seconds))
    finally:
        os.close(file)
        target.close()
    return Row(f"write {human_bytes(size)} x {count}, durable", "B/s", store, ceiling, "pwrite, one fsync")


def _reads(client: Client, directory: Path, scratch: str, size: int, count: int, seconds: float) -> Row:
    batch_bytes = size * count
    turns = _DATA_BYTES // batch_bytes
    # The destination rotates too: one that stays in the CPU's cache would flatter both sides.
    destination = memoryview(bytearray(_DATA_BYTES))
    views = [destination[begin : begin + size] for begin in range(0, _DATA_BYTES, size)]

    def read_store(turn: int) -> None:
        first = turn % turns * count
        items = [(f"{scratch}/read", (first + index) * size, size) for index in range(count)]
        client.batch_read(items, views[first : first + count])

    file = os.open(directory / "read", os.O_RDONLY)

    def read_plain(turn: int) -> None:
        first = turn % turns * count
        for index in range(first, first + count):
            os.preadv(file, [views[index]], index * size)

    try:
        store, ceiling = (rate * batch_bytes for rate in _best([read_store, read_plain], seconds))
    finally:
        os.close(file)
    return Row(f"read {human_bytes(size)} x {count}, verified", "B/s", store, ceiling, "preadv")


def _creates(client: Client, directory: Path, scratch: str, seconds: float) -> Row:
    data = os.urandom(_SMALL_BYTES)
    made = {"store": 0, "plain": 0}
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)

    def create_in_store(_: int) -> None:
        made["store"] += 1
        client.put(f"{scratch}/small-{made['store']}", data)

    def create_plain(_: int) -> None:
        made["plain"] += 1
        file = os.open(directory / f"small-{made['plain']}", os.O_WRONLY | os.O_CREAT)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
        os.fsync(folder)

    try:
        store, ceiling = _best([create_in_store, create_plain], seconds)
    finally:
        os.close(folder)
    name = f"create a {human_bytes(_SMALL_BYTES)} file, durable"
    return Row(name, "files/s", store, ceiling, "open, write, fsync file and directory")


def _best(sides: list[Callable[[int], None]], seconds: float) -> list[float]:
    """Calls per second of each side, the best of rounds taken in turns; the first call of each warms up."""
    for side in sides:
        side(0)
    best = [0.0] * len(sides)
    for _ in range(_ROUNDS):
        for index, side in enumerate(sides):
            start_s = now_s = time.perf_counter()
            turn = 0
            while now_s - start_s < seconds or turn == 0:
                side(turn)
                turn += 1
                now_s = time.perf_counter()
            best[index] = max(best[index], turn / (now_s - start_s))
    return best


def _rate(rate: float | None, unit: str) -> str:
    if rate is None:
        return ""
    return f"{human_bytes(rate)}/s" if unit == "B/s" else f"{rate:.0f} {unit}"


def _ratio(row: Row) -> str:
    return "" if row.store is None else f"{row.store / row.ceiling:.2f}"
