"""Cumulative CRC32C: the checksums of a block, shaped so that any aligned range is verified by one call.

`sums[i]` is the CRC32C of all bytes from 0 to the end of granule `i` (the last granule may be short). CRC32C can be
continued from a running value, so bytes from the end of granule `i` to the end of granule `j` are right exactly if
`crc32c(those bytes, sums[i]) == sums[j]`: one call however many granules, and an append goes on from the last value
without reading what is there.

The native part computes them, or `awscrt` where that was not built, or the processor has no instructions that it knows:
with AVX-512 both are three times as fast as the SSE4.2 loops of the packages named for CRC32C (65 against 23 GB/s from
64 KiB up, the same for small pieces), and the checksum is half the cost of a warm read. `awscrt` is not imported
before it is needed: that takes as long as all of numpy's core.

Sums are kept packed (little-endian u32): a record is decoded without making an integer per granule.
"""

from __future__ import annotations

import struct
from typing import Any, Protocol

from .lane import native

__all__ = ["crc32c", "cumulative_sums", "cumulative_sums_slowly", "first_bad_granule", "sum_before"]

_U32 = struct.Struct("<I")
HAS_INSTRUCTIONS = native is not None and native.CRC32C_WAY > 1
"""The native part computes CRC32C as quickly as `awscrt` does."""


class Crc32c(Protocol):
    """Of `data`, any buffer, behind bytes whose CRC32C is `crc`."""

    def __call__(self, data: Any, crc: int = 0, /) -> int: ...


crc32c: Crc32c
if HAS_INSTRUCTIONS:
    crc32c = native.crc32c
else:
    import awscrt.checksums

    crc32c = awscrt.checksums.crc32c


def cumulative_sums(payload: memoryview, *, granule: int, offset: int = 0, start: int = 0) -> bytes:
    """Packed sums for `payload` that begins at block offset `offset`, where the running CRC is `start`.

    The first value is for the end of the granule that holds `offset` (or the payload's end, if that comes first).
    """
    if HAS_INSTRUCTIONS:
        packed: bytes = native.cumulative_sums(payload, granule, offset, start)
        return packed
    return cumulative_sums_slowly(payload, granule=granule, offset=offset, start=start)


def cumulative_sums_slowly(payload: memoryview, *, granule: int, offset: int = 0, start: int = 0) -> bytes:
    """`cumulative_sums` where the native part was not built, or is slow."""
    values = []
    running = start
    begin, end = 0, min(len(payload), granule - offset % granule)
    while begin < len(payload):
        running = crc32c(payload[begin:end], running)
        values.append(running)
        begin, end = end, min(len(payload), end + granule)
    return struct.pack(f"<{len(values)}I", *values)


def sum_before(sums: bytes, granule_index: int) -> int:
    """The running CRC before granule `granule_index`: what to continue from."""
    return _U32.unpack_from(sums, 4 * granule_index - 4)[0] if granule_index else 0


def first_bad_granule(block: memoryview, sums: bytes, *, granule: int, first: int) -> int | None:
    """Index of the first granule of `block` (which begins with granule `first`) that breaks the chain, or None."""
    running = sum_before(sums, first)
    for index, begin in enumerate(range(0, len(block), granule), first):
        running = crc32c(block[begin : begin + granule], running)
        if running != sum_before(sums, index + 1):
            return index
    return None
