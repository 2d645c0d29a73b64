"""What the dead leave: files they had open, chunks they never named, grants, truncates that were not finished.

One server on its KV: at its start, all sessions that it finds are of the dead (`recover`), and chunks without an inode
of the ids that the process before it had leased are nobody's (`sweep`).

Several servers share the KV: a server's death means nothing to the clients, so nothing happens at a start. A client's
files are recovered, and the ids of its blocks swept, when its session with the cluster has ended (`end_clients`).

Invariants: everything may be interrupted and done again. Does not know: how one hears of the dead (`clients`).
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from ..errors import Corruption, EmberError
from ..kv.types import Transaction, decode_int
from ..types import Chunks, Inode
from . import grants
from .blocks import BLOCK_IDS
from .clients import CLEANED, ENDED, KEEP_S
from .keys import (
    abandoned_key,
    block_key,
    client_key,
    decode_session,
    get_inode,
    inode_key,
    intent_key,
    length_key,
    put_inode,
    result_key,
    session_range,
    unpack_id,
)
from .scan import pages
from .state import NANOSECONDS, MetaState
from .truncate import finish

log = logging.getLogger("emberline.meta")


# ---- one server: at its start


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


async def sweep_unnamed(state: MetaState, begin: int, end: int) -> int:
    """Remove chunks of inodes in [begin, end) that were reserved by a process that died and never committed."""
    removed = await _sweep_range(state, begin, end)
    if not state.background.stopping:
        await state.ids.mark_swept(end)
    return removed


async def _sweep_range(state: MetaState, begin: int, end: int) -> int:
    removed = 0
    async for inodes in state.chunks.owners(begin, end):
        rows = await state.kv.begin().get_many([inode_key(inode) for inode in inodes])
        for inode, row in zip(inodes, rows, strict=True):
            if state.background.stopping:
                return removed
            if row is None:
                try:
                    removed += await state.chunks.remove(inode, None)
                except Corruption as error:
                    log.warning("chunks of inode %x, which nothing names, stay: %s", inode, error)
    return removed


async def sweep(state: MetaState) -> None:
    """Run the sweep that is due after a crash, if it has not been."""
    async with state.turns.of("sweep"):
        if state.background.unswept is not None:
            await sweep_unnamed(state, *state.background.unswept)
            if not state.background.stopping:
                state.background.unswept = None


# ---- several servers: at the end of a client's session


async def end_clients(state: MetaState) -> int:
    """Take care of what ended clients left. Returns how many there were. What fails is tried again the next time."""
    ended: set[bytes] = set()
    now_s = state.runtime.wall_ns() // NANOSECONDS
    async for page in pages(state.kv, b"K"):
        for key, value in page:
            client, mark = key[1:], decode_int(value)
            if mark >= CLEANED:
                if now_s - (mark - CLEANED) >= KEEP_S:
                    await _delete(state, key)
            elif mark >= ENDED or state.clients.has_ended(client, grace_s=state.config.client_grace_s):
                await _mark(state, client, ENDED)
                ended.add(client)
    if not ended:
        return 0
    failed = await _recover_sessions(state, ended) | await _sweep_blocks(state, ended)
    for client in ended - failed:
        if state.background.stopping:
            break
        await _clean(state, client, now_s)
    return len(ended)


async def _mark(state: MetaState, client: bytes, mark: int) -> None:
    async def work(txn: Transaction) -> None:
        txn.max(client_key(client), mark)

    await state.kv.run(work, reclaims=True)


async def _delete(state: MetaState, key: bytes) -> None:
    async def work(txn: Transaction) -> None:
        txn.delete(key)

    await state.kv.run(work, reclaims=True)


async def _clean(state: MetaState, client: bytes, now_s: int) -> None:
    """Forget what its requests led to: none of them is taken any more."""

    async def work(txn: Transaction) -> None:
        txn.delete_range(result_key(client, 0), result_key(client, (1 << 64) - 1))
        txn.max(client_key(client), CLEANED + now_s)

    await state.kv.run(work, reclaims=True)
    state.clients.forget(client)
    state.blocks.forget(client)


async def _recover_sessions(state: MetaState, ended: set[bytes]) -> set[bytes]:
    """Close the files that ended clients had open. Returns the clients of those that failed."""
    files: dict[int, dict[bytes, bytes]] = {}
    async for page in pages(state.kv, b"S"):
        for key, value in page:
            client = decode_session(value).client
            if client in ended:
                files.setdefault(unpack_id(key, 1), {})[key] = client
    failed: set[bytes] = set()
    for inode, sessions in files.items():
        if state.background.stopping:
            return ended
        try:
            await close_sessions(state, inode, list(sessions))
            await grants.give_up(state, inode)
        except EmberError as error:
            log.warning("the length of inode %x, whose writer is gone, is not known yet: %s", inode, error)
            failed.update(sessions.values())
    return failed


async def close_sessions(state: MetaState, inode: int, sessions: list[bytes]) -> None:
    """Take a file's length from its chunks, and close sessions of it, by the keys of their rows."""
    while not await _close_sessions(state, inode, sessions):
        pass


async def _close_sessions(state: MetaState, inode: int, sessions: list[bytes]) -> bool:
    """Take a file's length from its chunks, and close sessions of it. False if it changed: then again."""
    await finish(state, inode)
    before = await get_inode(state.kv.begin(), inode)
    end = 0
    if before is not None and isinstance(before.layout, Chunks):
        end = await state.chunks.end(inode, before.layout)

    async def work(txn: Transaction) -> bool:
        now = await get_inode(txn, inode)
        if (now is not None and _is_cut(before, now)) or await txn.get(intent_key(inode)) is not None:
            return False
        if now is not None and isinstance(now.layout, Chunks):
            length = max(end, decode_int(await txn.get(length_key(inode))))
            if length > now.length:
                put_inode(txn, now, replace(now, length=length))
            txn.delete(length_key(inode))
        for session in sessions:
            txn.delete(session)
        return True

    return await state.kv.run(work, reclaims=True)


def _is_cut(before: Inode | None, now: Inode) -> bool:
    """Whether an end that was measured when the file was as `before` may be wrong now."""
    return (
        before is None
        or before.truncate_generation != now.truncate_generation
        or type(before.layout) is not type(now.layout)
    )


async def _sweep_blocks(state: MetaState, ended: set[bytes]) -> set[bytes]:
    """Remove chunks that ended clients never named, and their blocks. Returns the clients of those that failed."""
    blocks = [(unpack_id(key, 1), client) async for page in pages(state.kv, b"L") for key, client in page]
    failed: set[bytes] = set()
    for begin, client in blocks:
        if client not in ended:
            continue
        if state.background.stopping:
            return ended
        try:
            await _sweep_range(state, begin, begin + BLOCK_IDS)
            if not state.background.stopping:
                await _drop_block(state, begin)
        except EmberError as error:
            log.warning("chunks that a client has left without a name stay for now: %s", error)
            failed.add(client)
    return failed


async def _drop_block(state: MetaState, begin: int) -> None:
    async def work(txn: Transaction) -> None:
        txn.delete(block_key(begin))
        txn.delete_range(abandoned_key(begin), abandoned_key(begin + BLOCK_IDS))

    await state.kv.run(work, reclaims=True)


async def finish_truncates(state: MetaState) -> None:
    """Cut what truncates have left that nobody finished."""
    async for page in pages(state.kv, b"T"):
        for key, _ in page:
            if state.background.stopping:
                return
            try:
                await finish(state, unpack_id(key, 1))
            except Corruption as error:
                log.warning("the truncate of inode %x waits: %s", unpack_id(key, 1), error)
