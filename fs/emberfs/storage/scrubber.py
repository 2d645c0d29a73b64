"""The scrub of a storage node: each chunk is read back from the medium now and then, and mended if it is damaged.

One loop goes round the serving targets of the node, chunk after chunk in key order, just so fast that it is round in
`scrub_interval_s`, and never faster than `scrub_bytes_per_s`. An operator's `ScrubChunks` does the same at once, a page
at a time, and leaves the loop where it is.

Where the loop begins (when, at which target, at which chunk of each) is drawn at random when the process starts, and
how far it came is not kept. So a node that is restarted often looks at as much of its disk as another one, each time
from somewhere else on; and the nodes of a cluster do not all read at the same time.

Another loop looks again at what could not be mended. The two share the limit.

Invariants:
  - No lock is held while the scrub reads or waits, so no request waits for it; only to mend a chunk it takes its lock.
  - Damage counts if the record still says the same after the read, and is confirmed under the lock before it is mended.

Does not know: where a good copy is (`repair`), or who asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..engine.allocator import CLASS_LOG2_MAX, class_for
from ..engine.scrub import ChunkScrubber
from ..errors import EmberError, StaleRouting, StoreClosed
from ..messages import ChunksScrubbed, DamagedChunk, ScrubChunks
from ..runtime import Runtime
from ..settings import Settings
from ..waiting import pause
from .config import StorageConfig
from .replica import Replica

SPARE = 0.9
"""A round takes this part of the interval: a node has pauses of its own, and more data tomorrow."""
BEGIN_S_MAX = 600.0
"""The loop begins within so long, or within a tenth of the interval if that is less."""
LOOK_S = 60.0
"""A pause is cut into parts of at most this: meanwhile the settings may change, or there may be more to read, and so
less time for each chunk."""
PAGE_S = 2.0
"""An operator's page ends after so long, if not before."""
MEND_LOOKS_MAX = 3
"""So often a damaged chunk is looked at that is being written to: then its writer mends it, or meets the damage."""
_END = b"\xff" * 17
"""Behind every chunk id."""

log = logging.getLogger("emberline.storage")


@dataclass(slots=True)
class ScrubCounts:
    """What was done since the process started."""

    chunks: int = 0
    read_bytes: int = 0
    damaged: int = 0
    repaired: int = 0
    unrepairable: int = 0
    """Damaged, and no other replica had the bytes. Counted at each look, as all of these are."""


