"""Garbage: chunks of files without a name, expired trash, and orphan trees.

Invariants: chunks go first, then the row that says they are due, so a crash in between repeats and forgets nothing. A
file that somebody still has open for writing waits, else its writer's next chunk would belong to nobody.
Does not know: where chunks are.
"""

from __future__ import annotations

import logging

from ..errors import Corruption
from ..kv.types import Transaction
from ..messages import Collected, CollectGarbage, Usage, UsageReply
from ..types import Chunks, Inode
from . import nodes
from .keys import (
    Counter,
    garbage_key,
    get_counter,
    get_inode,
    rows_of,
    session_range,
    unpack_id,
)
from .orphans import delete_orphans
from .state import MetaState
from .trash import expire

PAGE_ROWS = 256

log = logging.getLogger("emberline.meta")


async def collect_garbage(state: MetaState, request: CollectGarbage) -> Collected:
    """Remove what is due; with `force` also chunks whose delay is not over. Expired trash first, as it adds to it."""
    async with state.claims.of("collect"):
        await expire(state, older_than_s=state.config.trash_s)
        await delete_orphans(state)
        files, chunks = await _collect(state, force=request.force)
    pending = await get_counter(state.kv.begin(), Counter.GARBAGE)
    return Collected(files=files, chunks=chunks, pending=pending)


async def _collect(state: MetaState, *, force: bool) -> tuple[int, int]:
    """(files, chunks) that went."""
    files = chunks = 0
    begin, end = rows_of(b"G")
    if not force:
        end = garbage_key(state.runtime.wall_ns() + 1, 0)
    while True:
        rows = await state.kv.begin().range(begin, end, limit=PAGE_ROWS)
        done: list[tuple[bytes, Inode | None]] = []
        for key, _ in rows:
            if state.background.stopping:
                break
            inode = await get_inode(state.kv.begin(), unpack_id(key, 9))
            if inode is not None and await state.kv.begin().range(*session_range(inode.id), limit=1):
                continue
            if inode is not None and isinstance(inode.layout, Chunks):
                try:
                    chunks += await state.chunks.remove(inode.id, inode.layout)
                except Corruption as error:
                    # One damaged chunk must not keep all other garbage.
                    log.warning("chunks of the removed inode %x stay: %s", inode.id, error)
                    continue
            done.append((key, inode))
        await _bury(state, done)
        files += len(done)
        if len(rows) < PAGE_ROWS or state.background.stopping:
            return files, chunks
        begin = rows[-1][0] + b"\0"


async def _bury(state: MetaState, garbage: list[tuple[bytes, Inode | None]]) -> None:
    """Remove garbage rows and their inodes, unless somebody else has."""
    if not garbage:
        return

    async def work(txn: Transaction) -> None:
        there = await txn.get_many([key for key, _ in garbage])
        left = [each for each, row in zip(garbage, there, strict=True) if row is not None]
        inodes = [inode for _, inode in left if inode is not None]
        rest = [await nodes.attached(txn, inode) for inode in inodes]
        for key, _ in left:
            txn.delete(key)
        for inode, about in zip(inodes, rest, strict=True):
            nodes.bury(txn, inode, about)
        txn.add(Counter.GARBAGE.value, -len(left))

    await state.kv.run(work, reclaims=True)


async def usage(state: MetaState, request: Usage) -> UsageReply:
    """What the namespace holds, by its counters."""
    txn = state.kv.begin()
    return UsageReply(
        files=await get_counter(txn, Counter.FILES),
        directories=await get_counter(txn, Counter.DIRECTORIES),
        length_bytes=await get_counter(txn, Counter.LENGTH),
        trash_entries=await get_counter(txn, Counter.TRASH),
        gc_pending=await get_counter(txn, Counter.GARBAGE),
    )
