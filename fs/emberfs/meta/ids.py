"""Inode ids: leased from the KV in batches, handed out from memory.

Invariants: an id is given out once, also across crashes. After an unclean stop `IdLease.swept` tells below which id no
reserved and never committed inode can have left chunks. Does not know: what an id is used for.
"""

from __future__ import annotations

from ..kv.types import KV, Transaction
from ..locks import KeyedLocks
from ..runtime import Runtime
from .keys import IDS_KEY, IdLease, encode_row, get_ids


class InodeIds:
    """Hands out inode ids."""

    def __init__(self, kv: KV, runtime: Runtime, *, batch: int) -> None:
        self._kv = kv
        self._batch = batch
        self._turns = KeyedLocks(runtime)
        self._next = self._end = 0

    async def take(self) -> int:
        """A fresh id. One transaction of its own per batch, otherwise memory."""
        while self._next == self._end:
            await self._renew(1)
        self._next += 1
        return self._next - 1

    async def take_block(self, count: int) -> int:
        """The first of `count` fresh ids in a row, a multiple of `count`."""
        while True:
            begin = -(-self._next // count) * count
            if begin + count <= self._end:
                self._next = begin + count
                return begin
            await self._renew(2 * count)

    async def _renew(self, count: int) -> None:
        """Lease ids, unless somebody just did. With less than `count` left, those are given up."""
        async with self._turns.of("lease"):
            if self._end - self._next < count:
                # One row that is there already: this must not be what keeps a full store from trashing a file.
                end = await self._kv.run(self._lease, reclaims=True)
                self._next, self._end = end - self._batch, end

    async def unswept(self) -> tuple[int, int]:
        """[begin, end) of the ids that a process before this one may have left chunks under. Call it before `take`."""
        assert self._end == 0
        ids = await get_ids(self._kv.begin())
        return ids.swept, ids.next

    async def mark_swept(self, end: int) -> None:
        """Ids below `end` have been swept."""

        async def work(txn: Transaction) -> None:
            ids = await get_ids(txn)
            txn.put(IDS_KEY, encode_row(IdLease(next=ids.next, swept=max(ids.swept, end))))

        await self._kv.run(work, reclaims=True)

    async def give_back(self) -> None:
        """At a clean close with nothing reserved: return what is left, and say that nothing needs a sweep."""
        if self._end:

            async def work(txn: Transaction) -> None:
                ids = await get_ids(txn)
                unused = self._next if ids.next == self._end else ids.next
                txn.put(IDS_KEY, encode_row(IdLease(next=unused, swept=unused)))

            await self._kv.run(work, reclaims=True)

    async def _lease(self, txn: Transaction) -> int:
        ids = await get_ids(txn)
        end = ids.next + self._batch
        txn.put(IDS_KEY, encode_row(IdLease(next=end, swept=ids.swept)))
        return end
