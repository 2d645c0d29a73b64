"""Reads the index that the last owner of a namespace left: its newest snapshot, and the log since.

Most of it may be read *ahead*, while the silence of that owner lasts: what it still appends comes to the end of the
log, and is applied once it is over. Should it write another snapshot meanwhile, all is read again.

Does not know: who may write the index (`wal`), or what entries mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from emberfs import NotFound
from emberfs.errors import EmberError
from emberfs.runtime import Runtime

from .files import Files
from .index import Index
from .journal import FRAME, batches, frames
from .snapshot import decode_snapshot


class Head(msgspec.Struct, frozen=True):
    """Which two files make an index."""

    snapshot: str
    log: str


class IndexReader:
    """See the module. `make`: an empty index."""

    def __init__(self, files: Files, runtime: Runtime, directory: str, make: Callable[[], Index]) -> None:
        self._files, self._runtime, self._directory, self._make = files, runtime, directory, make
        self._ahead: asyncio.Task[_Read] | None = None

    def read_ahead(self, is_wanted: bool) -> None:
        """Begin to read what there is; not `is_wanted`: forget it."""
        if is_wanted and self._ahead is None:
            self._ahead = self._runtime.spawn(self._read_all(None), "kv-read-ahead")
        elif not is_wanted and self._ahead is not None:
            self._ahead.cancel()
            self._ahead.add_done_callback(lambda done: done.cancelled() or done.exception())  # Nobody asks for it.
            self._ahead = None

    async def read(self, epoch: int) -> Index | None:
        """What the last owner before `epoch` left, which is over. None: nobody left anything.

        Raises ValueError for an index that a newer program wrote, Corruption for one that cannot be read.
        """
        if self._ahead is not None:
            with contextlib.suppress(EmberError, ValueError, OSError):  # If it is still so, it is said again.
                ahead = await self._ahead
                if ahead.head is not None and ahead.index is not None and ahead.head == await self._newest(epoch):
                    log = await self._files.get(f"{self._directory}/{ahead.head.log}")
                    await self._runtime.offload(_replay, ahead.index, log, ahead.log_bytes)
                    return ahead.index
        return (await self._read_all(epoch)).index

    async def _newest(self, epoch: int | None) -> Head | None:
        names = [name for name in await self._files.names(self._directory) if name.startswith("head-")]
        heads = [name for name in names if epoch is None or int(name[5:13]) < epoch]
        if not heads:
            return None
        return msgspec.json.decode(await self._files.get(f"{self._directory}/{max(heads)}"), type=Head)

    async def _read_all(self, epoch: int | None) -> _Read:
        before = None
        while True:
            head = None
            try:
                head = await self._newest(epoch)
                if head is None:
                    return _Read(None, None, 0)
                data = await self._files.get(f"{self._directory}/{head.snapshot}")
                log = await self._files.get(f"{self._directory}/{head.log}")
            except NotFound:
                if head == before and head is not None:
                    raise
                before = head
                continue  # An owner was just at it: its head names others by now.
            # In a thread: the loop goes on to say that we live.
            index = await self._runtime.offload(_decoded, data, self._make().segments.segment_bytes)
            return _Read(head, index, await self._runtime.offload(_replay, index, log, 0))


@dataclass(frozen=True, slots=True)
class _Read:
    head: Head | None
    index: Index | None
    log_bytes: int
    """So much of the log is in it."""


def _decoded(snapshot: bytes, segment_bytes: int) -> Index:
    return decode_snapshot(snapshot, segment_bytes=segment_bytes)


def _replay(index: Index, log: bytes, begin: int) -> int:
    """Apply what a log says from `begin` on. Where its last whole frame ends."""
    behind = memoryview(log)[begin:]
    for batch in batches(behind):
        for entry in batch:
            index.apply(entry)
    return begin + sum(FRAME.size + len(body) for body in frames(behind))
