"""Bugs of the KV cache, planted by patching the product's classes, that plays or walks must find.

`BUGS` maps a sentence to a function that returns the patches, and to what exposes it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest.mock import AsyncMock, patch

from emberfs.errors import Corruption
from emberkv import pool as pool_module
from emberkv import recovery
from emberkv.errors import SeatGone, StaleOwner
from emberkv.files import StoreFiles
from emberkv.leases import Leases
from emberkv.ownership import Ownership
from emberkv.pool import Pool
from emberkv.pools import Pools
from emberkv.puts import Puts
from emberkv.space import Space
from emberkv.strangers import Strangers
from emberkv.wal import Wal

Patch = AbstractContextManager[Any]


async def _nothing(*_: Any, **__: Any) -> None:
    return None


# ---- the index


def _acknowledges_what_is_not_written() -> Patch:
    return patch.object(Wal, "flush", _nothing)


def _acknowledges_whoever_serves() -> Patch:
    """It sees with its next beat that it is over."""
    check = Ownership.check

    async def blind(self: Ownership) -> None:
        task = asyncio.current_task()
        if task is None or ".kv-wal/" not in task.get_name():
            await check(self)

    return patch.object(Ownership, "check", blind)


def _reads_no_log() -> Patch:
    return patch.object(recovery, "_replay", lambda index, log, begin: begin)


def _a_snapshot_counts_before_it_is_there() -> Patch:
    put, held = StoreFiles.put, {}

    async def late(self: StoreFiles, path: str, data: bytes) -> None:
        if path.endswith(".snapshot"):
            held[self] = (path, data)
            return
        await put(self, path, data)
        if self in held and "/head-" in path:
            await put(self, *held.pop(self))

    return patch.object(StoreFiles, "put", late)


def _removes_the_index_before_the_next_one_counts() -> Patch:
    put = StoreFiles.put

    async def hasty(self: StoreFiles, path: str, data: bytes) -> None:
        directory, _, name = path.rpartition("/")
        if name.startswith("head-"):
            for other in await self.names(directory):
                if other.removeprefix("head-").partition(".")[0] < name.removeprefix("head-"):
                    await self.remove(f"{directory}/{other}")
        await put(self, path, data)

    return patch.object(StoreFiles, "put", hasty)


# ---- space


class _Unflushed:
    """A journal that is as durable as ever, it says."""

    flush = staticmethod(_nothing)

    def __init__(self, real: Wal) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _removes_files_before_the_index_says_so() -> Patch:
    collect = Space.collect

    async def hasty(self: Space, *, files_max: int | None = None) -> int:
        real, self._wal = self._wal, _Unflushed(self._wal)  # type: ignore[assignment]
        try:
            return await collect(self, files_max=files_max)
        finally:
            self._wal = real

    return patch.object(Space, "collect", hasty)


def _gives_space_back_under_a_lease() -> Patch:
    return patch.object(Leases, "are_held", lambda self, leases, *, after, up_to: False)


def _forgets_who_reads_where_a_page_was() -> Patch:
    return patch.object(Leases, "of_slots", lambda self, slots, *, after: set())


def _hands_numbers_out_again() -> Patch:
    async def find(files: Any, directory: str, index: Any, *, is_opening: bool) -> list[str]:
        return [name for name in await files.names(directory) if int(name, 16) not in index.segments.by_id]

    return patch.object(pool_module, "find_strangers", find)


def _leaves_files_of_the_one_before() -> Patch:
    return patch.object(Strangers, "remove_one", _nothing)


def _looks_for_strangers_once() -> Patch:
    return patch.object(Space, "look_for_strangers", _nothing)


# ---- who holds what


def _leases_do_not_end() -> Patch:
    return patch.object(Leases, "expire", lambda self, now_s: None)


def _reservations_do_not_end() -> Patch:
    return patch.object(Puts, "end_overdue", lambda self, now_s: None)


def _writes_to_what_was_sealed_meanwhile() -> Patch:
    async def segment_for(self: Puts, writer: int, length: int) -> Any:
        segment = self._segments.open_for(writer, length)
        if segment is None:
            async with self._making_room:
                segment = self._segments.open_for(writer, length)
                if segment is None:
                    segment = await self._space.new_segment(writer, length)
        return segment

    return patch.object(Puts, "_segment_for", segment_for)


def _takes_the_next_one_s_files_for_a_loss() -> Patch:
    """Who began to serve and was overtaken says that the index is lost."""
    check = Ownership.check

    async def unless_it_failed(self: Ownership) -> None:
        if not isinstance(sys.exception(), Corruption):
            await check(self)

    return patch.object(Ownership, "check", unless_it_failed)


def _sends_nobody_to_who_serves() -> Patch:
    async def get(self: Pools, namespace: Any) -> Any:
        try:
            return await real(self, namespace)
        except StaleOwner as error:
            raise SeatGone(str(error)) from error

    real = Pools.get
    return patch.object(Pools, "get", get)


def _erases_nothing_where_it_stands_by() -> Patch:
    return patch.object(Pools, "elsewhere", AsyncMock(return_value=[]))


def _keeps_its_log_when_it_is_over() -> Patch:
    def lose(self: Pool, owning: asyncio.Task[None]) -> None:
        self._wal.is_lost = True
        if not owning.cancelled():
            owning.exception()

    return patch.object(Pool, "_lose", lose)


class Bug(NamedTuple):
    """How to plant it, and the play that finds it."""

    plant: Callable[[], Patch]
    finding: str
    """What the failure says."""
    act: str
    death: str = "the server is killed"
    first: int = 0
    """The message to begin with: one soon after found it when this was written. 0: it takes nobody's death."""


