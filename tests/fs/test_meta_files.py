"""What is in files: put, bytes in the row, the move to chunks, sessions, lengths, truncate, and what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from emberfs.errors import AlreadyExists, Conflict, IsADirectory, LimitExceeded, NotFound, StaleChunk, TargetFailed
from emberfs.kv.types import Transaction
from emberfs.messages import (
    Abandon,
    AdoptChunks,
    CloseSession,
    CommitPut,
    DropTail,
    Opened,
    Promote,
    Promoted,
    ReportLength,
    Reserve,
    Reserved,
    Truncate,
    Usage,
    WriteInline,
)
from emberfs.meta.claims import Claim
from emberfs.types import CHUNK_SIZE_BYTES_MIN, INLINE_BYTES_MAX, Chunks, Inline, Inode

from tests.fs.meta_fakes import CHUNK, FakeChunks, Meta, SharedMeta


@pytest.fixture(params=[Meta, SharedMeta])
def meta(request: pytest.FixtureRequest) -> Iterator[Meta]:
    meta: Meta = request.param()
    yield meta
    meta.close()


def report(meta: Meta, opened: Opened, end: int, *, generation: int = 0, durable: bool = False) -> None:
    meta(ReportLength(opened.session, opened.inode.id, end, generation, durable))


def close(meta: Meta, opened: Opened, end: int = 0, *, generation: int = 0) -> None:
    meta(CloseSession(opened.session, opened.inode.id, end, generation))


def promote(meta: Meta, opened: Opened, length: int) -> Inode:
    """Move an inline file to chunks as a client does."""
    granted: Promoted = meta(Promote(opened.inode.id, CHUNK, opened.session))
    meta.chunks.write(opened.inode.id, length)
    adopt = AdoptChunks(opened.session, opened.inode.id, granted.inode.revision, granted.layout, length)
    return meta(adopt).inode  # type: ignore[no-any-return]


def truncate(meta: Meta, path: str, length: int) -> Inode:
    return meta(Truncate(path, 0, length)).inode  # type: ignore[no-any-return]


def commit(reserved: Reserved, path: str, *, overwrite: bool = True) -> CommitPut:
    return CommitPut(path, reserved.inode, reserved.layout, b"", 7, 0o644, overwrite)


# ---- put


def test_put_swaps_the_entry(meta: Meta) -> None:
    old = meta.put_chunks("/file", 3 * CHUNK)
    new = meta.put_chunks("/file", CHUNK)
    assert meta.stat("/file") == new
    assert new.id != old.id
    assert meta.chunks.of(old.id), "readers of the old file go on"
    usage = meta(Usage())
    assert (usage.files, usage.length_bytes, usage.gc_pending) == (1, CHUNK, 1)


def test_put_refuses(meta: Meta) -> None:
    meta.put("/file")
    meta.mkdir("/dir")
    with pytest.raises(AlreadyExists):
        meta.put("/file", overwrite=False)
    with pytest.raises(IsADirectory):
        meta.put("/dir")
    with pytest.raises(LimitExceeded):
        meta.put("/big", b"x" * (INLINE_BYTES_MAX + 1))
    with pytest.raises(LimitExceeded):
        meta(Reserve(CHUNK_SIZE_BYTES_MIN + 1))


def test_a_commit_may_be_run_again_and_is_not_undone_by_abandon(meta: Meta) -> None:
    reserved = meta(Reserve(CHUNK))
    meta.chunks.write(reserved.inode, 7)
    first = meta(commit(reserved, "/file")).inode
    assert meta(commit(reserved, "/file", overwrite=False)).inode == first
    meta(Abandon(reserved.inode, reserved.layout))
    assert meta.chunks.of(reserved.inode) == {0: 7}


def test_an_abandoned_put_leaves_nothing(meta: Meta) -> None:
    reserved = meta(Reserve(CHUNK))
    meta.chunks.write(reserved.inode, 7)
    meta(Abandon(reserved.inode, reserved.layout))
    assert not meta.chunks.lengths
    with pytest.raises(StaleChunk):
        meta(commit(reserved, "/file"))


def test_an_abandon_that_failed_is_made_up_for_at_the_next_start() -> None:
    chunks = UnremovableChunks()
    meta = Meta(chunks=chunks)
    reserved = meta(Reserve(CHUNK))
    chunks.write(reserved.inode, CHUNK)
    with pytest.raises(TargetFailed):
        meta(Abandon(reserved.inode, reserved.layout))
    meta.run(meta.service.close())
    chunks.broken = False
    meta.start()
    meta.settle()
    assert not chunks.lengths
    meta.close()


class UnremovableChunks(FakeChunks):
    """Removals fail until the disk is mended."""

    broken = True

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        if self.broken:
            raise TargetFailed("the disk does not answer")
        return await super().remove(inode, layout, claim=claim)


# ---- bytes in the row


def test_inline_writes(meta: Meta) -> None:
    opened = meta.open("/file")
    meta(WriteInline(opened.session, opened.inode.id, 3, b"def"))
    assert meta.stat("/file").layout == Inline(b"\0\0\0def")
    meta(WriteInline(opened.session, opened.inode.id, 0, b"abcd"))
    file = meta.stat("/file")
    assert (file.layout, file.length, file.revision) == (Inline(b"abcdef"), 6, 2)
    with pytest.raises(StaleChunk):
        meta(WriteInline(opened.session, opened.inode.id, INLINE_BYTES_MAX, b"x"))
    assert meta(Usage()).length_bytes == 6


def test_an_inline_file_moves_to_chunks(meta: Meta) -> None:
    opened = meta.open("/file")
    meta(WriteInline(opened.session, opened.inode.id, 0, b"abc"))
    file = promote(meta, opened, 2 * CHUNK)
    assert meta.stat("/file") == file
    assert isinstance(file.layout, Chunks)
    assert (file.length, meta(Usage()).length_bytes) == (2 * CHUNK, 2 * CHUNK)
    again = meta(Promote(file.id, CHUNK, opened.session))
    assert (again.inode, again.layout) == (file, file.layout)
    with pytest.raises(StaleChunk):
        meta(WriteInline(opened.session, opened.inode.id, 0, b"abc"))


def test_a_file_that_changed_does_not_take_old_chunks(meta: Meta) -> None:
    opened = meta.open("/file")
    granted = meta(Promote(opened.inode.id, CHUNK, opened.session))
    meta.chunks.write(opened.inode.id, CHUNK)
    meta(WriteInline(opened.session, opened.inode.id, 0, b"abc"))
    adopt = AdoptChunks(opened.session, opened.inode.id, granted.inode.revision, granted.layout, CHUNK)
    for _ in range(2):
        with pytest.raises(StaleChunk):
            meta(adopt)
    assert not meta.chunks.lengths
    assert promote(meta, opened, 2 * CHUNK).length == 2 * CHUNK


def test_a_second_writer_waits_for_the_move_of_the_first(meta: Meta) -> None:
    opened = meta.open("/file")
    granted = meta(Promote(opened.inode.id, CHUNK, opened.session))

    async def both() -> tuple[Inode, Promoted]:
        second = Promote(opened.inode.id, CHUNK, b"another session")
        waiting = meta.runtime.spawn(meta.service.handle(second), "second")
        await meta.runtime.sleep(0)
        adopt = AdoptChunks(opened.session, opened.inode.id, granted.inode.revision, granted.layout, CHUNK)
        adopted = await meta.service.handle(adopt)
        return adopted.inode, await waiting  # type: ignore[attr-defined]

    adopted, second = meta.run(both())
    assert second.inode == adopted
    assert second.layout == granted.layout


def test_a_writer_that_failed_may_ask_again_at_once(meta: Meta) -> None:
    opened = meta.open("/file")
    meta(Promote(opened.inode.id, CHUNK, opened.session))
    meta.chunks.write(opened.inode.id, CHUNK)
    again = meta(Promote(opened.inode.id, CHUNK, opened.session))
    assert not meta.chunks.lengths, "what the first try wrote is gone"
    assert meta(AdoptChunks(opened.session, opened.inode.id, again.inode.revision, again.layout, CHUNK)).inode.layout


def test_a_move_that_was_given_up_leaves_nothing(meta: Meta) -> None:
    opened, other = meta.open("/file"), meta.open("/file")
    meta(Promote(opened.inode.id, CHUNK, opened.session))
    meta.chunks.write(opened.inode.id, CHUNK)
    close(meta, other)
    assert meta.chunks.lengths, "the mover may still be at it"
    close(meta, opened)
    assert not meta.chunks.lengths


def test_a_move_is_given_up_before_the_next_one_begins() -> None:
    chunks = SlowChunks()
    meta = Meta(chunks=chunks)
    first, second = meta.open("/file"), meta.open("/file")
    meta(Promote(first.inode.id, CHUNK, first.session))
    chunks.write(first.inode.id, CHUNK)

    async def both() -> None:
        chunks.began, chunks.go_on = meta.runtime.future(), meta.runtime.future()
        spawn, handle = meta.runtime.spawn, meta.service.handle
        closing = spawn(handle(CloseSession(first.session, first.inode.id, 0, 0)), "first")
        await chunks.began
        granting = spawn(handle(Promote(first.inode.id, CHUNK, second.session)), "second")
        await meta.runtime.sleep(0)
        assert not granting.done()
        chunks.go_on.set_result(None)
        granted = await granting
        assert isinstance(granted, Promoted)
        chunks.write(first.inode.id, 2 * CHUNK)
        await closing
        await handle(AdoptChunks(second.session, first.inode.id, granted.inode.revision, granted.layout, 2 * CHUNK))

    meta.run(both())
    assert chunks.of(first.inode.id) == {0: CHUNK, 1: CHUNK}
    meta.close()


class SlowChunks(FakeChunks):
    """The first removal waits for the test, between looking and removing."""

    began: asyncio.Future[None]
    go_on: asyncio.Future[None]

    async def remove(self, inode: int, layout: Chunks | None, *, claim: Claim | None = None) -> int:
        found = list(self.of(inode))
        if found and not self.began.done():
            self.began.set_result(None)
            await self.go_on
        return len([self.lengths.pop((inode, index)) for index in found])


def test_nobody_takes_a_move_over_from_a_session_that_is_open(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberfs.meta.files.PROMOTE_WAIT_S", 0.0)
    first, second = meta.open("/file"), meta.open("/file")
    granted = meta(Promote(first.inode.id, CHUNK, first.session))
    meta.chunks.write(first.inode.id, CHUNK)
    with pytest.raises(Conflict):
        meta(Promote(first.inode.id, CHUNK, second.session))
    assert meta.chunks.of(first.inode.id) == {0: CHUNK}
    adopt = AdoptChunks(first.session, first.inode.id, granted.inode.revision, granted.layout, CHUNK)
    assert meta(adopt).inode.length == CHUNK


def test_a_move_that_failed_makes_way_at_once(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberfs.meta.files.PROMOTE_WAIT_S", 0.0)
    first, second = meta.open("/file"), meta.open("/file")
    meta(Promote(first.inode.id, CHUNK, first.session))
    meta.chunks.write(first.inode.id, CHUNK)
    meta(DropTail(second.session, first.inode.id))
    assert meta.chunks.lengths, "the grant is not the second's"
    meta(DropTail(first.session, first.inode.id))
    assert not meta.chunks.lengths
    assert isinstance(meta(Promote(first.inode.id, CHUNK, second.session)).inode.layout, Inline)


def test_a_session_that_was_closed_gets_no_grant(meta: Meta) -> None:
    opened = meta.open("/file")
    close(meta, opened)
    with pytest.raises(NotFound):
        meta(Promote(opened.inode.id, CHUNK, opened.session))


# ---- what a failed write leaves


def test_what_a_failed_write_left_past_the_end_goes(meta: Meta) -> None:
    file = meta.put_chunks("/file", CHUNK)
    opened = meta.open("/file")
    meta.chunks.write(file.id, 2 * CHUNK)
    report(meta, opened, 2 * CHUNK)
    meta.chunks.write(file.id, 9 * CHUNK)
    meta(DropTail(opened.session, file.id))
    assert meta.chunks.of(file.id) == {0: CHUNK, 1: CHUNK}
    assert meta.stat("/file").length == 2 * CHUNK
    meta.crash_and_restart()
    assert meta.stat("/file").length == 2 * CHUNK


def test_dropping_a_tail_forgets_no_report(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer reports between the drop's look at the length and its commit."""
    file = meta.put_chunks("/file", CHUNK)
    failed, other = meta.open("/file"), meta.open("/file")
    meta.chunks.write(file.id, 3 * CHUNK)
    run, reports = meta.kv.run, [ReportLength(other.session, file.id, 3 * CHUNK, 0, False)]

    async def interrupted(work: Callable[[Transaction], Awaitable[Inode]], **options: bool) -> Inode:
        async def work_and_report(txn: Transaction) -> Inode:
            done = await work(txn)
            if reports:
                await meta.service.handle(reports.pop())
            return done

        return await run(work_and_report, **options)

    monkeypatch.setattr(meta.kv, "run", interrupted)
    meta(DropTail(failed.session, file.id))
    assert not reports
    assert meta.stat("/file").length == 3 * CHUNK
    assert meta.chunks.of(file.id) == {0: CHUNK, 1: CHUNK, 2: CHUNK}
    with pytest.raises(StaleChunk):
        report(meta, other, 4 * CHUNK)


