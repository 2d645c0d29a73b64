"""Batches: many ranges at once, straight into and out of whatever memory the caller has.

Run: pytest tests/fs/test_client_batches.py
"""

from __future__ import annotations

import array
import asyncio
import io
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emberfs
import numpy as np
import pytest
import torch
from emberfs import Client
from emberfs.checksum import crc32c
from emberfs.errors import InvalidPath, IsADirectory, LimitExceeded, NoSpace, NotFound, StoreClosed
from emberfs.messages import WriteChunks
from emberfs.types import BATCH_ITEMS_MAX, FILE_BYTES_MAX

from tests.fs.stores import CHUNK, content

DATA = content(3 * CHUNK + 1000)


@pytest.fixture(autouse=True)
def files(client: Client) -> None:
    client.put("/small", b"0123456789")
    client.put("/large", DATA, chunk_size_bytes=CHUNK)
    client.mkdir("/dir")


def anonymous_map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def matrix(size: int) -> np.ndarray[Any, Any]:
    return np.zeros((size // 1000, 1000), dtype=np.uint8)


MEMORY: dict[str, Callable[[int], Any]] = {
    "bytearray": bytearray,
    "mmap": anonymous_map,
    "memoryview": lambda size: memoryview(bytearray(size)),
    "array": lambda size: array.array("d", bytes(size)),
    "numpy": lambda size: np.zeros(size // 8, dtype=np.float64),
    "numpy 2-D": matrix,
    "torch": lambda size: torch.zeros(size // 4, dtype=torch.float32),
    "torch 2-D": lambda size: torch.zeros((size // 2000, 1000), dtype=torch.bfloat16),
}


def as_bytes(buffer: Any) -> bytes:
    if isinstance(buffer, torch.Tensor):
        return buffer.view(torch.uint8).numpy().tobytes()
    return bytes(memoryview(buffer).cast("B"))


@pytest.mark.parametrize("kind", MEMORY)
def test_read_into_and_write_out_of_any_memory(client: Client, kind: str) -> None:
    size = 160_000
    buffer = MEMORY[kind](size)
    assert client.batch_read([("/large", 17, size)], into=[buffer]) == [size]
    assert as_bytes(buffer) == DATA[17 : 17 + size]
    client.batch_write([("/copy", 5, buffer)])
    assert client.get("/copy") == bytes(5) + DATA[17 : 17 + size]
    client.put("/whole", buffer)
    assert client.get("/whole") == DATA[17 : 17 + size]
    again = MEMORY[kind](size)
    assert client.get_into("/whole", again) == size
    assert as_bytes(again) == as_bytes(buffer)


def test_one_buffer_is_filled_item_after_item(client: Client) -> None:
    buffer = bytearray(b"#" * 60)
    counts = client.batch_read([("/large", 0, 20), ("/small", 4, 20), ("/large", len(DATA) - 5, 10)], into=buffer)
    assert counts == [20, 6, 5]
    assert buffer[:26] == DATA[:20] + b"456789"
    assert buffer[40:45] == DATA[-5:]


def test_what_was_read_comes_with_its_checksum_if_asked(client: Client) -> None:
    items = [("/large", 100, 5000), ("/none", 0, 4), ("/small", 4, 20), ("/large", 3, 0)]
    buffers, sums = [bytearray(length) for _, _, length in items], array.array("I", [7] * 4)
    counts = client.batch_read(items, into=buffers, raise_errors=False, sums=sums)
    assert [counts[0], counts[2], counts[3]] == [5000, 6, 0]
    assert [sums[0], sums[2], sums[3]] == [crc32c(DATA[100:5100]), crc32c(b"456789"), 0]
    for wrong in (array.array("I", [0] * 3), array.array("Q", [0] * 4)):
        with pytest.raises(ValueError, match="4 items have as many checksums"):
            client.batch_read(items, into=buffers, raise_errors=False, sums=wrong)


def test_ranges_past_the_end_and_empty_ones(client: Client) -> None:
    items = [("/small", 10, 5), ("/small", 500, 5), ("/large", 1 << 40, 5), ("/large", 3, 0), ("/small", 0, 0)]
    assert client.batch_read(items, into=bytearray(15)) == [0, 0, 0, 0, 0]
    assert client.batch_read([], into=bytearray()) == []
    client.batch_write([])


def test_a_buffer_larger_than_its_range_keeps_the_rest(client: Client) -> None:
    buffer = bytearray(b"#" * 20)
    client.batch_read([("/small", 0, 4)], into=[buffer])
    assert buffer == b"0123" + b"#" * 16


def test_the_first_error_is_raised_or_each_is_in_its_place(client: Client) -> None:
    items = [("/none", 0, 4), ("/small", 0, 4), ("/dir", 0, 4), ("/" + "n" * 256, 0, 4), ("/large", 0, 4)]
    buffer = bytearray(20)
    results = client.batch_read(items, into=buffer, raise_errors=False)
    assert [type(result) for result in results] == [NotFound, int, IsADirectory, InvalidPath, int]
    assert (buffer[4:8], buffer[16:20]) == (b"0123", DATA[:4])
    with pytest.raises(NotFound, match="/none"):
        client.batch_read(items, into=buffer)


@pytest.mark.parametrize(
    ("items", "into", "error"),
    [
        ([("/small", 0, 10)], bytearray(9), ValueError),
        ([("/small", 0, 5), ("/small", 0, 5)], bytearray(9), ValueError),
        ([("/small", 0, 10)], [bytearray(9)], ValueError),
        ([("/small", 0, 10)], [], ValueError),
        ([("/small", 0, 10)], [bytearray(10), bytearray(10)], ValueError),
        ([("/small", 0, 10)], bytes(10), ValueError),
        ([("/small", 0, 10)], [np.zeros((10, 10), np.uint8)[:, 0]], ValueError),
        ([("/small", 0, 10)], [torch.zeros(10, 10)[:, 0]], ValueError),
        ([("/small", 0, 10)], [None], TypeError),
        ([("/small", -1, 10)], bytearray(10), LimitExceeded),
        ([("/small", 0, -1)], bytearray(10), LimitExceeded),
        ([("/small", FILE_BYTES_MAX, 1)], bytearray(10), LimitExceeded),
        ([("/small", 0, 0)] * (BATCH_ITEMS_MAX + 1), bytearray(), LimitExceeded),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_read(
    client: Client, items: list[Any], into: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.batch_read(items, into=into)
    if isinstance(into, bytearray):
        assert not any(into)


@pytest.mark.parametrize("path", ["/small", "/large"])
@pytest.mark.parametrize("offset", [-1, FILE_BYTES_MAX])
def test_a_write_outside_of_any_file_is_refused(client: Client, path: str, offset: int) -> None:
    with pytest.raises(LimitExceeded):
        client.batch_write([(path, offset, b"x")])
    with pytest.raises(LimitExceeded):
        client.get(path, -1)
    with pytest.raises(LimitExceeded):
        client.get(path, 0, -1)
    with pytest.raises(LimitExceeded):
        client.get_into(path, bytearray(1), offset=-1)
    assert client.get("/small") == b"0123456789" and client.get("/large") == DATA


def test_a_batch_of_writes_makes_extends_and_overwrites(client: Client) -> None:
    patch = content(CHUNK, seed=2)
    client.batch_write(
        [
            ("/new", 0, b"first"),
            ("/new", 10, b"third"),
            ("/large", CHUNK - 7, patch),
            ("/large", len(DATA) + 3, b"beyond"),
            ("/large", CHUNK, b"over"),
            ("/small", 2, b"##"),
            ("/small", 9_000, b"far"),
            ("/small", 10_000_000, b""),
        ]
    )
    large = bytearray(DATA) + bytes(3) + b"beyond"
    large[CHUNK - 7 : 2 * CHUNK - 7] = patch
    large[CHUNK : CHUNK + 4] = b"over"
    assert client.get("/new") == b"first\0\0\0\0\0third"
    assert client.get("/large") == large, "items of one file are applied in their order"
    assert client.get("/small") == b"01##456789".ljust(9_000, b"\0") + b"far", "an empty write extends nothing"


def test_a_batch_that_names_a_missing_directory_writes_nothing(client: Client) -> None:
    with pytest.raises(NotFound):
        client.batch_write([("/small", 0, b"###"), ("/none/file", 0, b"x")])
    assert client.get("/small") == b"0123456789"


def test_open_files_take_part_with_what_they_hold_back(client: Client) -> None:
    with client.open("/large", "r+b") as file, client.open("/small") as reader:
        file.seek(100)
        file.write(b"buffered")
        buffer = bytearray(12)
        assert client.batch_read([(file, 100, 8), (reader, 0, 4)], into=buffer) == [8, 4]
        assert buffer == b"buffered0123"
        file.write(b" and more")
        client.batch_write([(file, 102, b"FF"), (file, len(DATA), b"tail")])
        assert client.get("/large", 100, 17) == b"buFFered and more"
        assert file.size == len(DATA) + 4


def test_files_that_cannot_take_part_say_so(client: Client, tmp_path: Path) -> None:
    with client.open("/small") as reader, pytest.raises(io.UnsupportedOperation):
        client.batch_write([(reader, 0, b"x")])
    with pytest.raises(StoreClosed):
        client.batch_read([(reader, 0, 1)], into=bytearray(1))
    with client.open("/fresh", "w+b") as fresh:
        fresh.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            client.batch_read([(fresh, 0, 1)], into=bytearray(1))
        with pytest.raises(io.UnsupportedOperation):
            client.batch_write([(fresh, 0, b"x")])
    with emberfs.connect(f"ember://{tmp_path}/other") as other:
        other.put("/small", b"abcdefghij")
        with other.open("/small") as reader, pytest.raises(InvalidPath, match="another store"):
            client.batch_read([(reader, 0, 1)], into=bytearray(1))


def test_a_large_batch_over_many_files(client: Client) -> None:
    names = [f"/part-{number}" for number in range(200)]
    client.batch_write([(name, 0, content(5000, seed)) for seed, name in enumerate(names)])
    buffer = bytearray(5000 * 200)
    assert client.batch_read([(name, 0, 5000) for name in names], into=buffer) == [5000] * 200
    assert buffer == b"".join(content(5000, seed) for seed in range(200))


def test_awaited_batches(client: Client, store: Path) -> None:
    async def main() -> None:
        async with emberfs.connect_async(f"ember://{store}") as other:
            await other.batch_write([("/small", 3, b"###"), ("/async", 0, DATA)])
            async with await other.open("/large", "r+b") as file:
                await file.write(b"held back")
                buffer = bytearray(9)
                sums = array.array("I", [0])
                assert await other.batch_read([(file, 0, 9)], into=buffer, sums=sums) == [9]
                assert sums[0] == crc32c(buffer[:9])
                assert buffer == b"held back"
                await other.batch_write([(file, 5, b"BACK")])
            assert await other.get("/large", 0, 9) == b"held BACK"
            with pytest.raises(StoreClosed):
                await other.batch_read([(file, 0, 9)], into=buffer)
            reads = [other.batch_read([("/async", at, 1000)], into=bytearray(1000)) for at in range(0, 90_000, 1000)]
            assert await asyncio.gather(*reads) == [[1000]] * 90

    asyncio.run(main())
    assert client.get("/small") == b"012###6789"
    assert client.get("/async") == DATA


def test_threads_move_one_file_to_chunks_together(client: Client) -> None:
    pieces = {offset: content(10_000, seed=offset) for offset in (0, 20_000, 40_000, 60_000)}
    for number in range(20):
        client.put(f"/f{number}", b"old")
        with client.open(f"/f{number}", "r+b") as file, ThreadPoolExecutor(len(pieces)) as pool:
            list(pool.map(lambda offset, file=file: client.batch_write([(file, offset, pieces[offset])]), pieces))
        data = client.get(f"/f{number}")
        assert all(data[offset : offset + 10_000] == piece for offset, piece in pieces.items())


def test_chunks_that_will_be_whole_get_their_room_at_once(client: Client) -> None:
    def blocks() -> dict[int, int]:
        found: dict[int, int] = client.maintenance.info()["targets"][0]["blocks"]
        return found

    before, step, chunk_bytes = blocks(), 24 << 10, 1 << 19
    with client.open("/grows", "x+b", chunk_size_bytes=chunk_bytes) as file:
        file.truncate(2 * chunk_bytes)
    for offset in range(0, 4 * step, step):
        client.batch_write([("/grows", offset, content(step, seed=offset))], whole_chunks=True)
    client.batch_write([("/short", 0, content(step, seed=1))])
    after = blocks()
    assert after[chunk_bytes] == before.get(chunk_bytes, 0) + 1
    assert after[64 << 10] == before.get(64 << 10, 0) + 1, "a short file of one write takes what it needs"
    for offset in range(0, 4 * step, step):
        assert client.get("/grows", offset, step) == content(step, seed=offset)
    assert client.get("/grows", 4 * step) == bytes(2 * chunk_bytes - 4 * step)
    assert client.stat("/grows").length == 2 * chunk_bytes


def test_a_batch_that_was_refused_half_way_leaves_nothing_past_the_end(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = client.stat("/large").length
    refuse_after(client, monkeypatch, messages=1)
    monkeypatch.setattr("emberfs.client.core.MESSAGE_BYTES_MAX", 4 * CHUNK)
    with pytest.raises(NoSpace):
        client.batch_write([("/large", old, b"#" * (12 * CHUNK))])
    assert client.stat("/large").length == old
    client.truncate("/large", 20 * CHUNK)
    assert client.get("/large") == DATA + bytes(20 * CHUNK - old)


def refuse_after(client: Client, monkeypatch: pytest.MonkeyPatch, *, messages: int) -> None:
    """Let that many chunk writes through; the next one finds the disk full, and those after it do not."""
    storage = client._attachment.core._chains[1]
    call, seen = storage.call, 0

    async def refusing(request: object, buffers: tuple[memoryview, ...] = ()) -> object:
        nonlocal seen
        if isinstance(request, WriteChunks):
            seen += 1
            if seen == messages + 1:
                raise NoSpace("disk is full")
        return await call(request, buffers)

    monkeypatch.setattr(storage, "call", refusing)


def test_the_error_of_a_batch_is_its_cause(client: Client) -> None:
    """One path of several cannot be opened: that is said, and the sessions of the others are closed."""
    with pytest.raises(IsADirectory):
        client.batch_write([("/one", 0, b"a" * 5000), ("/dir", 0, b"b"), ("/two", 0, b"c")])
    assert client.get("/one") == client.get("/two") == b"", "nothing was written"
    client.batch_write([("/one", 0, b"a"), ("/two", 0, b"b"), ("/one", 1, b"c")])
    assert (client.get("/one"), client.get("/two")) == (b"ac", b"b")
