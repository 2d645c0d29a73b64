"""Bad input: whatever is wrong, there is one clear error, and nothing is lost.

Run: pytest tests/fs/test_bad_input.py
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import emberfs
import fsspec
import lmdb
import msgspec
import pytest
from emberfs import Client
from emberfs.disk import LocalDisk
from emberfs.errors import (
    Corruption,
    InvalidPath,
    NoSpace,
    NotADirectory,
    NotFound,
    StoreBusy,
    StoreFormat,
    TargetFailed,
)

from tests.fs.stores import CHUNK, content, flip_byte, line_of, program, url_of

DATA = content(5 * CHUNK + 100)


def make_store(store: Path) -> None:
    """Two files in a store that is closed again."""
    with emberfs.connect(url_of(store)) as client:
        client.put("/good", content(3 * CHUNK, seed=2), chunk_size_bytes=CHUNK)
        client.put("/bad", DATA, chunk_size_bytes=CHUNK)


def assert_good(client: Client) -> None:
    """The file that nothing happened to is whole."""
    assert client.get("/good") == content(3 * CHUNK, seed=2)


# ---- paths and URLs


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get("/none"),
        lambda client: client.stat("/none/deeper"),
        lambda client: client.list("/none"),
        lambda client: client.open("/none"),
        lambda client: client.put("/none/file", b"x"),
        lambda client: client.put("/none/file", DATA),
        lambda client: client.remove("/none"),
        lambda client: client.rename("/none", "/other"),
        lambda client: client.truncate("/none", 5),
        lambda client: client.mkdir("/none/dir"),
        lambda client: client.link("/none", "/other"),
        lambda client: client.batch_read([("/none", 0, 1)], into=bytearray(1)),
        lambda client: client.xattrs("/none"),
        lambda client: client.trash_restore("0" * 16),
    ],
)
def test_a_missing_path(client: Client, call: Callable[[Client], object]) -> None:
    with pytest.raises(NotFound) as caught:
        call(client)
    assert caught.value.errno == errno.ENOENT
    assert client.list("/") == []


def test_a_file_where_a_directory_should_be(client: Client) -> None:
    client.put("/file", b"x")
    for call in (client.get, client.list, client.stat, client.mkdir, client.remove):
        with pytest.raises(NotADirectory):
            call("/file/below")
    assert not client.exists("/file/below")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "a store URL looks like"),
        ("/tmp/store", "a store URL looks like"),
        ("s3://bucket", "a store URL looks like"),
        ("ember:/tmp/store", "a store URL looks like"),
        ("ember://", "names a directory"),
        ("ember://host/store", "without a port"),
        ("ember://host:1234/store", "names a path in a store"),
        ("ember:///a\0b", "names a directory"),
        ("ember://~nobody-of-that-name/store", "a user that does not exist"),
    ],
)
def test_a_bad_url(url: str, message: str) -> None:
    with pytest.raises(InvalidPath, match=message):
        emberfs.connect(url)


def test_no_url_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBERLINE_URL", raising=False)
    with pytest.raises(InvalidPath, match="EMBERLINE_URL"):
        emberfs.connect()


NAMES = [
    "with space",
    " leading and trailing ",
    "ünïcödé",
    "日本語",
    "🔥" * 63,
    "e\u0301 is not \u00e9",
    "new\nline",
    "tab\t",
    "-rf",
    "~",
    "$HOME",
    "back\\slash",
    "per%20cent",
    "a?b#c!d*[e]",
    "...",
    "n" * 255,
    "ü" * 127,
    "\x01\x7f",
    "C:",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_is_a_name(client: Client, store: Path, name: str) -> None:
    client.mkdir(f"/{name}")
    client.put(f"/{name}/{name}", b"inside")
    assert [entry for entry, _ in client.list(f"/{name}")] == [name]
    client.rename(f"/{name}/{name}", "/plain")
    client.rename("/plain", f"/{name}/{name}")
    client.symlink(f"/{name}/{name}", "/link")
    assert client.get("/link") == b"inside"
    trash = client.remove(f"/{name}", recursive=True)
    client.trash_restore(trash)
    client.close()
    with emberfs.connect(url_of(store)) as again:
        assert again.get(f"/{name}/{name}") == b"inside"


def test_names_that_look_alike_are_different_names(client: Client) -> None:
    names = sorted(["\u00e9", "e\u0301", "E", "e", "é ".strip() + " "], key=str.encode)
    for name in names:
        client.put("/" + name, name.encode())
    assert [name for name, _ in client.list("/")] == names
    assert all(client.get("/" + name) == name.encode() for name in names)


@pytest.mark.parametrize(
    "path", ["/a\0b", "/" + "n" * 256, "/" + "ü" * 128, "/" + "/".join(["d" * 200] * 21), "/\udcff"]
)
def test_an_impossible_name(client: Client, path: str) -> None:
    calls: list[Callable[[str], object]] = [client.get, client.mkdir, client.list, client.exists, client.remove]
    for call in [*calls, lambda path: client.put(path, DATA), lambda path: client.open(path, "wb")]:
        with pytest.raises(InvalidPath):
            call(path)
    assert client.list("/") == []
    assert client.collect_garbage(force=True).pending == 0


def test_dots_never_leave_the_store(client: Client, tmp_path: Path) -> None:
    client.mkdir("/dir")
    client.put("/../../dir/./../top//", b"x")
    assert client.get("top") == client.get("/dir/../top") == b"x"
    client.symlink("../../../../../../etc/passwd", "/dir/link")
    with pytest.raises(NotFound):
        client.get("/dir/link")
    for path in ("/", "/..", "/.", "//"):
        with pytest.raises(InvalidPath):
            client.remove(path, recursive=True)


def test_links_in_a_circle(client: Client) -> None:
    client.symlink("/two", "/one")
    client.symlink("/one", "/two")
    with pytest.raises(InvalidPath, match="symbolic links"):
        client.get("/one")


def test_zero_bytes_and_many_chunks(client: Client, store: Path) -> None:
    data = content(500 * CHUNK + 1)
    client.put("/many", data, chunk_size_bytes=CHUNK)
    client.put("/empty", b"")
    with client.open("/also empty", "wb"):
        pass
    client.close()
    with emberfs.connect(url_of(store)) as again:
        assert again.get("/many") == data
        assert again.get("/many", 250 * CHUNK - 5, 10) == data[250 * CHUNK - 5 :][:10]
        assert again.get("/empty") == again.get("/also empty") == b""
        again.remove("/many", trash=False)
        assert again.collect_garbage(force=True).chunks == 501
        assert again.maintenance.fsck().clean


# ---- damage


def test_a_corrupt_chunk_is_named_and_never_returned(store: Path) -> None:
    make_store(store)
    offset = 3 * CHUNK + 20_000
    flip_byte(store, DATA, offset)
    with emberfs.connect(url_of(store)) as client:
        chunk = f"{client.stat('/bad').id:x}.3"
        buffer = bytearray(len(DATA))
        reads: list[Callable[[], object]] = [
            lambda: client.get("/bad"),
            lambda: client.get("/bad", offset, 1),
            lambda: client.get_into("/bad", buffer),
            lambda: client.batch_read([("/good", 0, 5), ("/bad", offset - 1, 5)], into=bytearray(10)),
            lambda: client.open("/bad").read(),
            lambda: client.open("/bad").read_at(offset, 10),
        ]
        for read in reads:
            with pytest.raises(Corruption, match=f"chunk {chunk} .*'/bad'") as caught:
                read()
            error = caught.value
            assert (error.path, error.chunk, error.errno) == ("/bad", chunk, errno.EIO)
            assert error.offset is not None and error.offset <= offset < error.offset + (16 << 10)
        assert client.get("/bad", 0, 3 * CHUNK) == DATA[: 3 * CHUNK], "all but the damaged granule is still to be had"
        assert client.get("/bad", 4 * CHUNK) == DATA[4 * CHUNK :]
        assert_good(client)
        found = client.maintenance.scrub().findings
        assert [finding.path for finding in found] == ["/bad"]
        client.put("/bad", DATA)
        assert client.get("/bad") == DATA, "a new file heals the name"


def test_a_corrupt_chunk_through_fsspec(store: Path) -> None:
    make_store(store)
    flip_byte(store, DATA, 50)
    fs = fsspec.filesystem("ember", url=url_of(store), skip_instance_cache=True)
    try:
        with pytest.raises(OSError, match="/bad") as caught:
            fs.cat_file("/bad")
        assert caught.value.errno == errno.EIO
        with fs.open("/bad") as file, pytest.raises(Corruption):
            file.read(10)
        good, bad = fs.cat_ranges(["/good", "/bad"], [0, 0], [10, 10])
        assert good == content(3 * CHUNK, seed=2)[:10] and isinstance(bad, Corruption)
        with pytest.raises(Corruption):
            fs.get_file("/bad", store.parent / "copy")
    finally:
        fs.close()


def test_a_corrupt_chunk_keeps_neither_its_file_nor_the_store_from_going_on(store: Path) -> None:
    make_store(store)
    flip_byte(store, DATA, 20_000)
    with emberfs.connect(url_of(store)) as client:
        with client.open("/bad", "r+b") as file:
            file.seek(10)
            file.write(b"partly over damaged bytes")
            with pytest.raises(Corruption, match="/bad"):
                file.flush()
            file.discard()
        with client.open("/bad", "r+b") as file, pytest.raises(Corruption, match="/bad"):
            file.truncate(20_001)
        with pytest.raises(Corruption, match="/bad"):
            client.open("/bad", "r+b")
    with emberfs.connect(url_of(store)) as client:
        assert_good(client)
        client.remove("/bad", trash=False)
        assert client.collect_garbage(force=True).files == 1
        assert client.maintenance.fsck().clean


def edit_index(environment: Path, change: Callable[[bytes, bytes], bytes | None]) -> int:
    """Change rows of a closed KV behind its back; returns how many."""
    count = 0
    with lmdb.open(str(environment), map_size=1 << 30) as env, env.begin(write=True) as transaction:
        for key, value in list(transaction.cursor()):
            new = change(key, value)
            if new is not None:
                transaction.put(key, new)
                count += 1
    return count


def test_a_corrupt_index_record(store: Path) -> None:
    make_store(store)
    with emberfs.connect(url_of(store)) as client:
        bad = client.stat("/bad").id

    def damage(key: bytes, value: bytes) -> bytes | None:
        is_second_chunk = key == b"c" + bad.to_bytes(8, "big") + (1).to_bytes(8, "big")
        return value[:20] + bytes([value[20] ^ 1]) + value[21:] if is_second_chunk else None

    assert edit_index(store / "target-1" / "index", damage) == 1
    with emberfs.connect(url_of(store)) as client:
        with pytest.raises(Corruption, match=f"index record of chunk {bad:x}.1 .*'/bad'"):
            client.get("/bad")
        assert client.get("/bad", 0, CHUNK) == DATA[:CHUNK]
        assert client.get("/bad", 2 * CHUNK) == DATA[2 * CHUNK :]
        assert_good(client)
        assert not client.maintenance.fsck().clean
        client.remove("/bad", trash=False)
        client.put("/short lived", DATA)
        client.remove("/short lived", trash=False)
        assert client.collect_garbage(force=True).pending == 0
        assert_good(client)
        client.maintenance.fsck(repair=True)
        assert client.maintenance.fsck().clean


# ---- space


def test_a_full_store_refuses_cleanly_and_goes_on_after_freeing(store: Path) -> None:
    make_store(store)
    free = os.statvfs(store)
    reserve = free.f_bavail * free.f_frsize * 2
    with emberfs.connect(url_of(store), reserve_bytes=reserve) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.put("/new", DATA * 100),
            lambda: client.batch_write([("/new", 0, DATA * 100)]),
            lambda: write_all(client, "/new", DATA * 100),
            lambda: write_all(client, "/good", DATA * 100, mode="ab"),
        ]
        for call in calls:
            with pytest.raises(NoSpace, match="full") as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
        assert client.get("/bad") == DATA
        assert client.get("/good")[: 3 * CHUNK] == content(3 * CHUNK, seed=2)
        client.remove("/bad", trash=False)
        assert client.collect_garbage(force=True).files >= 1
        client.put("/again", DATA, chunk_size_bytes=CHUNK)
        assert client.get("/again") == DATA, "freed blocks are used again"
        assert client.maintenance.fsck().clean


def write_all(client: Client, path: str, data: bytes, *, mode: str = "wb") -> None:
    with client.open(path, mode, chunk_size_bytes=CHUNK) as file:
        file.write(data)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system needs more rights than this test has")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("reserve_bytes", [0, 4 << 20])
def test_a_disk_that_is_really_full(tiny_disk: Path, reserve_bytes: int) -> None:
    kept: dict[str, bytes] = {}
    with emberfs.connect(url_of(tiny_disk / "store"), reserve_bytes=reserve_bytes) as client:
        client.put("/first", DATA)
        with pytest.raises(NoSpace):
            for number in range(1000):
                data = content(200_000, seed=number)
                client.put(f"/file-{number}", data, chunk_size_bytes=CHUNK)
                kept[f"/file-{number}"] = data
        assert len(kept) > 10
        with pytest.raises(NoSpace), client.open("/first", "ab") as file:
            file.write(content(24 << 20))
        assert all(client.get(path) == data for path, data in kept.items())
        trashed = list(kept)[::2]
        for path in trashed:
            client.remove(path)
        client.trash_empty()
        client.collect_garbage(force=True)
        client.put("/after", DATA)
        assert client.get("/after") == DATA
    with emberfs.connect(url_of(tiny_disk / "store"), reserve_bytes=reserve_bytes) as client:
        assert client.get("/first")[: len(DATA)] == client.get("/after") == DATA
        assert all(client.get(path) == kept[path] for path in set(kept) - set(trashed))
        assert client.maintenance.fsck().clean


# ---- a disk that fails


class FailingDisk(LocalDisk):
    """Fails the fsyncs, or the writes, while told to."""

    fails: ClassVar[set[str]] = set()

    async def write(self, items: Sequence[Any]) -> None:
        if "write" in self.fails:
            raise OSError(errno.EIO, "Input/output error")
        await super().write(items)

    async def sync(self, files: Sequence[int]) -> None:
        if "sync" in self.fails:
            raise OSError(errno.EIO, "Input/output error")
        await super().sync(files)


@pytest.mark.parametrize("what", ["sync", "write"])
def test_a_disk_that_fails_once_takes_no_more_writes(
    store: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(store)
    monkeypatch.setattr("emberfs.embedded.LocalDisk", FailingDisk)
    with emberfs.connect(url_of(store)) as client:
        client.put("/acknowledged", DATA)
        monkeypatch.setattr(FailingDisk, "fails", {what})
        with pytest.raises(TargetFailed, match="stopped taking writes") as caught:
            client.put("/lost", DATA)
        assert caught.value.errno == errno.EIO
        monkeypatch.setattr(FailingDisk, "fails", set())
        with pytest.raises(TargetFailed, match="reopen the store"):
            client.put("/lost", DATA)
        assert not client.exists("/lost")
        assert_good(client)
    with emberfs.connect(url_of(store)) as client:
        assert client.get("/acknowledged") == DATA
        client.put("/later", DATA)
        assert client.get("/later") == DATA
        assert client.maintenance.fsck().clean


# ---- owners and formats

OWNER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
client.put("/mine", b"owner")
print("open", flush=True)
sys.stdin.readline()
"""


