"""How a namespace goes from one server alone to one that clients of many processes share, and back.

A server alone keeps in memory what a shared one keeps in rows: length reports, reserved ids, grants to move a file to
chunks; and its sessions are nobody's. So the one that ends says what it had (`unwritten`), in the name of the client
that all of it belongs to, and the one that begins writes that down (`write_down`) before it serves.

Back it goes only when no client is left (`forget_clients`): then a server alone finds nothing that it does not know.

Does not know: how the two reach each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from ..kv.types import Transaction
from ..types import Chunks, Inline
from . import grants, recovery
from .blocks import block_of
from .keys import (
    GrantRow,
    block_key,
    client_key,
    decode_session,
    encode_row,
    get_inode,
    grant_key,
    length_key,
    session_key,
    session_range,
    unpack_id,
)
from .scan import pages
from .state import MetaState

PASSES_MAX = 3
"""A client is known to have ended only at the second look."""


class Unwritten(msgspec.Struct, frozen=True, array_like=True):
    """What a server alone had in memory."""

    client: bytes
    """Whose all of it is from now on."""
    reports: list[tuple[int, int, int]]
    """(inode, truncate generation, end) of length reports that are in no row."""
    reserved: list[int]
    promotions: list[tuple[int, bytes, Chunks]]
    """(inode, session, layout)"""


def unwritten(state: MetaState, client: bytes) -> Unwritten:
    """To be asked when no request is under way and none will come."""
    return Unwritten(
        client,
        [(inode, hint.truncate_generation, hint.end) for inode, hint in state.hints.items()],
        sorted(state.reserved),
        [(inode, each.session, each.layout) for inode, each in state.promoting.items()],
    )


async def write_down(state: MetaState, left: Unwritten) -> None:
    """Go on from what the server before had. Before the first request."""

    async def work(txn: Transaction) -> None:
        txn.max(client_key(left.client), 1)
        for block in {block_of(inode) for inode in left.reserved}:
            txn.put(block_key(block), left.client)
        for inode, session, layout in left.promotions:
            if await txn.get(session_key(inode, session)) is not None:
                txn.put(grant_key(inode), encode_row(GrantRow(session=session, layout=layout)))
        for number, generation, end in left.reports:
            inode_row = await get_inode(txn, number)
            if inode_row is not None and inode_row.truncate_generation == generation:
                txn.max(length_key(number), end)

    await state.kv.run(work, reclaims=True)
    async for page in pages(state.kv, b"S"):
        await state.kv.run(_naming([key for key, _ in page], left.client), reclaims=True)


def _naming(keys: list[bytes], client: bytes) -> Callable[[Transaction], Awaitable[None]]:
    """A transaction that makes sessions of nobody those of `client`."""

    async def work(txn: Transaction) -> None:
        for key, value in zip(keys, await txn.get_many(keys), strict=True):
            if value is not None and not decode_session(value).client:
                txn.put(key, encode_row(msgspec.structs.replace(decode_session(value), client=client)))

    return work


async def recover_nameless(state: MetaState) -> None:
    """Close what a server alone had open that died before it could say what it had."""
    files: dict[int, list[bytes]] = {}
    async for page in pages(state.kv, b"S"):
        for key, value in page:
            if not decode_session(value).client:
                files.setdefault(unpack_id(key, 1), []).append(key)
    for inode, sessions in files.items():
        row = await get_inode(state.kv.begin(), inode)
        if row is not None and isinstance(row.layout, Inline) and await _is_only(state, inode, sessions):
            await state.chunks.remove(inode, None)  # of a move to chunks that nobody finished
        await recovery.close_sessions(state, inode, sessions)


async def _is_only(state: MetaState, inode: int, sessions: list[bytes]) -> bool:
    """Nobody else has the file open, or may have written chunks of it."""
    return len(await state.kv.begin().range(*session_range(inode))) == len(sessions)


async def forget_clients(state: MetaState) -> bool:
    """Take care of what clients left, none of whom is there any more, and forget them.

    False if there is something that could not be done: then the next server must be a shared one too.
    """
    for _ in range(PASSES_MAX):
        state.clients.heard(())
        await recovery.end_clients(state)
    await grants.clear(state)
    txn = state.kv.begin()
    for prefix in (b"S", b"L", b"P"):
        if await txn.range(prefix, prefix + b"\xff", limit=1):
            return False

    async def work(txn: Transaction) -> None:
        for prefix in (b"K", b"O", b"A", b"E"):
            txn.delete_range(prefix, prefix + b"\xff")

    await state.kv.run(work, reclaims=True)
    return True
