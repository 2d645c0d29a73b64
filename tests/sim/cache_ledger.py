"""What clients of a simulated KV cache were told, and what must therefore be so.

Always:
  - A page that is read is right, byte for byte, or a miss.
  - A page that a lease keeps is read, as long as the server that gave the lease serves.
  - A place in a segment names one page for ever, whoever served.
When a server serves, and all nodes do (`check_index`):
  - Each page whose `committed` was acknowledged is there, unless a server has let it go since.
  - Each page that the index names lies where it says, and is right.
When all is quiet (`check_nothing_leaks`): no lease, reservation, promise or file is left that nobody needs.

Does not know: faults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from emberfs.errors import EmberError, NotFound
from emberkv.compaction import page_header
from emberkv.journal import AnyEntry, Evicted, Put, Unplaced, split
from emberkv.keys import KEY_BYTES, ROOT
from emberkv.page import HEADER_BYTES, Place, places_of
from emberkv.pool import Pool

from tests.sim.cache_cluster import DIRECTORY, CacheClient, CacheServer, Hit, content

LEASE_SHARE = 0.9
"""So much of a lease is certain, with clocks that drift."""
SETTLED_S = 20.0
"""After the last request what nobody needs is gone, at the latest."""


class WrongBytes(AssertionError):
    """A page that is not the one asked for was returned."""


class Leased(NamedTuple):
    """A hit, and how long what of it is there."""

    hit: Hit
    kept_by: Pool | None
    """For as long as nobody else takes over, who may remove files then."""
    until_s: float
    """By the world's clock."""


