"""Pages out of segments into the caller's memory, each checked for what it is.

A read is two ranges a page: the header into scratch memory, the payload where it shall be. The header must be that of
the key, at this very place, with this checksum, and the payload must have it: whatever happened since the match, a page
that is not the one asked for is a miss.

Source: DESIGN.md, section 4. Does not know: the service.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

from emberfs import Client, File
from emberfs.errors import AccessDenied, EmberError

from .page import HEADER_BYTES, MAGIC, PLACE, VERSION

OPEN_MAX = 512
"""Segments that are kept open."""
BATCH_PAGES = 256
BATCH_BYTES = 48 << 20
"""A storage server reads 64 MiB at once past its event loop."""
_FRONT = struct.Struct("<4sHHIIII32s")
_TENANT = struct.Struct("<I")
_TENANT_AT = 88


class PageReader:
    """Reads pages of a namespace. Not thread-safe: each thread borrows one."""

    def __init__(self, client: Client, segments: str) -> None:
        self.refusal = ""
        """Why storage servers refused some of the last read; "": they did not."""
        self._client, self._segments = client, segments
        self._files: dict[int, File] = {}
        self._scratch = client.buffer(BATCH_PAGES * HEADER_BYTES)
        self._heads = [self._scratch[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(BATCH_PAGES)]
        self._fronts = [head[: _FRONT.size] for head in self._heads]
        self._tenants = [head[_TENANT_AT : _TENANT_AT + _TENANT.size] for head in self._heads]

    def read(
        self,
        keys: Sequence[bytes],
        places: bytes,
        views: Sequence[memoryview],
        *,
        kind: int,
        tenant: int,
        begin: int = 0,
        grants: Sequence[bytes] = (),
    ) -> list[bool]:
        """Read page i of `places` into `views[i]`; whether it is there and right.

        A view as long as the payload gets all of it, and its checksum is compared. A shorter one gets what of it
        is from `begin` on: the header is compared, and the store has verified the bytes.

        `grants`: of each page what it is read under. Empty: we may read the files.
        """
        done: list[bool] = []
        self.refusal = ""
        first = 0
        while first < len(views):
            last = min(first + BATCH_PAGES, len(views))
            grant = grants[first] if grants else b""
            if grants:  # As many as are read under one.
                last = next((page for page in range(first, last) if grants[page] != grant), last)
            last = _end_of_batch(views, first, last)
            part = list(PLACE.iter_unpack(places[first * PLACE.size : last * PLACE.size]))
            done += self._read_batch(keys[first:last], part, views[first:last], kind, tenant, begin, grant)
            first = last
        return done

    def _read_batch(
        self, keys: Sequence[bytes], places: Sequence[tuple[int, int, int, int]], views: Sequence[memoryview],
        kind: int, tenant: int, begin: int, grant: bytes,
    ) -> list[bool]:  # fmt: skip
        items: list[Any] = []
        into: list[memoryview] = []
        asked: list[int] = []
        last = 0
        file: Any = None
        for index, (segment, offset, _, _) in enumerate(places):
            if segment != last:  # Most of them lie in the one of the page before them.
                last, file = segment, (segment if grant else self._file(segment)) if segment else None
            if file is None:
                continue
            view = views[index]
            asked.append(index)
            items += (file, offset, HEADER_BYTES), (file, offset + HEADER_BYTES + begin, len(view))
            into += self._heads[index], view
        done = [False] * len(places)
        if not items:
            return done
        sums = array("I", bytes(array("I").itemsize * len(items)))
        try:
            if grant:
                counts: Sequence[Any] = self._client.read_granted(grant, items, into, sums=sums)
            else:
                counts = self._client.batch_read(items, into, raise_errors=False, sums=sums)
        except EmberError as error:
            if isinstance(error, AccessDenied):
                self.refusal = str(error)
            return done  # Nobody serves them now, or not to us: a miss.
        tail = _TENANT.pack(tenant)
        for at, index in enumerate(asked):
            segment, offset, length, crc = places[index]
            view = views[index]
            if counts[2 * at] != HEADER_BYTES or counts[2 * at + 1] != len(view):
                continue
            front = _FRONT.pack(MAGIC, VERSION, kind, segment, offset, length, crc, keys[index])
            if self._fronts[index] == front and self._tenants[index] == tail:
                done[index] = len(view) < length or sums[2 * at + 1] == crc
        return done

    def close(self) -> None:
        """Let its files go."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, segment: int) -> File | None:
        file = self._files.pop(segment, None)  # And in again: what is in use is not the oldest.
        if file is None:
            try:
                file = self._client.open(f"{self._segments}/{segment:08x}", "rb")
            except EmberError as error:
                if isinstance(error, AccessDenied):
                    self.refusal = str(error)
                return None  # It was removed with all its pages, or nobody can say: a miss.
            if len(self._files) >= OPEN_MAX:
                oldest = next(iter(self._files))
                self._files.pop(oldest).close()
        self._files[segment] = file
        return file


def _end_of_batch(views: Sequence[memoryview], first: int, last: int) -> int:
    """One page, and those after it up to so many bytes."""
    left = BATCH_BYTES - len(views[first])
    for page in range(first + 1, last):
        left -= len(views[page]) + HEADER_BYTES
        if left < 0:
            return page
    return last
