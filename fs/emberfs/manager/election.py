"""Who of the managers is primary: a lease row in the KV, renewed by its holder, taken over when it stands still.

Invariants:
  - A manager acts as primary for `primary_lease_s` from the send time of its last renewal, by its own clock; another
    takes over only after it has seen the row unchanged for `takeover_s`. So no two act at the same time.
  - Each take-over is a new epoch. A change of state reads the row in its transaction (`run`), so what an old primary
    still has under way changes nothing.
  - After a commit whose outcome is not known this manager is not primary any more: what it has in memory may be old.

Does not know: what a primary does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from msgspec.structs import replace

from ..errors import Conflict, DeadlineExceeded, EmberError, LimitExceeded, NoSpace, StaleRouting, Unavailable
from ..kv.types import KV, Transaction
from ..runtime import Runtime
from .config import ManagerConfig
from .rows import LEASE_KEY, Lease, encode, get

T = TypeVar("T")
NEVER_S = float("-inf")
HOLDER_BYTES = 8

log = logging.getLogger("emberline.manager")


class Election:
    """One candidate. `start` before use, `close` after."""

    def __init__(
        self,
        kv: KV,
        runtime: Runtime,
        *,
        address: str,
        elected: Callable[[], Awaitable[None]],
        config: ManagerConfig,
    ) -> None:
        """`elected` is awaited after each take-over: this manager acts as primary when it returns."""
        self.since_s = NEVER_S
        """When this manager began to act as primary, or to act again after a lapse."""
        self._kv = kv
        self._runtime = runtime
        self._address = address
        self._elected = elected
        self._config = config
        self._holder = runtime.random_bytes(HOLDER_BYTES)
        self._epoch: int | None = None
        self._valid_until_s = NEVER_S
        self._seen: Lease | None = None
        self._seen_s = NEVER_S
        self._is_blind = False
        """The lease row could not be had; said once in the log."""
        self._answered_s = runtime.now_s()
        """When the KV last said what is in the lease row."""
        self._task: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What goes on until `close`."""
        return [] if self._task is None else [self._task]

    def start(self) -> None:
        self._task = self._runtime.spawn(self._stand(), "manager-election")

    async def close(self) -> None:
        """Stop, and tell the others at once if we were primary."""
        if self._task is None:
            return
        self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        self._task = None
        epoch, was_primary = self._epoch, self.is_primary
        self._step_down()
        if epoch is not None and was_primary:
            await self._free_lease(epoch)

    @property
    def is_primary(self) -> bool:
        """True while this manager acts as primary. Ask again after every await."""
        return self._runtime.now_s() < self._valid_until_s

    @property
    def primary_address(self) -> str:
        """Where the primary is, as this manager last saw it; empty if there was none."""
        return self._seen.address if self._seen is not None and self._seen.holder else ""

    def require_primary(self) -> None:
        """Raise StaleRouting, which names the primary, unless this manager acts as primary."""
        if not self.is_primary:
            self._refuse()

    async def run(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """`kv.run` for changes of state: raises StaleRouting, and changes nothing, unless the lease row is ours.

        Must not be cancelled by a caller's end: run it in a task of the manager.
        """
        self.require_primary()
        epoch = self._epoch

        async def guarded(txn: Transaction) -> T:
            lease = await get(txn, LEASE_KEY, Lease)
            if lease is None or lease.epoch != epoch:
                self._refuse()
            return await work(txn)

        try:
            return await self._kv.run(guarded)
        except (Conflict, DeadlineExceeded, LimitExceeded, NoSpace, Unavailable):
            raise  # Nothing happened.
        except BaseException:
            self._step_down()
            raise

    def _refuse(self) -> NoReturn:
        silent_s = self._runtime.now_s() - self._answered_s
        if silent_s > self._config.takeover_s:
            raise StaleRouting(
                f"this manager could not read or renew its lease in the key-value store for {silent_s:.0f} s, and "
                "without that none can be the primary"
            )
        address = self.primary_address
        raise StaleRouting(f"the primary manager is at {address}" if address else "there is no primary manager now")

    def _step_down(self) -> None:
        self._epoch = None
        self._valid_until_s = NEVER_S
        self._seen = None  # The row must be seen unchanged for the whole time again, our own renewals included.

    async def _stand(self) -> None:
        while True:
            try:
                await (self._look() if self._epoch is None else self._renew(self._epoch))
                self._is_blind = False
                self._answered_s = self._runtime.now_s()
            except EmberError as error:
                if not self._is_blind:
                    log.warning("the manager's lease row cannot be read or renewed: %s", error)
                self._is_blind = True
            except Exception:
                # A mistake of ours or of a library: the lease runs out if it stays, but this manager stands again.
                if not self._is_blind:
                    log.exception("the manager's lease row cannot be read or renewed")
                self._is_blind = True
            await self._runtime.sleep(self._config.renew_s)

    async def _renew(self, epoch: int) -> None:
        sent_s = self._runtime.now_s()

        async def work(txn: Transaction) -> Lease | None:
            lease = await get(txn, LEASE_KEY, Lease)
            if lease is None or lease.epoch != epoch:
                return None
            lease = replace(lease, counter=lease.counter + 1)
            txn.put(LEASE_KEY, encode(lease))
            return lease

        lease = await self._kv.run(work)
        if self._epoch != epoch:
            return  # Stepped down meanwhile.
        if lease is None:
            log.warning("another manager has become primary")
            self._step_down()
            return
        self._seen = lease
        self._extend(sent_s)

    async def _look(self) -> None:
        """Watch the row as one who is not primary, and take over when it is time."""
        lease = await get(self._kv.begin(), LEASE_KEY, Lease)
        now_s = self._runtime.now_s()
        if lease != self._seen:
            self._seen, self._seen_s = lease, now_s
        if lease is None or not lease.holder or now_s - self._seen_s >= self._config.takeover_s:
            await self._take_over(lease)

    async def _take_over(self, old: Lease | None) -> None:
        sent_s = self._runtime.now_s()
        new = Lease(old.epoch + 1 if old is not None else 1, self._holder, 0, self._address)

        async def work(txn: Transaction) -> bool:
            if await get(txn, LEASE_KEY, Lease) != old:
                return False
            txn.put(LEASE_KEY, encode(new))
            return True

        if not await self._kv.run(work):
            return
        self._epoch, self._seen = new.epoch, new
        try:
            await self._elected()
        except BaseException:
            self._step_down()
            raise
        log.info("this manager is primary now, epoch %d", new.epoch)
        self._extend(sent_s)

    def _extend(self, sent_s: float) -> None:
        if not self.is_primary:
            # Nobody was answered for a while: their silence is ours.
            self.since_s = self._runtime.now_s()
        self._valid_until_s = sent_s + self._config.primary_lease_s

    async def _free_lease(self, epoch: int) -> None:
        async def work(txn: Transaction) -> None:
            lease = await get(txn, LEASE_KEY, Lease)
            if lease is not None and lease.epoch == epoch:
                txn.put(LEASE_KEY, encode(replace(lease, holder=b"")))

        try:
            await self._kv.run(work)
        except EmberError as error:
            log.warning("the manager's lease runs out by itself: %s", error)
