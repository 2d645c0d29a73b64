"""Many ranges of open files of this machine, as they are: of what comes nothing is checked but its length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .lane import native


def read_files(descriptors: Any, offsets: Any, lengths: Any, into: memoryview) -> int:
    """Fill `into` range after range; returns how many were read whole: the next one is longer than its file.

    `descriptors` are packed as int32, `offsets` and `lengths` as int64 (`array`, numpy). With the native part the whole
    of it is one call without the interpreter's lock, which threads otherwise hand to and fro with each range. Raises
    OSError.
    """
    if native is not None:
        return native.read_files(descriptors, offsets, lengths, into)  # type: ignore[no-any-return]
    return read_files_slowly(descriptors.tolist(), offsets.tolist(), lengths.tolist(), into)


def read_files_slowly(
    descriptors: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], into: memoryview
) -> int:
    """The same in Python."""
    begin = 0
    for number, (descriptor, offset, length) in enumerate(zip(descriptors, offsets, lengths, strict=True)):
        done = 0
        while done < length:
            count = os.preadv(descriptor, (into[begin + done : begin + length],), offset + done)
            if not count:
                return number
            done += count
        begin += length
    return len(lengths)
