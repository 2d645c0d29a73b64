"""Pages on their way into segments, by a few threads behind the caller's back.

    put        copies pages, with their headers, into a *slab* of memory that the servers of this host share
    a thread   writes a slab: what lies side by side in one write; then commits the parts that it holds

While slabs are being written the next one fills, so small puts go to disk in large writes. Memory is bounded: who puts
faster than the store takes waits for a slab. The store updates a chunk once at a time: a slab that is full leaves the
chunk that it would not fill to the next one, so that both are written at the same time.

A *part* is what one reservation is for; its `Ticket` tells when it is committed, or why it is not.

Does not know: how places are reserved, or what a commit is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from emberfs import Client, StoreClosed
from emberfs.checksum import crc32c
from emberfs.errors import DeadlineExceeded

from .files import SEGMENT_CHUNK_BYTES
from .opening import OpenSegments
from .page import HEADER_BYTES, Place, encode_header
from .segments import SECTOR_BYTES

SLAB_BYTES = (16 << 20) + (64 << 10)
"""16 pages of 1 MiB, and other batches that are whole MiB without their headers."""
assert SLAB_BYTES >= 16 * (HEADER_BYTES + (1 << 20)) + SECTOR_BYTES
SLABS_MAX = 5
THREADS = 3
"""What one of them wrote is on its way to the disk, and the store takes what another one writes. Of two both end at
once every other time, since those who come during a flush share the next; then nothing is on its way."""


class Ticket:
    """What becomes of a part."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._done = threading.Event()

    def settle(self, error: Exception | None) -> None:
        """It is committed, or it failed."""
        self.error = error
        self._done.set()

    def wait(self, timeout_s: float | None) -> None:
        """Return when it is committed. Raises why it is not, DeadlineExceeded."""
        if not self._done.wait(timeout_s):
            raise DeadlineExceeded(f"pages were not written within {timeout_s:g} s: they may come yet")
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Part:
    """The pages of one reservation."""

    reservation: int
    seat: int
    keys: Sequence[bytes]
    parents: Sequence[bytes]
    places: Sequence[Place]
    payloads: Sequence[memoryview]
    kind: int
    tenant: int
    is_durable: bool
    tokens: bytes = b""
    """Of its pages; nothing is done with them here."""
    grant: bytes = b""
    """To write into their segments, if it takes one."""

    @property
    def size_bytes(self) -> int:
        """With headers, and with what fills up the last sector."""
        return sum(place.end - place.offset for place in self.places) + SECTOR_BYTES


@dataclass(slots=True)
class Copied:
    """A part in a slab."""

    reservation: int
    seat: int
    crcs: list[int]
    is_durable: bool
    ticket: Ticket
    end: int
    """Where it ends in its slab."""
    tokens: bytes = b""


