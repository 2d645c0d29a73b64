"""A page as it lies in a segment: a header, then the payload.

    0   magic "EKVP"        4
    4   format version      u16
    6   kind                u16   index in the namespace's kinds
    8   segment             u32   which one it was written to, and where: a page that lies elsewhere is not this page
    12  offset              u32   of the header
    16  payload length      u32   bytes
    20  payload CRC32C      u32
    24  key                 32
    56  parent key          32    zeros at a root
    88  tenant number       u32
    92  CRC32C of the above u32

A reader knows all of it from the match, so it compares whole headers: another key, another place or another version of
a page never passes for this one. The header says enough to rebuild the index from the segments alone.

Does not know: where segments are, or who may read.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from emberfs.checksum import crc32c

MAGIC = b"EKVP"
VERSION = 1
HEADER_BYTES = 96
PAGE_BYTES_MAX = (64 << 20) - HEADER_BYTES

_HEAD = struct.Struct("<4sHHIIII32s32sI")
_CRC = struct.Struct("<I")


class Place(NamedTuple):
    """Where a page lies and what its payload's checksum is."""

    segment: int
    offset: int
    """Of the header, in bytes."""
    length: int
    """Of the payload, in bytes."""
    crc: int
    """CRC32C of the payload."""

    @property
    def end(self) -> int:
        """The first byte behind the page."""
        return self.offset + HEADER_BYTES + self.length


PLACE = struct.Struct("<IIII")
"""A `Place` on the wire and in the index."""
NO_PLACE = bytes(PLACE.size)
"""Of a page that is not there: no segment has the number 0."""


def places_of(blob: bytes) -> list[Place]:
    """Packed places, one by one."""
    return [Place(*each) for each in PLACE.iter_unpack(blob)]


def encode_header(place: Place, *, key: bytes, parent: bytes, kind: int, tenant: int) -> bytes:
    """The header of a page at `place`."""
    segment, offset, length, crc = place
    head = _HEAD.pack(MAGIC, VERSION, kind, segment, offset, length, crc, key, parent, tenant)
    return head + _CRC.pack(crc32c(head))


class Header(NamedTuple):
    """What a header says."""

    place: Place
    key: bytes
    parent: bytes
    kind: int
    tenant: int


def decode_header(data: bytes | memoryview) -> Header | None:
    """None: no page begins here."""
    head = bytes(data[: _HEAD.size])
    if len(data) < HEADER_BYTES or head[:4] != MAGIC or _CRC.unpack_from(data, _HEAD.size)[0] != crc32c(head):
        return None
    _, version, kind, segment, offset, length, crc, key, parent, tenant = _HEAD.unpack(head)
    if version != VERSION:
        return None
    return Header(Place(segment, offset, length, crc), key, parent, kind, tenant)
