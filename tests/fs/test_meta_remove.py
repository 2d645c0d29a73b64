"""Removing: the trash, garbage and its delay, and trees that are deleted in steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emberfs.errors import AlreadyExists, DirectoryNotEmpty, InvalidPath, IsADirectory, NotADirectory, NotFound
from emberfs.messages import (
    CloseSession,
    CollectGarbage,
    Link,
    Rename,
    TrashEmpty,
    TrashList,
    TrashRestore,
    Usage,
    UsageReply,
)
from emberfs.meta import orphans
from emberfs.meta.check import check

from tests.fs.meta_fakes import CHUNK, Meta, SharedMeta

DAY_S = 86400.0


@pytest.fixture(params=[Meta, SharedMeta])
def meta(request: pytest.FixtureRequest) -> Iterator[Meta]:
    meta: Meta = request.param()
    yield meta
    assert meta.run(check(meta.kv, meta.chunks)) == []
    meta.close()


def test_remove_for_good(meta: Meta) -> None:
    meta.mkdir("/dir/sub", parents=True)
    meta.put("/file")
    with pytest.raises(DirectoryNotEmpty):
        meta.remove("/dir")
    with pytest.raises(IsADirectory):
        meta.remove("/dir/sub", want="file")
    with pytest.raises(NotADirectory):
        meta.remove("/file", want="directory")
    assert meta.remove("/dir/sub", want="directory") == ""
    meta.remove("/dir", recursive=True)
    meta.remove("/file", recursive=True)
    with pytest.raises(NotFound):
        meta.remove("/file")
    assert meta(Usage()) == UsageReply(0, 0, 0, 0, 0)


# ---- garbage


def test_chunks_wait_for_their_delay(meta: Meta) -> None:
    file = meta.put_chunks("/file", 2 * CHUNK)
    meta.remove("/file")
    meta.runtime.advance(299)
    assert meta(CollectGarbage(force=False)).pending == 1
    assert meta.chunks.of(file.id)
    meta.runtime.advance(2)
    collected = meta(CollectGarbage(force=False))
    assert (collected.files, collected.chunks, collected.pending) == (1, 2, 0)
    assert not meta.chunks.lengths


def test_force_does_not_wait(meta: Meta) -> None:
    meta.put_chunks("/file", CHUNK)
    meta.put_chunks("/file", CHUNK)
    meta.put("/inline")
    meta.remove("/inline")
    assert meta(CollectGarbage(force=True)).files == 1
    assert meta(Usage()).gc_pending == 0
    assert len(meta.chunks.lengths) == 1


def test_a_file_that_is_being_written_is_not_collected(meta: Meta) -> None:
    file = meta.put_chunks("/file", CHUNK)
    opened = meta.open("/file")
    meta.remove("/file")
    assert meta(CollectGarbage(force=True)).pending == 1
    meta.chunks.write(file.id, 2 * CHUNK)
    meta(CloseSession(opened.session, file.id, 2 * CHUNK, 0))
    assert meta(CollectGarbage(force=True)).chunks == 2


def test_a_file_with_another_name_keeps_its_chunks(meta: Meta) -> None:
    file = meta.put_chunks("/a", CHUNK)
    meta(Link("/a", "/b"))
    meta.remove("/a")
    assert meta(CollectGarbage(force=True)).files == 0
    assert meta.chunks.of(file.id)


# ---- trees


def build_tree(meta: Meta) -> None:
    """Three levels, links between them, 14 files."""
    meta.mkdir("/tree/a/b", parents=True)
    for number in range(12):
        meta.put_chunks(f"/tree/{'a/b' if number % 2 else 'a'}/{number}", CHUNK)
    meta.put("/tree/linked")
    meta(Link("/tree/linked", "/tree/a/linked"))
    meta(Link("/tree/linked", "/tree/linked too"))
    meta(Link("/tree/linked", "/outside"))


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_tree_is_gone_at_once_and_deleted_in_steps(meta: Meta, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "STEP_ENTRIES", step)
    build_tree(meta)
    meta.remove("/tree", recursive=True)
    assert meta.names("/") == ["outside"]
    meta.put("/tree", b"the name is free")
    collected = meta(CollectGarbage(force=True))
    assert (collected.files, collected.chunks) == (12, 12)
    assert meta(Usage()) == UsageReply(files=2, directories=0, length_bytes=16, trash_entries=0, gc_pending=0)
    assert meta.stat("/outside").nlink == 1


def test_the_deletion_of_a_tree_goes_on_after_a_crash(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tree(meta)
    # Dies right after the tree was detached.
    monkeypatch.setattr("emberfs.meta.remove.start_sweeper", lambda state: None)
    meta.remove("/tree", recursive=True)
    assert meta(Usage()).files == 13
    meta.crash_and_restart()
    meta(CollectGarbage(force=False))
    assert meta(Usage()).files == 1


# ---- trash


def test_the_trash_gives_back(meta: Meta) -> None:
    build_tree(meta)
    tree = meta.stat("/tree")
    tree_id = meta.remove("/tree", recursive=True, trash=True)
    file_id = meta.remove("/outside", trash=True)
    assert meta.names("/") == []
    entries = meta(TrashList()).entries
    assert (entries[0].id, entries[0].inode.id) == (tree_id, tree.id)
    assert [entry.path for entry in entries] == ["/tree", "/outside"]
    assert meta(Usage()).trash_entries == 2
    assert meta(CollectGarbage(force=True)).files == 0
    restored = meta(TrashRestore(tree_id, "")).inode
    assert (restored.id, restored.parent, restored.name) == (tree.id, tree.parent, "tree")
    meta(TrashRestore(file_id, "/tree/elsewhere"))
    assert meta.names("/tree") == ["a", "elsewhere", "linked", "linked too"]
    assert meta(TrashList()).entries == []


def test_restore_makes_the_directories_that_are_gone(meta: Meta) -> None:
    meta.mkdir("/a/b", parents=True)
    meta.put("/a/b/file", b"x")
    trash_id = meta.remove("/a/b/file", trash=True)
    meta.remove("/a", recursive=True)
    with pytest.raises(NotFound):
        meta(TrashRestore(trash_id, "/nowhere/file"))
    meta(TrashRestore(trash_id, ""))
    assert meta.stat("/a/b/file").length == 1


def test_restore_refuses(meta: Meta) -> None:
    meta.put("/file")
    trash_id = meta.remove("/file", trash=True)
    meta.put("/file", b"another")
    with pytest.raises(AlreadyExists):
        meta(TrashRestore(trash_id, ""))
    with pytest.raises(NotFound):
        meta(TrashRestore("0" * 16, ""))
    with pytest.raises(InvalidPath):
        meta(TrashRestore("../../x", ""))
    assert len(meta(TrashList()).entries) == 1


def test_the_trash_does_not_take_a_full_directory_unasked(meta: Meta) -> None:
    meta.mkdir("/dir/sub", parents=True)
    with pytest.raises(DirectoryNotEmpty):
        meta.remove("/dir", trash=True)
    meta.remove("/dir/sub", trash=True)


def test_the_trash_expires(meta: Meta) -> None:
    build_tree(meta)
    meta.remove("/tree", recursive=True, trash=True)
    meta.runtime.advance(6 * DAY_S)
    meta.remove("/outside", trash=True)
    assert meta(CollectGarbage(force=True)).files == 0
    meta.runtime.advance(1.1 * DAY_S)
    assert meta(CollectGarbage(force=True)).files == 12
    assert [entry.path for entry in meta(TrashList()).entries] == ["/outside"]


def test_the_trash_is_emptied(meta: Meta) -> None:
    build_tree(meta)
    meta.remove("/tree", recursive=True, trash=True)
    meta.runtime.advance(100)
    meta.remove("/outside", trash=True)
    meta(TrashEmpty(older_than_s=50))
    assert meta(Usage()).trash_entries == 1
    meta(TrashEmpty(older_than_s=0))
    meta(CollectGarbage(force=True))
    assert meta(Usage()) == UsageReply(0, 0, 0, 0, 0)


def test_a_clock_that_was_set_back_keeps_nothing_in_the_trash(meta: Meta) -> None:
    meta.put("/file")
    meta.remove("/file", trash=True)
    meta.runtime.advance(-1000)
    meta(TrashEmpty(older_than_s=1))
    assert meta(Usage()).trash_entries == 1
    meta(TrashEmpty(older_than_s=0))
    assert meta(Usage()).trash_entries == 0


def test_what_a_trashed_directory_was_called_is_free(meta: Meta) -> None:
    meta.mkdir("/dir")
    first = meta.remove("/dir", trash=True)
    meta.mkdir("/dir")
    second = meta.remove("/dir", trash=True)
    assert first < second
    meta(TrashRestore(first, ""))
    meta(Rename("/dir", "/other", False))
    meta(TrashRestore(second, ""))
    assert meta.names("/") == ["dir", "other"]
