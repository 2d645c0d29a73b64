"""The metadata backup: what a dump holds is what a load gives back."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from emberfs.errors import AlreadyExists, StoreFormat
from emberfs.kv.memory import MemoryKV
from emberfs.messages import CollectGarbage, GetXattrs, Link, SetXattr, Symlink, TrashList, Usage
from emberfs.meta.check import check
from emberfs.meta.dump import dump, load

from tests.fs.meta_fakes import CHUNK, Meta


@pytest.fixture
def meta() -> Iterator[Meta]:
    meta = Meta()
    yield meta
    meta.close()


def fill(meta: Meta) -> None:
    meta.mkdir("/dir/ü", parents=True)
    for number in range(30):
        meta.put(f"/dir/{number}", bytes([number]) * 4096)
    meta.put_chunks("/dir/ü/chunks", 2 * CHUNK)
    meta(Link("/dir/ü/chunks", "/linked"))
    meta(Symlink("dir/ü", "/link"))
    for number in range(40):
        meta(SetXattr("/linked", f"user.{number}", b"\xff" * (64 << 10)))
    meta.remove("/dir/0", trash=True)
    meta.put_chunks("/garbage", CHUNK)
    meta.remove("/garbage")


def lines_of(meta: Meta) -> list[str]:
    lines: list[str] = []
    meta.run(dump(meta.kv, lines.append))
    return lines


def load_into_new(meta: Meta, lines: list[str]) -> Meta:
    """A second service, on the same runtime, started on what was loaded."""
    kv = MemoryKV(meta.runtime)
    meta.run(load(kv, lines))
    return Meta(kv, runtime=meta.runtime, chunks=meta.chunks)


def test_a_dump_comes_back_whole(meta: Meta) -> None:
    fill(meta)
    lines = lines_of(meta)
    copy = load_into_new(meta, lines)
    for path in ("/", "/dir", "/dir/ü", "/dir/7", "/linked", "/link"):
        assert copy.stat(path, follow=False) == meta.stat(path, follow=False)
        assert copy(GetXattrs(path)) == meta(GetXattrs(path))
    assert copy.names("/dir") == meta.names("/dir")
    assert copy(TrashList()) == meta(TrashList())
    assert copy(Usage()) == meta(Usage())
    assert copy.run(check(copy.kv, copy.chunks)) == []
    assert lines_of(copy)[1:] == lines[1:]
    assert copy.put("/new").id not in {json.loads(line).get("id") for line in lines}
    assert copy(CollectGarbage(force=True)).files == 1
    copy.run(copy.service.close())


def test_each_line_can_be_read_by_people(meta: Meta) -> None:
    meta.put("/file", b"hello")
    header, *rows = map(json.loads, lines_of(meta))
    assert header["emberline_metadata"] == 1
    assert header["counts"]["inode"] == sum(row["row"] == "inode" for row in rows)
    assert {"row": "entry", "parent": 1, "name": "file", "inode": 16, "kind": 1} in rows
    (file,) = [row for row in rows if row.get("id") == 16]
    assert (file["layout"], file["mode"]) == ({"inline": "aGVsbG8="}, 0o644)


def test_load_wants_an_empty_namespace(meta: Meta) -> None:
    lines = lines_of(meta)
    meta.put("/file")
    with pytest.raises(AlreadyExists):
        meta.run(load(meta.kv, lines))
    assert meta.names("/") == ["file"]


def test_a_bad_dump_is_refused_and_leaves_nothing_that_starts(meta: Meta) -> None:
    meta.put("/file", b"hello")
    header, *rows = lines_of(meta)
    newer = header.replace('"emberline_metadata":1', '"emberline_metadata":2')
    bad: list[tuple[list[str], str]] = [
        ([], "no JSON"),
        (["{}"], "no header"),
        (["[1]"], "no JSON"),
        ([newer, *rows], "format 2"),
        (['{"emberline_metadata":1}', *rows], "header of the dump is damaged"),
        ([header, *rows[:-1]], "not whole"),
        ([header, *rows, "{"], "no JSON"),
        ([header, '{"row": "inode", "id": "x"}', *rows], "damaged line"),
        ([header, '{"row": "bird"}', *rows], "damaged line"),
    ]
    for lines, message in bad:
        kv = MemoryKV(meta.runtime)
        with pytest.raises(StoreFormat, match=message):
            meta.run(load(kv, lines))
        if kv.snapshot():
            with pytest.raises(StoreFormat):
                Meta(kv, runtime=meta.runtime)
