"""Names: paths, directories, links and rename."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emberfs.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    InvalidPath,
    IsADirectory,
    LimitExceeded,
    NotADirectory,
    NotFound,
    StoreFormat,
)
from emberfs.kv.lmdb import LmdbKV
from emberfs.messages import GetXattrs, Link, List, Rename, SetAttr, SetXattr, Stat, Symlink, Usage
from emberfs.meta import MetaConfig
from emberfs.meta.keys import SUPERBLOCK_KEY, Superblock, encode_row
from emberfs.types import ROOT_INODE, Kind

from tests.fs.meta_fakes import ClockRuntime, Meta, SharedMeta


@pytest.fixture(params=["memory", "lmdb", "shared"])
def meta(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Meta]:
    runtime = ClockRuntime()
    kind = SharedMeta if request.param == "shared" else Meta
    meta = kind(LmdbKV.open(tmp_path, runtime) if request.param == "lmdb" else None, runtime=runtime)
    yield meta
    meta.close()


def rename(meta: Meta, source: str, target: str, *, overwrite: bool = True) -> None:
    meta(Rename(source, target, overwrite))


def test_a_new_namespace_has_an_empty_root(meta: Meta) -> None:
    root = meta.stat("/")
    assert (root.id, root.kind, meta.names("/")) == (ROOT_INODE, Kind.DIRECTORY, [])


def test_a_file_is_found_where_it_was_put(meta: Meta) -> None:
    meta.mkdir("/a/b", parents=True)
    put = meta.put("/a/b/ü 日本", b"hello")
    assert meta.stat("/a/b/ü 日本") == put
    assert (put.length, put.nlink, put.kind, put.mode) == (5, 1, Kind.FILE, 0o644)
    assert meta.names("/a") == ["b"]


def test_an_open_file_is_found_by_its_inode(meta: Meta) -> None:
    opened = meta.open("/a")
    rename(meta, "/a", "/b")
    assert meta(Stat("", inode=opened.inode.id)).inode == opened.inode
    meta.remove("/b")
    assert meta(Stat("", inode=opened.inode.id)).inode.nlink == 0
    with pytest.raises(NotFound):
        meta(Stat("", inode=4711))


def test_what_is_not_there_is_not_found(meta: Meta) -> None:
    meta.put("/file")
    for path in ("/nothing", "/nothing/below"):
        with pytest.raises(NotFound) as caught:
            meta.stat(path)
        assert caught.value.path == path
    with pytest.raises(NotADirectory):
        meta.stat("/file/below")
    with pytest.raises(NotADirectory):
        meta.names("/file")
    with pytest.raises(NotFound):
        meta.put("/nothing/file")


@pytest.mark.parametrize(
    "path",
    ["", "a", "//", "/a/", "/a//b", "/.", "/..", "/x\0", "/" + "n" * 256, "/" + "é" * 128, "/n" * 2049, "/\ud800"],
)
def test_a_bad_path_is_refused(meta: Meta, path: str) -> None:
    if isinstance(meta, SharedMeta) and not path.isprintable():
        pytest.skip("such a path does not travel")
    with pytest.raises(InvalidPath):
        meta.put(path)


def test_names_of_255_bytes_work(meta: Meta) -> None:
    meta.put("/" + "n" * 255)
    assert meta.names("/") == ["n" * 255]


def test_mkdir_names_the_parent_that_is_missing(meta: Meta) -> None:
    meta.mkdir("/a")
    with pytest.raises(NotFound, match="parent directory is missing: '/a/b'") as caught:
        meta.mkdir("/a/b/c/d")
    assert caught.value.path == "/a/b"


def test_whatever_is_made_names_the_parent_that_is_missing(meta: Meta) -> None:
    meta.mkdir("/a")
    meta.put("/file")
    meta(Symlink("/a/b/nothing", "/a/link"))
    for attempt in (
        lambda: meta.put("/a/b/c/d"),
        lambda: meta.open("/a/b/c/d"),
        lambda: meta(Symlink("/", "/a/b/c")),
        lambda: meta(Link("/file", "/a/b/c")),
        lambda: meta(Rename("/file", "/a/b/c", False)),
    ):
        with pytest.raises(NotFound, match="parent directory is missing: '/a/b'"):
            attempt()
    with pytest.raises(NotFound, match="no such file or directory: '/a/link'"):
        meta.put("/a/link")


def test_mkdir(meta: Meta) -> None:
    with pytest.raises(NotFound):
        meta.mkdir("/a/b")
    made = meta.mkdir("/a/b", parents=True)
    assert made == meta.stat("/a/b")
    assert meta.mkdir("/a/b", exist_ok=True) == made
    with pytest.raises(AlreadyExists):
        meta.mkdir("/a/b")
    meta.put("/file")
    with pytest.raises(AlreadyExists):
        meta.mkdir("/file", exist_ok=True)
    with pytest.raises(NotADirectory):
        meta.mkdir("/file/x", parents=True)
    assert meta.mkdir("/", exist_ok=True).id == ROOT_INODE


def test_a_listing_comes_in_pages_ordered_by_bytes(meta: Meta) -> None:
    names = ["Z", "a", "a-", "a/".replace("/", "0"), "é", "b"]
    for name in names:
        meta.put(f"/{name}")
    meta.mkdir("/dir")
    seen, after, more = [], "", True
    while more:
        page = meta(List(path="/", after=after, limit=2))
        assert len(page.entries) <= 2
        seen += [name for name, _ in page.entries]
        after, more = seen[-1], page.more
    assert seen == sorted([*names, "dir"], key=str.encode)


def test_a_directory_changes_with_its_entries(meta: Meta) -> None:
    meta.mkdir("/dir")
    before = meta.stat("/dir").mtime_ns
    meta.runtime.advance(10)
    meta.put("/dir/file")
    after = meta.stat("/dir").mtime_ns
    assert after - before >= 10e9
    ((_, listed),) = meta(List(path="/", after="", limit=10)).entries
    assert listed.mtime_ns == after


def test_attributes_are_set(meta: Meta) -> None:
    meta.put("/file")
    meta.mkdir("/dir")
    for path in ("/file", "/dir"):
        changed = meta(SetAttr(path, mode=0o100600, mtime_ns=5, uid=7)).inode
        assert (changed.mode, changed.mtime_ns, changed.uid, changed.gid) == (0o600, 5, 7, 0)
        assert meta.stat(path) == changed


def test_extended_attributes(meta: Meta) -> None:
    meta.put("/file")
    meta(SetXattr("/file", "user.note", b"x" * (64 << 10)))
    meta(SetXattr("/file", "user.b", b""))
    assert meta(GetXattrs("/file")).values == {"user.b": b"", "user.note": b"x" * (64 << 10)}
    meta(SetXattr("/file", "user.b", None))
    assert list(meta(GetXattrs("/file")).values) == ["user.note"]
    with pytest.raises(NotFound):
        meta(SetXattr("/file", "user.b", None))
    with pytest.raises(LimitExceeded):
        meta(SetXattr("/file", "big", b"x" * ((64 << 10) + 1)))
    with pytest.raises(InvalidPath):
        meta(SetXattr("/file", "n" * 256, b""))
    meta.remove("/file")
    meta.put("/file")
    assert meta(GetXattrs("/file")).values == {}


# ---- links


def test_a_hard_link_is_the_same_file(meta: Meta) -> None:
    meta.put("/a", b"x")
    linked = meta(Link("/a", "/b")).inode
    assert linked == meta.stat("/a") == meta.stat("/b")
    assert linked.nlink == 2
    meta.remove("/a")
    assert meta.stat("/b").nlink == 1
    assert meta(Usage()).files == 1
    meta.remove("/b")
    assert meta(Usage()).files == 0


def test_only_files_have_hard_links(meta: Meta) -> None:
    meta.mkdir("/dir")
    meta.put("/file")
    with pytest.raises(IsADirectory):
        meta(Link("/dir", "/again"))
    with pytest.raises(AlreadyExists):
        meta(Link("/file", "/dir"))


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("/top/file", "/top/file"),
        ("file", "/top/sub/file"),
        ("../file", "/top/file"),
        ("./../sub//file", "/top/sub/file"),
        ("../../../..", "/"),
        ("..", "/top"),
        (".", "/top/sub"),
        ("/", "/"),
        ("/top/through/file", "/top/sub/file"),
    ],
)
def test_a_symbolic_link_leads_to_its_target(meta: Meta, target: str, found: str) -> None:
    meta.mkdir("/top/sub", parents=True)
    meta.put("/top/file")
    meta.put("/top/sub/file")
    meta(Symlink(target="sub", path="/top/through"))
    link = meta(Symlink(target=target, path="/top/sub/link")).inode
    assert meta.stat("/top/sub/link", follow=False) == link
    assert (link.kind, link.target, link.length) == (Kind.SYMLINK, target, len(target))
    assert meta.stat("/top/sub/link").id == meta.stat(found).id


def test_a_link_on_the_way_is_followed(meta: Meta) -> None:
    meta.mkdir("/real/sub", parents=True)
    meta(Symlink(target="real", path="/link"))
    made = meta.put("/link/sub/file", b"x")
    assert meta.stat("/real/sub/file") == made
    meta(Symlink(target="real/new", path="/dangling"))
    assert meta.open("/dangling").inode.id == meta.stat("/real/new").id
    with pytest.raises(AlreadyExists):
        meta.open("/dangling", exclusive=True)


def test_links_in_a_circle_are_refused(meta: Meta) -> None:
    meta(Symlink(target="b", path="/a"))
    meta(Symlink(target="a", path="/b"))
    for path in ("/a", "/a/below"):
        with pytest.raises(InvalidPath, match="40 symbolic links"):
            meta.stat(path)
    meta.remove("/a")
    assert meta.names("/") == ["b"]


@pytest.mark.parametrize("target", ["", "x\0", "n" * 256, "n/" * 2049])
def test_a_bad_link_target_is_refused(meta: Meta, target: str) -> None:
    with pytest.raises(InvalidPath):
        meta(Symlink(target=target, path="/link"))


# ---- rename


def test_rename_moves_a_tree(meta: Meta) -> None:
    meta.mkdir("/a/b/c", parents=True)
    file = meta.put("/a/b/c/file", b"x")
    meta.mkdir("/other")
    rename(meta, "/a/b", "/other/moved")
    assert meta.stat("/other/moved/c/file") == file
    assert meta.names("/a") == []
    moved = meta.stat("/other/moved")
    assert (moved.parent, moved.name) == (meta.stat("/other").id, "moved")


def test_rename_replaces_a_file(meta: Meta) -> None:
    source = meta.put("/source", b"new")
    meta.put("/target", b"old")
    with pytest.raises(AlreadyExists):
        rename(meta, "/source", "/target", overwrite=False)
    rename(meta, "/source", "/target")
    assert meta.stat("/target") == source
    assert meta.names("/") == ["target"]
    assert meta(Usage()).files == 1


def test_rename_replaces_an_empty_directory_only(meta: Meta) -> None:
    meta.mkdir("/source")
    meta.mkdir("/full/x", parents=True)
    meta.mkdir("/empty")
    meta.put("/file")
    with pytest.raises(DirectoryNotEmpty):
        rename(meta, "/source", "/full")
    with pytest.raises(NotADirectory):
        rename(meta, "/source", "/file")
    with pytest.raises(IsADirectory):
        rename(meta, "/file", "/empty")
    rename(meta, "/source", "/empty")
    assert meta.names("/") == ["empty", "file", "full"]
    assert meta(Usage()).directories == 3


def test_a_directory_is_not_moved_into_itself(meta: Meta) -> None:
    meta.mkdir("/a/b/c", parents=True)
    for target in ("/a/x", "/a/b/x", "/a/b/c/x"):
        with pytest.raises(InvalidPath, match="own subtree"):
            rename(meta, "/a", target)
    rename(meta, "/a/b/c", "/c")
    rename(meta, "/a", "/c/a")
    assert meta.stat("/c/a/b").name == "b"


def test_rename_onto_itself_or_another_name_of_the_file_does_nothing(meta: Meta) -> None:
    meta.put("/a", b"x")
    meta(Link("/a", "/b"))
    before = meta.stat("/a")
    rename(meta, "/a", "/a")
    rename(meta, "/a", "/b")
    assert meta.stat("/a") == meta.stat("/b") == before


def test_the_root_stays(meta: Meta) -> None:
    meta.mkdir("/a")
    with pytest.raises(InvalidPath):
        rename(meta, "/", "/a/x")
    with pytest.raises(InvalidPath):
        meta.remove("/", recursive=True)
    with pytest.raises(DirectoryNotEmpty):
        rename(meta, "/a", "/")


# ---- the store


def test_the_namespace_outlives_the_service(meta: Meta) -> None:
    file = meta.put("/file", b"x")
    meta.run(meta.service.close())
    meta.start()
    assert meta.stat("/file") == file
    if not isinstance(meta, SharedMeta):
        assert meta.put("/next").id == file.id + 1, "a clean close gives unused ids back"


def test_a_newer_format_is_refused(meta: Meta) -> None:
    async def work(txn: object) -> None:
        txn.put(SUPERBLOCK_KEY, encode_row(Superblock(format=99)))  # type: ignore[attr-defined]

    meta.run(meta.kv.run(work))
    with pytest.raises(StoreFormat, match="format 99"):
        meta.start()


def test_a_bad_config_is_refused() -> None:
    for settings in ({"gc_delay_s": -1}, {"stripe": 2}, {"id_batch": 0}, {"gc_interval_s": 0}):
        with pytest.raises(LimitExceeded):
            MetaConfig(**settings)  # type: ignore[arg-type]
