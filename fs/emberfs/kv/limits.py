"""The limits of `types`, checked where a key or value is handed in, with a sentence for each."""

from __future__ import annotations

from typing import NoReturn

from ..errors import LimitExceeded
from .types import KEY_BYTES_MAX, RANGE_ROWS_MAX, TRANSACTION_BYTES_MAX, VALUE_BYTES_MAX


def check_key(key: bytes) -> None:
    if not 0 < len(key) <= KEY_BYTES_MAX:
        refuse_key(key)


def refuse_key(key: bytes) -> NoReturn:
    raise LimitExceeded(f"a key is 1 to {KEY_BYTES_MAX} bytes long, this one {len(key)}")


def check_value(value: bytes) -> None:
    if len(value) > VALUE_BYTES_MAX:
        raise LimitExceeded(f"a value is at most {VALUE_BYTES_MAX} bytes long, this one {len(value)}")


def check_interval(begin: bytes, end: bytes) -> None:
    """A range end may be one byte longer than a key: "just after the longest key" is a place, too."""
    longest = max(len(begin), len(end))
    if longest > KEY_BYTES_MAX + 1:
        raise LimitExceeded(f"a range end is at most {KEY_BYTES_MAX + 1} bytes long, this one {longest}")


def check_limit(limit: int) -> None:
    if not 1 <= limit <= RANGE_ROWS_MAX:
        raise LimitExceeded(f"one range call returns 1 to {RANGE_ROWS_MAX} rows, not {limit}")


def refuse_transaction() -> NoReturn:
    raise LimitExceeded(f"a transaction writes at most {TRANSACTION_BYTES_MAX} bytes of keys and values")