def test_an_owner_that_cannot_share(store: Path) -> None:
    make_store(store)
    older = (
        "import fcntl, os, sys\nfile = os.open(sys.argv[1], os.O_RDWR)\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "os.pwrite(file, b'{\"pid\": %d}' % os.getpid(), 0)\nprint('open', flush=True)\nsys.stdin.readline()"
    )
    with program(older, store / "owner.lock") as owner:
        assert line_of(owner) == "open"
        with pytest.raises(StoreBusy, match=f"process {owner.pid} owns this store") as caught:
            emberfs.connect(url_of(store))
        assert caught.value.pid == owner.pid
        assert isinstance(caught.value, BlockingIOError)
        fs = fsspec.filesystem("ember", url=url_of(store), skip_instance_cache=True)
        with pytest.raises(StoreBusy, match=str(owner.pid)):
            fs.ls("/")
    with emberfs.connect(url_of(store)) as client:
        assert client.maintenance.fsck().clean


def test_a_killed_owner_leaves_the_store_free(store: Path) -> None:
    with program(OWNER, url_of(store)) as owner:
        assert line_of(owner) == "open"
        owner.kill()
        owner.wait()
        with emberfs.connect(url_of(store)) as client:
            assert client.get("/mine") == b"owner"


def newer_superblock(store: Path) -> None:
    """As a later emberline may write it: other fields, another checksum."""
    (store / "superblock.json").write_text(json.dumps({"format": 2, "store": {"id": "x"}, "chains": []}))


