"""Rows as Python has them, and columns as Arrow has them.

Beside what pyarrow does itself: a HUGEINT is an int, whether it comes as DuckDB's extension type or as decimal(38, 0),
which cannot be told from a DECIMAL(38, 0); a MAP is a dict, or pairs where its keys are not hashable; a TIME WITH TIME
ZONE is a time with its offset, a BIT a string of 0 and 1. A TIMESTAMP WITH TIME ZONE is a datetime in UTC, an ENUM and
a JSON are str; a UUID is a uuid.UUID as DuckDB's extension type, and a str where it comes as text.

Does not know: functions.
"""

from __future__ import annotations

import datetime
import itertools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from ..errors import InvalidArgument

HUGEINT = pa.opaque(pa.binary(16), "hugeint", "DuckDB")
UHUGEINT = pa.opaque(pa.binary(16), "uhugeint", "DuckDB")
_WIDE_DECIMAL = pa.decimal128(38, 0)
# A TIMETZ is microseconds above 24 bits that count the seconds of the offset down from this one.
_OFFSET_MAX_S = 16 * 3600 - 1

_PLAIN = {int, datetime.date, type(None)}
"""What needs no `_check`."""

MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What building an array of Python values raises when one does not fit."""


def rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch as dictionaries."""
    if not batch.num_columns:
        return [{} for _ in range(batch.num_rows)]
    names = batch.schema.names
    columns = [python_values(column) for column in batch.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of a column."""
    values: list[Any] = column.to_pylist()
    decode = _decoder(column.type)
    return values if decode is None else [None if value is None else decode(value) for value in values]


def array(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """A column of Python values. Raises one of `MISFITS` for a value that is not of the type."""
    if type_ in (HUGEINT, UHUGEINT):
        data = [None if value is None else _wide_bytes(value, signed=type_ == HUGEINT) for value in values]
        return pa.ExtensionArray.from_storage(type_, pa.array(data, pa.binary(16)))
    if type_ == pa.uuid():
        # Not every pyarrow knows uuid.UUID.
        data = [None if value is None else uuid.UUID(str(value)).bytes for value in values]
        return pa.ExtensionArray.from_storage(type_, pa.array(data, pa.binary(16)))
    if any(_has_extension(type_.field(i).type) for i in range(type_.num_fields)):
        return _nested_array(values, type_)
    check = _check(type_)
    if check is not None and not set(map(type, values)) <= _PLAIN:
        for value in values:
            check(value)
    return pa.array(values, type_)


def with_decimals(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with its HUGEINT columns as decimals, which Arrow and pandas can compute with."""
    columns = [_as_decimals(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def check_types(schema: pa.Schema) -> None:
    """Raises `InvalidArgument` for a type that no column can be made of from Python values."""
    for field in schema:
        if _has_opaque(field.type):
            raise InvalidArgument(
                f"a function cannot give {field.name!r} as {field.type}: give it as text or numbers, and cast it in SQL"
            )


def _has_opaque(type_: pa.DataType) -> bool:
    if isinstance(type_, pa.OpaqueType):
        return type_ not in (HUGEINT, UHUGEINT)
    return any(_has_opaque(type_.field(i).type) for i in range(type_.num_fields))


def _has_extension(type_: pa.DataType) -> bool:
    if isinstance(type_, pa.BaseExtensionType):
        return True
    return any(_has_extension(type_.field(i).type) for i in range(type_.num_fields))


def _nested_array(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """Values of a type with an extension type somewhere inside, which pyarrow makes only from its parts."""
    if pa.types.is_struct(type_):
        missing = pa.array([value is None for value in values], pa.bool_())
        parts = [array([None if value is None else value.get(f.name) for value in values], f.type) for f in type_]
        return pa.StructArray.from_arrays(parts, fields=list(type_), mask=missing)
    is_map = pa.types.is_map(type_)
    if not is_map and not pa.types.is_list(type_):
        raise TypeError(f"a function cannot give {type_}")
    lists = [value.items() if is_map and isinstance(value, dict) else value for value in values]
    ends = itertools.accumulate((0 if items is None else len(items) for items in lists), initial=0)
    starts = [None if items is None else start for items, start in zip(lists, ends, strict=False)]
    flat = [item for items in lists if items is not None for item in items]
    offsets = pa.array([*starts, len(flat)], pa.int32())
    if not is_map:
        return pa.ListArray.from_arrays(offsets, array(flat, type_.value_type), type=type_)
    keys, items = array([key for key, _ in flat], type_.key_type), array([item for _, item in flat], type_.item_type)
    return pa.MapArray.from_arrays(offsets, keys, items, type=type_)


def _wide_bytes(value: Any, *, signed: bool) -> bytes:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"an int is needed, not {value!r}")
    return int(value).to_bytes(16, "little", signed=signed)


def _as_decimals(name: str, column: pa.Array) -> pa.Array:
    if column.type != HUGEINT:
        return column
    # Both are 128 bits, two's complement, least significant byte first.
    storage = column.storage
    decimals = pa.Array.from_buffers(_WIDE_DECIMAL, len(storage), storage.buffers(), offset=storage.offset)
    try:
        decimals.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InvalidArgument(
            f"{name!r} has a HUGEINT of 39 digits, more than Arrow's decimals hold; cast it to VARCHAR or DOUBLE"
        ) from error
    return decimals


def _decoder(type_: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes of a value of pyarrow's, never None, the one for the user; None if it is that already."""
    if type_ == _WIDE_DECIMAL:
        return int
    if isinstance(type_, pa.OpaqueType) and type_.vendor_name == "DuckDB":
        return _OPAQUE.get(type_.type_name)
    if pa.types.is_map(type_):
        return _map_decoder(type_)
    if pa.types.is_struct(type_):
        fields = {field.name: decode for field in type_ if (decode := _optional(field.type)) is not None}
        return (lambda value: {k: fields[k](v) if k in fields else v for k, v in value.items()}) if fields else None
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        decode = _optional(type_.value_type)
        return None if decode is None else lambda value: [decode(item) for item in value]
    return None


def _optional(type_: pa.DataType) -> Callable[[Any], Any] | None:
    """As `_decoder`, for values inside others, which may be None."""
    decode = _decoder(type_)
    return None if decode is None else lambda value: None if value is None else decode(value)


def _map_decoder(type_: pa.MapType) -> Callable[[Any], Any]:
    key, item = _optional(type_.key_type), _optional(type_.item_type)
    container: Callable[[Any], Any] = list if pa.types.is_nested(type_.key_type) else dict

    def decode(pairs: list[tuple[Any, Any]]) -> Any:
        return container((key(k) if key else k, item(v) if item else v) for k, v in pairs)

    return decode


def _check(type_: pa.DataType) -> Callable[[Any], None] | None:
    """What raises one of `MISFITS` for a value that pyarrow would cut to fit, without a word: 7.5 as an integer, a
    time of day as a date. None: there is no such value."""
    if pa.types.is_integer(type_):
        return _check_whole
    if pa.types.is_date(type_):
        return _check_date
    if pa.types.is_map(type_):
        pairs = [check for inner in (type_.key_type, type_.item_type) if (check := _check(inner)) is not None]
        return (lambda value: _check_map(value, type_)) if pairs else None
    if pa.types.is_struct(type_):
        fields = {field.name: check for field in type_ if (check := _check(field.type)) is not None}
        return (lambda value: _check_struct(value, fields)) if fields else None
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        check = _check(type_.value_type)
        return None if check is None else lambda value: _check_each(value, check)
    return None


def _check_whole(value: Any) -> None:
    if value is not None and type(value) is not int and value != int(value):
        raise ValueError(f"{value!r} is not a whole number")


def _check_date(value: Any) -> None:
    if isinstance(value, datetime.datetime):
        raise TypeError(f"{value!r} is not a date alone")


def _check_each(values: Any, check: Callable[[Any], None]) -> None:
    for value in values if values is not None else ():
        check(value)


def _check_struct(value: Any, fields: dict[str, Callable[[Any], None]]) -> None:
    if isinstance(value, dict):
        for name, check in fields.items():
            check(value.get(name))


def _check_map(value: Any, type_: pa.MapType) -> None:
    pairs = list(value.items() if isinstance(value, dict) else value or ())
    for position, inner in enumerate((type_.key_type, type_.item_type)):
        check = _check(inner)
        if check is not None:
            _check_each((pair[position] for pair in pairs), check)


def _time_with_zone(data: bytes) -> datetime.time:
    bits = int.from_bytes(data, "little")
    offset = datetime.timedelta(seconds=_OFFSET_MAX_S - (bits & 0xFFFFFF))
    midnight = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone(offset))
    return (midnight + datetime.timedelta(microseconds=bits >> 24)).timetz()


def _bits(data: bytes) -> str:
    """The first byte is how many bits at the front of the rest are padding."""
    return "".join(f"{byte:08b}" for byte in data[1:])[data[0] :]


def _bignum(data: bytes) -> int:
    """Three bytes of sign and length, then the magnitude; a negative number has every bit of it flipped."""
    if data[0] & 0x80:
        return int.from_bytes(data[3:], "big")
    return -int.from_bytes(bytes(byte ^ 0xFF for byte in data[3:]), "big")


_OPAQUE: dict[str, Callable[[bytes], Any]] = {
    "hugeint": lambda data: int.from_bytes(data, "little", signed=True),
    "uhugeint": lambda data: int.from_bytes(data, "little"),
    "time_tz": _time_with_zone,
    "bit": _bits,
    "bignum": _bignum,
}
