"""The index of a namespace on the store: its log and snapshots as files, written by the owner, read by the next one.

    index/head-EPOCH-N          which snapshot and which log make the index; the last one counts
    index/EPOCH-N.snapshot      the index when log N was begun
    index/EPOCH-N.log           journal batches since
    tenants/EPOCH               whose pages those with a tenant's number are

Invariants:
  - An entry is applied to the index first and written soon; `flush` returns when all that was noted before is durable
    and nobody had taken over by then. So what was acknowledged as committed is what the next owner reads.
  - An owner writes and removes only files of epochs up to its own, and begins with a snapshot of its own: what one that
    is over still does touches nothing that a later one goes by.
  - A log that a write to may have failed is not written to again: what comes after a frame that was cut is never read.
    The index goes on in memory meanwhile, nothing is promised, and the next snapshot has all of it.

Does not know: what entries mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import msgspec
from emberfs.errors import EmberError
from emberfs.runtime import Runtime

from .errors import ReadOnly, StaleOwner
from .files import Files, Log
from .index import Index
from .journal import AnyEntry, QuotaSet, TenantAdded, encode_batch, filling
from .ownership import Ownership
from .recovery import Head
from .roster import Roster, trim_rosters, write_roster
from .segments import SECTOR_BYTES
from .snapshot import encode_image, image_of

log = logging.getLogger("emberline.kv")

FLUSH_S = 0.1
"""How long an entry that nobody waits for may wait."""
BATCH_ENTRIES_MAX = 4096
"""In one frame, which has a largest size: an entry is at most of the keys of one request."""
LOG_BYTES_MAX = 16 << 20
"""Then a snapshot is written: so much is read again at a start, entry by entry."""
RETRY_S = 1.0
RETRY_S_MAX = 16.0
"""After a write that failed the next one is tried so much later; twice as much each time."""


class Wal:
    """See the module. Only made by `recover`."""

    def __init__(self, files: Files, runtime: Runtime, directory: str, ownership: Ownership, index: Index) -> None:
        self.index = index
        self.is_lost = False
        """Somebody else serves the namespace, or it is closed: nothing is acknowledged any more."""
        self.failure: EmberError | OSError | None = None
        """Why the store did not take the last write; None: it did. Until it does nothing is acknowledged."""
        self.log_bytes_max = LOG_BYTES_MAX
        self._files, self._runtime = files, runtime
        self._directory, self._ownership = directory, ownership
        self._namespace_directory = directory.rpartition("/")[0]
        self._log: Log | None = None
        """None: the next write is a snapshot."""
        self._log_bytes = 0
        self._number = 0
        """Of the last snapshot."""
        self._wants_snapshot = False
        self._retry_s = RETRY_S
        self._noted: list[AnyEntry] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._begun: asyncio.Future[None] | None = None
        """The writer sleeps until something is noted, or somebody waits."""
        self._due: asyncio.Future[None] | None = None
        """It lets what was noted wait for more, until somebody waits."""
        self._work: asyncio.Task[None] | None = None

    @classmethod
    async def recover(
        cls, files: Files, runtime: Runtime, directory: str, ownership: Ownership, index: Index, *, is_new: bool
    ) -> Wal:
        """Go on with `index`, which an `IndexReader` gave, in files of our own: what is in it is served before they are
        there, or where the store takes none.

        If it `is_new` they are there first, as are those of every index that has segments: else its loss could not be
        told from its beginning. Raises what the store raises.
        """
        index.segments.inherit()
        wal = cls(files, runtime, directory, ownership, index)
        if is_new:
            await wal._write()
        wal._work = runtime.spawn(wal._keep_writing(), "kv-wal")
        return wal

    def note(self, *entries: AnyEntry) -> None:
        """Apply entries, and write them soon. Raises StaleOwner."""
        self._check_ours()
        for entry in entries:
            self.index.apply(entry)
        self._noted.extend(entries)
        _wake(self._begun)

    async def flush(self) -> None:
        """All that was noted is durable. Raises StaleOwner, ReadOnly."""
        self.check_writable()
        future = self._runtime.future()
        self._waiting.append(future)
        _wake(self._begun)
        _wake(self._due)
        await future

    def _check_ours(self) -> None:
        if self.is_lost:
            raise StaleOwner("another server has taken this namespace over")

    def check_writable(self) -> None:
        """Raises StaleOwner, or ReadOnly: what is noted now may be lost, should the process end before the store takes
        writes again."""
        self._check_ours()
        if self.failure is not None:
            raise _read_only(self.failure)

    def want_snapshot(self) -> None:
        """Write one soon: it has the stamps of use, which the log has not."""
        self._wants_snapshot = True
        _wake(self._begun)

    async def close(self) -> None:
        """Write what is left, and stop. Raises StaleOwner, ReadOnly, if that could not be written."""
        try:
            if not self.is_lost and self.failure is None:
                await self.flush()
        finally:
            try:
                if self._work is not None:
                    self._work.cancel()
                    await asyncio.wait([self._work])
                if not self.is_lost and self.failure is not None:
                    await self._ownership.check()
                    await self._snapshot()  # A last time: it may have room by now.
            finally:
                self.is_lost = True  # Nobody writes any more.
                _fail(self._waiting, StaleOwner("the service ends"))
                await self._end_log()

    # --- writing ---------------------------------------------------------------------------------------------------

    async def _until_due(self) -> None:
        """Return when somebody waits, or something was noted `FLUSH_S` ago; after a failure, when it is time."""
        if self.failure is not None:
            await self._runtime.sleep(self._retry_s)
            self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
            return
        if self._log is None:
            return
        if not self._noted and not self._waiting and not self._wants_snapshot:
            self._begun = self._runtime.future()
            await self._begun
        if not self._waiting:
            self._due, timer = self._runtime.future(), self._runtime.timer(FLUSH_S)
            await asyncio.wait([self._due, timer], return_when=asyncio.FIRST_COMPLETED)
            timer.cancel()

    async def _keep_writing(self) -> None:
        while True:
            await self._until_due()
            waiting, self._waiting = self._waiting, []
            try:
                await self._write()
                if waiting:
                    await self._ownership.check()
            except StaleOwner as error:
                self.is_lost = True
                _fail([*waiting, *self._waiting], error)
                return
            except (EmberError, OSError) as error:
                if self._log is not None:  # It is written. Only whether it counts could not be seen.
                    _fail(waiting, error)
                    continue
                await self._note_failure(error, waiting)
            except asyncio.CancelledError:
                _fail(waiting, StaleOwner("the service ends"))
                raise
            except Exception as error:
                self.is_lost = True
                _fail([*waiting, *self._waiting], error)
                raise
            else:
                _finish(waiting)

    async def _note_failure(self, error: EmberError | OSError, waiting: Sequence[asyncio.Future[None]]) -> None:
        if self.failure is None:
            log.warning(
                "%s: the store does not take the index, puts are refused until it does: %s", self._directory, error
            )
        self.failure = error
        _fail([*waiting, *self._waiting], _read_only(error))
        self._waiting = []

    async def _write(self) -> None:
        """Write what was noted to the log, or all there is anew."""
        try:
            if self._log is not None:
                await self._append(self._taken())
            else:
                await self._ownership.check()
            if self._log is None or self._wants_snapshot or self._log_bytes > self.log_bytes_max:
                await self._snapshot()
        except BaseException:
            await self._end_log()
            raise
        if self.failure is not None:
            log.warning("%s: the store takes the index again", self._directory)
        self.failure, self._retry_s = None, RETRY_S

    def _taken(self) -> list[AnyEntry]:
        entries, self._noted = self._noted, []
        return entries

    async def _end_log(self) -> None:
        ended, self._log = self._log, None
        if ended is not None:
            await ended.close()

    async def _append(self, entries: Sequence[AnyEntry]) -> None:
        assert self._log is not None
        for begin in range(0, len(entries), BATCH_ENTRIES_MAX):
            data = encode_batch(entries[begin : begin + BATCH_ENTRIES_MAX])
            filled = data + filling(len(data), SECTOR_BYTES)
            await self._log.append(filled)
            # To read filling again takes next to no time.
            self._log_bytes += len(data) + (len(filled) - len(data)) // 8
        if any(isinstance(entry, TenantAdded | QuotaSet) for entry in entries):
            await self._write_roster()

    async def _write_roster(self) -> None:
        roster = Roster(self.index.tenants, self.index.quotas)
        await write_roster(self._files, self._namespace_directory, self._ownership.epoch, roster)

    async def _snapshot(self) -> None:
        """Write what the index is now, go on in a new log, and remove what was before them."""
        self._wants_snapshot = False
        image, noted = image_of(self.index), self._taken()
        if self._log is not None:
            await self._append(noted)  # It is in the snapshot; until that counts, the old log needs it.
            await self._end_log()
        await self._write_roster()
        self._number += 1
        stem = f"{self._ownership.epoch:08d}-{self._number:08d}"
        head = Head(f"{stem}.snapshot", f"{stem}.log")
        # In a thread: the loop goes on to serve.
        data = await self._runtime.offload(encode_image, image)
        await self._files.put(f"{self._directory}/{head.snapshot}", data)
        begun = await self._files.open_log(f"{self._directory}/{head.log}")
        try:
            # Each under a name of its own: one that comes late, of a write that was given up, is none to go by.
            await self._files.put(f"{self._directory}/head-{stem}", msgspec.json.encode(head))
        except BaseException:
            await begun.close()
            raise
        self._log, self._log_bytes = begun, 0
        with contextlib.suppress(EmberError, OSError):  # With the next one, then.
            for name in await self._files.names(self._directory):
                if _is_before(name, stem):
                    await self._files.remove(f"{self._directory}/{name}")
            await trim_rosters(self._files, self._namespace_directory, self._ownership.epoch)


def _read_only(failure: EmberError | OSError) -> ReadOnly:
    return ReadOnly(f"the store does not take the index of this namespace, so it takes no pages now: {failure}")


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def _finish(waiting: Sequence[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


def _fail(waiting: Sequence[asyncio.Future[None]], error: Exception) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)


def _is_before(name: str, stem: str) -> bool:
    """A head, log or snapshot before those of `stem`."""
    return name.removeprefix("head-").partition(".")[0] < stem
