"""Our hash for partitions that outlive a job: the same for equal values, on every machine and in every version.

xxh64 with seed 0 over a normal form of the value:

| values | bytes hashed |
|---|---|
| integers, HUGEINT, whole decimals | from -2^63 to 2^64-1: 8 bytes, little-endian, two's complement; else 16 |
| other decimals | the digits as a 16-byte integer without zeros at the end, then the scale as one byte |
| booleans | as the integers 0 and 1 |
| floats | 8 bytes of the double; -0.0 as 0.0, every NaN as 0x7ff8000000000000 |
| text, JSON | UTF-8 |
| blobs, UUIDs | the bytes |
| dates, timestamps, times | microseconds, rounded down, as an integer; infinity is ±(2^63-1) |

NULL has the fixed hash `NULL_HASH`. Several columns: xxh64 of their hashes, 8 bytes each, little-endian, in order.

So what SQL compares as equal in one type meets, and so do integers, decimals and timestamps of different widths; an
integer and a double need not. Change anything here and `HASH_VERSION` has to change too: test vectors are in
docs/formats.md. Everything runs over whole columns, in pieces that stay in the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UnsupportedType

HASH_VERSION = 1
NULL_HASH = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: nobody's hash but by chance."""

Hashes: TypeAlias = NDArray[np.uint64]
Bytes: TypeAlias = NDArray[np.uint8]

_PIECE_ROWS = 32_768
"""A column of 64-bit numbers in 256 KiB: a handful of them stay in the L2 cache."""
_VECTOR_BYTES_MAX = 64
"""Longer values are hashed one by one; for those a call costs less than the bytes."""

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
_INFINITY = np.int64(2**63 - 1)
_CANONICAL_NAN = np.uint64(0x7FF8000000000000)


def partition_of(hashes: Hashes, num_partitions: int) -> NDArray[np.uint32]:
    """The partition of each hash: `((hash >> 32) * num_partitions) >> 32`."""
    assert 1 <= num_partitions < 2**32
    return (((hashes >> np.uint64(32)) * np.uint64(num_partitions)) >> np.uint64(32)).astype(np.uint32)


def hash_columns(columns: Sequence[pa.Array | pa.ChunkedArray]) -> Hashes:
    """The hash of each row. Raises `UnsupportedType` for lists, structs and whatever else has no normal form."""
    assert columns
    hashes = [_hash_column(column) for column in columns]
    if len(hashes) == 1:
        return hashes[0]
    return _hash_fixed(np.stack(hashes, axis=1).astype("<u8", copy=False).view(np.uint8))


def xxh64(value: bytes) -> int:
    """xxh64 with seed 0 of one value."""
    digest: bytes = _compute_xxh64()(value, 0)
    return int.from_bytes(digest, "big")


@functools.cache
def _compute_xxh64() -> Any:
    from awscrt.checksums import XXHash  # Takes a fifteenth of the time that the import of all of emberflow does.

    return XXHash.compute_xxhash64


def _hash_column(column: pa.Array | pa.ChunkedArray) -> Hashes:
    if isinstance(column, pa.ChunkedArray):
        parts = [_hash_column(chunk) for chunk in column.chunks]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)
    hashes = np.empty(len(column), np.uint64)
    for start in range(0, len(column), _PIECE_ROWS):
        piece = column.slice(start, _PIECE_ROWS)
        part = _hash_values(piece)
        if piece.null_count:
            part[piece.is_null().to_numpy(zero_copy_only=False)] = NULL_HASH
        hashes[start : start + len(piece)] = part
    return hashes


