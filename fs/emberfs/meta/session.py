"""Sessions: who has a file open for writing, how far a file reaches, and what a crash leaves of that.

The length of a file with chunks is in its row, but a writer does not pay a transaction per write: it reports the end
of what was acknowledged, mostly into memory (a hint), and durably with `flush` and `close`.

Invariants:
  - A report counts only with the file's own `truncate_generation`.
  - An open session is a row, made in the transaction that opened the file. Rows that are there when the service starts
    belong to the dead: their files' lengths are taken from the chunks, and the rows go.

Does not know: where chunks are.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from ..errors import AlreadyExists, Conflict, Corruption, IsADirectory, NotFound, StaleChunk
from ..kv.types import Transaction
from ..messages import CloseSession, Done, DropTail, Open, Opened, ReportLength
from ..types import CLIENT_ID_BYTES, Chunks, Inline, Inode, Kind
from . import nodes
from .files import give_up_promotion
from .keys import (
    SessionRow,
    decode_session,
    encode_row,
    get_inode,
    put_inode,
    session_key,
    session_range,
    unpack_id,
)
from .paths import locate
from .scan import pages
from .state import Hint, MetaState
from .truncate import finish, set_length

log = logging.getLogger("emberline.meta")


async def open_session(state: MetaState, request: Open) -> Opened:
    """Open a file for writing, and create or truncate it as asked, in one transaction."""
    session = state.runtime.random_bytes(CLIENT_ID_BYTES)

    async def work(txn: Transaction) -> Inode | None:
        inode = await _open(state, txn, request)
        if inode is not None:
            row = SessionRow(state.runtime.wall_ns(), inode.truncate_generation, request.append)
            txn.put(session_key(inode.id, session), encode_row(row))
        return inode

    inode = await state.kv.run(work)
    if inode is None:
        # Raised here, because inside the transaction it would only be tried again.
        raise Conflict("the file is open for appending already", request.path)
    try:
        await finish(state, inode.id)
    except Corruption:
        await close_session(state, CloseSession(session, inode.id, 0, inode.truncate_generation))
        raise
    return Opened(inode=state.hinted(inode), session=session)


async def _open(state: MetaState, txn: Transaction, request: Open) -> Inode | None:
    """The transaction's part: the file, or None if it has an append session and a second one is asked for."""
    place = await locate(txn, request.path, follow=not request.exclusive)
    if place.entry is None:
        if not request.create:
            raise NotFound("no such file", request.path)
        state.new_layout(request.chunk_size_bytes)  # refuses a bad size now, not when the file outgrows its row
        return await nodes.create(
            state,
            txn,
            place,
            request.path,
            kind=Kind.FILE,
            mode=request.mode,
            uid=request.uid,
            gid=request.gid,
            layout=Inline(),
        )
    if request.exclusive:
        raise AlreadyExists("the file exists", request.path)
    if place.is_dir:
        raise IsADirectory("cannot write to a directory", request.path)
    inode = await get_inode(txn, place.inode)
    assert inode is not None, "an entry names a missing inode"
    if request.append and await _is_appended(txn, inode.id):
        return None
    return await set_length(state, txn, inode, 0) if request.truncate else inode


async def _is_appended(txn: Transaction, inode: int) -> bool:
    sessions = await txn.range(*session_range(inode))
    return any(decode_session(row).append for _, row in sessions)


async def report_length(state: MetaState, request: ReportLength) -> Done:
    """Note that a file reaches at least `end`; in its row when `durable`, else in memory."""

    async def work(txn: Transaction) -> Inode:
        inode = await _open_file(txn, request.inode, request.session)
        _check_generation(inode, request.truncate_generation)
        return _lengthen(state, txn, inode, request.end)

    if not request.durable:
        inode = await _open_file(state.kv.begin(), request.inode, request.session)
        _check_generation(inode, request.truncate_generation)
        if inode.id not in state.settling:
            if request.end > state.hinted(inode).length:
                state.hints[inode.id] = Hint(inode.truncate_generation, request.end, state.runtime.wall_ns())
            return Done()
    _settle_hint(state, request.inode, await state.kv.run(work))
    return Done()


