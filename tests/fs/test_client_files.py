"""Open files, as programs use them: every mode, positions, buffers, and what the store holds afterwards.

Run: pytest tests/fs/test_client_files.py
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import emberfs
import pytest
from emberfs import AsyncClient, AsyncFile, Client, File
from emberfs.client.buffers import NewBytes
from emberfs.client.handle import READ_AHEAD_BYTES_MAX, READ_AHEAD_BYTES_MIN
from emberfs.errors import AlreadyExists, Conflict, IsADirectory, LimitExceeded, NoSpace, NotFound, StoreClosed
from emberfs.messages import ReadChunks, WriteChunks
from emberfs.types import FILE_BYTES_MAX, Chunks, Inline

from tests.fs.stores import CHUNK, content


def write(client: Client, path: str, data: bytes, *, mode: str = "wb", chunk_size_bytes: int | None = CHUNK) -> None:
    with client.open(path, mode, chunk_size_bytes=chunk_size_bytes) as file:
        assert file.write(data) == len(data)


# ---- modes


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 17])
def test_what_is_written_is_read(client: Client, size: int) -> None:
    data = content(size)
    write(client, "/file", data)
    assert client.get("/file") == data
    assert client.stat("/file").length == size
    with client.open("/file") as file:
        assert file.read() == data
        assert file.read() == b""


def test_the_layout_follows_the_size_and_the_chunk_size_asked_for(client: Client) -> None:
    write(client, "/small", content(4096))
    write(client, "/large", content(4097))
    assert isinstance(client.stat("/small").layout, Inline)
    layout = client.stat("/large").layout
    assert isinstance(layout, Chunks) and layout.chunk_size_bytes == CHUNK


@pytest.mark.parametrize("mode", ["r", "w", "rt", "rwb", "b", "", "bb", "rb++", "U"])
def test_an_unknown_mode_is_refused(client: Client, mode: str) -> None:
    with pytest.raises(ValueError, match="mode must be binary"):
        client.open("/file", mode)


@pytest.mark.parametrize("mode", ["r+b", "rb+"])
def test_both_spellings_of_an_update_mode_work(client: Client, mode: str) -> None:
    client.put("/file", b"0123")
    with client.open("/file", mode) as file:
        file.write(b"ab")
    assert client.get("/file") == b"ab23"


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_a_missing_file_is_not_made_by_reading(client: Client, mode: str) -> None:
    with pytest.raises(NotFound):
        client.open("/none", mode)
    assert not client.exists("/none")


@pytest.mark.parametrize("mode", ["rb", "r+b", "wb", "xb", "ab"])
def test_a_directory_is_no_file(client: Client, mode: str) -> None:
    client.mkdir("/dir")
    with pytest.raises((IsADirectory, AlreadyExists)):
        client.open("/dir", mode)


@pytest.mark.parametrize("mode", ["wb", "xb", "ab"])
def test_the_parent_must_exist(client: Client, mode: str) -> None:
    with pytest.raises(NotFound):
        client.open("/none/file", mode)


def test_exclusive_creation_refuses_at_open_and_at_close(client: Client) -> None:
    client.put("/old", b"old")
    with pytest.raises(AlreadyExists):
        client.open("/old", "xb")
    file = client.open("/new", "xb")
    file.write(b"mine")
    client.put("/new", b"theirs")
    with pytest.raises(AlreadyExists):
        file.close()
    assert client.get("/new") == b"theirs"


@pytest.mark.parametrize(("mode", "method"), [("rb", "write"), ("wb", "read"), ("ab", "read"), ("rb", "truncate")])
def test_a_mode_refuses_what_it_is_not_for(client: Client, mode: str, method: str) -> None:
    client.put("/file", b"x")
    with client.open("/file", mode) as file, pytest.raises(io.UnsupportedOperation):
        getattr(file, method)(*[b"x"] * (method == "write"))


def test_a_closed_file_refuses_everything(client: Client) -> None:
    client.put("/file", b"x")
    file = client.open("/file", "r+b")
    file.close()
    file.close()
    calls: list[Callable[[], object]] = [file.read, lambda: file.write(b"x"), lambda: file.seek(0), file.truncate]
    for call in calls:
        with pytest.raises(StoreClosed):
            call()


def test_append_goes_to_the_end_wherever_the_position_is(client: Client) -> None:
    client.put("/log", b"one ")
    with client.open("/log", "a+b") as file:
        assert file.tell() == 4
        file.seek(0)
        file.write(b"two ")
        assert file.tell() == 8
        file.seek(0)
        assert file.read() == b"one two "
    write(client, "/log", content(3 * CHUNK), mode="ab")
    write(client, "/log", b"end", mode="ab")
    assert client.get("/log") == b"one two " + content(3 * CHUNK) + b"end"


def test_update_in_place_keeps_the_rest(client: Client) -> None:
    data = bytearray(content(4 * CHUNK))
    write(client, "/file", bytes(data))
    with client.open("/file", "r+b") as file:
        for offset in (0, CHUNK - 3, 2 * CHUNK, 4 * CHUNK - 1):
            file.seek(offset)
            file.write(b"######")
            data[offset : offset + 6] = b"######"
            file.seek(max(offset - 10, 0))
            assert file.read(20) == data[max(offset - 10, 0) :][:20], "a file reads its own writes"
    assert client.get("/file") == data


def test_a_new_file_reads_back_what_it_wrote(client: Client) -> None:
    data = content(2 * CHUNK + 100)
    with client.open("/new", "w+b", chunk_size_bytes=CHUNK) as file:
        for begin in range(0, len(data), 1000):
            file.write(data[begin : begin + 1000])
            file.seek(begin)
            assert file.read() == data[begin : begin + 1000]
        file.seek(0)
        assert file.read() == data
        assert not client.exists("/new")
    assert client.get("/new") == data


# ---- lengths


@pytest.mark.parametrize("mode", ["w+b", "r+b"])
@pytest.mark.parametrize("written", [0, 100, 5000, 3 * CHUNK + 5])
@pytest.mark.parametrize("length", [0, 50, 4096, 4097, CHUNK, 2 * CHUNK + 1, 4 * CHUNK])
def test_truncate_to_any_length(client: Client, mode: str, written: int, length: int) -> None:
    data = content(written)
    client.put("/file", b"")
    expected = data[:length].ljust(length, b"\0")
    with client.open("/file", mode, chunk_size_bytes=CHUNK) as file:
        file.write(data)
        assert file.truncate(length) == length
        assert file.size == length
        file.seek(0)
        assert file.read() == expected
        file.seek(length)
        file.write(b"after")
    assert client.get("/file") == expected + b"after"


def test_a_shortened_file_shows_nothing_old_when_it_grows_again(client: Client) -> None:
    data = content(3 * CHUNK)
    write(client, "/file", data)
    client.truncate("/file", CHUNK + 10)
    client.truncate("/file", 3 * CHUNK)
    assert client.get("/file") == data[: CHUNK + 10] + bytes(2 * CHUNK - 10)


@pytest.mark.parametrize("mode", ["w+b", "r+b"])
def test_a_hole_before_the_first_byte(client: Client, mode: str) -> None:
    client.put("/file", b"")
    with client.open("/file", mode, chunk_size_bytes=CHUNK) as file:
        file.seek(5 * CHUNK + 3)
        file.write(b"far")
        file.seek(0)
        assert file.read() == bytes(5 * CHUNK + 3) + b"far"
    assert client.get("/file") == bytes(5 * CHUNK + 3) + b"far"
    assert client.get("/file", 2 * CHUNK, 10) == bytes(10)


@pytest.mark.parametrize("mode", ["w+b", "r+b"])
def test_a_file_longer_than_any_is_refused(client: Client, mode: str) -> None:
    client.put("/file", b"old")
    with client.open("/file", mode) as file:
        with pytest.raises(LimitExceeded):
            file.truncate(FILE_BYTES_MAX + 1)
        with pytest.raises(LimitExceeded):
            file.truncate(-1)
        file.seek(FILE_BYTES_MAX)
        with pytest.raises(LimitExceeded):
            file.write(b"x")


def test_a_huge_sparse_file_costs_nothing(client: Client) -> None:
    with client.open("/sparse", "wb") as file:
        file.truncate(FILE_BYTES_MAX)
    assert client.stat("/sparse").length == FILE_BYTES_MAX
    assert client.get("/sparse", FILE_BYTES_MAX - 5) == bytes(5)


# ---- positions and buffers


def test_seek_and_tell(client: Client) -> None:
    client.put("/file", b"0123456789")
    with client.open("/file") as file:
        assert (file.seek(4), file.read(2), file.tell()) == (4, b"45", 6)
        assert (file.seek(-2, io.SEEK_END), file.read()) == (8, b"89")
        assert (file.seek(-4, io.SEEK_CUR), file.read(1)) == (6, b"6")
        assert (file.seek(100), file.read(), file.tell()) == (100, b"", 100)
        with pytest.raises(ValueError, match="cannot seek"):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 3)
        assert file.seekable() and file.readable() and not file.writable()


def test_readinto_fills_the_callers_memory(client: Client) -> None:
    data = content(3 * CHUNK)
    write(client, "/file", data)
    buffer = bytearray(2 * CHUNK)
    with client.open("/file") as file:
        assert file.readinto(buffer) == 2 * CHUNK
        assert buffer == data[: 2 * CHUNK]
        assert file.readinto(buffer) == CHUNK
        assert buffer[:CHUNK] == data[2 * CHUNK :]
        assert file.readinto(buffer) == 0
        with pytest.raises(ValueError, match="writable"):
            file.readinto(b"read-only")


def test_read_at_moves_no_position(client: Client) -> None:
    client.put("/file", b"0123456789")
    with client.open("/file") as file:
        assert (file.read_at(3, 4), file.read_at(8, 100), file.read_at(50, 1)) == (b"3456", b"89", b"")
        assert file.tell() == 0
        with pytest.raises(LimitExceeded):
            file.read_at(-1, 4)


def test_lines_and_text(client: Client) -> None:
    lines = [f"line {number} of ünicode\n" for number in range(20_000)]
    with io.TextIOWrapper(client.open("/text", "wb", chunk_size_bytes=CHUNK), encoding="utf-8") as text:
        text.writelines(lines)
    with client.open("/text") as file:
        assert [line.decode() for line in file] == lines
        file.seek(0)
        assert file.readline() == lines[0].encode()
        assert file.peek(4)[:4] == b"line"
        assert file.tell() == len(lines[0].encode())
    with io.TextIOWrapper(client.open("/text"), encoding="utf-8") as text:
        assert text.readlines() == lines


def test_small_reads_read_ahead_and_the_window_is_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of small reads asks the store for few and growing ranges; a random one for what it needs."""
    data = content(8 << 20)
    client.put("/file", data)
    monkeypatch.setattr(client._attachment.store, "lanes", None)  # All go by message.
    asked: list[int] = []
    storage = client._attachment.core._chains[1]
    call = storage.call

    async def listening(request: object, buffers: tuple[memoryview, ...] = ()) -> object:
        if isinstance(request, ReadChunks):
            asked.append(sum(map(len, buffers)))
        return await call(request, buffers)

    monkeypatch.setattr(storage, "call", listening)
    with client.open("/file") as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == data
    assert len(asked) < 40
    assert max(asked) <= READ_AHEAD_BYTES_MAX
    asked.clear()
    with client.open("/file") as file:
        for offset in (5 << 20, 1 << 20, 7 << 20, 3 << 20):
            file.seek(offset)
            assert file.read(100) == data[offset : offset + 100]
    assert sum(asked) <= 4 * READ_AHEAD_BYTES_MIN


