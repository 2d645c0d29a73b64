"""Where a local file takes no space: Linux's FIEMAP, which knows of space that was reserved and never written, too.

Source: Documentation/filesystems/fiemap.rst of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator

_FIEMAP = 0xC020660B
_EXTENTS = 512
_LAST = 1
_HEAD = struct.Struct("=QQLLLL")
"""Begin and length of what is asked for, flags, extents that were found, extents that there is room for, nothing."""
_EXTENT = struct.Struct("=QQQQQLLLL")
"""Begin in the file and on the medium, length, nothing twice, flags, nothing thrice."""
_UNKNOWN = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM))


def holes(file: int, length: int) -> list[tuple[int, int]]:
    """[begin, end) of the holes of an open file of so many bytes, in order; none where the file system does not tell.

    Raises OSError.
    """
    found, at = [], 0
    try:
        for begin, end in _extents(file, length):
            if begin > at:
                found.append((at, begin))
            at = end
    except OSError as error:
        if error.errno in _UNKNOWN:
            return []
        raise
    return found if at >= length else [*found, (at, length)]


def _extents(file: int, length: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < length:
        answer = bytearray(_HEAD.size + _EXTENTS * _EXTENT.size)
        _HEAD.pack_into(answer, 0, at, length - at, 0, 0, _EXTENTS, 0)
        fcntl.ioctl(file, _FIEMAP, answer, True)
        count = _HEAD.unpack_from(answer)[3]
        for number in range(count):
            begin, _, size, _, _, flags, *_ = _EXTENT.unpack_from(answer, _HEAD.size + number * _EXTENT.size)
            at = begin + size
            yield begin, at
            if flags & _LAST:
                return
        if not count:
            return