def _hash_values(array: pa.Array) -> Hashes:
    """The hashes of values; where there is NULL, anything."""
    type_ = array.type
    if isinstance(type_, pa.BaseExtensionType):
        name = getattr(type_, "type_name", None)  # Of arrow.opaque: DuckDB's name.
        if name in ("hugeint", "uhugeint"):
            return _hash_integers_128(_matrix(array.storage, 16), signed=name == "hugeint")
        if name is not None:
            raise UnsupportedType(f"no hash is defined for {name}")
        return _hash_values(array.storage)
    if pa.types.is_dictionary(type_):
        return _hash_values(array.dictionary_decode())
    if pa.types.is_decimal(type_):
        if type_.bit_width > 128:
            raise UnsupportedType(f"no hash is defined for {type_}")
        wide = array if type_.bit_width == 128 else array.cast(pa.decimal128(type_.precision, type_.scale))
        return _hash_decimals(_matrix(wide, 16), type_.scale)
    if pa.types.is_fixed_size_binary(type_):
        return _hash_fixed(_matrix(array, type_.byte_width))
    if pa.types.is_integer(type_) or pa.types.is_boolean(type_):
        numbers = array.cast(pa.uint64() if type_ == pa.uint64() else pa.int64()).fill_null(0)
        return _hash_words(numbers.to_numpy())
    if pa.types.is_floating(type_):
        return _hash_words(_normal_doubles(array.cast(pa.float64()).fill_null(0.0).to_numpy()))
    if pa.types.is_temporal(type_) and not pa.types.is_duration(type_) and type_ != pa.month_day_nano_interval():
        return _hash_words(_micros(array))
    if pa.types.is_string_view(type_) or pa.types.is_binary_view(type_):
        array = array.cast(pa.large_binary())
        type_ = array.type
    if pa.types.is_string(type_) or pa.types.is_binary(type_):
        return _hash_bytes(array, np.int32)
    if pa.types.is_large_string(type_) or pa.types.is_large_binary(type_):
        return _hash_bytes(array, np.int64)
    if pa.types.is_null(type_):
        return np.zeros(len(array), np.uint64)
    raise UnsupportedType(f"no hash is defined for {type_}")


# ---- normal forms


