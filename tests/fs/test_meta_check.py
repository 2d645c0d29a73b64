"""fsck: each kind of damage is found, named, and mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from emberfs.kv.types import Transaction, encode_int
from emberfs.messages import GetXattrs, Link, Reserve, SetXattr, Symlink, TrashList, Usage
from emberfs.meta.check import Finding, check
from emberfs.meta.keys import Counter, encode_inode, entry_key, entry_value, inode_key, mtime_key, pack_id, trash_key
from emberfs.types import ROOT_INODE, TRASH_INODE, Inode, Kind
from msgspec.structs import replace

from tests.fs.meta_fakes import CHUNK, Meta

Rows = list[tuple[bytes, bytes | None]]
"""Rows to set, or to remove."""


@pytest.fixture
def meta() -> Iterator[Meta]:
    meta = Meta()
    meta.mkdir("/dir/sub", parents=True)
    meta.put_chunks("/dir/file", 2 * CHUNK)
    meta.put("/dir/sub/small", b"x")
    meta(Link("/dir/file", "/linked"))
    meta(Symlink("/dir", "/link"))
    meta(SetXattr("/dir/file", "user.note", b"x"))
    meta.put("/trashed")
    meta.remove("/trashed", trash=True)
    meta.put_chunks("/garbage", CHUNK)
    meta.remove("/garbage")
    yield meta
    meta.close()


def damage(meta: Meta, rows: Rows) -> None:
    async def work(txn: Transaction) -> None:
        for key, value in rows:
            txn.delete(key) if value is None else txn.put(key, value)

    meta.run(meta.kv.run(work))


def run(meta: Meta, *, repair: bool = False) -> list[Finding]:
    return meta.run(check(meta.kv, meta.chunks, repair=repair))  # type: ignore[no-any-return]


def kinds(findings: list[Finding]) -> list[str]:
    return sorted({finding.kind for finding in findings})


def test_a_sound_namespace_has_no_findings(meta: Meta) -> None:
    assert run(meta) == []


def key_of(meta: Meta, path: str, name: str) -> bytes:
    return entry_key(pack_id(meta.stat(path).id), name.encode())


def drop_inode(meta: Meta) -> Rows:
    return [(inode_key(meta.stat("/dir/sub/small").id), None)]


def drop_directory(meta: Meta) -> Rows:
    return [(inode_key(meta.stat("/dir/sub").id), None)]


def drop_entry(meta: Meta) -> Rows:
    return [(key_of(meta, "/dir/sub", "small"), None)]


def drop_directory_entry(meta: Meta) -> Rows:
    return [(key_of(meta, "/dir", "sub"), None)]


def drop_one_name(meta: Meta) -> Rows:
    return [(key_of(meta, "/", "linked"), None)]


def say_wrong_kind(meta: Meta) -> Rows:
    return [(key_of(meta, "/dir", "file"), entry_value(meta.stat("/dir/file").id, Kind.DIRECTORY))]


def name_directory_twice(meta: Meta) -> Rows:
    return [(key_of(meta, "/", "again"), entry_value(meta.stat("/dir/sub").id, Kind.DIRECTORY))]


def say_wrong_parent(meta: Meta) -> Rows:
    sub = meta.stat("/dir/sub")
    return [(inode_key(sub.id), encode_inode(replace(sub, parent=ROOT_INODE, name="other")))]


def leave_rows(meta: Meta) -> Rows:
    return [(mtime_key(4711), encode_int(1))]


def drop_trash_entry(meta: Meta) -> Rows:
    return [(entry_key(pack_id(TRASH_INODE), meta(TrashList()).entries[0].id.encode()), None)]


def drop_trash_row(meta: Meta) -> Rows:
    return [(trash_key(meta(TrashList()).entries[0].id), None)]


def miscount(meta: Meta) -> Rows:
    return [(counter.value, encode_int(99)) for counter in Counter]


def leave_chunks(meta: Meta) -> Rows:
    meta.chunks.write(meta.stat("/dir/file").id + 1000, CHUNK)
    return []


@pytest.mark.parametrize(
    ("harm", "found", "where"),
    [
        (drop_inode, {"counter", "entry"}, "/dir/sub/small"),
        (drop_directory, {"counter", "entry", "row", "unnamed"}, "/dir/sub"),
        (drop_entry, {"unnamed"}, "/lost+found/"),
        (drop_directory_entry, {"unnamed"}, "/lost+found/"),
        (drop_one_name, {"links"}, ""),
        (say_wrong_kind, {"entry"}, "/dir/file"),
        (name_directory_twice, {"entry", "parent"}, "/again"),
        (say_wrong_parent, {"parent"}, "sub"),
        (leave_rows, {"row"}, ""),
        (drop_trash_entry, {"counter", "trash", "unnamed"}, "/lost+found/"),
        (drop_trash_row, {"trash"}, ""),
        (miscount, {"counter"}, ""),
        (leave_chunks, {"chunks"}, ""),
    ],
)
def test_damage_is_found_and_mended(meta: Meta, harm: Callable[[Meta], Rows], found: set[str], where: str) -> None:
    damage(meta, harm(meta))
    seen = run(meta)
    assert set(kinds(seen)) <= found
    assert kinds(seen), "nothing was found"
    assert any(where in finding.path for finding in seen)
    assert not any(finding.repaired for finding in seen)
    assert kinds(run(meta)) == kinds(seen), "looking mends nothing"
    mended = run(meta, repair=True)
    assert set(kinds(mended)) <= found
    assert all(finding.repaired for finding in mended)
    assert run(meta) == []


def test_a_lost_file_is_found_in_lost_and_found(meta: Meta) -> None:
    lost: Inode = meta.stat("/dir/sub/small")
    damage(meta, drop_directory_entry(meta))
    damage(meta, drop_one_name(meta))
    run(meta, repair=True)
    (name,) = meta.names("/lost+found")
    assert meta.stat(f"/lost+found/{name}/small") == lost
    assert meta.stat("/dir/file").nlink == 1
    assert meta(GetXattrs("/dir/file")).values
    meta.remove("/lost+found", recursive=True)
    assert meta(Usage()).trash_entries == 1


def test_chunks_of_a_file_that_is_being_made_are_left_alone(meta: Meta) -> None:
    reserved = meta(Reserve(CHUNK))
    meta.chunks.write(reserved.inode, CHUNK)
    assert meta.run(meta.service.check(repair=True)) == []
    assert meta.chunks.of(reserved.inode) == {0: CHUNK}
    assert kinds(run(meta)) == ["chunks"], "without the service nobody knows"