@dataclass(slots=True)
class _Slab:
    memory: memoryview
    used: int = 0
    parts: list[Copied] = field(default_factory=list)
    """Those that end in it."""
    runs: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(segment, offset there, begin and end here)"""
    grants: dict[int, bytes] = field(default_factory=dict)
    """Segment -> the newest grant that there is for it."""
    written: Ticket = field(default_factory=Ticket)
    before: Ticket | None = None
    """Of the slab that has the beginning of our first part."""

    def room_for(self, part: Part) -> bool:
        return self.used + part.size_bytes <= len(self.memory)

    def copy(self, part: Part) -> Ticket:
        crcs = []
        for key, parent, place, payload in zip(part.keys, part.parents, part.places, part.payloads, strict=True):
            crcs.append(crc32c(payload))
            whole = Place(place.segment, place.offset, place.length, crcs[-1])
            head = encode_header(whole, key=key, parent=parent, kind=part.kind, tenant=part.tenant)
            begin, end = self.used, self.used + HEADER_BYTES + place.length
            self.memory[begin : begin + HEADER_BYTES] = head
            self.memory[begin + HEADER_BYTES : end] = payload
            self._add_run(place, begin, end)
            self.used = end
        self._fill_up()
        self.grants.update({place.segment: part.grant for place in part.places if part.grant})
        copied = Copied(part.reservation, part.seat, crcs, part.is_durable, Ticket(), self.used, part.tokens)
        self.parts.append(copied)
        return copied.ticket

    def leave_rest_to(self, following: _Slab, part: Part) -> None:
        """`following`, which is empty, is for `part`: if that goes on in our last chunk, it gets what we have of it."""
        if not self.runs:
            return
        segment, offset, begin, end = self.runs[-1]
        rest = (offset + end - begin) % SEGMENT_CHUNK_BYTES
        goes_on = part.places[0][:2] == (segment, offset + end - begin)
        if not goes_on or not 0 < rest < end - begin or rest + part.size_bytes > len(following.memory):
            return
        cut = end - rest
        following.memory[:rest] = self.memory[cut:end]
        following.runs, following.used = [(segment, offset + cut - begin, 0, rest)], rest
        following.grants = {number: grant for number, grant in self.grants.items() if number == segment}
        following.parts = [replace(each, end=each.end - cut) for each in self.parts if each.end > cut]
        following.before = self.written
        self.runs[-1], self.used = (segment, offset, begin, cut), cut
        self.parts = [each for each in self.parts if each.end <= cut]

    def _fill_up(self) -> None:
        """Write the last sector of what was handed out whole. The next part's places begin behind it."""
        segment, offset, begin, end = self.runs[-1]
        missing = -(offset + end - begin) % SECTOR_BYTES
        self.memory[end : end + missing] = bytes(missing)
        self.used = end + missing
        self.runs[-1] = (segment, offset, begin, self.used)

    def _add_run(self, place: Place, begin: int, end: int) -> None:
        if self.runs:
            segment, offset, first, last = self.runs[-1]
            if segment == place.segment and offset + last - first == place.offset and last == begin:
                self.runs[-1] = (segment, offset, first, end)
                return
        self.runs.append((place.segment, place.offset, begin, end))

    def empty(self) -> None:
        self.used = 0
        self.parts, self.runs, self.grants = [], [], {}
        self.written, self.before = Ticket(), None


