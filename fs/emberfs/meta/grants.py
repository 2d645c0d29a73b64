"""The move of an inline file to chunks, when several servers share the KV: the grant to do it is a row.

Chunks are written under an inline file's id by one session at a time, the one whose grant is in the row.

    granted     Promote put the row; the session writes chunks
    adopted     AdoptChunks deletes the row in the transaction that switches the layout
    void        given up: by its session (which closed, failed, or asks again), or because its session is gone. Its
                chunks are removed, then the row. Until then nobody is granted anything, and nobody adopts them.

Does not know: paths, and who writes the chunks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from ..errors import Conflict, IsADirectory, NotFound, StaleChunk
from ..kv.types import Transaction
from ..messages import AdoptChunks, InodeReply, Promote, Promoted
from ..types import Chunks, Inline, Inode
from .keys import (
    GrantRow,
    decode_grant,
    encode_row,
    get_inode,
    grant_key,
    put_inode,
    session_key,
    unpack_id,
)
from .scan import pages
from .state import MetaState

WAIT_S = 5.0
"""How long a writer waits for another one to move the file."""
POLL_S = 0.02


class _Held(Exception):
    """Another session has the grant, and is open."""


class _Abandoned(Exception):
    """There is a grant whose chunks must go first."""

    def __init__(self, grant: GrantRow) -> None:
        self.grant = grant


async def promote(state: MetaState, request: Promote) -> Promoted:
    """`files.promote`. One transaction, unless there is a grant already."""
    layout = state.new_layout(request.chunk_size_bytes)

    async def work(txn: Transaction) -> Promoted:
        inode = await existing(txn, request.inode)
        if isinstance(inode.layout, Chunks):
            return Promoted(inode=await state.measured(txn, inode), layout=inode.layout)
        grant = await _get(txn, inode.id)
        if grant is not None:
            # One's own is void: a writer that asks again has failed the first time.
            if grant.session == request.session or not await _is_alive(txn, inode.id, grant):
                raise _Abandoned(grant)
            raise _Held
        if await txn.get(session_key(inode.id, request.session)) is None:
            raise NotFound("the session was closed")
        txn.put(grant_key(inode.id), encode_row(GrantRow(session=request.session, layout=layout)))
        return Promoted(inode=inode, layout=layout)

    deadline_s = state.runtime.now_s() + WAIT_S
    while True:
        try:
            return await state.decide(work, Promoted)
        except _Abandoned as abandoned:
            await state.step(_voiding(request.inode, abandoned.grant), reclaims=True)
            await give_up(state, request.inode)
        except _Held:
            if state.runtime.now_s() >= deadline_s:
                raise Conflict("another writer is moving the file to chunks") from None
            await state.runtime.sleep(POLL_S)


def _voiding(inode: int, grant: GrantRow) -> Callable[[Transaction], Awaitable[None]]:
    """A transaction that makes this very grant void."""

    async def work(txn: Transaction) -> None:
        if await _get(txn, inode) == grant:
            txn.put(grant_key(inode), encode_row(replace(grant, void=True)))

    return work


async def void(txn: Transaction, inode: int, session: bytes) -> None:
    """The session gives its grant up, if it has one. The caller goes on to `give_up`."""
    grant = await _get(txn, inode)
    if grant is not None and grant.session == session:
        txn.put(grant_key(inode), encode_row(replace(grant, void=True)))


async def give_up(state: MetaState, inode: int) -> None:
    """Remove a grant that is void, or that no session is behind any more, and what it led to. May be done again."""
    if await state.kv.begin().get(grant_key(inode)) is None:
        return

    async def make_void(txn: Transaction) -> GrantRow | None:
        grant = await _get(txn, inode)
        if grant is None or await _is_alive(txn, inode, grant):
            return None
        grant = replace(grant, void=True)
        txn.put(grant_key(inode), encode_row(grant))
        return grant

    async with state.claims.of(("promote", inode)) as claim:
        grant = await state.kv.run(make_void, reclaims=True)
        if grant is None:
            return
        await state.chunks.remove(inode, grant.layout, claim=claim)

        async def forget(txn: Transaction) -> None:
            if await _get(txn, inode) == grant:
                txn.delete(grant_key(inode))

        await state.kv.run(forget, reclaims=True)


async def adopt(state: MetaState, request: AdoptChunks) -> InodeReply:
    """`files.adopt_chunks`."""

    async def work(txn: Transaction) -> Inode:
        grant = await _get(txn, request.inode)
        if grant is None or grant.void or grant.layout != request.layout:
            raise StaleChunk("the file was not promoted to these chunks")
        inode = await switch_layout(state, txn, request)
        txn.delete(grant_key(request.inode))
        return inode

    async def refuse(txn: Transaction) -> None:
        # The grant may be gone already, while the chunks were still being written.
        inode, grant = await get_inode(txn, request.inode), await _get(txn, request.inode)
        if inode is not None and isinstance(inode.layout, Inline) and (grant is None or grant.layout == request.layout):
            row = GrantRow(session=request.session, layout=request.layout, void=True)
            txn.put(grant_key(request.inode), encode_row(row))

    try:
        return InodeReply(await state.decide(work, Inode))
    except (StaleChunk, NotFound):
        await state.kv.run(refuse, reclaims=True)
        await give_up(state, request.inode)
        raise


async def clear(state: MetaState) -> None:
    """Take back all grants that nobody is behind any more: what a server or a client that died has left."""
    async for page in pages(state.kv, b"P"):
        for key, _ in page:
            if state.background.stopping:
                return
            await give_up(state, unpack_id(key, 1))


async def switch_layout(state: MetaState, txn: Transaction, request: AdoptChunks) -> Inode:
    """The transaction's part of an AdoptChunks. Done again it finds it done."""
    old = await existing(txn, request.inode)
    if old.layout == request.layout:
        return old
    if not isinstance(old.layout, Inline) or old.revision != request.revision:
        raise StaleChunk("the file changed while it was moved to chunks")
    now_ns = state.runtime.wall_ns()
    new = replace(
        old,
        layout=request.layout,
        length=request.length,
        revision=old.revision + 1,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
    )
    put_inode(txn, old, new)
    return new


async def existing(txn: Transaction, inode: int) -> Inode:
    """A file's inode. Raises NotFound, IsADirectory."""
    file = await get_inode(txn, inode)
    if file is None:
        raise NotFound("the file was removed")
    if not file.is_file:
        raise IsADirectory("not a file")
    return file


async def _get(txn: Transaction, inode: int) -> GrantRow | None:
    row = await txn.get(grant_key(inode))
    return None if row is None else decode_grant(row)


async def _is_alive(txn: Transaction, inode: int, grant: GrantRow) -> bool:
    """Whether the session that has the grant is still there and counts on it."""
    return not grant.void and await txn.get(session_key(inode, grant.session)) is not None
