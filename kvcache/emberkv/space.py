"""Room in a namespace: what is evicted, what is compacted, and which files go.

    live pages   <= live_share x limit           else the coldest leaves are evicted, whosoever they are
    of a tenant  <= its quota                    else its own
    segments     <= limit                        else a segment is compacted: what is cold in it goes, the rest moves
    the limit    <= capacity                     less where others fill the store: the cache gives way
    dead ones    retired by the journal, then removed once no lease can reach them

An evicted page was held by nobody, nor was anything below it: no lease reaches it. A moved one may still be read under
a lease where it was, so a segment that was compacted stays until the leases of that moment have ended.

Order of an eviction, each durable before the next: the tombstone and the retirement of the segment, then its file goes.
A crash between them leaves a file that the next owner removes.

The limit is what `room` finds that the store has left: below the capacity the cache shrinks ahead of need.

The file of the next segment is made ahead, as a *spare* that the journal does not know and that takes no space: who
fills a segment does not wait for it. One that is of no use becomes a dead segment, so that its number is known to be
used before its file goes, and that to whoever owns the namespace next. One that the journal never knew, after a crash,
is the next owner's to remove.

Does not know: clients.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from emberfs import AlreadyExists
from emberfs.errors import EmberError, LimitExceeded
from emberfs.runtime import Runtime

from .compaction import COMPACTION, SOON_S, TURN_PAGES, Compaction
from .counts import Departed
from .files import Files
from .journal import Evicted, SegmentAdded, SegmentRetired, SegmentSealed, Unplaced
from .leases import Leases
from .segments import SECTOR_BYTES, Segment
from .strangers import STUCK_S, Strangers
from .survey import hollow, newest_by_segment
from .table import FREE
from .wal import Wal

log = logging.getLogger("emberline.kv")

WORKING_SEGMENTS = 4
"""Room for so many is left beside what is alive: one is written to, one is compacted into, some are to go."""
AT_ONCE_PAGES = 1000
"""So many are evicted for one page that is put: where a limit fell, the rest goes by and by."""
LEAVES_S = 60.0
"""Leases on what was moved end by themselves, and room is waited for; not for those that are extended longer."""
CUT_PAGES = 1000
"""After so many that went, others have their turn."""
NOBODY = -1
"""The writer of a segment that was dead from the beginning."""
GRANTED_SHARE = 0.25
"""Of the limit, that files may take which wait for grants, or to be removed: more are not made to wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceConfig:
    """How much a namespace may hold."""

    capacity_bytes: int
    """Of segments on disk, dead pages too. Never exceeded, and not reached on a store that has not so much left."""
    live_share: float = 0.9
    """Of the limit, for live pages; the rest is for what is dead and not yet given back. In (0, 1)."""
    cold_share: float = 0.05
    """Of the pages, those that were not used for longest: a compaction lets them go, since they would be next anyway.
    More of them make writes fewer and the order less like LRU. In [0, 1)."""
    ttl_s: float = 72 * 3600.0
    """A page that was not used for so long, nor any below it, goes. A namespace or a tenant may have another one."""
    orphan_s: float = 60.0
    """A page whose parent did not come for so long goes."""
    evictions_per_s: float = 20_000.0
    """The pace of removals by age: no burst of tombstones when a whole day expires at once."""
    granted_s: float = 0.0
    """A file stays for so long after the last grant to write to it was given, or the end of an owner that may have
    given some. 0: there are no grants."""

    def __post_init__(self) -> None:
        if self.capacity_bytes < 1 << 20:
            raise LimitExceeded(f"the capacity must be at least 1 MiB, not {self.capacity_bytes} bytes")
        if not 0 < self.live_share < 1:
            raise LimitExceeded(f"live_share must be in (0, 1), not {self.live_share}")
        if not 0 <= self.cold_share < 1:
            raise LimitExceeded(f"cold_share must be in [0, 1), not {self.cold_share}")
        if min(self.ttl_s, self.orphan_s, self.evictions_per_s) <= 0:
            raise LimitExceeded("ttl_s, orphan_s and evictions_per_s must be above 0")


