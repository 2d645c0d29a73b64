"""The index of a namespace on the store: its log and snapshots as files, written by the owner, read by the next one.

    index/head-EPOCH            what makes the index: a snapshot, logs of which a known part counts, the log of now
    index/EPOCH-N.log           journal batches
    index/EPOCH-N.snapshot      the index when log N was begun

Invariants:
  - An entry is applied to the index first and written soon; `flush` returns when all that was noted before is durable
    and nobody had taken over by then. So what was acknowledged as committed is what the next owner reads.
  - An owner writes only files of its own epoch. Of the log of the one before it counts what it has read, and says so in
    its head: a late append there is nobody's.

Does not know: what entries mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from emberfs import NotFound
from emberfs.errors import EmberError
from emberfs.runtime import Runtime

from .errors import StaleOwner
from .files import Files, Log
from .index import Index
from .journal import AnyEntry, batches, encode_batch
from .ownership import Ownership
from .snapshot import decode_snapshot, encode_snapshot

FLUSH_S = 0.05
"""How long an entry that nobody waits for may wait."""
LOG_BYTES_MAX = 16 << 20
"""Then a snapshot is written: so much is read again at a start, entry by entry."""


class _Head(msgspec.Struct):
    log: str
    """The log of now."""
    snapshot: str = ""
    logs: list[tuple[str, int]] = []
    """(an earlier log, how many bytes of it count), after the snapshot."""


class Wal:
    """See the module. Only made by `recover`."""

    def __init__(self, files: Files, runtime: Runtime, directory: str, ownership: Ownership, index: Index) -> None:
        self.index = index
        self.is_lost = False
        """Somebody else serves the namespace, or the store refused a write: nothing is acknowledged any more."""
        self.log_bytes_max = LOG_BYTES_MAX
        self._files, self._runtime = files, runtime
        self._directory, self._ownership = directory, ownership
        self._head = _Head("")
        self._log: Log | None = None
        self._log_bytes = 0
        self._number = 0
        self._noted: list[AnyEntry] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._wake: asyncio.Future[None] | None = None
        self._work: asyncio.Task[None] | None = None

    @classmethod
    async def recover(
        cls, files: Files, runtime: Runtime, directory: str, ownership: Ownership, make: Callable[[], Index]
    ) -> Wal:
        """Read what the owner before left, and go on in files of our own. `make`: an empty index.

        Raises ValueError for an index that a newer program wrote, Corruption for one that cannot be read.
        """
        head, index = await _read(files, directory, ownership.epoch, make)
        index.seal_all()
        wal = cls(files, runtime, directory, ownership, index)
        await wal._begin_log(head)
        wal._work = runtime.spawn(wal._keep_writing(), "kv-wal")
        return wal

    def note(self, *entries: AnyEntry) -> None:
        """Apply entries, and write them soon. Raises StaleOwner."""
        if self.is_lost:
            raise StaleOwner("another server has taken this namespace over")
        for entry in entries:
            self.index.apply(entry)
        self._noted.extend(entries)
        self._rouse(soon=False)

    async def flush(self) -> None:
        """All that was noted is durable. Raises StaleOwner."""
        if self.is_lost:
            raise StaleOwner("another server has taken this namespace over")
        future = self._runtime.future()
        self._waiting.append(future)
        self._rouse(soon=True)
        await future

    async def close(self) -> None:
        """Write what is left, and stop."""
        try:
            if not self.is_lost:
                await self.flush()
        finally:
            if self._work is not None:
                self._work.cancel()
                await asyncio.wait([self._work])
            if self._log is not None:
                await self._log.close()

    # --- writing ---------------------------------------------------------------------------------------------------

    def _rouse(self, *, soon: bool) -> None:
        if soon and self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _keep_writing(self) -> None:
        while True:
            if not self._waiting:
                self._wake = self._runtime.future()
                timer = self._runtime.timer(FLUSH_S)
                await asyncio.wait([self._wake, timer], return_when=asyncio.FIRST_COMPLETED)
                timer.cancel()
            entries, self._noted = self._noted, []
            waiting, self._waiting = self._waiting, []
            try:
                await self._write(entries)
                if waiting or entries:
                    await self._ownership.check()
            except (EmberError, OSError) as error:
                # What is in the index may not be in the log: from here on nobody can be promised anything.
                self.is_lost = True
                _fail([*waiting, *self._waiting], error)
                return
            _finish(waiting)

    async def _write(self, entries: Sequence[AnyEntry]) -> None:
        if entries:
            assert self._log is not None
            data = encode_batch(entries)
            await self._log.append(data)
            self._log_bytes += len(data)
        if self._log_bytes > self.log_bytes_max and not self._noted:
            await self._snapshot()  # Nothing is in the index now that is not in the log.

    async def _snapshot(self) -> None:
        """Write what the index is now, and go on in a new log."""
        old = self._head
        data = encode_snapshot(self.index)
        await self._begin_log(_Head(old.log, old.snapshot, [*old.logs, (old.log, self._log_bytes)]))
        name = f"{self._ownership.epoch:08d}-{self._number}.snapshot"
        await self._files.put(f"{self._directory}/{name}", data)
        await self._put_head(_Head(self._head.log, name))
        for gone in [old.snapshot, *(log for log, _ in [*old.logs, (old.log, 0)])]:
            if gone:
                await self._files.remove(f"{self._directory}/{gone}")

    async def _begin_log(self, before: _Head) -> None:
        """A new log after what `before` says."""
        if self._log is not None:
            await self._log.close()
        self._number += 1
        name = f"{self._ownership.epoch:08d}-{self._number}.log"
        self._log = await self._files.open_log(f"{self._directory}/{name}")
        self._log_bytes = 0
        await self._put_head(_Head(name, before.snapshot, before.logs))

    async def _put_head(self, head: _Head) -> None:
        self._head = head
        await self._files.put(f"{self._directory}/head-{self._ownership.epoch:08d}", msgspec.json.encode(head))


def _finish(waiting: Sequence[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


def _fail(waiting: Sequence[asyncio.Future[None]], error: Exception) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)


# ---- reading


async def _read(files: Files, directory: str, epoch: int, make: Callable[[], Index]) -> tuple[_Head, Index]:
    """What counts, as the head of the next owner names it, and the index that it makes."""
    heads = [name for name in await files.names(directory) if name.startswith("head-") and int(name[5:]) < epoch]
    if not heads:
        return _Head(""), make()
    head = msgspec.json.decode(await files.get(f"{directory}/{max(heads)}"), type=_Head)
    index = make()
    if head.snapshot:
        data = await files.get(f"{directory}/{head.snapshot}")
        index = decode_snapshot(data, segment_bytes=index.segments.segment_bytes)
    logs = list(head.logs)
    for name, length in logs:
        _replay(index, (await files.get(f"{directory}/{name}"))[:length])
    try:
        data = await files.get(f"{directory}/{head.log}")
    except NotFound:
        data = b""
    _replay(index, data)
    return _Head(head.log, head.snapshot, [*logs, (head.log, len(data))]), index


def _replay(index: Index, data: bytes) -> None:
    for batch in batches(data):
        index.replay(batch)
