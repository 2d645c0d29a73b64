"""The index record of a chunk: where its bytes lie, which version they are, and how to know they are right.

Layout, little-endian: a fixed head, the committed sums, the pending sums, a CRC32C of key + everything before.
The key is part of the CRC, so a record that ends up under another key is caught.

    head    format u8, flags u8, checksum type u8, granule log2 u8, reserved u32
            committed {position u64, version u64, chain version u32, length u32, side sums crc u32}
            pending   {the same}
            last request {client 16 B, channel u32, sequence u64}

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


class Extent(NamedTuple):
    """One version of a chunk's bytes."""

    position: int
    length: int
    version: int
    chain_version: int
    sums: bytes
    """Packed cumulative sums; empty when they lie beside the block."""
    slot: int | None = None
    """Which side slot holds the sums, or None when they are in the record."""
    side_crc: int = 0


class Request(NamedTuple):
    """Who asked for an update: a retry carries the same three."""

    client: bytes
    channel: int
    sequence: int


NO_REQUEST = Request(bytes(16), 0, 0)


class Record(NamedTuple):
    """A decoded record. `pending` beside `pending_removes`: a removal that is prepared and not committed."""

    granule_log2: int
    committed: Extent | None
    pending: Extent | None
    pending_removes: bool
    request: Request

    @property
    def is_pending(self) -> bool:
        """An update is prepared and not committed. Its version is the committed one + 1."""
        return self.pending is not None or self.pending_removes

    def encode(self, chunk: bytes) -> bytes:
        """The row for `chunk`."""
        committed, pending = self.committed, self.pending
        flags = _PENDING_REMOVES if self.pending_removes else 0
        if committed is not None:
            flags |= _COMMITTED
            if committed.slot is not None:
                flags |= _COMMITTED_BESIDE | (_COMMITTED_SLOT if committed.slot else 0)
        if pending is not None:
            flags |= _PENDING
            if pending.slot is not None:
                flags |= _PENDING_BESIDE | (_PENDING_SLOT if pending.slot else 0)
        body = b"".join(
            (
                _HEAD.pack(
                    RECORD_FORMAT,
                    flags,
                    CHECKSUM_CRC32C_CUMULATIVE,
                    self.granule_log2,
                    0,
                    *_extent_fields(committed),
                    *_extent_fields(pending),
                    *self.request,
                ),
                committed.sums if committed is not None else b"",
                pending.sums if pending is not None else b"",
            )
        )
        return body + _CRC.pack(crc32c(body, crc32c(chunk)))


def _extent_fields(extent: Extent | None) -> tuple[int, int, int, int, int]:
    if extent is None:
        return (0, 0, 0, 0, 0)
    return (extent.position, extent.version, extent.chain_version, extent.length, extent.side_crc)


def decode_record(chunk: bytes, row: bytes) -> Record:
    """The record of `chunk`. Raises Corruption for damage, StoreFormat for a newer format."""
    check_record(chunk, row)
    head = _HEAD.unpack_from(row)
    flags, granule_log2 = head[1], head[3]
    end = _HEAD.size
    committed = pending = None
    if flags & _COMMITTED:
        slot = (1 if flags & _COMMITTED_SLOT else 0) if flags & _COMMITTED_BESIDE else None
        committed, end = _decode_extent(row, head[5:10], end, granule_log2, slot)
    if flags & _PENDING:
        slot = (1 if flags & _PENDING_SLOT else 0) if flags & _PENDING_BESIDE else None
        pending, end = _decode_extent(row, head[10:15], end, granule_log2, slot)
    assert end + _CRC.size == len(row)
    return Record(granule_log2, committed, pending, bool(flags & _PENDING_REMOVES), Request(*head[15:18]))


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