# ---- sessions and lengths


def test_open(meta: Meta) -> None:
    with pytest.raises(NotFound):
        meta.open("/file", create=False)
    created = meta.open("/file").inode
    assert created.layout == Inline()
    with pytest.raises(AlreadyExists):
        meta.open("/file", exclusive=True)
    meta.mkdir("/dir")
    with pytest.raises(IsADirectory):
        meta.open("/dir")
    assert meta.open("/file").inode == created


def test_one_append_session_at_a_time(meta: Meta) -> None:
    first = meta.open("/file", append=True)
    meta.open("/file")
    with pytest.raises(Conflict):
        meta.open("/file", append=True)
    close(meta, first)
    meta.open("/file", append=True)


def test_a_reported_length_is_seen_at_once_and_kept_when_durable(meta: Meta) -> None:
    file = meta.put_chunks("/file", CHUNK)
    opened = meta.open("/file")
    report(meta, opened, 5 * CHUNK)
    report(meta, opened, 3 * CHUNK)
    assert meta.stat("/file").length == 5 * CHUNK
    assert meta.open("/file").inode.length == 5 * CHUNK
    report(meta, opened, 2 * CHUNK, durable=True)
    meta.crash_and_restart()
    assert meta.stat("/file").length == 5 * CHUNK, "a durable report takes along what was known"
    assert meta.stat("/file").id == file.id


