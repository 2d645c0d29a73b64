"""Where the committed bytes of chunks lie, as reads and commits found: the next read spares the index and the decoding.

Invariants:
  - What is known of a chunk is what its row says, from when it was noted until a change of that row begins.
  - What a read saw that began before the end of a change is not noted after the change began.
  - A mirror knows only chunks of which nothing is pending: it may be asked by somebody who cannot ask the chain.

Does not know: how rows are read, or who else serves from the mirror.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from .record import Extent, Record, sums_bytes
from .rows import NOTHING, Change

log = logging.getLogger("emberline.engine")

CHANGES_KEPT = 4096
ENTRY_BYTES = 650
"""What an entry takes beside its row: the dictionary, the key, the tuples."""


class Known(NamedTuple):
    """A chunk's row, decoded."""

    row: bytes
    extent: Extent
    granule_log2: int
    sums: bytes
    """Packed, wherever they lie."""
    is_clean: bool
    """Nothing is pending."""


class Mirror(Protocol):
    """Who serves reads from what we know, without asking us."""

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        """The chunk's committed bytes begin at `block` of `file`."""

    def drop(self, chunk: bytes) -> None:
        """It changes: when this returns, no read of it that is not over yet will succeed."""

    def clear(self) -> None:
        """Drop everything. When this returns, no file is in use."""


class Extents:
    """Of one target. Bounded: what was noted first goes first."""

    def __init__(self, bytes_max: int, place: Callable[[int], tuple[int, int]]) -> None:
        """`place`: of an extent's position, the file, and where it begins there."""
        self.mirror: Mirror | None = None
        self.changes = 0
        """How many beginnings and ends of changes there were; a read that begins remembers it."""
        self._changed_at: dict[bytes, int] = {}
        """Chunks -> the end of their last change (or its beginning, meanwhile), of the newest CHANGES_KEPT."""
        self._forgotten_at = 0
        """A change of any other chunk was no later."""
        self._bytes_max, self._place = bytes_max, place
        self._bytes = 0
        self._known: dict[bytes, Known] = {}
        self._changing: frozenset[bytes] = frozenset()
        self._is_stopped = False

    def get(self, chunk: bytes) -> Known | None:
        """What is known of `chunk`."""
        return self._known.get(chunk)

    def note(self, chunk: bytes, known: Known, *, changes: int) -> None:
        """This was found by who began when there had been so many `changes`."""
        last = self._changed_at.get(chunk, self._forgotten_at)
        if last > changes or chunk in self._changing or self._is_stopped:
            return
        self._drop(chunk)
        self._known[chunk] = known
        self._bytes += _weight(known)
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._known)))
        if self.mirror is not None and known.is_clean:
            self.mirror.put(chunk, *self._place(known.extent.position), known)

    def note_published(self, changes: Iterable[Change]) -> None:
        """These were committed just now. Who writes is often read next: the mirror serves the first read as well.

        Not of chunks whose sums lie beside their blocks and were not read. Raises nothing: what happened has happened.
        """
        if self.mirror is None:
            return
        try:
            self._note_published(changes)
        except Exception:
            log.exception("not all that was written is served from the table")

    def _note_published(self, changes: Iterable[Change]) -> None:
        last: dict[bytes, tuple[bytes, Record] | None] = {}
        for change in changes:
            last.update(change.published)
        for chunk, there in last.items():
            row, record = there or (b"", NOTHING)
            extent, granule_log2 = record.committed, record.granule_log2
            if extent is not None and extent.length and len(extent.sums) == sums_bytes(extent.length, granule_log2):
                self.note(chunk, Known(row, extent, granule_log2, extent.sums, is_clean=True), changes=self.changes)

    def begin_change(self, chunks: Iterable[bytes]) -> None:
        """The rows of `chunks` are about to change. One change at a time, until `end_change`."""
        assert not self._changing
        self._changing = frozenset(chunks)
        for chunk in self._changing:
            self._drop(chunk)
        self._mark()

    def end_change(self) -> None:
        """The rows say what they will say. A read that began before may have seen what they said."""
        self._mark()
        self._changing = frozenset()

    def _mark(self) -> None:
        self.changes += 1
        for chunk in self._changing:
            self._changed_at.pop(chunk, None)
            self._changed_at[chunk] = self.changes
        while len(self._changed_at) > CHANGES_KEPT:
            self._forgotten_at = self._changed_at.pop(next(iter(self._changed_at)))

    def stop(self) -> None:
        """Know nothing any more: the files are about to be closed, or cannot be relied on."""
        self._is_stopped = True
        self._known.clear()
        self._bytes = 0
        if self.mirror is not None:
            self.mirror.clear()

    def _drop(self, chunk: bytes) -> None:
        known = self._known.pop(chunk, None)
        if known is None:
            return
        self._bytes -= _weight(known)
        if self.mirror is not None and known.is_clean:
            self.mirror.drop(chunk)


def _weight(known: Known) -> int:
    return ENTRY_BYTES + len(known.row) + 2 * len(known.sums)
