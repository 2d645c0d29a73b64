"""Rows read by messages, page by page, are the rows; and nothing else can be had or changed that way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from emberfs.cluster.rows import ClusterRows
from emberfs.errors import AccessDenied, LimitExceeded
from emberfs.kv.types import KV
from emberfs.maintenance import paths_of
from emberfs.messages import Message, ReadRows, SetXattr
from emberfs.meta import reading

from tests.fs.meta_fakes import Meta


class Service:
    """A connection to a metadata service."""

    def __init__(self, meta: Meta) -> None:
        self.meta = meta
        self.calls = 0

    async def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.calls += 1
        return await self.meta.service.handle(request)


@pytest.fixture
def meta() -> Iterator[Meta]:
    meta = Meta()
    yield meta
    meta.close()


def test_pages_add_up_to_the_rows(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE_ROWS", 7)
    monkeypatch.setattr(reading, "REPLY_BYTES_MAX", 100 << 10)
    for number in range(60):
        meta.put(f"/{number}", bytes([number]) * 1000)
    for number in range(5):
        meta(SetXattr("/1", f"user.{number}", b"x" * (60 << 10)))
    service = Service(meta)
    rows = ClusterRows(service, meta.runtime)

    async def read(kv: KV) -> list[object]:
        txn = kv.begin()
        everything = await txn.range(b"", b"\xff")
        keys = [key for key, _ in everything]
        return [
            everything,
            await txn.range(b"", b"\xff", reverse=True),
            await txn.range(b"D", b"J", limit=20),
            await txn.get_many([*keys, b"none", *keys[:3]]),
            await txn.get(keys[3]),
            await txn.range(b"zz", b"zz"),
        ]

    assert meta.run(read(rows)) == meta.run(read(meta.kv))
    assert service.calls > 40


def test_paths_are_found_through_a_service(meta: Meta) -> None:
    meta.mkdir("/a/b", parents=True)
    inode = meta.put("/a/b/c").id
    rows = ClusterRows(Service(meta), meta.runtime)
    assert meta.run(paths_of(rows, [inode, 999])) == {inode: "/a/b/c", 999: "inode 3e7"}


def test_nothing_is_written_that_way(meta: Meta) -> None:
    rows = ClusterRows(Service(meta), meta.runtime)

    async def write() -> None:
        txn = rows.begin()
        txn.put(b"V", b"")
        await txn.commit()

    with pytest.raises(AccessDenied, match="metadata servers only"):
        meta.run(write())


@pytest.mark.parametrize("request_", [ReadRows(keys=[b"\xff\xff1"]), ReadRows(begin=b"\xff", end=b"\xff\xff1")])
def test_the_rows_of_others_are_not_shown(meta: Meta, request_: ReadRows) -> None:
    with pytest.raises(LimitExceeded):
        meta(request_)
