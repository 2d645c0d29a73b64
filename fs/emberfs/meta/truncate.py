"""Truncate: one transaction for the length, then the chunks, then the mark that says that chunks are due is removed.

Invariants:
  - The transaction that sets the length also raises `truncate_generation`: a length report that was under way is stale
    from that moment, so it cannot bring back what was cut.
  - Chunks past a shorter length are cut before anybody is granted a new session. An intent row says that this is due,
    and outlives a crash.

Does not know: who has the file open.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import IsADirectory, LimitExceeded, NotFound, StaleChunk
from ..kv.types import Transaction
from ..messages import InodeReply, Truncate
from ..types import FILE_BYTES_MAX, INLINE_BYTES_MAX, Inline, Inode
from .keys import (
    Intent,
    decode_intent,
    encode_row,
    get_inode,
    grant_key,
    intent_key,
    length_key,
    put_inode,
    session_range,
)
from .paths import locate_existing
from .state import MetaState


async def truncate(state: MetaState, request: Truncate) -> InodeReply:
    """Set a file's length. StaleChunk if an inline file would outgrow its row: promote it first."""
    if not 0 <= request.length <= FILE_BYTES_MAX:
        raise LimitExceeded(f"a file is 0 to {FILE_BYTES_MAX} bytes, not {request.length}")

    async def work(txn: Transaction) -> Inode:
        inode = request.inode or (await locate_existing(txn, request.path, follow=True)).inode
        old = await get_inode(txn, inode)
        if old is None:
            raise NotFound("the file was removed", request.path or None)
        if not old.is_file:
            raise IsADirectory("not a file", request.path or None)
        return await set_length(state, txn, old, request.length)

    inode = await state.decide(work, Inode, reclaims=True)
    await finish(state, inode.id)
    return InodeReply(inode)


async def set_length(state: MetaState, txn: Transaction, old: Inode, length: int) -> Inode:
    """The transaction's part of a truncate. The caller runs `finish` once it committed."""
    layout = old.layout
    if isinstance(layout, Inline):
        if length > INLINE_BYTES_MAX and (layout.data or await _is_promoting(state, txn, old.id)):
            raise StaleChunk(f"{length} bytes do not fit into the inode row: promote the file first")
        layout = Inline(layout.data[:length].ljust(length, b"\0")) if length <= INLINE_BYTES_MAX else state.new_layout()
    else:
        assert layout is not None
        # An open session may have written more than anybody has reported.
        open_now = await txn.range(*session_range(old.id), limit=1, snapshot=True)
        pending = await txn.get(intent_key(old.id))
        if open_now or pending or length < (await state.measured(txn, old)).length:
            cut = min(length, decode_intent(pending).length) if pending else length
            txn.put(intent_key(old.id), encode_row(Intent(length=cut, layout=layout)))
    now_ns = state.runtime.wall_ns()
    new = replace(
        old,
        length=length,
        layout=layout,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        truncate_generation=old.truncate_generation + 1,
        revision=old.revision + 1,
    )
    put_inode(txn, old, new)
    if state.shared:
        txn.delete(length_key(old.id))
    return new


async def _is_promoting(state: MetaState, txn: Transaction, inode: int) -> bool:
    return await txn.get(grant_key(inode)) is not None if state.shared else inode in state.promoting


async def finish(state: MetaState, inode: int) -> None:
    """Cut the chunks of a truncate that committed, if there is one. May be called by several at once, and again."""
    row = await state.kv.begin().get(intent_key(inode))
    if row is None:
        return
    async with state.claims.of(inode) as claim:
        # Whoever waited for a turn may find it done, and the file written to since.
        row = await state.kv.begin().get(intent_key(inode))
        if row is not None:
            intent = decode_intent(row)
            await state.chunks.truncate(inode, intent.layout, intent.length, claim=claim)
            done = row

            async def forget(txn: Transaction) -> None:
                # Not an intent that came meanwhile.
                if await txn.get(intent_key(inode)) == done:
                    txn.delete(intent_key(inode))

            await state.kv.run(forget, reclaims=True)
