"""The index record of a chunk: where its bytes lie, which version they are, and how to know they are right.

Layout, little-endian: a fixed head, the committed sums, the pending sums, a CRC32C of key + everything before.
The key is part of the CRC, so a record that ends up under another key is caught.

    head    format u8, flags u8, checksum type u8, granule log2 u8, reserved u32
            committed {position u64, version u64, chain version u32, length u32, side sums crc u32}
            pending   {the same}
            request of the pending update {client 16 B, channel u32, sequence u64}

A removed chunk may leave a tombstone: no committed extent, and of its fields only the versions, so that its next
version follows. A pending removal, too, has of its fields only the versions.

A position is (size class log2) << 56 | block index; see `allocator`. Sums of up to SUMS_INLINE_BYTES_MAX are in the
record; longer ones lie beside the block, in one of two slots (an append in place writes the other slot, so committed
sums are never overwritten), and the record keeps their CRC.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..checksum import crc32c
from ..errors import Corruption, StoreFormat
from ..types import describe_chunk

RECORD_FORMAT = 1
CHECKSUM_CRC32C_CUMULATIVE = 1
SUMS_INLINE_BYTES_MAX = 1024

_HEAD = struct.Struct("<4BI QQIII QQIII 16sIQ")
_COMMITTED_HEAD = struct.Struct("<4BI QQIII")
"""The part of it up to the committed extent."""
_CRC = struct.Struct("<I")

_COMMITTED, _PENDING, _PENDING_REMOVES = 1, 2, 4
_COMMITTED_BESIDE, _PENDING_BESIDE, _COMMITTED_SLOT, _PENDING_SLOT = 8, 16, 32, 64
_TOMBSTONE = 128


class Extent(NamedTuple):
    """One version of a chunk's bytes."""

    position: int
    length: int
    version: int
    chain_version: int
    sums: bytes
    """Packed cumulative sums; empty in a decoded extent when they lie beside the block."""
    slot: int | None = None
    """Which side slot holds the sums, or None when they are in the record."""
    side_crc: int = 0


class Request(NamedTuple):
    """Who asked for an update: a retry carries the same three."""

    client: bytes
    channel: int
    sequence: int


NO_REQUEST = Request(bytes(16), 0, 0)


class Stamp(NamedTuple):
    """The versions of what has no bytes: a tombstone, or a removal that is prepared."""

    version: int
    chain_version: int


class Record(NamedTuple):
    """A decoded record."""

    granule_log2: int
    committed: Extent | None
    pending: Extent | None = None
    tombstone: Stamp | None = None
    """Instead of `committed`: the chunk was removed."""
    removal: Stamp | None = None
    """Instead of `pending`: a removal is prepared and not committed."""
    request: Request = NO_REQUEST
    """Who asked for the pending update. Says nothing when nothing is pending."""

    @property
    def is_pending(self) -> bool:
        """An update is prepared and not committed."""
        return self.pending is not None or self.removal is not None

    @property
    def version(self) -> int:
        """The committed version, or the tombstone's; 0: none."""
        current = self.committed or self.tombstone
        return current.version if current is not None else 0

    @property
    def pending_version(self) -> int:
        """0: none."""
        pending = self.pending or self.removal
        return pending.version if pending is not None else 0

    def positions(self) -> tuple[int, ...]:
        """The blocks this record names, each once: committed and pending may share one."""
        committed, pending = self.committed, self.pending
        if committed is None:
            return () if pending is None else (pending.position,)
        if pending is None or pending.position == committed.position:
            return (committed.position,)
        return (committed.position, pending.position)

    def encode(self, chunk: bytes) -> bytes:
        """The row for `chunk`."""
        committed, pending = self.committed, self.pending
        flags = (_PENDING_REMOVES if self.removal is not None else 0) | (_TOMBSTONE if self.tombstone else 0)
        committed_sums = pending_sums = b""
        if committed is not None:
            flags |= _COMMITTED
            if committed.slot is None:
                committed_sums = committed.sums
            else:
                flags |= _COMMITTED_BESIDE | (_COMMITTED_SLOT if committed.slot else 0)
        if pending is not None:
            flags |= _PENDING
            if pending.slot is None:
                pending_sums = pending.sums
            else:
                flags |= _PENDING_BESIDE | (_PENDING_SLOT if pending.slot else 0)
        body = b"".join(
            (
                _HEAD.pack(
                    RECORD_FORMAT,
                    flags,
                    CHECKSUM_CRC32C_CUMULATIVE,
                    self.granule_log2,
                    0,
                    *_version_fields(committed, self.tombstone),
                    *_version_fields(pending, self.removal),
                    *self.request,
                ),
                committed_sums,
                pending_sums,
            )
        )
        return body + _CRC.pack(crc32c(body, crc32c(chunk)))


