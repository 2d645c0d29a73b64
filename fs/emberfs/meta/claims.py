"""What only one server may do at a time: a claim row in the KV per name, held by renewing it.

    async with claims.of("collect") as claim: ...

The same rules as for the managers' lease (docs/replication.md): a holder renews its row every RENEW_S and counts on it
for LEASE_S from the send time of the last renewal; another one takes over when it has seen the row unchanged for
TAKEOVER_S by its own clock. A holder that is stopped for longer than that and goes on does not know better until it
looks at `is_held`: so what is done under a claim must bear being done twice. Within one server waiters take turns in
memory.

Does not know: what is being claimed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from ..errors import EmberError, Unavailable
from ..kv.types import KV, Transaction
from ..locks import KeyedLocks
from ..runtime import Runtime
from .keys import ClaimRow, claim_key, decode_claim, encode_row

RENEW_S = 0.5
LEASE_S = 2.0
TAKEOVER_S = 2.5
POLL_FIRST_S = 0.02
"""Pause between two looks at somebody else's row; doubled up to POLL_MAX_S."""
POLL_MAX_S = 0.5

log = logging.getLogger("emberline.meta")


class Claim:
    """Being the one who does it."""

    def __init__(self, runtime: Runtime, key: bytes, holder: bytes, until_s: float) -> None:
        self.key = key
        self.holder = holder
        self.until_s = until_s
        self._runtime = runtime

    @property
    def is_held(self) -> bool:
        """Ask again after every await."""
        return self._runtime.now_s() < self.until_s

    def check(self) -> None:
        """Raises Unavailable unless it is held."""
        if not self.is_held:
            raise Unavailable("another server may have taken this over: try again")


class Claims:
    """`KeyedLocks` across all servers of one KV."""

    def __init__(self, kv: KV, runtime: Runtime) -> None:
        self._kv = kv
        self._runtime = runtime
        self._turns = KeyedLocks(runtime)

    @asynccontextmanager
    async def of(self, name: Hashable) -> AsyncIterator[Claim]:
        """Hold `name` while inside. Two transactions if nobody else wants it."""
        async with self._turns.of(name):
            claim = await self._take(claim_key(repr(name)))
            renewing = self._runtime.spawn(self._renew(claim), "meta-claim")
            try:
                yield claim
            finally:
                renewing.cancel()
                try:
                    await renewing
                except asyncio.CancelledError:
                    pass
                await self._release(claim)

    async def _take(self, key: bytes) -> Claim:
        holder = self._runtime.random_bytes(8)
        seen: bytes | None = None
        seen_s = self._runtime.now_s()
        pause_s = POLL_FIRST_S
        while True:
            row = await self._kv.begin().get(key)
            now_s = self._runtime.now_s()
            if row != seen:
                seen, seen_s = row, now_s
            if row is None or now_s - seen_s >= TAKEOVER_S:
                if await self._replace(key, row, encode_row(ClaimRow(holder=holder, beats=0))):
                    return Claim(self._runtime, key, holder, now_s + LEASE_S)
            else:
                await self._runtime.sleep(pause_s)
                pause_s = min(2 * pause_s, POLL_MAX_S)

    async def _replace(self, key: bytes, old: bytes | None, new: bytes) -> bool:
        async def work(txn: Transaction) -> bool:
            if await txn.get(key) != old:
                return False
            txn.put(key, new)
            return True

        return await self._kv.run(work, reclaims=True)

    async def _renew(self, claim: Claim) -> None:
        async def work(txn: Transaction) -> bool:
            row = await self._ours(txn, claim)
            if row is not None:
                txn.put(claim.key, encode_row(ClaimRow(holder=claim.holder, beats=row.beats + 1)))
            return row is not None

        while True:
            await self._runtime.sleep(RENEW_S)
            sent_s = self._runtime.now_s()
            try:
                if not await self._kv.run(work, reclaims=True):
                    claim.until_s = sent_s
                    return
            except EmberError as error:
                log.warning("a claim was not renewed: %s", error)
            else:
                claim.until_s = sent_s + LEASE_S

    async def _release(self, claim: Claim) -> None:
        async def work(txn: Transaction) -> None:
            if await self._ours(txn, claim) is not None:
                txn.delete(claim.key)

        try:
            await self._kv.run(work, reclaims=True)
        except EmberError as error:
            log.warning("a claim runs out by itself: %s", error)

    async def _ours(self, txn: Transaction, claim: Claim) -> ClaimRow | None:
        value = await txn.get(claim.key)
        row = None if value is None else decode_claim(value)
        return row if row is not None and row.holder == claim.holder else None
