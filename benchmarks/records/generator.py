"""What the records are: a function of a seed and a record's number, so that any range can be made anywhere.

Like gensort's (`gensort -a`, of which this is no byte-for-byte copy) a record is text: a key of 10 characters, and a
payload of 90 that begins with the record's number. The rest of it is random text in place of gensort's runs of equal
letters, so a compressor finds next to nothing: 1 GB of records is about 1 GB of Parquet.

Invariants: record i takes its 96 random bytes from blocks 3i to 3i+2 of one Philox stream, whatever the range and the
kind of keys; records of different kinds differ in their keys alone.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

KEY_BYTES = 10
RECORD_BYTES = 100

Keys: TypeAlias = Literal["uniform", "skewed", "hot", "null"]
"""How the keys are spread.

uniform   60 random bits: no two of 10 million are equal, most likely
skewed    as with `gensort -s`: the first 6 characters are one of 65, the n-th of them in 1 of 2**n records
hot       60 % of the records have one and the same key
null      every key is NULL
"""

Records: TypeAlias = npt.NDArray[np.uint8]
"""One row of 100 bytes for each record. A key of ten 0xFF, which no text has, stands for NULL: it sorts last."""

NULL_KEY = b"\xff" * KEY_BYTES
HOT_KEY = b"emberflow0"
HOT_SHARE = 0.6

_LETTERS = b"+/0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LETTER_OF_BYTE = _LETTERS * 4
_HEX_DIGITS = np.frombuffer(b"0123456789ABCDEF", np.uint8)
_BLOCKS = 3
"""Of Philox, for each record; a block is four words of 64 bits."""
_WORDS = 4 * _BLOCKS
_NUMBER_DIGITS = 16
_PREFIX_BYTES = 6


def make_records(first: int, count: int, *, seed: int = 0, keys: Keys = "uniform") -> Records:
    """Records `first` to `first + count - 1`."""
    words = np.random.Philox(key=seed, counter=_BLOCKS * first).random_raw(_WORDS * count).astype("<u8", copy=False)
    text = np.frombuffer(words.tobytes().translate(_LETTER_OF_BYTE), np.uint8).reshape(count, 8 * _WORDS)
    records = np.empty((count, RECORD_BYTES), np.uint8)
    records[:, :KEY_BYTES] = text[:, :KEY_BYTES]
    filler = KEY_BYTES + _NUMBER_DIGITS
    records[:, KEY_BYTES:filler] = _hexadecimal(np.arange(first, first + count, dtype=">u8"))
    records[:, filler:] = text[:, KEY_BYTES : KEY_BYTES + RECORD_BYTES - filler]
    # The last word has given no letters: it chooses.
    choice = words.reshape(count, _WORDS)[:, -1]
    if keys == "skewed":
        records[:, :_PREFIX_BYTES] = _PREFIXES[64 - np.frexp(choice.astype(np.float64))[1].clip(0, 64)]
    elif keys == "hot":
        records[choice < np.uint64(HOT_SHARE * 2**64), :KEY_BYTES] = np.frombuffer(HOT_KEY, np.uint8)
    elif keys == "null":
        records[:, :KEY_BYTES] = np.frombuffer(NULL_KEY, np.uint8)
    return records


def _hexadecimal(numbers: npt.NDArray[np.unsignedinteger]) -> Records:
    octets = numbers.view(np.uint8).reshape(len(numbers), 8)
    digits = np.empty((len(numbers), _NUMBER_DIGITS), np.uint8)
    digits[:, 0::2] = _HEX_DIGITS[octets >> 4]
    digits[:, 1::2] = _HEX_DIGITS[octets & 15]
    return digits


_PREFIXES = make_records(0, 65, seed=65)[:, :_PREFIX_BYTES]