class Scrubber:
    """Of one node. `run` and `run_again` go on until `closing` is done."""

    def __init__(
        self,
        replicas: Mapping[int, Replica],
        runtime: Runtime,
        *,
        settings: Callable[[], Settings],
        config: StorageConfig,
        closing: asyncio.Future[None],
    ) -> None:
        """`replicas`: by chain, as the node opens and closes them. `settings`: as they are now."""
        self.counts = ScrubCounts()
        self._replicas = replicas
        self._runtime = runtime
        self._settings = settings
        self._config = config
        self._closing = closing
        self._turn = asyncio.Lock()
        """Whoever waits because of the limit has it."""
        self._first_chain = 0.0
        """Where in the order of chains a round begins: a fraction."""
        self._begins: dict[bytes, bytes] = {}
        """Target -> the chunk at which each pass over it begins."""

    def gauges(self) -> dict[str, float]:
        """Figures for metrics."""
        counts = self.counts
        return {
            "storage_scrub_chunks": counts.chunks,
            "storage_scrub_bytes": counts.read_bytes,
            "storage_scrub_damaged_chunks": counts.damaged,
            "storage_scrub_repaired_chunks": counts.repaired,
            "storage_scrub_unrepairable_chunks": counts.unrepairable,
            "storage_unmended_chunks": sum(len(each.repairer.unmended) for each in self._replicas.values()),
        }

    # --- by itself -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Go round for ever; while the interval is 0, nowhere."""
        self._first_chain = self._random()
        await self._wait_to_begin()
        while not self._closing.done():
            looked_at = self.counts.chunks
            if self._settings().scrub_interval_s:
                await self._go_round()
            if self.counts.chunks == looked_at:  # There is nothing yet, or nothing serves.
                wait_s = self._settings().scrub_interval_s / 10 or LOOK_S
                await pause(self._runtime, min(LOOK_S, wait_s), self._closing)

    async def _wait_to_begin(self) -> None:
        """A part, drawn at random, of the longest wait there may be now."""
        part, start_s = self._random(), self._runtime.now_s()
        await self._wait(start_s, lambda: part * min(BEGIN_S_MAX, self._settings().scrub_interval_s / 10))

    async def _wait(self, start_s: float, wait_s: Callable[[], float]) -> None:
        """Until `wait_s` after `start_s`, as it is by then."""
        while not self._closing.done():
            left_s = start_s + wait_s() - self._runtime.now_s()
            if left_s <= 0:
                return
            await pause(self._runtime, min(left_s, LOOK_S), self._closing)

    def _random(self) -> float:
        """From 0 up to 1."""
        return int.from_bytes(self._runtime.random_bytes(4), "big") / (1 << 32)

    async def _go_round(self) -> None:
        """Look once at every chunk of every serving target."""
        chains = sorted(self._replicas)
        first = int(self._first_chain * len(chains))
        for chain in chains[first:] + chains[:first]:
            replica = self._replicas.get(chain)
            if replica is None or not _serves(replica):
                continue
            try:
                await self._go_through(replica)
            except (EmberError, OSError) as error:
                if not isinstance(error, StoreClosed):
                    log.warning("the scrub of chain %d ends early: %s", chain, error)

    async def _go_through(self, replica: Replica) -> None:
        begin = await self._begin_of(replica)
        scrubber = ChunkScrubber(replica.engine, pace=self._pace)
        for first, end in ((begin, _END), (b"", begin)):
            while self._goes_on(replica) and (rows := await replica.engine.scan(first, end, limit=1)):
                ((chunk, row),) = rows
                first = chunk + b"\x00"
                began_s = self._runtime.now_s()
                before = scrubber.report.read_bytes
                await self._look(scrubber, replica, chunk, row)
                await self._rest(began_s, scrubber.report.read_bytes - before)

    def _goes_on(self, replica: Replica) -> bool:
        return _serves(replica) and self._settings().scrub_interval_s > 0

    async def _begin_of(self, replica: Replica) -> bytes:
        """Drawn once for each target, evenly between the first and the last chunk that it has then."""
        target = replica.engine.identity.target
        if target not in self._begins:
            first = await replica.engine.scan(b"", _END, limit=1)
            if not first:
                return b""
            last = await replica.engine.scan(b"", _END, limit=1, reverse=True)
            low, high = (int.from_bytes(rows[0][0], "big") for rows in (first, last))
            begin = low + int(self._random() * (high - low + 1))
            self._begins[target] = begin.to_bytes(len(first[0][0]), "big")
        return self._begins[target]

    async def _pace(self, read_bytes: int) -> None:
        """Between two pieces: not faster than the limit."""
        async with self._turn:
            await self._wait(self._runtime.now_s(), lambda: read_bytes / self._settings().scrub_bytes_per_s)
        if self._closing.done():
            raise StoreClosed("the server is closing")

    async def _rest(self, began_s: float, read_bytes: int) -> None:
        """After a chunk: what it takes of the time of a round."""
        block_bytes = 1 << class_for(min(read_bytes, 1 << CLASS_LOG2_MAX))
        await self._wait(began_s, lambda: block_bytes * self._byte_s())

    def _byte_s(self) -> float:
        """Seconds for each byte of a block, with which a round takes its time."""
        used_bytes = sum(each.engine.allocator.used_bytes for each in self._replicas.values() if _serves(each))
        return SPARE * self._settings().scrub_interval_s / max(used_bytes, 1)

    # --- on demand -------------------------------------------------------------------------------------------------

    async def serve(self, request: ScrubChunks) -> ChunksScrubbed:
        """One page, as fast as the disk is. Raises StaleRouting."""
        replica = self._replicas.get(request.chain)
        if replica is None or replica.engine.identity.target != request.target:
            raise StaleRouting(f"target {request.target.hex()} of chain {request.chain} is not here")
        if not _serves(replica):
            raise StaleRouting(f"target {request.target.hex()} does not serve in chain {request.chain} now")
        scrubber, began_s = ChunkScrubber(replica.engine), self._runtime.now_s()
        after, damaged = request.after, list[DamagedChunk]()
        while rows := await replica.engine.scan(after + b"\x00", _END, limit=1):
            ((after, row),) = rows
            if (found := await self._look(scrubber, replica, after, row)) is not None:
                damaged.append(found)
            is_over = self._closing.done() or self._runtime.now_s() - began_s > PAGE_S
            if is_over or scrubber.report.read_bytes >= request.bytes_max:
                break
        if not rows:
            await self._forget_removed(replica)
        report = scrubber.report
        return ChunksScrubbed(after if rows else None, report.chunks, report.read_bytes, damaged)

    async def _forget_removed(self, replica: Replica) -> None:
        """Of what could not be mended, what is gone."""
        for chunk in list(replica.repairer.unmended):
            if not await replica.engine.scan(chunk, chunk + b"\x00", limit=1):
                replica.repairer.note_well(chunk)

    async def run_again(self) -> None:
        """Look again every `tombstone_s`."""
        while not self._closing.done():
            await self._wait(self._runtime.now_s(), lambda: self._settings().tombstone_s)
            await self.look_again()

    async def look_again(self) -> None:
        """At what could not be mended: a file may have been removed or written again, a replica be back."""
        for replica in list(self._replicas.values()):
            try:
                await self._forget_removed(replica)
                for chunk in list(replica.repairer.unmended):
                    rows = await replica.engine.scan(chunk, chunk + b"\x00", limit=1)
                    if rows and _serves(replica):
                        scrubber = ChunkScrubber(replica.engine, pace=self._pace)
                        await self._look(scrubber, replica, chunk, rows[0][1])
            except StoreClosed:
                return
            except (EmberError, OSError) as error:
                log.warning("a damaged chunk could not be looked at again: %s", error)

    # --- one chunk -------------------------------------------------------------------------------------------------

    async def _look(self, scrubber: ChunkScrubber, replica: Replica, chunk: bytes, row: bytes) -> DamagedChunk | None:
        """Read a chunk, and mend it if that is needed. None: it is well."""
        chunks, read_bytes = scrubber.report.chunks, scrubber.report.read_bytes
        findings = await scrubber.scrub(chunk, row)
        self.counts.chunks += scrubber.report.chunks - chunks
        self.counts.read_bytes += scrubber.report.read_bytes - read_bytes
        if not findings:
            replica.repairer.note_well(chunk)
            return None
        self.counts.damaged += 1
        detail, is_news = findings[0].message, chunk not in replica.repairer.unmended
        if await self._mend(replica, chunk):
            self.counts.repaired += 1
            log.warning("damaged on the disk, and mended from another replica: %s", detail)
            return DamagedChunk(chunk, detail, True)
        self.counts.unrepairable += 1
        if is_news:
            log.error("damaged on the disk, and no other replica of the chunk could help: %s", detail)
        return DamagedChunk(chunk, detail, False)

    async def _mend(self, replica: Replica, chunk: bytes) -> bool:
        """Whether the chunk is well now."""
        for _ in range(MEND_LOOKS_MAX):
            view = replica.view
            if view is None or not view.is_serving:
                return False
            async with replica.locks.of(chunk):
                rows = await replica.engine.scan(chunk, chunk + b"\x00", limit=1)
                if not rows or not await ChunkScrubber(replica.engine).scrub(chunk, rows[0][1]):
                    replica.repairer.note_well(chunk)
                    return True
                if view is replica.view and await replica.repairer.repair(view, chunk):
                    return True
            await pause(self._runtime, self._config.retry_s, view.changed)
        return False


def _serves(replica: Replica) -> bool:
    """Only what serves is mended, so only that is read: a resync brings the rest."""
    return replica.view is not None and replica.view.is_serving and replica.engine.failure is None
