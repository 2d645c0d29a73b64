"""How much of the disk's speed is left behind the embedded store: batch reads, durable writes, and fsspec.

One thread on every side, the data warm in the page cache, destinations rotating over 64 MiB so that they are not in
the processor's cache. Ours verifies checksums on every read; a peer that is a store is checked by its caller.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emberfs
import fsspec
from emberfs.checksum import crc32c

from .corpus import make_corpus
from .peers import DiskcacheValues, LmdbValues, Values
from .runner import Row, Subject, compare, verify

KIB, MIB = 1 << 10, 1 << 20
ROTATION_BYTES = 64 * MIB

READ_GOALS = {(MIB, 16): 0.45, (64 * KIB, 16): 0.4, (4 * KIB, 256): None}
"""(item bytes, items per batch) -> ours / raw preadv."""
WRITE_GOALS = {1: 0.3, 16: 0.45, 64: 0.6}
"""1 MiB overwrites per batch -> ours / raw pwrite + one fdatasync per batch."""
FSSPEC_FILE_BYTES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
CAT_GOAL = 0.8
READINTO_GOAL = 0.55
UPDATE_BYTES = (4 * KIB, 64 * KIB, 100_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    """Of the data that is read; a multiple of the largest fsspec file."""
    small_pass_bytes: int
    """Read per pass by items under 64 KiB; larger ones read all data."""
    write_pass_bytes: int
    """Overwritten durably per pass; not more than `data_bytes`, and a multiple of 64 MiB keeps batches whole."""
    update_count: int
    """Appends and overwrites per row of write amplification."""
    rounds: int
    has_read_goals: bool
    """Less than 1 GiB may fit into a processor's cache, and the goals are about memory."""
    fsspec_file_bytes: tuple[int, ...] = FSSPEC_FILE_BYTES


FULL = Size(
    data_bytes=1024 * MIB,
    small_pass_bytes=256 * MIB,
    write_pass_bytes=256 * MIB,
    update_count=256,
    rounds=7,
    has_read_goals=True,
)
QUICK = Size(
    data_bytes=64 * MIB,
    small_pass_bytes=16 * MIB,
    write_pass_bytes=64 * MIB,
    update_count=32,
    rounds=2,
    has_read_goals=False,
)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    corpus = make_corpus(directory / "raw", size_bytes=size.data_bytes)
    url = f"ember://{directory}/store"
    with emberfs.connect(url) as client:
        client.put("/corpus", corpus)
        rows = [_batch_read(directory, client, corpus, size, *shape) for shape in READ_GOALS]
        rows += _durable_writes(directory, client, corpus, size)
        rows += _amplification(client, corpus, size)
        for file_bytes in size.fsspec_file_bytes:
            rows += _fsspec_reads(directory, url, corpus, size, file_bytes)
    return rows


# ---- batch reads


@dataclass(frozen=True, slots=True)
class _Batch:
    offsets: list[int]
    views: list[memoryview]


