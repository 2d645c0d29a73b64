"""Operations at the same time: which of them meet, and that one of those that do runs again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from emberfs.errors import Conflict, DirectoryNotEmpty, InvalidPath, NotFound
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import Transaction
from emberfs.messages import CommitPut, Message, Open, Remove, Rename, Truncate, WriteInline
from emberfs.meta.check import check
from emberfs.runtime import AsyncioRuntime
from emberfs.types import Inline

from tests.fs.meta_fakes import CHUNK, ClockRuntime, Meta


class CountingKV(MemoryKV):
    """Counts attempts, and makes every commit take a moment, so that operations really overlap."""

    def __init__(self, runtime: AsyncioRuntime) -> None:
        super().__init__(runtime, persist=lambda: runtime.sleep(0.001))
        self.attempts = 0

    async def run(self, work: Callable[[Transaction], Awaitable[Any]], *, reclaims: bool = False) -> Any:
        async def counted(txn: Transaction) -> Any:
            self.attempts += 1
            return await work(txn)

        return await super().run(counted, reclaims=reclaims)


@pytest.fixture
def meta() -> Iterator[Meta]:
    runtime = ClockRuntime()
    meta = Meta(CountingKV(runtime), runtime=runtime)
    meta.put("/first")  # takes the lease of ids
    yield meta
    assert meta.run(check(meta.kv, meta.chunks)) == []
    meta.close()


def together(meta: Meta, requests: list[Message]) -> list[Any]:
    """The answers, or errors, of requests that all start before one ends."""

    async def work() -> list[Any]:
        await meta.runtime.sleep(0)  # to the loop: gather wants to be in one
        return await asyncio.gather(*(meta.service.handle(request) for request in requests), return_exceptions=True)

    return meta.run(work())  # type: ignore[no-any-return]


def put(path: str) -> CommitPut:
    return CommitPut(path, 0, None, b"x", 1, 0o644, True)


def test_creates_in_one_directory_do_not_meet(meta: Meta) -> None:
    meta.mkdir("/dir")
    before = meta.kv.attempts
    together(meta, [put(f"/dir/{number:02}") for number in range(64)])
    assert meta.kv.attempts - before == 64
    assert len(meta.names("/dir")) == 64


def test_of_creates_of_one_name_the_last_wins(meta: Meta) -> None:
    before = meta.kv.attempts
    replies = together(meta, [put("/same") for _ in range(8)])
    assert meta.kv.attempts - before > 8, "they did not overlap: the test shows nothing"
    assert meta.stat("/same") in [reply.inode for reply in replies]
    assert meta.names("/") == ["first", "same"]


def test_a_create_and_the_removal_of_its_directory_exclude_each_other(meta: Meta) -> None:
    outcomes: Counter[bool] = Counter()
    for number in range(10):
        meta.mkdir(f"/dir{number}")
        requests = [put(f"/dir{number}/file"), Remove(f"/dir{number}", False, False, "any")]
        created, removed = together(meta, requests if number % 2 else requests[::-1])[:: 1 if number % 2 else -1]
        assert isinstance(created, NotFound) != isinstance(removed, DirectoryNotEmpty)
        outcomes[isinstance(created, NotFound)] += 1
    assert len(outcomes) == 2


def test_two_renames_do_not_make_a_circle(meta: Meta) -> None:
    meta.mkdir("/a")
    meta.mkdir("/b")
    replies = together(meta, [Rename("/a", "/b/a", False), Rename("/b", "/a/b", False)])
    assert sorted(isinstance(reply, NotFound | InvalidPath) for reply in replies) == [False, True]


def test_writes_to_an_inline_file_are_all_there(meta: Meta) -> None:
    opened = meta.open("/file")
    together(meta, [WriteInline(opened.session, opened.inode.id, n, bytes([n])) for n in range(20)])
    layout = meta.stat("/file").layout
    assert isinstance(layout, Inline)
    assert list(layout.data) == list(range(20))


def test_truncates_at_once_leave_the_chunks_of_the_shortest(meta: Meta) -> None:
    file = meta.put_chunks("/file", 9 * CHUNK)
    together(meta, [Truncate("/file", 0, length * CHUNK) for length in (5, 2, 7)])
    assert meta.chunks.of(file.id) == {0: CHUNK, 1: CHUNK}
    assert meta.stat("/file").truncate_generation == 3


def test_two_append_sessions_at_once(meta: Meta) -> None:
    request = Open("/log", True, False, False, 0o644, CHUNK, append=True)
    replies = together(meta, [request, request])
    assert sorted(isinstance(reply, Conflict) for reply in replies) == [False, True]
