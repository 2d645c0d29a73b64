"""What is in a file: whole objects (`put`), bytes in the inode row, and the way from there to chunks.

Invariants:
  - `put` writes chunks under a reserved id that nobody can see, then one transaction swaps the entry.
  - An inline file's length is that of its data, and `revision` grows with each change of it.
  - Chunks are written under an inline file's id by one writer at a time: the one whose Promote was granted.

Does not know: length reports, and how sessions come and go.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import AlreadyExists, Conflict, IsADirectory, LimitExceeded, NotFound, StaleChunk
from ..kv.types import Transaction
from ..messages import (
    Abandon,
    AdoptChunks,
    CommitPut,
    Done,
    InodeReply,
    Promote,
    Promoted,
    Reserve,
    Reserved,
    WriteInline,
)
from ..types import INLINE_BYTES_MAX, Chunks, Inline, Inode, Kind
from . import grants, nodes
from .keys import get_inode, put_inode, session_key
from .paths import locate_new
from .state import MetaState, Promotion

PROMOTE_WAIT_S = 5.0
"""How long a writer waits for another one to move the file."""
PROMOTE_POLL_S = 0.01


async def reserve(state: MetaState, request: Reserve) -> Reserved:
    """An id and a layout to write chunks under. Memory only: a crash leaves chunks that the next start removes.

    When several servers share the KV the id is of a block that belongs to the client: see `blocks`.
    """
    layout = state.new_layout(request.chunk_size_bytes)
    if state.shared:
        return Reserved(inode=await state.blocks.take(state.client), layout=layout)
    inode = await state.ids.take()
    state.reserved.add(inode)
    return Reserved(inode=inode, layout=layout)


async def commit_put(state: MetaState, request: CommitPut) -> InodeReply:
    """Make reserved chunks, or inline bytes, the file at a path. Run again after UpdateUnknown it finds it done."""
    if not request.inode and len(request.data) > INLINE_BYTES_MAX:
        raise LimitExceeded(f"{len(request.data)} inline bytes, at most {INLINE_BYTES_MAX}")

    async def work(txn: Transaction) -> Inode:
        place = await locate_new(txn, request.path, follow=True)
        if place.entry is not None:
            if place.is_dir:
                raise IsADirectory("a directory is in the way", request.path)
            old = await get_inode(txn, place.inode)
            assert old is not None, "an entry names a missing inode"
            if old.id == request.inode:
                return old
            if not request.overwrite:
                raise AlreadyExists("the file exists", request.path)
            nodes.release(state, txn, old, await nodes.attached(txn, old))
        if request.inode and state.shared:
            await state.blocks.check(txn, state.client, request.inode)
        elif request.inode and request.inode not in state.reserved:
            raise StaleChunk("the file's inode is not reserved any more")
        return await nodes.create(
            state,
            txn,
            place,
            request.path,
            kind=Kind.FILE,
            mode=request.mode,
            uid=request.uid,
            gid=request.gid,
            inode=request.inode,
            layout=request.layout if request.inode else Inline(request.data),
            length=request.length if request.inode else len(request.data),
            mtime_ns=request.mtime_ns,
        )

    inode = await state.decide(work, Inode)
    state.reserved.discard(request.inode)
    if state.shared:
        state.blocks.committed(state.client, request.inode)
    return InodeReply(inode)


async def abandon(state: MetaState, request: Abandon) -> Done:
    """Remove the chunks of a reserved inode, unless it was committed after all."""
    if state.shared:
        is_unnamed = await state.blocks.abandon(request.inode)
    else:
        is_unnamed = await get_inode(state.kv.begin(), request.inode) is None
    if is_unnamed:
        await state.chunks.remove(request.inode, request.layout)
    # Not before they are gone: the ids of a service that has nothing reserved are not swept at its next start.
    state.reserved.discard(request.inode)
    return Done()


async def write_inline(state: MetaState, request: WriteInline) -> InodeReply:
    """Change the bytes of an inline file. StaleChunk if it is not inline, or not any more after this."""

    async def work(txn: Transaction) -> Inode:
        old = await grants.existing(txn, request.inode)
        if not isinstance(old.layout, Inline):
            raise StaleChunk("the file is in chunks")
        data = old.layout.data
        offset = request.offset
        end = offset + len(request.data)
        if end > INLINE_BYTES_MAX:
            raise StaleChunk(f"{end} bytes do not fit into the inode row: promote the file first")
        return _put_data(state, txn, old, data[:offset].ljust(offset, b"\0") + request.data + data[end:])

    return InodeReply(await state.decide(work, Inode))


def _put_data(state: MetaState, txn: Transaction, old: Inode, data: bytes) -> Inode:
    now_ns = state.runtime.wall_ns()
    new = replace(
        old, layout=Inline(data), length=len(data), revision=old.revision + 1, mtime_ns=now_ns, ctime_ns=now_ns
    )
    put_inode(txn, old, new)
    return new


async def promote(state: MetaState, request: Promote) -> Promoted:
    """Grant one writer to move an inline file to chunks, until it adopts them, gives up, or its session closes.

    A second writer waits for the first, and gets the row without a grant if the file is in chunks by then. Conflict if
    the first is at it still after PROMOTE_WAIT_S: its chunks may be on their way, so nobody else may write any.
    """
    if state.shared:
        return await grants.promote(state, request)
    layout = state.new_layout(request.chunk_size_bytes)
    deadline_s = state.runtime.now_s() + PROMOTE_WAIT_S
    while True:
        async with state.turns.of(("promote", request.inode)):
            txn = state.kv.begin()
            inode = await grants.existing(txn, request.inode)
            if isinstance(inode.layout, Chunks):
                return Promoted(inode=state.hinted(inode), layout=inode.layout)
            if not await _held_by_another(state, txn, request):
                if await txn.get(session_key(inode.id, request.session)) is None:
                    raise NotFound("the session was closed")
                failed = state.promoting.get(inode.id)
                state.promoting[inode.id] = Promotion(request.session, layout)
                if failed is not None:
                    await state.chunks.remove(inode.id, failed.layout)
                return Promoted(inode=inode, layout=layout)
        if state.runtime.now_s() >= deadline_s:
            raise Conflict("another writer is moving the file to chunks")
        await state.runtime.sleep(PROMOTE_POLL_S)


async def _held_by_another(state: MetaState, txn: Transaction, request: Promote) -> bool:
    """Whether somebody else has the grant. One's own is void: a writer that asks again has failed the first time."""
    promotion = state.promoting.get(request.inode)
    if promotion is None or promotion.session == request.session:
        return False
    return await txn.get(session_key(request.inode, promotion.session)) is not None


async def give_up_promotion(state: MetaState, inode: int, session: bytes) -> None:
    """Remove what a session's Promote led to without an AdoptChunks, and its grant. Nothing if it has none."""
    if state.shared:
        await grants.give_up(state, inode)
        return
    async with state.turns.of(("promote", inode)):
        promotion = state.promoting.get(inode)
        if promotion is not None and promotion.session == session:
            await state.chunks.remove(inode, promotion.layout)
            del state.promoting[inode]


async def adopt_chunks(state: MetaState, request: AdoptChunks) -> InodeReply:
    """Switch an inline file to the chunks that its Promote was for. After StaleChunk those chunks are gone."""
    if state.shared:
        return await grants.adopt(state, request)

    async def work(txn: Transaction) -> Inode:
        return await grants.switch_layout(state, txn, request)

    async with state.turns.of(("promote", request.inode)):
        promotion = state.promoting.get(request.inode)
        if promotion is None or promotion.layout != request.layout:
            raise StaleChunk("the file was not promoted to these chunks")
        try:
            inode = await state.kv.run(work)
        except (StaleChunk, NotFound):
            await state.chunks.remove(request.inode, request.layout)
            del state.promoting[request.inode]
            raise
        del state.promoting[request.inode]
        return InodeReply(inode)
