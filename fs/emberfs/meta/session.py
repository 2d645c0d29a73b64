"""Sessions: who has a file open for writing, how far a file reaches, and what a crash leaves of that.

The length of a file with chunks is in its row, but a writer does not pay a transaction per write: it reports the end
of what was acknowledged, mostly into memory (a hint), and durably with `flush` and `close`.

Invariants:
  - A report counts only with the file's own `truncate_generation`.
  - An open session is a row, made in the transaction that opened the file. What becomes of the rows of the dead is told
    in `recovery`.

When several servers share the KV there are no hints. A report is a blind maximum in a row beside the inode's: reports
of several writers do not meet, while a truncate, which changes the inode row that every report reads, meets them all.
The maximum goes into the inode row when a session is closed, and is void after a truncate.

Does not know: where chunks are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from ..errors import AlreadyExists, Conflict, Corruption, IsADirectory, NotFound, StaleChunk
from ..kv.types import Transaction, decode_int
from ..messages import CloseSession, Done, DropTail, Open, Opened, ReportLength
from ..types import CLIENT_ID_BYTES, Chunks, Inline, Inode, Kind
from . import grants, nodes
from .files import give_up_promotion
from .keys import (
    SessionRow,
    decode_inode,
    decode_session,
    encode_row,
    get_inode,
    inode_key,
    length_key,
    put_inode,
    session_key,
    session_range,
)
from .paths import locate, locate_new
from .state import Hint, MetaState
from .truncate import finish, set_length


async def open_session(state: MetaState, request: Open) -> Opened:
    """Open a file for writing, and create or truncate it as asked, in one transaction."""
    session = state.runtime.random_bytes(CLIENT_ID_BYTES)

    async def work(txn: Transaction) -> Opened | None:
        inode = await _open(state, txn, request)
        if inode is None:
            return None
        row = SessionRow(state.runtime.wall_ns(), inode.truncate_generation, request.append, state.client)
        txn.put(session_key(inode.id, session), encode_row(row))
        return Opened(await state.measured(txn, inode), session)

    opened: Opened | None = await state.decide(work, Opened | None)
    if opened is None:
        # Raised here, because inside the transaction it would only be tried again.
        raise Conflict("the file is open for appending already", request.path)
    inode = opened.inode
    try:
        await finish(state, inode.id)
    except Corruption:
        closing = CloseSession(opened.session, inode.id, 0, inode.truncate_generation)
        await _closed(state, closing, await state.kv.run(_closing(state, closing), reclaims=True))
        raise
    return opened


async def _open(state: MetaState, txn: Transaction, request: Open) -> Inode | None:
    """The transaction's part: the file, or None if it has an append session and a second one is asked for."""
    find = locate_new if request.create else locate
    place = await find(txn, request.path, follow=not request.exclusive)
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

    if state.shared:
        await state.kv.run(lambda txn: _note_length(txn, request))
        return Done()

    async def work(txn: Transaction) -> Inode:
        inode = await _open_file(txn, request.inode, request.session)
        _check_generation(inode, request.truncate_generation)
        return await _lengthen(state, txn, inode, request.end)

    if not request.durable:
        inode = await _open_file(state.kv.begin(), request.inode, request.session)
        _check_generation(inode, request.truncate_generation)
        if inode.id not in state.settling:
            if request.end > state.hinted(inode).length:
                state.hints[inode.id] = Hint(inode.truncate_generation, request.end, state.runtime.wall_ns())
            return Done()
    _settle_hint(state, request.inode, await state.kv.run(work))
    return Done()


async def _note_length(txn: Transaction, request: ReportLength) -> None:
    """A report in the shared KV. One that says nothing new writes nothing. May be done again."""
    inode = await _open_file(txn, request.inode, request.session)
    _check_generation(inode, request.truncate_generation)
    if isinstance(inode.layout, Chunks) and request.end > inode.length:
        key = length_key(inode.id)
        if request.end > decode_int(await txn.get(key, snapshot=True)):
            txn.max(key, request.end)


async def drop_tail(state: MetaState, request: DropTail) -> Done:
    """Remove what a failed write left past the end of a file, as a truncate to the length that it has.

    The truncate makes other writers' reports stale: what they wrote there meanwhile goes too, and they write it again.
    """

    async def work(txn: Transaction) -> Inode:
        inode = await _open_file(txn, request.inode, request.session)
        if not isinstance(inode.layout, Chunks):
            if state.shared:
                await grants.void(txn, inode.id, request.session)
            return inode
        return await set_length(state, txn, inode, (await state.measured(txn, inode)).length)

    async with state.turns.of(("tail", request.inode)):
        # A report into memory between our look at the hint and our commit would be forgotten.
        state.settling.add(request.inode)
        try:
            inode = await state.decide(work, Inode, reclaims=True)
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

    inode: Inode | None = await state.decide(_closing(state, request), Inode | None, reclaims=True)
    await _closed(state, request, inode)
    if inode is not None and request.end:
        _check_generation(inode, request.truncate_generation)
    return Done()


def _closing(state: MetaState, request: CloseSession) -> Callable[[Transaction], Awaitable[Inode | None]]:
    """The transaction that ends a session. Its result is the file."""

    async def work(txn: Transaction) -> Inode | None:
        txn.delete(session_key(request.inode, request.session))
        inode = await get_inode(txn, request.inode)
        if inode is not None:
            valid = inode.truncate_generation == request.truncate_generation
            inode = await _lengthen(state, txn, inode, request.end if valid else 0)
        return inode

    return work


async def _closed(state: MetaState, request: CloseSession, inode: Inode | None) -> None:
    """What is left to do when a session has ended."""
    _settle_hint(state, request.inode, inode)
    if inode is None or not isinstance(inode.layout, Chunks):
        await give_up_promotion(state, request.inode, request.session)


async def _open_file(txn: Transaction, inode: int, session: bytes) -> Inode:
    """The file of an open session; NotFound if either is gone."""
    row, file = await txn.get_many([session_key(inode, session), inode_key(inode)])
    if row is None:
        raise NotFound("the session was closed")
    if file is None:
        raise NotFound("the file was removed")
    return decode_inode(file)


def _check_generation(inode: Inode, truncate_generation: int) -> None:
    if inode.truncate_generation != truncate_generation:
        raise StaleChunk("the file was truncated meanwhile")


async def _lengthen(state: MetaState, txn: Transaction, inode: Inode, end: int) -> Inode:
    """Put the length of a file with chunks into its row: `end`, 0 if nothing was written, or what reports say already.

    An inline file has the length of its data.
    """
    if not isinstance(inode.layout, Chunks):
        return inode
    length = max(end, (await state.measured(txn, inode)).length)
    if not (end or length > inode.length):
        return inode
    now_ns = state.runtime.wall_ns()
    new = replace(inode, length=length, mtime_ns=now_ns, ctime_ns=now_ns)
    put_inode(txn, inode, new)
    if state.shared:
        txn.delete(length_key(inode.id))
    return new


def _settle_hint(state: MetaState, inode: int, row: Inode | None) -> None:
    """Drop a hint that says no more than the row. One that came meanwhile, from another session, stays."""
    hint = state.hints.get(inode)
    if hint and (row is None or state.hinted(row) is row):
        del state.hints[inode]
