"""Garbage: chunks of files without a name, expired trash, orphan trees, and what a crash left unnamed.

Invariants: chunks go first, then the row that says they are due, so a crash in between repeats and forgets nothing. A
file that somebody still has open for writing waits, else its writer's next chunk would belong to nobody.
Does not know: where chunks are.
"""

from __future__ import annotations

import logging

from ..errors import Corruption, EmberError
from ..kv.types import Transaction
from ..messages import Collected, CollectGarbage, Usage, UsageReply
from ..types import Chunks, Inode
from . import nodes
from .keys import (
    Counter,
    garbage_key,
    get_counter,
    get_inode,
    inode_key,
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
    async with state.turns.of("collect"):
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
            if state.stopping:
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
        if len(rows) < PAGE_ROWS or state.stopping:
            return files, chunks
        begin = rows[-1][0] + b"\0"


async def _bury(state: MetaState, garbage: list[tuple[bytes, Inode | None]]) -> None:
    """Remove garbage rows and their inodes. The caller has the "collect" turn: nobody else does that."""
    if not garbage:
        return

    async def work(txn: Transaction) -> None:
        inodes = [inode for _, inode in garbage if inode is not None]
        rest = [await nodes.attached(txn, inode) for inode in inodes]
        for key, _ in garbage:
            txn.delete(key)
        for inode, about in zip(inodes, rest, strict=True):
            nodes.bury(txn, inode, about)
        txn.add(Counter.GARBAGE.value, -len(garbage))

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


async def sweep_unnamed(state: MetaState, begin: int, end: int) -> int:
    """Remove chunks of inodes in [begin, end) that were reserved by a process that died and never committed."""
    removed = 0
    async for inodes in state.chunks.owners(begin, end):
        rows = await state.kv.begin().get_many([inode_key(inode) for inode in inodes])
        for inode, row in zip(inodes, rows, strict=True):
            if state.stopping:
                return removed
            if row is None:
                try:
                    removed += await state.chunks.remove(inode, None)
                except Corruption as error:
                    log.warning("chunks of inode %x, which nothing names, stay: %s", inode, error)
    await state.ids.mark_swept(end)
    return removed


async def sweep(state: MetaState) -> None:
    """Run the sweep that is due after a crash, if it has not been."""
    async with state.turns.of("sweep"):
        if state.unswept is not None:
            await sweep_unnamed(state, *state.unswept)
            if not state.stopping:
                state.unswept = None


async def run_in_background(state: MetaState) -> None:
    """What the service does unasked: one sweep, then garbage at intervals. Cancel it only while it rests."""
    while not state.stopping:
        try:
            await sweep(state)
            await collect_garbage(state, CollectGarbage(force=False))
        except (EmberError, OSError) as error:
            # A full or failing disk must not end the garbage collection of a store that is used again later.
            log.warning("garbage collection: %s; trying again in %.0f s", error, state.config.gc_interval_s)
        if not state.stopping:
            state.resting = True
            await state.runtime.sleep(state.config.gc_interval_s)
            state.resting = False