def _version_fields(extent: Extent | None, removal: Stamp | None) -> tuple[int, int, int, int, int]:
    if extent is not None:
        return (extent.position, extent.version, extent.chain_version, extent.length, extent.side_crc)
    if removal is not None:
        return (0, removal.version, removal.chain_version, 0, 0)
    return (0, 0, 0, 0, 0)


def decode_record(chunk: bytes, row: bytes) -> Record:
    """The record of `chunk`. Raises Corruption for damage, StoreFormat for a newer format."""
    check_record(chunk, row)
    head = _HEAD.unpack_from(row)
    flags, granule_log2 = head[1], head[3]
    end = _HEAD.size
    committed = pending = tombstone = removal = None
    if flags & _COMMITTED:
        slot = (1 if flags & _COMMITTED_SLOT else 0) if flags & _COMMITTED_BESIDE else None
        committed, end = _decode_extent(row, head[5:10], end, granule_log2, slot)
    elif flags & _TOMBSTONE:
        tombstone = Stamp(head[6], head[7])
    if flags & _PENDING:
        slot = (1 if flags & _PENDING_SLOT else 0) if flags & _PENDING_BESIDE else None
        pending, end = _decode_extent(row, head[10:15], end, granule_log2, slot)
    elif flags & _PENDING_REMOVES:
        # Rows of before removals had a version of their own say 0.
        removal = Stamp(head[11] or head[6] + 1, head[12])
    assert end + _CRC.size == len(row)
    return Record(granule_log2, committed, pending, tombstone, removal, Request(*head[15:18]))


def is_clean(row: bytes) -> bool:
    """Whether a row (undamaged) says that nothing is pending."""
    return not row[1] & (_PENDING | _PENDING_REMOVES)


def is_tombstone(row: bytes) -> bool:
    """Whether a row (undamaged, or so it is believed) says that its chunk was removed and nothing is pending."""
    return bool(row[1] & _TOMBSTONE) and not row[1] & (_PENDING | _PENDING_REMOVES)


def row_to_read(chunk: bytes, row: bytes | None, is_pending: bool) -> bytes | None:
    """The row in which a pending version that is to be read is the committed one; else, and if damaged, as it is."""
    if row is None or not is_pending:
        return row
    try:
        record = decode_record(chunk, row)
    except Corruption:
        return row
    if record.removal is not None:
        return None
    if record.pending is None:
        return row
    return Record(record.granule_log2, record.pending).encode(chunk)


def decode_committed(chunk: bytes, row: bytes) -> tuple[Extent | None, int]:
    """(committed extent, granule log2): what a read needs, without decoding the rest. Raises as `decode_record`."""
    check_record(chunk, row)
    _, flags, _, granule_log2, _, position, version, chain_version, length, side_crc = _COMMITTED_HEAD.unpack_from(row)
    if not flags & _COMMITTED:
        return None, granule_log2
    if flags & _COMMITTED_BESIDE:
        slot = 1 if flags & _COMMITTED_SLOT else 0
        return Extent(position, length, version, chain_version, b"", slot, side_crc), granule_log2
    end = _HEAD.size + sums_bytes(length, granule_log2)
    return Extent(position, length, version, chain_version, row[_HEAD.size : end]), granule_log2


def check_record(chunk: bytes, row: bytes) -> None:
    """Raise unless `row` is an undamaged record of `chunk`, of a format we know."""
    if len(row) < _HEAD.size + _CRC.size or _CRC.unpack_from(row, len(row) - 4)[0] != crc32c(row[:-4], crc32c(chunk)):
        name = describe_chunk(chunk)
        raise Corruption(f"index record of chunk {name} is damaged", chunk=name)
    if row[0] > RECORD_FORMAT or row[2] != CHECKSUM_CRC32C_CUMULATIVE:
        raise StoreFormat(
            f"chunk record format {row[0]} (checksum type {row[2]}) is newer than this emberline reads "
            f"({RECORD_FORMAT}); upgrade emberline"
        )


def _decode_extent(
    row: bytes, fields: tuple[int, ...], begin: int, granule_log2: int, slot: int | None
) -> tuple[Extent, int]:
    position, version, chain_version, length, side_crc = fields
    end = begin if slot is not None else begin + sums_bytes(length, granule_log2)
    return Extent(position, length, version, chain_version, row[begin:end], slot, side_crc), end


def sums_bytes(length: int, granule_log2: int) -> int:
    """Bytes of packed sums for `length` bytes of data."""
    return (length + (1 << granule_log2) - 1 >> granule_log2) * 4


def last_sum(sums: bytes) -> int:
    """The CRC32C of a content with these packed cumulative sums."""
    return int.from_bytes(sums[-4:], "little")