STOPPED = "the server is stopped and goes on when it is over"
ALONE = "the server is stopped for a while"
BUGS = {
    "acknowledges what is not written": Bug(_acknowledges_what_is_not_written, "is lost", "put", first=5),
    "acknowledges, whoever serves": Bug(_acknowledges_whoever_serves, "is lost", "put", STOPPED, first=1),
    "reads no log": Bug(_reads_no_log, "is lost", "put", first=1),
    "a snapshot counts before it is there": Bug(
        _a_snapshot_counts_before_it_is_there, "no such file", "snapshot", first=12
    ),
    "removes the index before the next one counts": Bug(
        _removes_the_index_before_the_next_one_counts, "is lost", "snapshot", first=15
    ),
    "removes files before the index says so": Bug(
        _removes_files_before_the_index_says_so, "is not page", "compaction", first=29
    ),
    "gives space back under a lease": Bug(_gives_space_back_under_a_lease, "went under a lease", "compaction"),
    "forgets who reads where a page was": Bug(_forgets_who_reads_where_a_page_was, "went under a lease", "compaction"),
    "hands numbers of segments out again": Bug(_hands_numbers_out_again, "handed out twice", "put", first=5),
    "leaves files of the one before": Bug(_leaves_files_of_the_one_before, "strangers", "put", first=4),
    "leases do not end": Bug(_leases_do_not_end, "slots that are held", "eviction"),
    "reservations do not end": Bug(
        _reservations_do_not_end, "bytes of writers", "put", "the writer is killed", first=1
    ),
    # The simulation found these:
    "writes to what was sealed meanwhile": Bug(
        _writes_to_what_was_sealed_meanwhile, "hand_out", "takeover", ALONE, first=38
    ),
    "looks for files of the one before only once": Bug(
        _looks_for_strangers_once, "files that no segment has", "compaction", STOPPED, first=10
    ),
    "takes the next one's files for a loss": Bug(
        _takes_the_next_one_s_files_for_a_loss, "there is no index", "opening", STOPPED, first=9
    ),
    "sends nobody to who serves": Bug(_sends_nobody_to_who_serves, "SeatGone", "opening", STOPPED, first=9),
    "erases nothing where it stands by": Bug(
        _erases_nothing_where_it_stands_by, "the act does not end", "erasure", first=2
    ),
    "keeps its log when it is over": Bug(
        _keeps_its_log_when_it_is_over, "removed files are still there", "takeover", STOPPED, first=33
    ),
}
"""What is wrong -> how to plant it, and what finds it."""