def test_close_keeps_the_length(meta: Meta) -> None:
    meta.put_chunks("/file", CHUNK)
    opened, other = meta.open("/file"), meta.open("/file")
    report(meta, other, 3 * CHUNK)
    close(meta, opened)
    assert meta.stat("/file").length == 3 * CHUNK, "the other's report is not lost"
    close(meta, other, 4 * CHUNK)
    close(meta, other, 4 * CHUNK)
    assert meta.stat("/file").length == 4 * CHUNK
    with pytest.raises(NotFound):
        report(meta, other, 9)


def test_a_report_from_before_a_truncate_is_refused(meta: Meta) -> None:
    meta.put_chunks("/file", CHUNK)
    opened = meta.open("/file")
    report(meta, opened, 4 * CHUNK)
    assert truncate(meta, "/file", 10).truncate_generation == 1
    assert meta.stat("/file").length == 10
    for durable in (False, True):
        with pytest.raises(StaleChunk):
            report(meta, opened, 4 * CHUNK, durable=durable)
    report(meta, opened, 20, generation=1)
    assert meta.stat("/file").length == 20
    with pytest.raises(StaleChunk):
        close(meta, opened, 4 * CHUNK)
    with pytest.raises(NotFound):
        report(meta, opened, 30, generation=1)
    assert meta.stat("/file").length == 20


