"""Grants: which ranges of which files may be read, or written, signed by who knows, and good for a while.

    0   magic               4         "EMG1": to read; "EMW1": to write, which is not to read
    4   tenant, its bytes   u32   behind the ranges
    8   expires             u64   Unix seconds
    16  lease               u64   the signer's: what it is for
    24  files               u32
    28  ranges              u32
    32  files               40 each, by inode: number, inode, seed u64; chunk size, chains, stripe u32; 4 of zeros
        ranges              16 each, by file and begin, none touching the next: begin u64, length u32, file u32
        tenant
        HMAC-SHA256 of all before it

A file's `number` is what the signer calls it; the rest is what a client needs to find its chunks, so that a reader asks
no metadata server. Whoever has the key makes and checks grants: the services that sign, and the storage servers.

Invariants: a grant says nothing of the bytes, and nobody may take them for right because there was one. That it ends is
hygiene: the clocks of two machines decide about it.

Those to read are checked in C, too, for lanes (`lane/grant.c`). Does not know: who presents a grant, or connections.
"""

from __future__ import annotations

import hmac
import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .errors import AccessDenied, LimitExceeded
from .types import Chunks

KEY_BYTES = 32
KEYS_MAX = 4
FILES_MAX = 1024
RANGES_MAX = 2048
TENANT_BYTES_MAX = 1024
"""All these are those of `lane/grant.c`: the longest grant fits into a packet of a lane."""

_HEAD = struct.Struct("<4sIQQII")
_FILE = struct.Struct("<QQQIII4x")
_RANGE = struct.Struct("<QII")
_EXPIRES = struct.Struct("<Q")
_EXPIRES_AT = 8
_MAGIC = {False: b"EMG1", True: b"EMW1"}
"""By whether it is to write."""
_WRITES = {magic: writes for writes, magic in _MAGIC.items()}
_MAC_BYTES = 32
GRANT_BYTES_MAX = _HEAD.size + FILES_MAX * _FILE.size + RANGES_MAX * _RANGE.size + TENANT_BYTES_MAX + _MAC_BYTES


class GrantFile(NamedTuple):
    """A file that ranges are of."""

    number: int
    inode: int
    layout: Chunks


class Grant:
    """What a grant says."""

    __slots__ = ("_ranges", "expires_s", "files", "lease", "tenant", "writes")

    def __init__(
        self,
        tenant: str,
        lease: int,
        expires_s: int,
        files: Sequence[GrantFile],
        ranges: Iterable[tuple[int, int, int]],
        *,
        writes: bool = False,
    ) -> None:
        """`ranges`: (begin, length, index of the file), sorted by file and begin. `writes`: to write, not to read."""
        self.tenant, self.lease, self.expires_s, self.writes = tenant, lease, expires_s, writes
        self.files = tuple(files)
        self._ranges: dict[int, tuple[Chunks, list[int], list[int]]] = {
            file.inode: (file.layout, [], []) for file in files
        }
        for begin, length, index in ranges:
            _, begins, ends = self._ranges[self.files[index].inode]
            begins.append(begin)
            ends.append(begin + length)

    def covers(self, inode: int, index: int, offset: int, length: int) -> bool:
        """All of [offset, offset + length) of chunk `index` of a file is granted."""
        if (found := self._ranges.get(inode)) is None:
            return False
        layout, begins, ends = found
        size = layout.chunk_size_bytes
        if offset < 0 or offset + length > size:
            return False
        begin = index * size + offset
        place = bisect_right(begins, begin) - 1
        return place >= 0 and begin + length <= ends[place]

    def layout(self, inode: int) -> Chunks | None:
        """Where the chunks of a file are; None: nothing of it is granted."""
        found = self._ranges.get(inode)
        return None if found is None else found[0]


def sign(
    key: bytes, *, tenant: str, lease: int, expires_s: int, files: Mapping[int, GrantFile],
    ranges: Iterable[tuple[int, int, int]], writes: bool = False,
) -> bytes:  # fmt: skip
    """A grant of `ranges`: (number of a file of `files`, begin, end), in any order, to read or to write them. Raises
    LimitExceeded."""
    joined: list[list[int]] = []
    for inode, begin, end in sorted([(files[number].inode, begin, end) for number, begin, end in ranges]):
        if joined and joined[-1][0] == inode and begin <= joined[-1][2]:
            joined[-1][2] = max(joined[-1][2], end)
        else:
            joined.append([inode, begin, end])
    inodes = {inode: index for index, inode in enumerate(dict.fromkeys(inode for inode, _, _ in joined))}
    named = tenant.encode()
    if len(joined) > RANGES_MAX or len(inodes) > FILES_MAX or len(named) > TENANT_BYTES_MAX:
        raise LimitExceeded(f"a grant of {len(joined)} ranges of {len(inodes)} files is too much at once")
    by_inode = {file.inode: file for file in files.values()}
    parts = [_HEAD.pack(_MAGIC[writes], len(named), expires_s, lease, len(inodes), len(joined))]
    for inode in inodes:
        layout = by_inode[inode].layout
        sizes = layout.chunk_size_bytes, layout.chain_count, layout.stripe
        parts.append(_FILE.pack(by_inode[inode].number, inode, layout.seed, *sizes))
    parts += [_RANGE.pack(begin, end - begin, inodes[inode]) for inode, begin, end in joined]
    body = b"".join([*parts, named])
    return body + hmac.digest(key, body, "sha256")


def renew(data: bytes, key: bytes, *, expires_s: int) -> bytes:
    """The same grant until another time. `data` was checked before."""
    body = data[:_EXPIRES_AT] + _EXPIRES.pack(expires_s) + data[_EXPIRES_AT + _EXPIRES.size : -_MAC_BYTES]
    return body + hmac.digest(key, body, "sha256")


def read_grant(data: bytes) -> Grant:
    """What a grant says, whoever made it. Raises AccessDenied for what is none."""
    try:
        magic, named, expires_s, lease, files, ranges = _HEAD.unpack_from(data)
        files_end = _HEAD.size + files * _FILE.size
        ranges_end = files_end + ranges * _RANGE.size
        if magic not in _WRITES or len(data) != ranges_end + named + _MAC_BYTES:
            raise ValueError("of another form")
        known = [
            GrantFile(number, inode, Chunks(chunk_size, chains, stripe, seed))
            for number, inode, seed, chunk_size, chains, stripe in _FILE.iter_unpack(data[_HEAD.size : files_end])
        ]
        tenant = data[ranges_end : ranges_end + named].decode()
        granted = _RANGE.iter_unpack(data[files_end:ranges_end])
        return Grant(tenant, lease, expires_s, known, granted, writes=_WRITES[magic])
    except (struct.error, ValueError, IndexError) as error:
        raise AccessDenied(f"not a grant: {error}") from error


def check_grant(data: bytes, keys: Sequence[bytes], *, tenant: str) -> Grant:
    """What a grant says that was made with one of `keys`, for `tenant` ("": for whichever). Raises AccessDenied.

    Whether it has expired is left to whoever goes by it.
    """
    if len(data) > GRANT_BYTES_MAX:
        raise AccessDenied(f"not a grant: {len(data)} bytes are too long for one")
    body, theirs = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    if not any(hmac.compare_digest(hmac.digest(key, body, "sha256"), theirs) for key in keys):
        raise AccessDenied("the grant was not made with a key of this cluster, or was changed")
    grant = read_grant(data)
    if tenant not in ("", grant.tenant):
        raise AccessDenied("the grant is another tenant's")
    return grant