class PageWriter:
    """Writes pages of a namespace. `commit` is given the parts of a slab that is written, and settles their tickets.

    One thread may `add` at a time; the rest is safe from any.
    """

    def __init__(self, client: Client, segments: OpenSegments, commit: Callable[[Sequence[Copied]], None]) -> None:
        self._client, self._commit = client, commit
        self._changed = threading.Condition()
        self._slabs: list[_Slab] = []
        """All there are but those of a single large part."""
        self._free: list[_Slab] = []
        self._filling: _Slab | None = None
        self._is_copying = False
        self._full: deque[_Slab] = deque()
        self._writing: list[_Slab] = []
        self._flushing = 0
        """Threads that wait for all that was added."""
        self._opened = segments
        self._error: Exception | None = None
        """The first since the last `flush`, of parts that nobody waits for by their tickets."""
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._running = 0

    def add(self, part: Part, *, timeout_s: float) -> Ticket:
        """Copy a part, which is written soon. Raises DeadlineExceeded: the store does not take what came before."""
        with self._changed:
            self._start()
            slab = self._slab_for(part, timeout_s)
            self._is_copying = True  # No thread takes it now.
        try:
            wanted = {place.segment for place in part.places}
            with self._changed:
                for segment in wanted:
                    self._opened.begin(segment, wanted | self._segments_in_use())
            return slab.copy(part)
        finally:
            with self._changed:
                self._is_copying = False
                if self._may_take_what_fills():  # Else a thread would wake up for nothing, at each put.
                    self._changed.notify_all()

    def _slab_for(self, part: Part, timeout_s: float) -> _Slab:
        """The one that fills, if it has room; else that one is full, and the next begins. Called with the lock."""
        if self._filling is not None and self._filling.room_for(part):
            return self._filling
        slab = self._new_slab(part, timeout_s)
        if self._filling is not None:  # No thread took it meanwhile.
            self._filling.leave_rest_to(slab, part)
            self._full.append(self._filling)
            self._changed.notify_all()
        self._filling = slab
        return slab

    def _new_slab(self, part: Part, timeout_s: float) -> _Slab:
        """An empty one with room for a part. Called with the lock."""
        if part.size_bytes > SLAB_BYTES:
            self._wait(lambda: not (self._writing or self._full or self._filling), timeout_s)
            return _Slab(self._client.buffer(part.size_bytes))
        self._wait(lambda: bool(self._free) or len(self._slabs) < SLABS_MAX, timeout_s)
        if self._free:
            return self._free.pop()
        self._slabs.append(_Slab(self._client.buffer(SLAB_BYTES + SEGMENT_CHUNK_BYTES)))
        return self._slabs[-1]

    def _segments_in_use(self) -> set[int]:
        slabs = filter(None, (*self._writing, *self._full, self._filling))
        return {segment for slab in slabs for segment, _, _, _ in slab.runs}

    def _wait(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        if not self._changed.wait_for(lambda: is_so() or self._is_closed, timeout_s):
            raise DeadlineExceeded(f"the store did not take what was put before within {timeout_s:g} s")
        if self._is_closed:
            raise StoreClosed("this KVCache was closed")

    def flush(self, timeout_s: float) -> None:
        """All that was added is committed. Raises why something was not, DeadlineExceeded."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                self._wait(lambda: not (self._full or self._filling or self._writing), timeout_s)
            finally:
                self._flushing -= 1
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, timeout_s: float) -> None:
        """Write what was added, as far as the time goes, and end."""
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join(timeout_s)
            for slab in filter(None, (*self._full, self._filling)):
                for part in slab.parts:
                    part.ticket.settle(StoreClosed("this KVCache was closed before the pages were written"))

    # --- the threads -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._is_closed:
            raise StoreClosed("this KVCache was closed")
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name=f"emberkv-put-{number}", daemon=True)
                for number in range(THREADS)
            ]
            self._running = THREADS
            for thread in self._threads:
                thread.start()

    def _run(self) -> None:
        try:
            self._write_slabs()
        finally:
            with self._changed:
                self._running -= 1
                is_last = not self._running
            if is_last:
                self._opened.close()

    def _write_slabs(self) -> None:
        while (slab := self._next()) is not None:
            self._write(slab)
            with self._changed:
                self._writing = [each for each in self._writing if each is not slab]
                slab.empty()
                if any(each is slab for each in self._slabs):
                    self._free.append(slab)
                self._changed.notify_all()

    def _next(self) -> _Slab | None:
        """A slab that is full, or what there is if nothing is on its way; None: it is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._full or self._may_take_what_fills())
            if self._full:
                slab = self._full.popleft()
            elif self._filling is not None and not self._is_closed:
                slab, self._filling = self._filling, None
            else:
                return None
            self._writing.append(slab)
            return slab

    def _may_take_what_fills(self) -> bool:
        """Nothing is on its way; or nothing more comes, and it goes on behind the last chunk of what is."""
        if self._filling is None or self._is_copying:
            return False
        return not self._writing or (self._flushing > 0 and self._filling.before is not None)

    def _write(self, slab: _Slab) -> None:
        try:
            try:
                pieces = [(segment, offset, slab.memory[begin:end]) for segment, offset, begin, end in slab.runs]
                self._opened.write(pieces, slab.grants)
            except Exception as error:
                slab.written.settle(error)
                raise
            slab.written.settle(None)
            if slab.before is not None:  # A thread has had it before we had ours.
                slab.before.wait(None)
            self._commit(slab.parts)
        except Exception as error:  # Whatever it is: a thread that ended would keep every later put waiting.
            for part in slab.parts:
                part.ticket.settle(error)
        # Who waits for a ticket is told by it, and may have put the pages again by the next flush.
        for part in slab.parts:
            if not part.is_durable:
                self._error = self._error or part.ticket.error