def test_a_removed_file_is_written_to_its_end(meta: Meta) -> None:
    inline, chunked = meta.open("/inline"), meta.put_chunks("/chunked", CHUNK)
    opened = meta.open("/chunked")
    for path in ("/inline", "/chunked"):
        meta.remove(path)
    meta(WriteInline(inline.session, inline.inode.id, 0, b"x"))
    report(meta, opened, 2 * CHUNK, durable=True)
    assert (meta(Usage()).files, meta(Usage()).length_bytes) == (0, 0)
    close(meta, opened, 3 * CHUNK)
    close(meta, inline)
    assert meta.chunks.of(chunked.id)


# ---- truncate


@pytest.mark.parametrize(("length", "chunks"), [(0, {}), (CHUNK, {0: CHUNK}), (CHUNK + 1, {0: CHUNK, 1: 1})])
def test_truncate_cuts_chunks(meta: Meta, length: int, chunks: dict[int, int]) -> None:
    file = meta.put_chunks("/file", 3 * CHUNK)
    assert truncate(meta, "/file", length).length == length
    assert meta.chunks.of(file.id) == chunks
    assert truncate(meta, "/file", 9 * CHUNK).length == 9 * CHUNK
    assert meta.chunks.of(file.id) == chunks
    assert meta(Usage()).length_bytes == 9 * CHUNK