def _normal_doubles(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    # Adding 0.0 makes -0.0 positive and changes nothing else. Of a signalling NaN it would warn.
    with np.errstate(invalid="ignore"):
        words: NDArray[np.uint64] = (values + 0.0).view(np.uint64)
    words[np.isnan(values)] = _CANONICAL_NAN
    return words


def _micros(array: pa.Array) -> NDArray[np.int64]:
    """Microseconds since the epoch, or since midnight."""
    type_ = array.type
    if pa.types.is_date32(type_):
        days = array.view(pa.int32()).fill_null(0).to_numpy()
        micros: NDArray[np.int64] = days.astype(np.int64) * np.int64(86_400_000_000)
        # DuckDB's infinite dates.
        micros[days == 2**31 - 1] = _INFINITY
        micros[days == -(2**31) + 1] = -_INFINITY
        return micros
    if pa.types.is_time32(type_):
        array = array.view(pa.int32()).cast(pa.int64())
    values: NDArray[np.int64] = array.view(pa.int64()).fill_null(0).to_numpy()
    unit = "ms" if pa.types.is_date64(type_) else type_.unit
    if unit == "us":
        return values
    with np.errstate(over="ignore"):
        scaled = values // np.int64(1000) if unit == "ns" else values * np.int64(1000 if unit == "ms" else 1_000_000)
    return np.where(np.abs(values) == _INFINITY, values, scaled)


def _hash_integers_128(rows: Bytes, *, signed: bool) -> Hashes:
    """`rows` are 16 bytes each, little-endian."""
    low, high = rows.view("<u8").T
    fits = high == 0
    if signed:
        # A negative number fits if the upper half only repeats the sign of the lower.
        fits |= (high == np.uint64(2**64 - 1)) & (low >> np.uint64(63) == 1)
    return np.where(fits, _hash_words(low), _hash_fixed(rows))


def _hash_decimals(rows: Bytes, scale: int) -> Hashes:
    """`rows` are the digits, 16 bytes each, little-endian. A negative scale adds zeros."""
    hashes = np.empty(len(rows), np.uint64)
    low, high = rows.view("<i8").T
    short = high == low >> np.int64(63) if scale >= 0 else np.zeros(len(rows), dtype=bool)
    for row in np.flatnonzero(~short).tolist():
        hashes[row] = _hash_long_decimal(int.from_bytes(rows[row].tobytes(), "little", signed=True), scale)
    digits = np.where(short, low, 0)
    scales = np.full(len(rows), scale, np.uint8)
    for _ in range(scale):
        divisible = (scales > 0) & (digits % 10 == 0)
        if not divisible.any():
            break
        digits = np.where(divisible, digits // 10, digits)
        scales -= divisible
    fractional = np.empty((len(rows), 17), np.uint8)
    fractional[:, :16] = np.stack([digits, digits >> np.int64(63)], axis=1).astype("<i8", copy=False).view(np.uint8)
    fractional[:, 16] = scales
    by_digits = np.where(scales == 0, _hash_words(digits), _hash_fixed(fractional))
    return np.where(short, by_digits, hashes)


def _hash_long_decimal(digits: int, scale: int) -> int:
    while scale > 0 and digits % 10 == 0:
        digits, scale = digits // 10, scale - 1
    if scale > 0:
        return xxh64(digits.to_bytes(16, "little", signed=True) + bytes([scale]))
    digits *= 10**-scale
    if -(2**63) <= digits < 2**64:
        return xxh64((digits % 2**64).to_bytes(8, "little"))
    return xxh64(digits.to_bytes(16, "little", signed=True))


# ---- bytes of an array


def _matrix(array: pa.Array, width: int) -> Bytes:
    """The values of a fixed width as rows of bytes."""
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _hash_bytes(array: pa.Array, offset_type: type[np.int32] | type[np.int64]) -> Hashes:
    """The hashes of an array of text or blobs."""
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, offset_type)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    data = np.frombuffer(data_buffer or b"", np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    if len(lengths) and (lengths == lengths[0]).all() and lengths[0] <= _VECTOR_BYTES_MAX:
        return _hash_at(data, starts, int(lengths[0]))
    hashes = np.empty(len(array), np.uint64)
    # Rows of one length go through the same steps. A stable sort of bytes is a radix sort.
    groups = np.minimum(lengths, _VECTOR_BYTES_MAX + 1).astype(np.uint8)
    order = np.argsort(groups, kind="stable")
    end = 0
    for length, count in enumerate(np.bincount(groups).tolist()):
        rows = order[end : end + count]
        end += count
        if length <= _VECTOR_BYTES_MAX:
            hashes[rows] = _hash_at(data, starts[rows], length)
        else:
            hashes[rows] = [xxh64(data[offsets[row] : offsets[row + 1]].tobytes()) for row in rows.tolist()]
    return hashes


# ---- xxh64 over many values of one length; names and steps as in its specification


def _hash_words(values: NDArray[Any]) -> Hashes:
    """The hashes of 8-byte numbers."""
    words = values.view(np.uint64)
    return _avalanche(_step_8(np.full(len(words), _P5 + np.uint64(8)), words))


def _hash_fixed(rows: Bytes) -> Hashes:
    """The hashes of rows of bytes."""
    count, width = rows.shape
    return _hash_at(np.ascontiguousarray(rows).reshape(-1), np.arange(count, dtype=np.int64) * width, width)


def _hash_at(data: Bytes, starts: NDArray[np.int64], length: int) -> Hashes:
    """The hashes of `length` bytes of `data` from each of `starts` on."""
    words, halves = _overlapping(data, "<u8"), _overlapping(data, "<u4")
    done = length // 32 * 32
    acc = _stripes(lambda at: words[starts + at], len(starts), done) if done else np.full(len(starts), _P5)
    acc += np.uint64(length)
    while done + 8 <= length:
        acc = _step_8(acc, words[starts + done])
        done += 8
    if done + 4 <= length:
        acc ^= halves[starts + done].astype(np.uint64) * _P1
        acc = _rotl(acc, 23) * _P2 + _P3
        done += 4
    while done < length:
        acc ^= data[starts + done].astype(np.uint64) * _P5
        acc = _rotl(acc, 11) * _P1
        done += 1
    return _avalanche(acc)


def _overlapping(data: Bytes, dtype: str) -> NDArray[Any]:
    """The number that begins at each byte."""
    width = np.dtype(dtype).itemsize
    return np.ndarray((max(0, len(data) - width + 1),), dtype, buffer=data, strides=(1,))


def _stripes(lane: Callable[[int], Hashes], count: int, length: int) -> Hashes:
    """The four accumulators over `length` bytes, converged. `lane(at)` is the word of each value at that byte."""
    with np.errstate(over="ignore"):
        initial = (_P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1)
    accs = [np.full(count, value) for value in initial]
    for at in range(0, length, 32):
        accs = [_round(acc, lane(at + 8 * i)) for i, acc in enumerate(accs)]
    converged = _rotl(accs[0], 1) + _rotl(accs[1], 7) + _rotl(accs[2], 12) + _rotl(accs[3], 18)
    for acc in accs:
        converged = (converged ^ _round(np.zeros(count, np.uint64), acc)) * _P1 + _P4
    return converged


def _round(acc: Hashes, lane: Hashes) -> Hashes:
    return _rotl(acc + lane * _P2, 31) * _P1


def _step_8(acc: Hashes, lane: Hashes) -> Hashes:
    acc = acc ^ _rotl(lane * _P2, 31) * _P1
    return _rotl(acc, 27) * _P1 + _P4


def _rotl(values: Hashes, bits: int) -> Hashes:
    return (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))


def _avalanche(acc: Hashes) -> Hashes:
    acc = (acc ^ (acc >> np.uint64(33))) * _P2
    acc = (acc ^ (acc >> np.uint64(29))) * _P3
    return acc ^ (acc >> np.uint64(32))