@dataclass(slots=True)
class Ledger:
    """Of one namespace. Is the event feed of its servers."""

    tells_tokens: bool = False
    committed: dict[bytes, bytes] = field(default_factory=dict)
    """Pages that must be there -> the page before each."""
    departures: Counter[bytes] = field(default_factory=Counter)
    """How often a server let a page go, durably or not."""
    places: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """(segment, offset) -> the page that was committed there."""
    owner: Pool | None = None
    """Who took over last."""
    counts: Counter[str] = field(default_factory=Counter)

    # ---- what servers do

    def follow(self, pool: Pool) -> None:
        """See `cache_cluster.Feed`."""
        self.counts["takeovers"] += 1
        self.owner = pool
        pool.index.listener = self._note

    def _note(self, entry: AnyEntry) -> None:
        self.counts[type(entry).__name__] += 1
        if isinstance(entry, Evicted | Unplaced):
            for key in split(entry.keys, KEY_BYTES):
                self.departures[key] += 1
                self.committed.pop(key, None)
        elif isinstance(entry, Put):
            for key, place in zip(split(entry.keys, KEY_BYTES), places_of(entry.places), strict=True):
                before = self.places.setdefault((place.segment, place.offset), key)
                assert before == key, f"{place} was handed out twice"

    # ---- what clients do

    async def put(self, cache: CacheClient, keys: Sequence[bytes]) -> list[str]:
        """Pages of a prompt from its first one on, committed. Raises what the client raises."""
        departures = [self.departures[key] for key in keys]
        states = await cache.put(keys)
        above = ROOT
        for key, state, before in zip(keys, states, departures, strict=True):
            is_there = state in ("stored", "known") and self.departures[key] == before
            if not is_there or (above != ROOT and above not in self.committed):
                break  # What hangs on a page that is not there may go.
            self.committed[key] = above
            above = key
        self.counts.update(states)
        return states

    async def match(self, cache: CacheClient, keys: Sequence[bytes], *, lease_s: float) -> Leased:
        """Raises what the client raises."""
        until_s, owner = cache.process.world.now_s() + LEASE_SHARE * lease_s, self.owner
        hit = await cache.match(keys, lease_s=lease_s)
        return Leased(hit, owner if hit.lease else None, until_s)

    async def read(self, cache: CacheClient, leased: Leased) -> int:
        """Read the pages of a hit; how many of them there were."""
        pages, is_away = await cache.read(leased.hit)
        self._check_pages(leased.hit.keys, pages)
        right = sum(page is not None for page in pages)
        if leased.kept_by is self.owner and not is_away and cache.process.world.now_s() < leased.until_s:
            assert right == len(pages), f"{len(pages) - right} of {len(pages)} pages went under a lease"
        self.counts.update(read=right, missed=len(pages) - right)
        return right

    def _check_pages(self, keys: Sequence[bytes], pages: Sequence[bytes | None]) -> None:
        for key, page in zip(keys, pages, strict=True):
            if page is not None and page != content(key, len(page)):
                raise WrongBytes(f"page {key.hex()[:8]} begins with {page[:40]!r}")

    # ---- what must be so

    async def check_index(self, server: CacheServer, cache: CacheClient) -> None:
        """While nobody asks for anything. All nodes serve."""
        pool = server.pool
        assert pool is not None
        table = pool.table
        tenants = range(len(pool.index.tenants))
        named = [(key, slot) for tenant in tenants for key, slot in table.slots_of(tenant).items()]
        for key in self.committed:
            slot = table.any_slot(0, key)
            assert slot is not None and table.place(slot, 0) is not None, f"committed page {key.hex()[:8]} is lost"
            assert table.slot(0, key) is not None, f"committed page {key.hex()[:8]} is out of reach"
        for key, slot in named:
            place = table.place(slot, 0)
            if place is not None:
                page = await self._page(cache, place)
                if table.place(slot, 0) != place:
                    continue  # It went, or was moved, meanwhile.
                assert page is not None, f"page {key.hex()[:8]} is not at {place}"
                assert page_header(page, place, key) is not None, f"at {place} is not page {key.hex()[:8]}"
                self._check_pages([key], [page[HEADER_BYTES:]])
                self.counts["checked"] += 1

    async def _page(self, cache: CacheClient, place: Place) -> bytes | None:
        path = f"{DIRECTORY}/segments/{place.segment:08x}"
        try:
            return await cache.store.get(path, place.offset, place.end - place.offset)
        except NotFound:
            return None

    async def check_nothing_leaks(self, server: CacheServer, cache: CacheClient) -> None:
        """Once leases and reservations have run out, and upkeep has seen it."""
        if server.pool is not None:
            # What an owner that was over has left is looked for with each snapshot.
            server.pool._next_snapshot_s = server.process.now_s()
        until_s = cache.process.now_s() + SETTLED_S
        while True:
            try:
                left = await self._left(server, cache)
            except EmberError as error:
                left = [str(error)]
            if not left:
                return
            assert cache.process.now_s() < until_s, f"{SETTLED_S:g} s later: {'; '.join(left)}"
            await cache.process.sleep(0.5)

    async def _left(self, server: CacheServer, cache: CacheClient) -> list[str]:
        """What is there and should not be."""
        pool = server.pool
        if pool is None:
            return [f"{server.name} does not serve"]
        index, puts, table = pool.index, pool._puts, pool.table
        files = await self._names(cache, "segments")
        spare = pool.space._spare
        named = {each.id for each in index.segments} | ({spare.number} if spare else set())
        found = {
            "leases": len(pool.leases),
            "slots that are held": sum(table.held),
            "slots that are pinned": sum(
                table.pinned_s[slot] > pool.space.stamp_s() for slot in table.slots().tolist()
            ),
            "reservations": len(puts),
            "pages that somebody writes": len(puts._pending),
            "bytes of writers": puts._writers.total(),
            "bytes that were promised": pool.space.pending_bytes.total() + pool.space._promised_bytes,
            "bytes pending in segments": sum(each.pending_bytes for each in index.segments),
            "strangers": len(pool.space.strangers),
            "retired segments": sum(each.is_retired for each in index.segments),
            "files that no segment has": len(files - {f"{number:08x}" for number in named}),
            "segments without a file": len({f"{each.id:08x}" for each in index.segments} - files),
            "files of the index beside three": len(await self._names(cache, "index")) - 3,
            "rosters beside one": len(await self._names(cache, "tenants")) - 1,
        }
        live = Counter[int]()
        for slot in table.slots().tolist():
            if (place := table.place(slot, 0)) is not None:
                live[place.segment] += place.end - place.offset
        wrong = [f"segment {each.id}" for each in index.segments if each.live_bytes != live[each.id]]
        if table.live_bytes != live.total() or sum(table.tenant_bytes) != live.total():
            wrong.append("the table")
        told = [f"{count} {what}" for what, count in found.items() if count]
        return told + [f"{each} counts what is alive wrongly" for each in wrong]

    async def _names(self, cache: CacheClient, directory: str) -> set[str]:
        return {name for name, _ in await cache.store.list(f"{DIRECTORY}/{directory}")}

    async def check_all_goes(self, server: CacheServer, cache: CacheClient) -> None:
        """When everything was erased, no page, segment or file is left."""
        await self.check_nothing_leaks(server, cache)
        pool = server.pool
        assert pool is not None
        until_s = cache.process.now_s() + SETTLED_S
        while pool.table.count or pool.index.segments.by_id or await self._names(cache, "segments"):
            assert cache.process.now_s() < until_s, (
                f"{pool.table.count} pages and {len(pool.index.segments.by_id)} segments are left of what was erased"
            )
            await cache.process.sleep(0.5)
        assert pool.table.live_bytes == pool.index.segments.disk_bytes == 0
