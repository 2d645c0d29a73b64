"""Where the committed bytes of chunks lie, as reads found out: the next read spares the index and the decoding.

Invariants:
  - What is known of a chunk is what its row says, from when a read noted it until a change of that row begins.
  - What a read saw that began before the end of a change is not noted after the change began.
  - A mirror knows only chunks of which nothing is pending: it may be asked by somebody who cannot ask the chain.

Does not know: how rows are read, or who else serves from the mirror.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from .record import Extent

CHANGES_KEPT = 4096
ENTRY_BYTES = 400
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

    def __init__(self, bytes_max: int) -> None:
        self.mirror: Mirror | None = None
        self.changes = 0
        """How many beginnings and ends of changes there were; a read that begins remembers it."""
        self._changed_at: dict[bytes, int] = {}
        """Chunks -> the end of their last change (or its beginning, meanwhile), of the newest CHANGES_KEPT."""
        self._forgotten_at = 0
        """A change of any other chunk was no later."""
        self._bytes_max = bytes_max
        self._bytes = 0
        self._known: dict[bytes, Known] = {}
        self._changing: frozenset[bytes] = frozenset()
        self._is_stopped = False

    def get(self, chunk: bytes) -> Known | None:
        """What is known of `chunk`."""
        return self._known.get(chunk)

    def note(self, chunk: bytes, known: Known, *, file: int, block: int, changes: int) -> None:
        """A read has found this, that began when there had been so many `changes`. It lies at `block` of `file`."""
        last = self._changed_at.get(chunk, self._forgotten_at)
        if last > changes or chunk in self._changing or self._is_stopped:
            return
        self._drop(chunk)
        self._known[chunk] = known
        self._bytes += _weight(known)
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._known)))
        if self.mirror is not None and known.is_clean:
            self.mirror.put(chunk, file, block, known)

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
