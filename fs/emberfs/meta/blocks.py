"""Blocks of inode ids that clients of a cluster put files under: chunks first, the name later, at any server.

A block is BLOCK_IDS ids in a row, aligned, with one row that names its client. A server asks for one per client, hands
its ids out from memory, and asks for the next when it is used up. So a `put` costs one transaction, its commit, which
reads the block's row; whichever server does it, and wherever the id came from.

Invariants:
  - An id is committed at most once, and not after it was abandoned or its client's session has ended.
  - Chunks of an id without an inode are nobody's when its block is gone. The block goes when its client's session has
    ended, after they were swept; sooner only if every id was committed.

Does not know: how chunks are swept (`recovery`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import StaleChunk
from ..kv.types import KV, Transaction
from ..locks import KeyedLocks
from ..runtime import Runtime
from .clients import Clients
from .ids import InodeIds
from .keys import abandoned_key, block_key, inode_key

BLOCK_IDS = 64


@dataclass(slots=True)
class _Leased:
    """What this server handed out to one client."""

    next: int = 0
    end: int = 0
    uncommitted: dict[int, set[int]] = field(default_factory=dict)
    """First id of a block -> those of its ids that are not files yet, as far as this server knows."""


class Blocks:
    """Hands out ids to clients, and says which of them may be committed."""

    def __init__(self, kv: KV, runtime: Runtime, ids: InodeIds, clients: Clients) -> None:
        self._kv = kv
        self._ids = ids
        self._clients = clients
        self._turns = KeyedLocks(runtime)
        self._leased: dict[bytes, _Leased] = {}

    async def take(self, client: bytes) -> int:
        """An id for a new file of `client`. Raises SessionExpired."""
        leased = self._leased.setdefault(client, _Leased())
        while leased.next == leased.end:
            async with self._turns.of(client):
                if leased.next == leased.end:
                    await self._lease(client, leased)
        leased.next += 1
        return leased.next - 1

    async def _lease(self, client: bytes, leased: _Leased) -> None:
        begin = await self._ids.take_block(BLOCK_IDS)
        done = [block for block, left in leased.uncommitted.items() if not left]

        async def work(txn: Transaction) -> None:
            txn.put(block_key(begin), client)
            for block in done:
                txn.delete(block_key(block))

        await self._clients.admit(client, work)
        for block in done:
            del leased.uncommitted[block]
        leased.uncommitted[begin] = set(range(begin, begin + BLOCK_IDS))
        leased.next, leased.end = begin, begin + BLOCK_IDS

    def forget(self, client: bytes) -> None:
        """The client has ended."""
        self._leased.pop(client, None)

    async def check(self, txn: Transaction, client: bytes, inode: int) -> None:
        """Raises StaleChunk unless the client may make a file of this id in this transaction."""
        owner, abandoned, row = await txn.get_many([block_key(block_of(inode)), abandoned_key(inode), inode_key(inode)])
        if owner != client or abandoned is not None or row is not None:
            raise StaleChunk("the file's inode is not reserved any more")

    def committed(self, client: bytes, inode: int) -> None:
        """A file was made of this id."""
        leased = self._leased.get(client)
        if leased is not None and block_of(inode) in leased.uncommitted:
            leased.uncommitted[block_of(inode)].discard(inode)

    async def abandon(self, inode: int) -> bool:
        """See to it that the id is never committed; False if it was."""

        async def work(txn: Transaction) -> bool:
            owner, row = await txn.get_many([block_key(block_of(inode)), inode_key(inode)])
            if row is None and owner is not None:
                txn.put(abandoned_key(inode), b"")
            return row is None

        return await self._kv.run(work, reclaims=True)


def block_of(inode: int) -> int:
    """The first id of the block that an id is in."""
    return inode - inode % BLOCK_IDS
