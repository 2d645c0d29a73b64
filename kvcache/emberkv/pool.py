"""A namespace as it is served: matches with leases, and puts in two steps.

How puts go: see `puts`. What makes room for them: `space`.

Does not know: messages, or who is asking beyond the number of its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from emberfs.errors import Corruption, EmberError, LimitExceeded
from emberfs.runtime import Runtime

from .admission import WRITE_THROUGH
from .compaction import page_header
from .counts import PoolCounts
from .errors import StaleOwner
from .files import Files
from .index import Index
from .journal import Pinned, QuotaSet, TenantAdded, TtlSet, Unplaced, split
from .keys import KEY_BYTES
from .leases import Leases
from .namespace import Namespace
from .ownership import Ownership
from .page import NO_PLACE, PLACE, Place
from .puts import Puts
from .recovery import IndexReader
from .segments import segment_bytes_for
from .space import Space, SpaceConfig
from .strangers import find_strangers
from .wal import Wal

log = logging.getLogger("emberline.kv")

UPKEEP_S = 1.0
RECHECK_S = 60.0
"""A page that was reported and is as it should be is not looked at again for so long."""
CHECKED_MAX = 10_000
SNAPSHOT_S = 3600.0
"""The journal does not say what was used when: a service that is killed forgets so much of it."""
TENANTS_MAX = 1 << 16
LEASES_MAX = 1 << 18
"""Of one tenant. What it finds beyond them may go while it is read, which a reader notices."""


class Pool:
    """See the module. Only made by `open`."""

    def __init__(
        self, files: Files, runtime: Runtime, directory: str, namespace: Namespace, ownership: Ownership, wal: Wal,
        config: SpaceConfig, strangers: Sequence[str], counts: PoolCounts,
    ) -> None:  # fmt: skip
        self.namespace = namespace
        self.directory = directory
        self.counts = counts
        self.index = wal.index
        self.table = self.index.table
        self.leases = Leases(self.table.hold, self.table.let_go)
        self.ownership = ownership
        self.space = Space(files, runtime, f"{directory}/segments", wal, self.leases, config, strangers)
        self._files, self._runtime, self._wal = files, runtime, wal
        self._next_snapshot_s = runtime.now_s() + SNAPSHOT_S
        self._making_room = asyncio.Lock()
        self._puts = Puts(runtime, wal, self.space, self.leases, counts, self._making_room)
        self._checking = asyncio.Lock()
        self._checked_s: dict[Place, float] = {}
        """Pages that were reported, and that nothing was wrong with, and when."""
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        """Of the log, since somebody else serves the namespace."""

    @classmethod
    async def open(
        cls, files: Files, runtime: Runtime, directory: str, namespace: Namespace, *, config: SpaceConfig, address: str,
        counts: PoolCounts | None = None,
    ) -> Pool:  # fmt: skip
        """Take the namespace over, read its index, and serve it."""
        segment_bytes = segment_bytes_for(config.capacity_bytes)
        trailing = [kind.trailing for kind in namespace.kinds]

        def make() -> Index:
            return Index(trailing, segment_bytes=segment_bytes)

        reader = IndexReader(files, runtime, f"{directory}/index", make)
        try:
            ownership = await Ownership.take(
                files, runtime, f"{directory}/owner", address=address, on_quiet=reader.read_ahead
            )
            # From now on: who waits for silence would take over while we read.
            owning = runtime.spawn(ownership.keep(), "kv-owner")
            try:
                try:
                    there = await reader.read(ownership.epoch)
                    index = await _nothing(files, directory, make) if there is None else there
                    strangers = await find_strangers(files, f"{directory}/segments", index, is_opening=True)
                except Exception:
                    await ownership.check()  # What somebody does who has taken over meanwhile is no loss.
                    raise
                # Had somebody taken over before we looked, files of theirs would be among the strangers.
                await ownership.check()
                wal = await Wal.recover(files, runtime, f"{directory}/index", ownership, index, is_new=there is None)
            except BaseException:
                owning.cancel()
                raise
        finally:
            reader.read_ahead(False)
        pool = cls(files, runtime, directory, namespace, ownership, wal, config, strangers, counts or PoolCounts())
        owning.add_done_callback(pool._lose)
        pool._tasks = [owning, runtime.spawn(pool._keep_up(), "kv-upkeep")]
        return pool

    def _lose(self, owning: asyncio.Task[None]) -> None:
        self._wal.is_lost = True
        if not owning.cancelled():
            owning.exception()  # StaleOwner: it is said to whoever asks for something.
            # Its log is removed by who serves now, and takes space for as long as we have it open.
            self._ending = self._runtime.spawn(self._wal.close(), "kv-wal-end")

    @property
    def is_lost(self) -> bool:
        """Somebody else serves it by now."""
        return self._wal.is_lost or self.ownership.is_over

    @property
    def failure(self) -> str:
        """Why no pages are taken now; "": they are."""
        return "" if self._wal.failure is None else str(self._wal.failure)

    @property
    def reservations(self) -> int:
        """Puts that have not ended."""
        return len(self._puts)

    async def close(self) -> None:
        """Write what is left, and let the next owner in."""
        owning, upkeep = self._tasks
        upkeep.cancel()
        await asyncio.wait([upkeep])
        try:
            # What could not be written was promised to nobody: the next one need not wait for it.
            with contextlib.suppress(EmberError, OSError):
                self.space.drop_spare()
            with contextlib.suppress(EmberError, OSError):
                await self._wal.close()
            with contextlib.suppress(EmberError, OSError):
                await self.ownership.check()
                await self.space.end_making()
                await self.ownership.check()  # That may have taken long.
                owning.cancel()  # No beat comes after the last one.
                await asyncio.wait([owning])
                await self.ownership.beat(released=True)
        finally:
            self.space.forget_spare()
            owning.cancel()
            await asyncio.wait([owning] if self._ending is None else [owning, self._ending])

    # --- tenants ---------------------------------------------------------------------------------------------------

    def tenant(self, name: str) -> int:
        """The number of a tenant, made if it is new."""
        number = self.index.tenant(name)
        if number is None:
            if len(self.index.tenants) >= TENANTS_MAX:
                raise LimitExceeded(f"a namespace has at most {TENANTS_MAX:,} tenants")
            self._wal.note(TenantAdded(name))
            number = len(self.index.tenants) - 1
        return number

    def set_quota(self, tenant: int, limit_bytes: int) -> None:
        """What a tenant may hold; 0: as much as there is room for. What it has beyond it goes with the next rounds."""
        self._wal.note(QuotaSet(tenant, limit_bytes))

    def set_ttl(self, tenant: int | None, ttl_s: float) -> None:
        """After how long pages go that nobody used: a tenant's, or those of all others; 0: as it was."""
        self._wal.note(TtlSet(tenant, ttl_s))

    # --- reading ---------------------------------------------------------------------------------------------------

    def match(self, tenant: int, keys: bytes, lease_s: float) -> tuple[Any, str, int]:
        """(slots of the longest usable prefix of a chain, as `Found` has them; why it is no longer; a lease, 0 if there
        is none). `keys` are one after the other."""
        slots, ends, reason = self.table.match(tenant, keys)
        if reason in ("miss", "damaged"):
            begin = len(slots) * KEY_BYTES
            reason = self._why(tenant, keys[begin : begin + KEY_BYTES], reason)
        counts = self.counts
        counts.matches += 1
        counts.asked_pages += len(keys) // KEY_BYTES
        counts.matched_pages += len(slots)
        counts.stops[reason] += 1
        if not ends:
            return slots, reason, 0
        stamp_s = self.space.stamp_s()
        for slot in ends:
            self.table.touch(slot, stamp_s)
        return slots, reason, self.lease(ends, tenant, lease_s)

    def _why(self, tenant: int, key: bytes, reason: str) -> str:
        """Why a page cannot be had, of which the table knows no more than `reason`."""
        slot = self.table.any_slot(tenant, key)
        if self._puts.is_pending(tenant, key):
            return "pending"
        if slot is not None and self.table.slot(tenant, key) is None:
            return "parent missing"
        return self.space.departed.cause(key) or ("absent" if reason == "miss" else reason)

    def lookup(self, tenant: int, kind: int, keys: Sequence[bytes], lease_s: float) -> tuple[list[bytes], int]:
        """(of each key its place, zeros if it is not there; one lease on all that are)."""
        counts, table, places, held = self.counts, self.table, [], []
        now_s = self.space.stamp_s()
        slots = [table.slot(tenant, key) for key in keys]
        packed = iter(split(table.packed([slot for slot in slots if slot is not None], kind), PLACE.size))
        for key, slot in zip(keys, slots, strict=True):
            place = NO_PLACE if slot is None else next(packed)
            places.append(place)
            if slot is not None and place != NO_PLACE:
                held.append(slot)
                table.touch(slot, now_s)
            else:
                reason = "miss" if slot is None else "damaged" if kind == 0 else f"kind {kind} missing"
                counts.misses[self._why(tenant, key, reason)] += 1
        counts.looked_up_pages += len(keys)
        counts.found_pages += len(held)
        return places, self.lease(held, tenant, lease_s)

    def lease(self, slots: Sequence[int], tenant: int, lease_s: float) -> int:
        """A lease on slots; 0: there is nothing to lease, or no time, or its tenant has too many of them."""
        if not slots or lease_s <= 0:
            return 0
        if self.leases.count_of(tenant) >= LEASES_MAX:
            self.counts.unleased_hits += 1
            return 0
        return self.leases.take(slots, owner=tenant, duration_s=lease_s, now_s=self._runtime.now_s())

    async def report(self, tenant: int, kind: int, keys: Sequence[bytes]) -> int:
        """A reader found these damaged. They are read again, and those that are go. How many went.

        One reader at a time, and a page once in a while: whoever reports does not make the service read for nothing.
        Those that are not looked at are reported again, if they are damaged.
        """
        if self._checking.locked():
            return 0
        async with self._checking:
            gone = 0
            for key in keys:
                gone += await self._check_page(tenant, kind, key)
        self.counts.damaged_pages += gone
        return gone

    async def _check_page(self, tenant: int, kind: int, key: bytes) -> bool:
        """Whether a page was damaged, and went."""
        slot = self.table.slot(tenant, key)
        place = None if slot is None else self.table.place(slot, kind)
        now_s = self._runtime.now_s()
        if slot is None or place is None or self._checked_s.get(place, -RECHECK_S) + RECHECK_S > now_s:
            return False
        size = place.end - place.offset
        (page,) = await self._files.read(self.space.path(place.segment), [(place.offset, size)])
        is_same = self.table.slot(tenant, key) == slot and self.table.place(slot, kind) == place
        if is_same and (page is None or page_header(page, place, key) is None):
            self._wal.note(Unplaced(tenant, kind, key))
            self.space.departed.note(key, "damaged")
            return True
        if len(self._checked_s) >= CHECKED_MAX:
            self._checked_s.clear()
        self._checked_s[place] = now_s
        return False

    # --- writing ---------------------------------------------------------------------------------------------------

    async def reserve(
        self,
        writer: int,
        tenant: int,
        kind: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        lengths: Sequence[int],
        policy: str = WRITE_THROUGH,
    ) -> tuple[int, list[int], list[Place | None]]:
        """See `Puts.reserve`. Raises ReadOnly."""
        self._wal.check_writable()
        return await self._puts.reserve(writer, tenant, kind, keys, parents, lengths, policy)

    def commit(self, number: int, writer: int, crcs: Sequence[int]) -> None:
        """See `Puts.commit`."""
        self._puts.commit(number, writer, crcs)

    def reserved(self, number: int, writer: int) -> list[bytes]:
        """See `Puts.reserved`."""
        return self._puts.reserved(number, writer)

    def give_up(self, number: int, writer: int) -> None:
        """The pages of a reservation will not come."""
        self._puts.give_up(number, writer)

    async def flush(self) -> None:
        """All that was committed is durable. Raises ReadOnly, StaleOwner."""
        await self._wal.flush()

    def end_writer(self, writer: int) -> None:
        """It is gone: what it reserved is given up, and its segment sealed."""
        self._puts.give_up_all(lambda held: held.writer == writer)
        self.space.end_segment(writer)

    # --- removing --------------------------------------------------------------------------------------------------

    async def remove(self, tenant: int, keys: Sequence[bytes]) -> int:
        """Take pages out, with all that hang below them. How many keys there were."""
        there = [key for key in keys if self.table.any_slot(tenant, key) is not None]
        await self.space.cut(tenant, there)
        return len(there)

    async def erase(self, tenant: int) -> tuple[int, int]:
        """Take out all that a tenant has, and what it is about to write. (pages, bytes) that it had."""
        self._puts.give_up_all(lambda held: held.tenant == tenant)
        keys, size = list(self.table.slots_of(tenant)), self.table.tenant_bytes[tenant]
        await self.space.cut(tenant, keys)
        return len(keys), size

    def pin(self, tenant: int, keys: Sequence[bytes], for_s: float) -> int:
        """Keep pages, and what is above them, for so long, whatever happens. How many of them there are."""
        there = [key for key in keys if self.table.slot(tenant, key) is not None]
        if there:
            self._wal.note(Pinned(tenant, b"".join(there), self.space.stamp_s() + for_s))
        return len(there)

    # --- upkeep ----------------------------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        while not self.is_lost:
            await self._runtime.sleep(UPKEEP_S)
            try:
                if not self.is_lost:
                    await self.keep_up()
            except StaleOwner:
                return
            except (EmberError, OSError) as error:
                log.warning("%s: a round of upkeep failed, the next one tries again: %s", self.directory, error)
            except Exception:
                log.exception("%s: a round of upkeep failed, and the next one may", self.directory)

    async def keep_up(self) -> None:
        """One round: what is over ends, what is dead goes."""
        now_s = self._runtime.now_s()
        self.leases.expire(now_s)
        self._puts.end_overdue(now_s)
        if now_s >= self._next_snapshot_s:
            async with self._making_room:
                await self.space.look_for_strangers(self.ownership.check)
            self._next_snapshot_s = now_s + SNAPSHOT_S
            self._wal.want_snapshot()
        count_max = int(self.space.config.evictions_per_s * UPKEEP_S)
        await self.space.evict_above_limit(count_max - self.space.expire(count_max))
        while self._wal.failure is None:  # Else nothing that goes would be known to have gone.
            async with self._making_room:  # For one file: a put that needs a segment has its turn before the next.
                if await self.space.strangers.remove_one(self.ownership.check):
                    continue
                if not await self.space.collect(files_max=1) and not await self.space.shrink():
                    return


async def _nothing(files: Files, directory: str, make: Callable[[], Index]) -> Index:
    """The index of a namespace that nobody has served yet. Raises Corruption if it was: its files would be removed."""
    names = await files.names(f"{directory}/segments")
    if names:
        raise Corruption(f"there is no index of the {len(names)} segments in {directory}: see emberline kv rebuild")
    return make()