def newer_metadata(store: Path) -> None:
    assert edit_index(store / "meta", lambda key, _: msgspec.msgpack.encode([2]) if key == b"V" else None) == 1


def newer_engine(store: Path) -> None:
    newer = msgspec.msgpack.encode([2, bytes(16), "and more"])
    assert edit_index(store / "target-1" / "index", lambda key, _: newer if key == b"f" else None) == 1


@pytest.mark.parametrize("make_newer", [newer_superblock, newer_metadata, newer_engine])
def test_a_store_of_a_newer_format(store: Path, make_newer: Callable[[Path], None]) -> None:
    make_store(store)
    make_newer(store)
    before = {path: path.read_bytes() for path in store.rglob("blocks-*")}
    with pytest.raises(StoreFormat, match=r"format 2.*upgrade"):
        emberfs.connect(url_of(store))
    assert {path: path.read_bytes() for path in store.rglob("blocks-*")} == before


def test_a_directory_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(StoreFormat, match=r"not an emberline store.*'thesis.txt'"):
        emberfs.connect(url_of(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for path in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "below"):
        with pytest.raises(StoreFormat, match="a file is in the way"):
            emberfs.connect(url_of(path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 1}', b'{"format": "one"}', b"null"])
def test_a_damaged_superblock(store: Path, content: bytes) -> None:
    make_store(store)
    whole = (store / "superblock.json").read_bytes()
    (store / "superblock.json").write_bytes(content)
    with pytest.raises(StoreFormat, match=r"superblock.json is damaged"):
        emberfs.connect(url_of(store))
    (store / "superblock.json").write_bytes(whole.replace(b'"targets": 1', b'"targets": 2'))
    with pytest.raises(StoreFormat, match="checksum does not match"):
        emberfs.connect(url_of(store))
    (store / "superblock.json").write_bytes(whole)
    with emberfs.connect(url_of(store)) as client:
        assert_good(client)


def test_a_lost_superblock_is_not_made_anew(store: Path) -> None:
    make_store(store)
    superblock = (store / "superblock.json").read_bytes()
    (store / "superblock.json").unlink()
    with pytest.raises(StoreFormat, match="not an emberline store"):
        emberfs.connect(url_of(store))
    (store / "superblock.json").write_bytes(superblock)
    with emberfs.connect(url_of(store)) as client:
        assert_good(client)


@pytest.mark.parametrize(
    "settings",
    [{"targets": 0}, {"targets": "2"}, {"reserve_bytes": -1}, {"gc_delay_s": -1.0}, {"trash_s": "1d"}],
)
def test_a_bad_setting(store: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        emberfs.connect(url_of(store), **settings)
    with emberfs.connect(url_of(store)) as client:
        client.put("/file", b"x")


@pytest.mark.parametrize("connect", [emberfs.connect, emberfs.connect_async])
def test_an_unknown_setting_is_answered_with_those_there_are(store: Path, connect: Callable[..., Any]) -> None:
    with pytest.raises(emberfs.InvalidPath, match=r"no such setting: gc_delay;.* gc_delay_s"):
        connect(url_of(store), gc_delay=1)


def test_the_help_of_connect_lists_every_setting() -> None:
    for field in dataclasses.fields(emberfs.StoreConfig):
        assert field.name in (emberfs.connect.__doc__ or "")


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def test_a_corrupt_metadata_row_is_an_error_and_never_wrong_bytes(store: Path) -> None:
    with emberfs.connect(url_of(store)) as client:
        client.put("/small", b"these bytes are in the row")
        client.put("/other", b"these too")
        inode = client.stat("/small").id.to_bytes(8, "big")
    edits = [
        lambda key, value: flipped(value, value.index(b" are in") - 1) if key == b"I" + inode else None,
        lambda key, value: flipped(value, 7) if key[:1] == b"D" and key.endswith(b"small") else None,
    ]
    for edit in edits:
        assert edit_index(store / "meta", edit) == 1
        with emberfs.connect(url_of(store)) as client:
            with pytest.raises(Corruption, match="damaged"):
                client.get("/small")
            with pytest.raises(Corruption, match="damaged"):
                client.list("/")
            assert client.get("/other") == b"these too"
            findings = client.maintenance.fsck().findings
            assert [found.kind for found in findings] == ["row"]
        assert edit_index(store / "meta", edit) == 1  # and back again
    assert edit_index(store / "meta", edits[1]) == 1
    with emberfs.connect(url_of(store)) as client:
        assert client.maintenance.fsck(repair=True).clean
        assert client.get(f"/lost+found/{int.from_bytes(inode, 'big'):x}") == b"these bytes are in the row"
        assert [name for name, _ in client.list("/")] == ["lost+found", "other"]


def test_settings_that_come_too_late_are_not_silently_ignored(store: Path) -> None:
    with emberfs.connect(url_of(store), reserve_bytes=1 << 20):
        with emberfs.connect(url_of(store)) as same:
            assert same.maintenance.info()["settings"]["reserve_bytes"] == 1 << 20
        with pytest.warns(UserWarning, match="other settings"), emberfs.connect(url_of(store), gc_delay_s=1.0):
            pass
    with pytest.raises(StoreFormat, match="1 targets, not 2"):
        emberfs.connect(url_of(store), targets=2)
    with pytest.raises(emberfs.LimitExceeded):
        emberfs.connect(url_of(store), targets=0)