def _batches(size: Size, item_bytes: int, count: int) -> list[_Batch]:
    """Every item once (or as many as a pass reads), in a fixed random order, over a rotating destination."""
    offsets = list(range(0, size.data_bytes, item_bytes))
    random.Random(item_bytes).shuffle(offsets)
    if item_bytes < 64 * KIB:
        del offsets[size.small_pass_bytes // item_bytes :]
    destination = memoryview(bytearray(ROTATION_BYTES))
    views = [destination[at : at + item_bytes] for at in range(0, ROTATION_BYTES, item_bytes)]
    return [
        _Batch(chosen, [views[(begin + place) % len(views)] for place in range(len(chosen))])
        for begin in range(0, len(offsets), count)
        if (chosen := offsets[begin : begin + count])
    ]


def _verify_batch(batch: _Batch, corpus: memoryview, who: str) -> None:
    for offset, view in zip(batch.offsets, batch.views, strict=True):
        verify(view == corpus[offset : offset + len(view)], f"{who}: wrong bytes at {offset}")


def _batch_read(directory: Path, client: Any, corpus: memoryview, size: Size, item_bytes: int, count: int) -> Row:
    batches = _batches(size, item_bytes, count)
    amount_mib = sum(len(batch.offsets) for batch in batches) * item_bytes / MIB
    raw = os.open(directory / "raw", os.O_RDONLY)
    file = client.open("/corpus", "rb")
    requests = [[(file, offset, item_bytes) for offset in batch.offsets] for batch in batches]
    values: dict[str, Values] = {
        "LMDB": LmdbValues(directory / "lmdb"),
        "diskcache": DiskcacheValues(directory / "diskcache"),
    }
    for peer in values.values():
        peer.load(corpus[at : at + item_bytes] for at in range(0, size.data_bytes, item_bytes))

    def ours(check: bool) -> float:
        for request, batch in zip(requests, batches, strict=True):
            client.batch_read(request, into=batch.views)
            if check:
                _verify_batch(batch, corpus, "ours")
        return amount_mib

    def preadv(check: bool) -> float:
        for batch in batches:
            for offset, view in zip(batch.offsets, batch.views, strict=True):
                os.preadv(raw, [view], offset)
            if check:
                _verify_batch(batch, corpus, "preadv")
        return amount_mib

    def preadv_crc(check: bool) -> float:
        for batch in batches:
            for offset, view in zip(batch.offsets, batch.views, strict=True):
                os.preadv(raw, [view], offset)
                crc32c(view)
        return amount_mib

    def peer_read(name: str) -> Subject:
        numbers = [[offset // item_bytes for offset in batch.offsets] for batch in batches]

        def read(check: bool) -> float:
            for batch, wanted in zip(batches, numbers, strict=True):
                values[name].read(wanted, batch.views)
                if check:
                    _verify_batch(batch, corpus, name)
            return amount_mib

        return read

    try:
        return compare(
            f"batch read {_bytes(item_bytes)} x {count}, MiB/s",
            ours,
            peers={"preadv+crc": preadv_crc} | {name: peer_read(name) for name in values},
            ceiling=preadv,
            baseline="ceiling",
            goal=READ_GOALS[item_bytes, count] if size.has_read_goals else None,
            rounds=size.rounds,
        )
    finally:
        file.close()
        os.close(raw)
        for peer in values.values():
            peer.close()


# ---- durable writes


Writes = list[list[tuple[int, memoryview]]]
"""Batches of (offset, payload)."""


def _durable_writes(directory: Path, client: Any, corpus: memoryview, size: Size) -> list[Row]:
    """Every side overwrites what it wrote before, 1 MiB at a time, and has it durable after each batch.

    Not fresh space: on a thin disk the first write to a block costs several times the second, and which side meets
    such blocks is chance. Ours is a file of 1 MiB chunks and copies on write, into blocks that were used before.
    """
    content = corpus[: size.write_pass_bytes]
    client.put("/durable", content, chunk_size_bytes=MIB)
    (directory / "durable").write_bytes(content)
    values = LmdbValues(directory / "lmdb")
    values.load(content[at : at + MIB] for at in range(0, len(content), MIB))
    raw = os.open(directory / "durable", os.O_RDWR)
    os.fsync(raw)
    rows = []
    with client.open("/durable", "r+b") as file:
        for batch in WRITE_GOALS:
            rows += _durable_write(client, file, raw, values, content, batch, rounds=size.rounds)
    os.close(raw)
    values.close()
    return rows


def _durable_write(
    client: Any, file: Any, raw: int, values: LmdbValues, content: memoryview, batch: int, *, rounds: int
) -> list[Row]:
    # Pass after pass the payloads move on by one or two MiB, so that a write that did not happen is noticed.
    turns = [_shifted(content, batch, by=by) for by in (1, 2)]
    amount_mib = len(content) / MIB
    counters = _Counters(client)

    def ours(writes: Writes) -> None:
        for group in writes:
            client.batch_write([(file, offset, payload) for offset, payload in group])

    def pwrite(writes: Writes) -> None:
        for group in writes:
            for offset, payload in group:
                os.pwrite(raw, payload, offset)
            os.fdatasync(raw)

    def lmdb_values(writes: Writes) -> None:
        for group in writes:
            values.write([offset // MIB for offset, _ in group], [payload for _, payload in group])

    def read_lmdb() -> memoryview:
        into = memoryview(bytearray(len(content)))
        numbers = range(len(content) // MIB)
        values.read(numbers, [into[number * MIB :][:MIB] for number in numbers])
        return into

    def alternating(write: Callable[[Writes], None], read: Callable[[], Any], who: str) -> Subject:
        upcoming = itertools.cycle(turns)

        def subject(check: bool) -> float:
            writes = next(upcoming)
            write(writes)
            if check:
                _verify_writes(memoryview(read()), writes, who)
            return amount_mib

        return subject

    row = compare(
        f"durable write 1 MiB x {batch}, MiB/s",
        alternating(ours, lambda: client.get(file.name), "ours"),
        peers={"LMDB": alternating(lmdb_values, read_lmdb, "LMDB")},
        ceiling=alternating(pwrite, lambda: os.pread(raw, len(content), 0), "pwrite"),
        baseline="ceiling",
        goal=WRITE_GOALS[batch],
        rounds=rounds,
    )
    flushes = counters.since("flushes") / (len(turns[0]) * (rounds + 1))
    return [row, Row(row=f"durable write 1 MiB x {batch}, flushes per commit", ours=flushes)]


def _shifted(content: memoryview, batch: int, *, by: int) -> Writes:
    """Overwrites of every MiB of `content` with the one `by` places further."""
    writes = [(at, content[(at + by * MIB) % len(content) :][:MIB]) for at in range(0, len(content), MIB)]
    return [writes[begin : begin + batch] for begin in range(0, len(writes), batch)]


def _verify_writes(written: memoryview, writes: Writes, who: str) -> None:
    for group in writes:
        for offset, payload in group:
            verify(written[offset : offset + len(payload)] == payload, f"{who}: wrong bytes at {offset}")


# ---- write amplification


class _Counters:
    """What the store's engines did since this object was made."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._begin = self._now()

    def _now(self) -> dict[str, int]:
        (target,) = self._client.maintenance.info()["targets"]
        counters: dict[str, int] = target["counters"]
        return counters

    def since(self, name: str) -> int:
        """By how much a field of `EngineCounters` grew."""
        return self._now()[name] - self._begin[name]

    def amplification(self) -> float:
        """Bytes written to block files per byte that was asked for."""
        return self.since("block_bytes") / self.since("payload_bytes")


def _amplification(client: Any, corpus: memoryview, size: Size) -> list[Row]:
    """Each update is durable before the next, in chunks of the default size: the worst case of a small writer."""
    rows = []
    for length in UPDATE_BYTES:
        offsets = [number * length for number in range(size.update_count)]
        ratio = _update(client, f"/append-{length}", corpus, b"", length, offsets)
        rows.append(Row(row=f"append {_bytes(length)}, block bytes per byte", ours=ratio))
    for length in UPDATE_BYTES:
        base = corpus[: 16 * MIB]
        chooser = random.Random(length)
        offsets = [chooser.randrange((len(base) - length) // length) * length for _ in range(size.update_count)]
        ratio = _update(client, f"/overwrite-{length}", corpus, base, length, offsets)
        rows.append(Row(row=f"overwrite {_bytes(length)} of 4 MiB chunks, block bytes per byte", ours=ratio))
    return rows


def _update(
    client: Any, path: str, corpus: memoryview, base: bytes | memoryview, length: int, offsets: Sequence[int]
) -> float:
    """Write `length` bytes at each offset of a file that begins as `base`; returns the write amplification."""
    client.put(path, base)
    expected = bytearray(base)
    counters = _Counters(client)
    with client.open(path, "r+b") as file:
        for number, offset in enumerate(offsets):
            payload = corpus[number * KIB :][:length]
            client.batch_write([(file, offset, payload)])
            expected[offset : offset + length] = payload
    verify(client.get(path) == expected, f"wrong bytes in {path}")
    return counters.amplification()


# ---- fsspec


def _fsspec_reads(directory: Path, url: str, corpus: memoryview, size: Size, file_bytes: int) -> list[Row]:
    """cat_file, and open().readinto into a reused buffer, of every file of one size."""
    local, ember = fsspec.filesystem("file"), fsspec.filesystem("ember", url=url)
    folder = directory / "files"
    sources: dict[str, memoryview] = {
        f"{at // file_bytes:05}": corpus[at : at + file_bytes] for at in range(0, size.data_bytes, file_bytes)
    }
    ember.makedirs("/files")
    folder.mkdir()
    for name, source in sources.items():
        (folder / name).write_bytes(source)
        ember.pipe_file(f"/files/{name}", bytes(source))
    amount_mib = len(sources) * file_bytes / MIB
    buffer = memoryview(bytearray(file_bytes))

    def cat(fs: Any, prefix: str) -> Subject:
        def subject(check: bool) -> float:
            for name, source in sources.items():
                data = fs.cat_file(f"{prefix}/{name}")
                if check:
                    verify(data == source, f"cat_file {prefix}/{name}")
            return amount_mib

        return subject

    def readinto(fs: Any, prefix: str) -> Subject:
        def subject(check: bool) -> float:
            for name, source in sources.items():
                with fs.open(f"{prefix}/{name}", "rb") as file:
                    count = file.readinto(buffer)
                verify(count == file_bytes, f"readinto {prefix}/{name}: {count} bytes")
                if check:
                    verify(buffer == source, f"readinto {prefix}/{name}")
            return amount_mib

        return subject

    rows = [
        compare(
            f"fsspec {name} {_bytes(file_bytes)}, MiB/s",
            make(ember, "/files"),
            peers={"LocalFileSystem": make(local, str(folder))},
            ceiling=_checked(folder, sources, into),
            baseline="LocalFileSystem",
            goal=goal if size.has_read_goals else None,
            rounds=size.rounds,
        )
        for name, make, into, goal in (
            ("cat_file", cat, None, CAT_GOAL),
            ("open().readinto", readinto, buffer, READINTO_GOAL),
        )
    ]
    local.rm(str(folder), recursive=True)
    ember.rm("/files", recursive=True)
    return rows


def _checked(folder: Path, sources: dict[str, memoryview], into: memoryview | None) -> Subject:
    """The files beside the store, opened, read and checked without fsspec: what a verified read can reach."""

    def subject(check: bool) -> float:
        for name, source in sources.items():
            with open(folder / name, "rb", buffering=0) as file:
                data = file.read() if into is None else into[: file.readinto(into)]
                crc32c(data)
            if check:
                verify(data == source, f"read {name}")
        return sum(map(len, sources.values())) / MIB

    return subject


def _bytes(count: int) -> str:
    if count % KIB:
        return f"{count // 1000} KB"
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"