def test_truncate_cuts_what_a_writer_has_not_reported(meta: Meta) -> None:
    meta.put_chunks("/file", CHUNK)
    opened = meta.open("/file")
    meta.chunks.write(opened.inode.id, 5 * CHUNK)
    truncate(meta, "/file", CHUNK)
    assert meta.chunks.of(opened.inode.id) == {0: CHUNK}


def test_truncate_of_an_inline_file(meta: Meta) -> None:
    meta.put("/file", b"abcdef")
    assert truncate(meta, "/file", 3).layout == Inline(b"abc")
    assert truncate(meta, "/file", 5).layout == Inline(b"abc\0\0")
    with pytest.raises(StaleChunk, match="promote"):
        truncate(meta, "/file", INLINE_BYTES_MAX + 1)
    truncate(meta, "/file", 0)
    grown = truncate(meta, "/file", 1 << 30)
    assert isinstance(grown.layout, Chunks)
    assert (grown.length, meta.stat("/file")) == (1 << 30, grown)


def test_truncate_refuses(meta: Meta) -> None:
    meta.mkdir("/dir")
    with pytest.raises(IsADirectory):
        truncate(meta, "/dir", 0)
    with pytest.raises(LimitExceeded):
        truncate(meta, "/dir", -1)
    with pytest.raises(NotFound):
        meta(Truncate("", 4711, 0))


def test_open_may_truncate(meta: Meta) -> None:
    file = meta.put_chunks("/file", 3 * CHUNK)
    opened = meta.open("/file", truncate=True)
    assert (opened.inode.length, opened.inode.truncate_generation) == (0, 1)
    assert meta.chunks.of(file.id) == {}


class FailingChunks(FakeChunks):
    """Truncates fail until the disk is mended."""

    broken = True

    async def truncate(self, inode: int, layout: Chunks, length: int, *, claim: Claim | None = None) -> None:
        if self.broken:
            raise TargetFailed("the disk does not answer")
        await super().truncate(inode, layout, length, claim=claim)


def test_a_truncate_that_failed_is_finished_before_the_next_session() -> None:
    chunks = FailingChunks()
    meta = Meta(chunks=chunks)
    file = meta.put_chunks("/file", 3 * CHUNK)
    with pytest.raises(TargetFailed):
        truncate(meta, "/file", 5)
    with pytest.raises(TargetFailed):
        meta.open("/file")
    truncate_longer = Truncate("/file", 0, 2 * CHUNK)
    with pytest.raises(TargetFailed):
        meta(truncate_longer)
    chunks.broken = False
    assert meta.open("/file").inode.length == 2 * CHUNK
    assert chunks.of(file.id) == {0: 5}, "the shortest of both"
    meta.close()


# ---- after a crash


def test_the_length_of_a_dead_writer_comes_from_its_chunks(meta: Meta) -> None:
    file = meta.put_chunks("/file", CHUNK)
    meta.open("/file")
    meta.chunks.write(file.id, 3 * CHUNK + 5)
    meta.crash_and_restart()
    assert meta.stat("/file").length == 3 * CHUNK + 5
    meta.chunks.write(file.id, 9 * CHUNK)
    meta.crash_and_restart()
    assert meta.stat("/file").length == 3 * CHUNK + 5, "the session is gone"


def test_a_truncate_is_finished_after_a_crash() -> None:
    chunks = FailingChunks()
    meta = Meta(chunks=chunks)
    file = meta.put_chunks("/file", 3 * CHUNK)
    meta.open("/file")
    with pytest.raises(TargetFailed):
        truncate(meta, "/file", 5)
    chunks.broken = False
    meta.crash_and_restart()
    assert meta.stat("/file").length == 5
    assert chunks.of(file.id) == {0: 5}
    meta.close()


def test_a_crash_leaves_no_chunks_of_nobody(meta: Meta) -> None:
    kept = meta.put_chunks("/kept", CHUNK)
    unlinked = meta.put_chunks("/unlinked", CHUNK)
    meta.remove("/unlinked")
    reserved = meta(Reserve(CHUNK))
    meta.chunks.write(reserved.inode, CHUNK)
    moved = meta.open("/moved")
    meta(Promote(moved.inode.id, CHUNK, moved.session))
    meta.chunks.write(moved.inode.id, CHUNK)
    meta.crash_and_restart()
    meta.settle()
    assert {inode for inode, _ in meta.chunks.lengths} == {kept.id, unlinked.id}
    assert meta(Reserve(CHUNK)).inode > reserved.inode