def test_a_file_open_for_writing_shows_other_writers_no_stale_window(client: Client) -> None:
    write(client, "/file", bytes(2 * CHUNK))
    with client.open("/file", "r+b") as one, client.open("/file", "r+b") as other:
        assert one.read(10) == bytes(10)
        other.write(b"0123456789")
        other.flush()
        one.seek(0)
        assert one.read(10) == b"0123456789"


def test_small_writes_leave_in_whole_chunks_and_large_ones_directly(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(6 * CHUNK + 10)
    view = memoryview(data)
    sent: list[memoryview] = []
    storage = client._attachment.core._chains[1]
    call = storage.call

    async def listening(request: object, buffers: tuple[memoryview, ...] = ()) -> object:
        sent.extend(buffers)
        return await call(request, buffers)

    monkeypatch.setattr(storage, "call", listening)
    with client.open("/file", "wb", chunk_size_bytes=CHUNK) as file:
        for begin in range(0, 2 * CHUNK, 1024):
            file.write(view[begin : begin + 1024])
        assert [len(part) for part in sent] == [CHUNK, CHUNK]
        file.write(view[2 * CHUNK :])
        assert [len(part) for part in sent[2:]] == [CHUNK] * 4
        assert all(part.obj is data for part in sent[2:]), "whole chunks go out of the caller's own memory"
    assert client.get("/file") == data


def test_an_unclosed_writer_is_named_and_discarded(client: Client) -> None:
    file = client.open("/file", "wb")
    file.write(content(2 * CHUNK))
    with pytest.warns(ResourceWarning, match="/file.*never closed"):
        del file
    assert not client.exists("/file")


def refuse(client: Client, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """The disk is full for one chunk write, after that many that were not."""
    storage = client._attachment.core._chains[1]
    call, seen = storage.call, 0

    async def refusing(request: object, buffers: tuple[memoryview, ...] = ()) -> object:
        nonlocal seen
        seen += isinstance(request, WriteChunks)
        if isinstance(request, WriteChunks) and seen == after + 1:
            raise NoSpace("disk is full")
        return await call(request, buffers)

    monkeypatch.setattr(storage, "call", refusing)


@pytest.mark.parametrize("mode", ["w+b", "r+b"])
def test_a_refused_write_does_not_wait_in_the_buffer(
    client: Client, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    client.put("/file", b"")
    with client.open("/file", mode, chunk_size_bytes=CHUNK) as file:
        file.write(b"kept")
        refuse(client, monkeypatch, after=0)
        with pytest.raises(NoSpace):
            file.write(content(CHUNK))
        assert (file.size, file.tell()) == (4, 4)
        file.write(b" on")
    assert client.get("/file") == b"kept on"


@pytest.mark.parametrize("mode", ["w+b", "r+b"])
def test_a_refused_write_leaves_nothing_in_the_hole_after_it(
    client: Client, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    start = content(CHUNK)
    write(client, "/file", start)
    with client.open("/file", mode, chunk_size_bytes=CHUNK) as file:
        file.write(start)
        monkeypatch.setattr("emberfs.client.core.MESSAGE_BYTES_MAX", 2 * CHUNK)
        refuse(client, monkeypatch, after=1)
        with pytest.raises(NoSpace):
            file.write(b"#" * (6 * CHUNK))
        assert file.size == CHUNK
        file.seek(9 * CHUNK)
        file.write(b"far")
    assert client.get("/file") == start + bytes(8 * CHUNK) + b"far"


def test_a_file_cut_by_another_reads_short(client: Client) -> None:
    """What the writer does not know of yet is cut from what a read returns, never made up."""
    data = content(4 * CHUNK)
    write(client, "/file", data)
    with client.open("/file", "r+b") as file:
        client.truncate("/file", CHUNK)
        file.write(data[:1])
        assert file.read_at(0, 4 * CHUNK) == data[:CHUNK]
        client.truncate("/file", 100)
        file.seek(0)
        file.write(data[:1])
        file.seek(0)
        assert file.read() == data[:100]


def test_an_awaited_file_cut_by_another_reads_short(store: Path) -> None:
    data = content(4 * CHUNK)

    async def main() -> None:
        async with emberfs.connect_async(f"ember://{store}") as client:
            await client.put("/file", data)
            async with await client.open("/file", "r+b") as file:
                await client.truncate("/file", CHUNK)
                await file.write(data[:1])
                assert await file.read() == data[1:CHUNK]
                assert file.tell() == CHUNK

    asyncio.run(main())


def test_bytes_outlive_a_late_writer() -> None:
    target = NewBytes(1 << 20)
    late = target.view[:10]
    taken = target.finish(4)
    late[:] = b"0123456789"
    assert len(taken) == 4
    assert bytes(late) == b"0123456789"
    assert late.obj.owner[:10] == b"0123456789", "the view keeps the memory"


def test_an_unclosed_awaited_appender_is_named_and_lets_go(store: Path) -> None:
    async def main() -> None:
        async with emberfs.connect_async(f"ember://{store}") as client:
            file = await client.open("/log", "ab")
            with pytest.warns(ResourceWarning, match="/log.*never closed"):
                del file
            again = None
            async with asyncio.timeout(20):
                while again is None:
                    await asyncio.sleep(0)
                    with contextlib.suppress(Conflict):  # The finalizer waits for nothing, so it may still be at it.
                        again = await client.open("/log", "ab")
            await again.close()

    asyncio.run(main())


def test_a_store_of_several_targets(tmp_path: Path) -> None:
    data = content(40 * CHUNK + 7)
    with emberfs.connect(f"ember://{tmp_path}/wide", targets=3) as client:
        write(client, "/file", data)
        write(client, "/log", data[:100], mode="ab")
        write(client, "/log", data[100:], mode="ab")
        blocks = {target["target"]: target["block_bytes"] for target in client.maintenance.info()["targets"]}
        assert len(blocks) == 3 and min(blocks.values()) >= 5 * CHUNK, "the chunks are dealt over all targets"
    with emberfs.connect(f"ember://{tmp_path}/wide") as client:
        assert client.get("/file") == client.get("/log") == data
        client.truncate("/file", 10 * CHUNK)
        assert client.get("/file") == data[: 10 * CHUNK]
        client.remove("/file", trash=False)
        assert client.collect_garbage(force=True).chunks == 10
        assert client.maintenance.fsck().clean


# ---- the awaitable twin


def public(cls: type) -> dict[str, str]:
    """Public methods and properties of a class, each with its parameters."""
    found = {}
    for name, member in inspect.getmembers(cls):
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            parameters = "" if isinstance(member, property) else str(inspect.signature(member).parameters.values())
            found[name] = parameters
    return found


def test_the_clients_have_the_same_methods() -> None:
    blocking, awaited = public(Client), public(AsyncClient)
    assert set(blocking) - set(awaited) == {"io_queue", "maintenance"}, (
        "a queue is for blocking programs, and an operator's work is blocking"
    )
    assert set(awaited) <= set(blocking)
    assert {name: blocking[name] for name in awaited} == awaited


def test_the_files_have_the_same_methods() -> None:
    blocking, awaited = public(File), public(AsyncFile)
    methods = {name for name in awaited if inspect.isfunction(getattr(AsyncFile, name))}
    assert methods >= {"read", "readinto", "write", "seek", "tell", "truncate", "flush", "fsync", "close", "discard"}
    for name in methods:
        names = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (File, AsyncFile)]
        assert names[0] == names[1], name
    assert {"size"} <= set(blocking) & set(awaited)


def test_awaited_files(store: Path) -> None:
    data = content(3 * CHUNK + 11)

    async def main() -> None:
        async with emberfs.connect_async(f"ember://{store}") as client:
            async with await client.open("/file", "w+b", chunk_size_bytes=CHUNK) as file:
                await asyncio.gather(*[file.write(data[begin : begin + 1000]) for begin in range(0, len(data), 1000)])
                assert file.tell() == file.size == len(data)
                file.seek(CHUNK)
                assert await file.read(100) == data[CHUNK : CHUNK + 100]
                await file.fsync()
                assert not await client.exists("/file")
            async with await client.open("/file", "r+b") as file:
                buffer = bytearray(len(data))
                assert await file.readinto(buffer) == len(data)
                assert buffer == data
                assert await file.truncate(10) == 10
                file.seek(2)
                assert await file.truncate() == 2
                with pytest.raises(ValueError, match="whence"):
                    file.seek(0, 9)
            assert await client.get("/file") == data[:2]
            async with await client.open("/file", "ab") as file:
                await file.write(b"end")
                with pytest.raises(io.UnsupportedOperation):
                    await file.read()
            async with await client.open("/file") as file:
                with pytest.raises(io.UnsupportedOperation):
                    await file.write(b"x")
                assert await file.read() == data[:2] + b"end"
            with pytest.raises(StoreClosed):
                await file.read()
            with pytest.raises(ZeroDivisionError):
                async with await client.open("/never", "wb") as file:
                    await file.write(data)
                    raise ZeroDivisionError
            assert not await client.exists("/never")

    asyncio.run(main())


def test_a_client_names_itself_and_pickles(client: Client) -> None:
    again: Client = pickle.loads(pickle.dumps(client))
    with again:
        assert again.url == client.url and client.url in repr(client)
        client.put("/from one", b"to the other")
        assert again.get("/from one") == b"to the other"
    assert "closed" in repr(again)
    with pytest.raises(StoreClosed):
        again.get("/from one")
    assert client.get("/from one") == b"to the other", "the store stays open for the others"
