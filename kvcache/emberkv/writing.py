"""Pages into a segment: each with its header, runs that lie side by side in one write.

Does not know: the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emberfs import Client, File
from emberfs.checksum import crc32c

from .page import HEADER_BYTES, Place, encode_header

RUN_BYTES_MAX = 16 << 20
"""Of one write: so much is gathered in memory that the servers share."""


class PageWriter:
    """Writes pages of a namespace. Not thread-safe: each thread borrows one."""

    def __init__(self, client: Client, segments: str) -> None:
        self._client, self._segments = client, segments
        self._file: tuple[int, File] | None = None
        """The segment written to last."""
        self._run = memoryview(b"")
        """Memory that a write is gathered in. Made at the first."""

    def write(
        self, keys: Sequence[bytes], parents: Sequence[bytes], places: Sequence[Place], payloads: Sequence[memoryview],
        *, kind: int, tenant: int,
    ) -> list[int]:  # fmt: skip
        """Write the pages, durably. Their checksums. Raises what the store raises."""
        crcs = [crc32c(payload) for payload in payloads]
        begin = 0
        while begin < len(places):
            end, size = begin, 0
            while end < len(places) and _adjoins(places, begin, end) and (end == begin or size < RUN_BYTES_MAX):
                size += places[end].end - places[end].offset
                end += 1
            run = self._room(size)
            at = 0
            for index in range(begin, end):
                place = places[index]._replace(crc=crcs[index])
                head = encode_header(place, key=keys[index], parent=parents[index], kind=kind, tenant=tenant)
                run[at : at + HEADER_BYTES] = head
                run[at + HEADER_BYTES : at + HEADER_BYTES + place.length] = payloads[index]
                at += HEADER_BYTES + place.length
            items: list[Any] = [(self._open(places[begin].segment), places[begin].offset, run[:size])]
            self._client.batch_write(items)
            begin = end
        return crcs

    def close(self) -> None:
        """Let its file go."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def _room(self, size: int) -> memoryview:
        if len(self._run) < size:
            self._run = self._client.buffer(max(size, 1 << 20))
        return self._run

    def _open(self, segment: int) -> File:
        if self._file is None or self._file[0] != segment:
            self.close()
            self._file = (segment, self._client.open(f"{self._segments}/{segment:08x}", "r+b"))
        return self._file[1]


def _adjoins(places: Sequence[Place], begin: int, index: int) -> bool:
    if index == begin:
        return True
    return places[index].segment == places[index - 1].segment and places[index].offset == places[index - 1].end
