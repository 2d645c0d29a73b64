"""How much memory and time a large store takes to open, and a large file to pass through.

The large store is made behind the store's back: records and bitmaps go straight into the index, block files are
sparse. One chunk has bytes of its own and the others are zeros, with checksums that say so, so that reads verify.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import emberfs
import lmdb
from emberfs.checksum import cumulative_sums
from emberfs.engine.allocator import GROUP_BLOCKS, stride_bytes
from emberfs.engine.record import Extent, Record
from emberfs.types import chunk_id

from .memory_probe import MARK_SEED
from .runner import Row

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
OPEN_GOAL_S = 2.0
OPEN_GOAL_MB = 200.0
STREAM_GOAL_MB = 150.0
GRANULE_LOG2 = 14
LOAD_ROWS = 20_000
"""Per index transaction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much there is."""

    chunks: int
    chunk_log2: tuple[int, ...] = (22, 16)
    """Chunk sizes of the large stores; 4 MiB is the default of a file, and the one with goals."""
    stream_bytes: int
    rounds: int
    has_goals: bool


FULL = Size(chunks=1_000_000, stream_bytes=4 << 30, rounds=3, has_goals=True)
QUICK = Size(chunks=50_000, stream_bytes=256 << 20, rounds=1, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    for place, chunk_log2 in enumerate(size.chunk_log2):
        rows += _open_large(directory, size, chunk_log2, has_goals=size.has_goals and place == 0)
    return rows + _stream_large(directory, size)


# ---- a large store


def _open_large(directory: Path, size: Size, chunk_log2: int, *, has_goals: bool) -> list[Row]:
    store = directory / f"large-{chunk_log2}"
    url = f"ember://{store}"
    make_large_store(store, chunks=size.chunks, chunk_log2=chunk_log2)
    found = [_probe("open", url, size.chunks, 1 << chunk_log2) for _ in range(size.rounds)]
    what = f"{size.chunks:,} chunks of {(1 << chunk_log2) >> 10:,} KiB"
    index_bytes = os.stat(store / "target-1" / "index" / "data.mdb").st_blocks * 512
    return [
        Row(
            row=f"open {what}, s",
            ours=statistics.median(one["opened_s"] for one in found),
            goal=OPEN_GOAL_S if has_goals else None,
            at_most=True,
        ),
        Row(
            row=f"open {what}, RssAnon MB",
            ours=max(one["opened_bytes"] for one in found) / MB,
            goal=OPEN_GOAL_MB if has_goals else None,
            at_most=True,
        ),
        Row(row=f"open {what} and read 1000 times, peak RssAnon MB", ours=max(one["peak_bytes"] for one in found) / MB),
        Row(row=f"index of {what}, bytes per chunk", ours=index_bytes / size.chunks),
    ]


def make_large_store(directory: Path, *, chunks: int, chunk_log2: int) -> None:
    """A store with one file /large of `chunks` chunks: the first written by the store, the others loaded."""
    chunk_bytes = 1 << chunk_log2
    with emberfs.connect(f"ember://{directory}") as client:
        client.put("/large", random.Random(0).randbytes(8192), chunk_size_bytes=chunk_bytes)
        client.truncate("/large", chunks * chunk_bytes)
        inode = client.stat("/large").id
    target = directory / "target-1"
    # Loaded blocks come in groups of their own: the store's own block is in group 0, if it is of this size at all.
    first_block = GROUP_BLOCKS
    mark = random.Random(MARK_SEED).randbytes(chunk_bytes)
    name = f"blocks-{chunk_bytes >> 20}M" if chunk_log2 >= 20 else f"blocks-{chunk_bytes >> 10}K"
    blocks = os.open(target / name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(blocks, (first_block + chunks - 1) * stride_bytes(chunk_log2))
    os.pwrite(blocks, mark, (first_block + chunks - 2) * stride_bytes(chunk_log2))
    os.close(blocks)
    _load_index(target / "index", _rows(inode, chunks, chunk_log2, first_block, mark))


def _rows(inode: int, chunks: int, chunk_log2: int, first_block: int, mark: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Index rows in key order: a record per chunk, then a bitmap per group of blocks."""
    chunk_bytes, granule = 1 << chunk_log2, 1 << GRANULE_LOG2
    zero_sums = cumulative_sums(memoryview(bytes(chunk_bytes)), granule=granule)
    mark_sums = cumulative_sums(memoryview(mark), granule=granule)
    for index in range(1, chunks):
        chunk = chunk_id(inode, index)
        position = chunk_log2 << 56 | first_block + index - 1
        sums = mark_sums if index == chunks - 1 else zero_sums
        extent = Extent(position, chunk_bytes, 1, 1, sums)
        yield b"c" + chunk, Record(GRANULE_LOG2, extent).encode(chunk)
    end = first_block + chunks - 1
    for group in range(first_block // GROUP_BLOCKS, (end - 1) // GROUP_BLOCKS + 1):
        taken = min(end - group * GROUP_BLOCKS, GROUP_BLOCKS)
        key = b"g" + bytes([chunk_log2]) + group.to_bytes(5, "big")
        yield key, ((1 << taken) - 1).to_bytes(32, "little")


def _load_index(directory: Path, rows: Iterator[tuple[bytes, bytes]]) -> None:
    """Plain inserts in key order, as the engine's own commits are: bulk appends would pack the pages tighter."""
    environment = lmdb.open(str(directory), map_size=1 << 40, sync=False)
    done = False
    while not done:
        done = True
        with environment.begin(write=True) as transaction:
            for number, (key, value) in enumerate(rows, 1):
                transaction.put(key, value)
                if number == LOAD_ROWS:
                    done = False
                    break
    environment.sync(True)
    environment.close()


# ---- a large file


def _stream_large(directory: Path, size: Size) -> list[Row]:
    ours = _probe("stream", f"ember://{directory}/stream-store", size.stream_bytes)
    plain = _probe("stream", str(directory / "stream-plain"), size.stream_bytes)
    what = f"stream {size.stream_bytes >> 20:,} MiB by 1 MiB calls"
    return [
        Row(
            row=f"{what}, peak RssAnon MB",
            ours=ours["peak_bytes"] / MB,
            peers={"plain file": plain["peak_bytes"] / MB},
            goal=STREAM_GOAL_MB if size.has_goals else None,
            at_most=True,
        ),
        Row(row=f"{what}, s", ours=ours["stream_s"], peers={"plain file": plain["stream_s"]}),
    ]


def _probe(*arguments: object) -> dict[str, float]:
    """Run `memory_probe` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory_probe", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
