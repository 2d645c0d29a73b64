"""The index on disk: a log of what changed, and snapshots of all there is. Bytes in, bytes out.

A *frame* is {length u32, CRC32C of the body u32, body}. A log file is frames of batches; a batch is a msgpack array of
entries, applied as a whole. A snapshot file is one frame of what it holds, and one per block of arrays.

Frames of filling, whose body begins with a byte that no msgpack does, mean nothing: with them an append ends where a
sector does, and the store need not write the last chunk anew.

A log that ends in the middle of a frame, or in one whose checksum is wrong, ends before it: that batch was never
acknowledged as durable. A snapshot must be whole.

Does not know: files, the table's insides, or when to write which.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
from emberfs.checksum import crc32c

FORMAT = 1
FRAME = struct.Struct("<II")
FRAME_BYTES_MAX = 1 << 30
_FILLING = b"\xc1"


class Entry(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of what a log says. Fields are added at the end with a default."""


class TenantAdded(Entry, frozen=True):
    """The next tenant number belongs to `name`."""

    name: str


class Put(Entry, frozen=True):
    """Pages were committed."""

    tenant: int
    kind: int
    keys: bytes
    """32 bytes each."""
    parents: bytes
    """32 bytes each, zeros at a root."""
    places: bytes
    """16 bytes each, as `page.PLACE` has them."""
    used_s: float
    """Wall clock, seconds."""


class Moved(Entry, frozen=True):
    """Pages lie elsewhere now: compaction."""

    tenant: int
    kind: int
    keys: bytes
    places: bytes


class Evicted(Entry, frozen=True):
    """Slots are gone, with the pages of all kinds: a tombstone. In the order in which they went."""

    tenant: int
    keys: bytes


class Unplaced(Entry, frozen=True):
    """Pages of one kind are gone, their slots stay: they were damaged, or removed in the middle of a prefix."""

    tenant: int
    kind: int
    keys: bytes


class SegmentAdded(Entry, frozen=True):
    """A segment is written to, by a session of the process that says so; 0 is its own compaction, -1 nobody: it is
    sealed at once."""

    id: int
    size_bytes: int
    writer: int


class SegmentSealed(Entry, frozen=True):
    """Nothing was handed out behind `end`."""

    id: int
    end: int


class SegmentRetired(Entry, frozen=True):
    """Nothing of it is named any more. Its file goes."""

    id: int


class Pinned(Entry, frozen=True):
    """Slots stay until `until_s` (wall clock, seconds)."""

    tenant: int
    keys: bytes
    until_s: float


class QuotaSet(Entry, frozen=True):
    """What a tenant may hold, in bytes; 0: no limit of its own."""

    tenant: int
    limit_bytes: int


class TtlSet(Entry, frozen=True):
    """How long pages stay that nobody uses: a tenant's, or (None) those of all others; 0: as it is without it."""

    tenant: int | None
    ttl_s: float


AnyEntry = (
    TenantAdded | Put | Moved | Evicted | Unplaced | SegmentAdded | SegmentSealed | SegmentRetired | Pinned | QuotaSet
    | TtlSet
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[AnyEntry])


def encode_frame(body: bytes) -> bytes:
    """One frame."""
    return FRAME.pack(len(body), crc32c(body)) + body


def encode_batch(entries: Sequence[Entry]) -> bytes:
    """A frame of entries that are applied together."""
    return encode_frame(_encoder.encode(entries))


def filling(size_bytes: int, multiple: int) -> bytes:
    """A frame that makes `size_bytes` a multiple of something; empty if they are one."""
    if size_bytes % multiple == 0:
        return b""
    return encode_frame(_FILLING * ((-size_bytes - FRAME.size - 1) % multiple + 1))


def frames(data: bytes | memoryview) -> Iterator[memoryview]:
    """The bodies of whole frames, up to the first that is not."""
    view, begin = memoryview(data), 0
    while begin + FRAME.size <= len(view):
        length, crc = FRAME.unpack_from(view, begin)
        body = view[begin + FRAME.size : begin + FRAME.size + length]
        if length > FRAME_BYTES_MAX or len(body) < length or crc32c(body) != crc:
            return
        yield body
        begin += FRAME.size + length


def batches(data: bytes | memoryview) -> Iterator[list[AnyEntry]]:
    """What a log says, batch by batch. Raises ValueError for what a newer program wrote."""
    for body in frames(data):
        if body[:1] == _FILLING:
            continue
        try:
            yield _decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ValueError(f"a log that this program does not read: {error}") from error


def split(blob: bytes, size: int) -> list[bytes]:
    """Fixed pieces of a blob."""
    return list(struct.unpack(f"{size}s" * (len(blob) // size), blob))