@dataclass(slots=True)
class SpaceCounts:
    """What was done for room since the start."""

    evicted_pages: int = 0
    expired_pages: int = 0
    """By age, and those whose parent never came."""
    removed_pages: int = 0
    """Because somebody said so."""
    moved_bytes: int = 0
    """By compaction: what write amplification is made of."""
    freed_bytes: int = 0
    removed_segments: int = 0


@dataclass(frozen=True, slots=True)
class _Spare:
    """The file of the next segment. Its number is that of the next one as long as it is there."""

    number: int
    size_bytes: int
    made: asyncio.Task[bool]
    """Whether it could be made."""


class Space:
    """See the module."""

    def __init__(
        self, files: Files, runtime: Runtime, directory: str, wal: Wal, leases: Leases, config: SpaceConfig,
        strangers: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.config = config
        self.counts = SpaceCounts()
        self.departed = Departed()
        self.pending_bytes: Counter[int] = Counter()
        """Tenant -> what it was promised, and has not committed or given up."""
        self.patient: set[int] = set()
        """Tenants whose pages wait for the one before them as long as pages stay: an engine puts it later."""
        self.limit_bytes = config.capacity_bytes
        """What there is room for of the capacity. Below what the segments take already, until enough of them went."""
        self._movable_bytes = config.capacity_bytes
        self._spare: _Spare | None = None
        self._making: dict[int, asyncio.Task[bool]] = {}
        """Number -> the file that is being made. It is not removed before, or it would come afterwards."""
        self._stuck: dict[int, float] = {}
        """Segments whose files could not be removed, and when they are tried again."""
        self._next_patient_s = 0.0
        """When those are looked at again."""
        self._promised_bytes = 0
        """The same of all of them."""
        self._files, self._runtime, self._directory = files, runtime, directory
        self._wal, self._leases = wal, leases
        self._index = wal.index
        self._hollow = dict.fromkeys((slot, wal.index.table.keys[slot]) for slot in hollow(wal.index.table))
        """Slots without pages that were held, or had others below them, when their pages were taken out."""
        self.compaction = Compaction(self, files, wal, leases)
        self._clock_offset_s = runtime.wall_ns() / 1e9 - runtime.now_s()
        self._began_s = self.stamp_s()
        self.strangers = Strangers(
            files, directory, wal.index, strangers, stay_s=config.granted_s, stamp_s=self.stamp_s
        )
        if config.granted_s:
            newest = newest_by_segment(wal.index.table)
            for segment in wal.index.segments:
                # Of one that nothing was put into for longer no grant is left.
                if segment.is_retired or newest.get(segment.id, self._began_s) > self._began_s - config.granted_s:
                    segment.granted_until_s = self._began_s + config.granted_s

    def now_s(self) -> float:
        """By the clock of leases."""
        return self._runtime.now_s()

    def stamp_s(self) -> float:
        """Now, for stamps that outlive the process: wall clock at the start, and from there on monotonic."""
        return self._clock_offset_s + self.now_s()

    def ttl_s(self, tenant: int | None = None) -> float:
        """How long pages stay that nobody uses: of a tenant, or of the namespace."""
        of_tenant = 0.0 if tenant is None else self._index.ttls[tenant]
        return of_tenant or self._index.ttl_s or self.config.ttl_s

    def path(self, segment: int) -> str:
        """Where its file is."""
        return f"{self._directory}/{segment:08x}"

    def live_bytes_max(self, page_bytes: int) -> int:
        """Live pages beyond it are evicted, for a page of that size: some segments are being filled or compacted."""
        working = WORKING_SEGMENTS * self._index.segments.size_for(page_bytes)
        return min(int(self.limit_bytes * self.config.live_share), self.limit_bytes - working)

    @property
    def held_bytes(self) -> int:
        """What the segments take on the store: of what was promised nobody knows whether it is there yet."""
        segments = self._index.segments
        return max(segments.disk_bytes - segments.unknown_bytes - self._promised_bytes, 0)

    def heed(self, limit_bytes: int, movable_bytes: int) -> None:
        """So much of its capacity the namespace may hold; below that, so much may be there twice while it is moved."""
        self.limit_bytes = min(self.config.capacity_bytes, limit_bytes)
        self._movable_bytes = movable_bytes
        self._index.segments.fit(self.limit_bytes, self.config.capacity_bytes)

    # --- eviction --------------------------------------------------------------------------------------------------

    def make_live_room(self, size: int, tenant: int, limit: int) -> bool:
        """Evict until `size` more bytes of `tenant` fit, `limit` (see `live_bytes_max`) in all. False: not even without
        what nobody holds."""
        table, quota = self._index.table, self._index.quotas[tenant]
        # What will not fit whatever goes has nothing evicted for it.
        if (quota and self.pending_bytes[tenant] + size > quota) or self._promised_bytes + size > limit:
            return False
        while quota and table.tenant_bytes[tenant] + self.pending_bytes[tenant] + size > quota:
            if not self._evict_coldest([tenant]):
                return False
        for _ in range(AT_ONCE_PAGES):
            if table.live_bytes + self._promised_bytes + size <= limit:
                return True
            if not self._evict_coldest(self.every_tenant):
                return False
        return False

    def promise(self, tenant: int, size: int) -> None:
        """So many bytes of a tenant are to come."""
        self.pending_bytes[tenant] += size
        self._promised_bytes += size

    def redeem(self, tenant: int, size: int) -> None:
        """They came, or will not."""
        self.pending_bytes[tenant] -= size
        self._promised_bytes -= size

    @property
    def every_tenant(self) -> range:
        """Their numbers."""
        return range(len(self._index.tenants))

    def coldest(self, tenants: Iterable[int]) -> int | None:
        """Of those of some tenants the leaf that goes first. None: all are held or pinned."""
        table, now_s = self._index.table, self.stamp_s()
        found = [slot for tenant in tenants if (slot := table.coldest(tenant, now_s)) is not None]
        return min(found, key=table.used_s.__getitem__, default=None)

    def _evict_coldest(self, tenants: Iterable[int]) -> bool:
        slot = self.coldest(tenants)
        if slot is not None:
            self.evict([slot], "evicted")
            self.counts.evicted_pages += 1
        return slot is not None

    def evict_leaf(self, slot: int) -> bool:
        """False: others hang below it, or somebody holds or pinned it."""
        table = self._index.table
        if table.parent[slot] == FREE or table.held[slot] or table.children[slot]:
            return False
        if table.pinned_s[slot] > self.stamp_s():
            return False
        self.evict([slot], "evicted")
        self.counts.evicted_pages += 1
        return True

    async def take_turns(self) -> None:
        """Others go on meanwhile."""
        await self._runtime.sleep(0)

    def evict(self, slots: Sequence[int], cause: str) -> None:
        """Tombstones for leaves, in this order; `cause` is what `Departed` remembers of them."""
        table = self._index.table
        for slot in slots:
            if cause:
                self.departed.note(table.keys[slot], cause)
            self._wal.note(Evicted(table.tenant[slot], table.keys[slot]))

    async def evict_above_limit(self, count_max: int) -> None:
        """Evict what the store has no room for any more: at most so many."""
        table, segments = self._index.table, self._index.segments
        for count in range(count_max):
            if table.live_bytes + self._promised_bytes <= self.live_bytes_max(0):
                return
            if count % TURN_PAGES == 0:
                await self.take_turns()
                # What open ones have room for is given back by sealing them.
                if segments.disk_bytes - segments.going_bytes <= self.limit_bytes:
                    return
            if not self._evict_coldest(self.every_tenant):
                return

    def expire(self, count_max: int) -> int:
        """Evict what was not used for its time, what is above a quota that was lowered, and orphans: at most so many.
        How many."""
        table, now_s = self._index.table, self.stamp_s()
        count = 0
        for tenant, quota in enumerate(self._index.quotas):
            ttl_s = self.ttl_s(tenant)
            while count < count_max:
                slot = table.coldest(tenant, now_s)
                is_over = quota and table.tenant_bytes[tenant] > quota
                if slot is None or (not is_over and table.used_s[slot] + ttl_s > now_s):
                    break
                self.evict([slot], "evicted" if is_over else "expired")
                count += 1
        self._remove_hollow()
        count += self._expire_orphans(count_max - count)
        self.counts.expired_pages += count
        return count

    def _expire_orphans(self, count_max: int) -> int:
        table, now_s = self._index.table, self.stamp_s()
        is_round = now_s >= self._next_patient_s  # Those of patient tenants may be many, and have time.
        if is_round:
            self._next_patient_s = now_s + self.config.orphan_s
        count = 0
        for slot in table.orphans(without=() if is_round else self.patient):
            tenant = table.tenant[slot]
            wait_s = self.ttl_s(tenant) if tenant in self.patient else self.config.orphan_s
            since_s = max(table.used_s[slot], self._began_s)  # Who is patient says so when it comes back.
            if since_s + wait_s <= now_s and count < count_max:
                count += sum(self._cut_one(each, "expired") for each in table.below([slot]))
        return count

    async def cut(self, tenant: int, keys: Sequence[bytes]) -> int:
        """Take pages out with all below them; of what is held only the pages, it goes later. How many went."""
        table, count, steps = self._index.table, 0, 0
        seen: set[bytes] = set()
        for top in keys:
            steps += 1
            if steps % CUT_PAGES == 0:
                await self._runtime.sleep(0)
            if top in seen:
                continue
            cut = [top]
            for key in cut:  # It grows meanwhile: what hangs on one comes somewhere behind it.
                steps += 1
                if steps % CUT_PAGES == 0:
                    await self._runtime.sleep(0)
                slot = table.any_slot(tenant, key)
                if slot is not None and key not in seen:
                    seen.add(key)
                    cut.extend(table.keys[child] for child in table.children_of(slot))
            for key in reversed(cut):
                steps += 1
                if steps % CUT_PAGES == 0:
                    await self._runtime.sleep(0)
                slot = table.any_slot(tenant, key)
                if slot is not None:  # Else it went meanwhile.
                    count += self._cut_one(slot, "removed")
        self.counts.removed_pages += count
        return count

    def _remove_hollow(self) -> None:
        """Let slots go whose pages were taken out before."""
        table = self._index.table
        for slot, key in list(self._hollow):
            if table.keys[slot] != key or any(table.place(slot, kind) for kind in range(len(table.places))):
                del self._hollow[slot, key]  # It went, or was put again.
            elif not table.held[slot] and not table.children[slot]:
                self.evict([slot], "")  # Why its pages went is known already.
                del self._hollow[slot, key]

    def _cut_one(self, slot: int, cause: str) -> bool:
        table = self._index.table
        if not table.held[slot] and not table.children[slot]:
            self.evict([slot], cause)
            return True
        self.departed.note(table.keys[slot], cause)
        for kind in range(len(table.places)):
            place = table.place(slot, kind)
            if place is not None:
                segment = self._index.segments.by_id[place.segment]
                segment.gone_after_lease, segment.left_s = self._leases.newest, self.stamp_s()
                self._wal.note(Unplaced(table.tenant[slot], kind, table.keys[slot]))
        self._hollow[slot, table.keys[slot]] = None
        return False

    # --- segments --------------------------------------------------------------------------------------------------

    async def new_segment(self, writer: int, payload_bytes: int) -> Segment | None:
        """An open segment for a writer. None: there is no room for one now."""
        size_bytes = self._index.segments.size_for(payload_bytes)
        if not await self._make_disk_room(size_bytes):
            return None
        segment = await self.add_segment(writer, size_bytes)
        if self._spare is None and not self._wal.is_lost:
            number = self._index.segments.next_id
            self._spare = _Spare(number, size_bytes, self._begin_making(number, size_bytes))
        return segment

    def _begin_making(self, number: int, size_bytes: int) -> asyncio.Task[bool]:
        made = self._making[number] = self._runtime.spawn(self._make(number, size_bytes), "kv-spare")
        made.add_done_callback(lambda _: self._making.pop(number))
        return made

    async def _make(self, number: int, size_bytes: int) -> bool:
        """Make a file that nobody waits for. False: who needs the segment tries again, and is told."""
        try:
            await self._files.create(self.path(number), size_bytes)
        except (EmberError, OSError):
            return False
        return True

    async def _has_spare(self, number: int, size_bytes: int) -> bool:
        """Whether there is one for this segment, which it is from now on."""
        spare, self._spare = self._spare, None
        if spare is None:
            return False
        assert (spare.number, spare.size_bytes) == (number, size_bytes)
        await asyncio.wait([spare.made])  # Whoever waits may be cancelled, and the file is made nonetheless.
        return not spare.made.cancelled() and spare.made.result()

    def drop_spare(self) -> None:
        """It is of no use any more, and goes as a dead segment does. Raises StaleOwner."""
        spare, self._spare = self._spare, None
        if spare is not None:
            assert spare.number == self._index.segments.next_id
            self._wal.note(SegmentAdded(spare.number, spare.size_bytes, NOBODY), SegmentSealed(spare.number, 0))

    async def end_making(self) -> None:
        """At the end, of an owner: no file comes any more."""
        if self._making:
            await asyncio.wait(list(self._making.values()))

    def forget_spare(self) -> None:
        """At the end, of whoever may be none any more."""
        for made in self._making.values():
            made.cancel()

    def note_granted(self, numbers: Iterable[int]) -> dict[int, int]:
        """A grant to write is given for segments: where what was handed out of each ends, with its last sector."""
        segments, until_s = self._index.segments.by_id, self.stamp_s() + self.config.granted_s
        there = [segments[number] for number in numbers if number in segments]
        for segment in there:
            segment.granted_until_s = until_s
        return {segment.id: segment.end + -segment.end % SECTOR_BYTES for segment in there}

    async def add_segment(self, writer: int, size_bytes: int) -> Segment:
        """An open segment, whether or not there is room for it."""
        segments = self._index.segments
        self.end_segment(writer)
        if self._spare is not None and self._spare.size_bytes != size_bytes:
            self.drop_spare()
        while True:
            self._wal.note(SegmentAdded(segments.next_id, size_bytes, writer))
            segment = segments.by_id[segments.next_id - 1]
            segment.has_file, segment.since_lease = False, self._leases.newest
            try:
                if not await self._has_spare(segment.id, size_bytes):
                    await self._files.create(self.path(segment.id), size_bytes)
                segment.has_file = True
            except AlreadyExists:
                self.seal(segment)  # Of an owner that is over and does not know it: that number is its own.
            except BaseException:
                self.seal(segment)  # Nothing is handed out of what has no file.
                raise
            else:
                return segment

    def seal(self, segment: Segment) -> None:
        """Nothing is handed out of it any more."""
        self._wal.note(SegmentSealed(segment.id, segment.end))

    def end_segment(self, writer: int) -> None:
        """The same for what a writer has open."""
        if (segment := self._index.segments.of_writer(writer)) is not None:
            self.seal(segment)

    async def shrink(self) -> bool:
        """A step towards giving back what segments take above the limit. False: there is none, or leases forbid it."""
        segments = self._index.segments
        await self._runtime.sleep(0)
        now_s = self.stamp_s()
        leaving_bytes = sum(each.end for each in segments.waiting(now_s - LEAVES_S, now_s))
        if segments.promised_bytes - leaving_bytes <= self.limit_bytes:
            return False
        idle = segments.idle()
        if (idle is None or idle.writer == COMPACTION) and await self._compact_one():
            return True
        if idle is not None:
            self.seal(idle)
        return idle is not None

    def _must_wait(self, size_bytes: int) -> bool:
        """A good part of all there is waits for grants, or for its files to be removed."""
        segments = self._index.segments
        waiting_bytes_max = max(size_bytes, int(self.limit_bytes * GRANTED_SHARE))
        return (
            segments.granted_bytes(self.stamp_s()) >= waiting_bytes_max
            or sum(segments.by_id[each].end for each in self._stuck) >= waiting_bytes_max
        )

    async def _compact_one(self, *, is_patient: bool = False) -> bool:
        """A step towards giving back a segment. `is_patient`: room comes by itself from leases, so nothing is moved out
        of files that others keep. False: there is none."""
        if self.compaction.was_in_vain:
            return False
        began_s = self.now_s()
        is_limited = self.limit_bytes < self.config.capacity_bytes
        has_found = await (self._compact_within(is_patient) if is_limited else self._compact_at_all(is_patient))
        if not has_found:
            self.compaction.note_vain(began_s)
        return has_found

    async def _compact_at_all(self, is_patient: bool) -> bool:
        if await self._give_back(stay_s=0.0):
            return True
        sealed, staying = list(self._index.segments.sealed()), self.compaction.staying(0.0)
        if not any(each.id in staying for each in sealed):
            return bool(sealed) and await self._evict_a_segments_worth()
        return await self.compaction.clear_one() or (not is_patient and await self._give_back(stay_s=SOON_S))

    async def _compact_within(self, is_patient: bool) -> bool:
        """What is moved is there twice if leases reach it, until they end. The store has no room for much of that."""
        now_s = self.stamp_s()
        doubled_bytes = sum(each.moved_bytes for each in self._index.segments.waiting(now_s - LEAVES_S, now_s))
        movable_bytes = max(self._movable_bytes - doubled_bytes, 0)
        if await self.compaction.compact_one(movable_bytes, stay_s=0.0 if is_patient else math.inf):
            return True
        if doubled_bytes or is_patient:
            return False  # Room is on its way.
        return await self.compaction.thin_one(movable_bytes) or await self._evict_a_segments_worth()

    async def _give_back(self, *, stay_s: float) -> bool:
        """One segment whose file leases keep for no longer, and grants not at all."""
        if await self.compaction.compact_one(stay_s=stay_s):
            return True
        return self.compaction.is_tight and await self.compaction.thin_one(stay_s=stay_s)

    async def _evict_a_segments_worth(self) -> bool:
        """Coldest first, until there is less to be moved: to look for that is to look at all. False: all is held."""
        table, count = self._index.table, 0
        goal_bytes = table.live_bytes - self._index.segments.size_for(0)
        while table.live_bytes > goal_bytes and self._evict_coldest(self.every_tenant):
            count += 1
            if count % TURN_PAGES == 0:
                await self.take_turns()
        return count > 0

    async def _make_disk_room(self, size_bytes: int) -> bool:
        segments = self._index.segments
        while segments.promised_bytes + 2 * size_bytes > self.limit_bytes:  # One more, for compaction to give any back.
            if await self.collect():
                continue
            ours = segments.of_writer(COMPACTION)
            if ours is not None and not ours.pending_bytes and not segments.are_small:
                self.seal(ours)  # Nobody waits for it, and what it has room for need not be won by moving pages.
                continue
            idle, slack_bytes = segments.idle(), self.limit_bytes - self.live_bytes_max(0)
            # Who finds its segment sealed needs another one: not as long as those that are open take little.
            may_compact = idle is None or 2 * segments.open_room <= slack_bytes
            is_patient = segments.leaving_bytes(self.stamp_s() - LEAVES_S) >= size_bytes
            if may_compact and not self._must_wait(size_bytes) and await self._compact_one(is_patient=is_patient):
                continue
            if idle is None:
                return False
            self.seal(idle)
        return True

    async def collect(self, *, files_max: int | None = None) -> int:
        """Retire what is dead, and remove the files that no lease can reach, at most so many. How many went."""
        segments = self._index.segments
        for spent in segments.spent():
            self.seal(spent)
        if dead := segments.dead():
            self._wal.note(*(SegmentRetired(each.id) for each in dead))
        self._leases.expire(self._runtime.now_s())
        now_s = self.stamp_s()
        gone = [
            each
            for each in segments.retired()
            if each.id not in self._making and self._stuck.get(each.id, now_s) <= now_s and not self.is_reached(each)
        ]
        if gone:
            # Whoever retired them: only now it is known that it is durable, and that the namespace is still ours.
            await self._wal.flush()
        count = 0
        for segment in gone:
            if count == files_max:
                break
            try:
                await self._files.remove(self.path(segment.id))
            except (EmberError, OSError) as error:
                log.warning("%s stays for now: %s", self.path(segment.id), error)
                self._stuck[segment.id] = self.stamp_s() + STUCK_S
                continue
            self._stuck.pop(segment.id, None)
            segments.drop(segment)
            self.counts.freed_bytes += segment.end
            self.counts.removed_segments += 1
            count += 1
        if not segments.by_id:
            self.drop_spare()  # Nobody puts, and maybe nobody ever will.
        return count

    def is_reached(self, segment: Segment) -> bool:
        """A lease may reach a page that is not in it any more, or a grant may be written under."""
        if segment.granted_until_s > self.stamp_s():
            return True
        up_to = segment.gone_after_lease
        return self._leases.are_held(segment.leases, after=segment.since_lease, up_to=up_to)

    async def look_for_strangers(self, check: Callable[[], Awaitable[None]]) -> None:
        """Once more. `check` raises if we are over."""
        await check()
        self.drop_spare()  # It would be one of them.
        await self.strangers.look(check)