async def drop_tail(state: MetaState, request: DropTail) -> Done:
    """Remove what a failed write left past the end of a file, as a truncate to the length that it has.

    The truncate makes other writers' reports stale: what they wrote there meanwhile goes too, and they write it again.
    """

    async def work(txn: Transaction) -> Inode:
        inode = await _open_file(txn, request.inode, request.session)
        if not isinstance(inode.layout, Chunks):
            return inode
        return await set_length(state, txn, inode, state.hinted(inode).length)

    async with state.turns.of(("tail", request.inode)):
        # A report into memory between our look at the hint and our commit would be forgotten.
        state.settling.add(request.inode)
        try:
            inode = await state.kv.run(work, reclaims=True)
        finally:
            state.settling.discard(request.inode)
    _settle_hint(state, request.inode, inode)
    if isinstance(inode.layout, Chunks):
        await finish(state, request.inode)
    else:
        await give_up_promotion(state, request.inode, request.session)
    return Done()


async def close_session(state: MetaState, request: CloseSession) -> Done:
    """End a session with its last report. Closing it again, or a file that was removed, is fine.

    StaleChunk if the report is from before a truncate: the session is closed all the same.
    """

    async def work(txn: Transaction) -> Inode | None:
        txn.delete(session_key(request.inode, request.session))
        inode = await get_inode(txn, request.inode)
        if inode is not None:
            valid = inode.truncate_generation == request.truncate_generation
            inode = _lengthen(state, txn, inode, request.end if valid else 0)
        return inode

    inode = await state.kv.run(work, reclaims=True)
    _settle_hint(state, request.inode, inode)
    if inode is None or not isinstance(inode.layout, Chunks):
        await give_up_promotion(state, request.inode, request.session)
    if inode is not None and request.end:
        _check_generation(inode, request.truncate_generation)
    return Done()


async def _open_file(txn: Transaction, inode: int, session: bytes) -> Inode:
    """The file of an open session; NotFound if either is gone."""
    if await txn.get(session_key(inode, session)) is None:
        raise NotFound("the session was closed")
    file = await get_inode(txn, inode)
    if file is None:
        raise NotFound("the file was removed")
    return file


def _check_generation(inode: Inode, truncate_generation: int) -> None:
    if inode.truncate_generation != truncate_generation:
        raise StaleChunk("the file was truncated meanwhile")


def _lengthen(state: MetaState, txn: Transaction, inode: Inode, end: int) -> Inode:
    """Put the length of a file with chunks into its row: `end`, 0 if nothing was written, or what hints know already.

    An inline file has the length of its data.
    """
    length = max(end, state.hinted(inode).length)
    if not isinstance(inode.layout, Chunks) or not (end or length > inode.length):
        return inode
    now_ns = state.runtime.wall_ns()
    new = replace(inode, length=length, mtime_ns=now_ns, ctime_ns=now_ns)
    put_inode(txn, inode, new)
    return new


def _settle_hint(state: MetaState, inode: int, row: Inode | None) -> None:
    """Drop a hint that says no more than the row. One that came meanwhile, from another session, stays."""
    hint = state.hints.get(inode)
    if hint and (row is None or state.hinted(row) is row):
        del state.hints[inode]


# ---- after a crash


async def recover(state: MetaState) -> int:
    """Finish what the sessions of a dead process left, before any new one is granted. Returns how many there were.

    Pending truncates are carried out, lengths taken from the chunks, session rows removed. May be interrupted and run
    again.
    """
    for inode in await _all_inodes(state, b"T"):
        try:
            await finish(state, inode)
        except Corruption as error:
            # One damaged file must not keep the store closed: who opens it for writing is told, and it stays due.
            log.warning("the truncate of inode %x waits: %s", inode, error)
    recovered = 0
    for inode in await _all_inodes(state, b"S"):
        recovered += 1
        await _recover_file(state, inode)
    return recovered


async def _recover_file(state: MetaState, inode: int) -> None:
    row = await get_inode(state.kv.begin(), inode)
    end = 0
    if row is not None and isinstance(row.layout, Chunks):
        end = await state.chunks.end(inode, row.layout)
    elif row is not None:
        # Chunks of a Promote whose AdoptChunks never came.
        await state.chunks.remove(inode, None)

    async def work(txn: Transaction) -> None:
        old = await get_inode(txn, inode)
        if old is not None and end > old.length:
            put_inode(txn, old, replace(old, length=end))
        txn.delete_range(*session_range(inode))

    await state.kv.run(work, reclaims=True)


async def _all_inodes(state: MetaState, prefix: bytes) -> list[int]:
    """The inodes that have a row of this letter, each once, in order."""
    inodes = {unpack_id(key, 1): None async for page in pages(state.kv, prefix) for key, _ in page}
    return list(inodes)
