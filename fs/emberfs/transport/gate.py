"""What a reader may read on its connection, and a writer write: what the grants say that it shows, and nothing else.

A request brings its grant along, whole; one that writes may bring several. The signature is checked at the first one;
then a grant that is still known here costs a range test per item. So nothing has to be said again after a connection
was lost, and what one connection has shown is of no use to another.

Does not know: who makes grants, or lanes, whose native server checks the same by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import AccessDenied, GrantExpired
from ..grants import Grant, check_grant
from ..messages import Message, ReadChunks, WriteChunks
from ..striping import chains_of
from ..types import split_chunk_id
from .grant_keys import GrantKeys

GRANTS_MAX = 64
"""Of a connection, that are known; the one that was shown first goes first."""
CHECKS_MAX = 1 << 16
"""Grants that one request is sent under, times items: the server does nothing else meanwhile."""
CHUNK_ID_BYTES = 16


class Gate:
    """Of one connection."""

    def __init__(self, keys: GrantKeys | None, *, tenant: str, wall_ns: Callable[[], int]) -> None:
        """`tenant`: whose grants count; "": anybody's. Without `keys` none counts."""
        self.tenant = tenant
        self._keys = keys
        self._wall_ns = wall_ns
        self._checked_with: Sequence[bytes] = ()
        self._known: dict[bytes, Grant] = {}

    def check(self, request: Message, lengths: Sequence[int]) -> None:
        """May this be read or written, so many bytes of each item? Raises AccessDenied."""
        match request:
            case ReadChunks():
                self._check_read(request, lengths)
            case WriteChunks():
                self._check_write(request, lengths)

    def _check_read(self, request: ReadChunks, lengths: Sequence[int]) -> None:
        grant = self._shown(request.grant, writes=False)
        if not len(request.chunks) == len(request.offsets) == len(lengths):
            raise AccessDenied("a read under a grant says of each item where it begins and how long it is")
        for chunk, offset, length in zip(request.chunks, request.offsets, lengths, strict=True):
            if len(chunk) != CHUNK_ID_BYTES or not grant.covers(*split_chunk_id(chunk), offset, length):
                raise AccessDenied("the grant is for other bytes than these")

    def _check_write(self, request: WriteChunks, lengths: Sequence[int]) -> None:
        """A chunk on another chain than its file's would be no part of the file, and nobody would remove it."""
        if len(request.grants) * len(request.chunks) > CHECKS_MAX:
            raise AccessDenied(f"{len(request.grants)} grants for {len(request.chunks)} items are too many at once")
        grants: dict[int, list[Grant]] = {}
        for each in dict.fromkeys(request.grants or [b""]):
            grant = self._shown(each, writes=True)
            for file in grant.files:
                grants.setdefault(file.inode, []).append(grant)
        if request.replace:
            raise AccessDenied("under a grant bytes are written into a chunk, and no chunk is replaced")
        if not len(request.chains) == len(request.chunks) == len(request.offsets) == len(lengths):
            raise AccessDenied("a write under a grant says of each item where it goes and how long it is")
        for item in zip(request.chains, request.chunks, request.offsets, lengths, strict=True):
            if not _may_write(grants, request.chunk_size_bytes, *item):
                raise AccessDenied("the grant is for other bytes than these")

    def _shown(self, data: bytes, *, writes: bool) -> Grant:
        # One that was taken out is good for nothing from now on.
        if self._keys is not None and self._keys.keys is not self._checked_with:
            self._known, self._checked_with = {}, self._keys.keys
        grant = self._known.get(data) or self._learn(data)
        if self._wall_ns() >= grant.expires_s * 1_000_000_000:
            self._known.pop(data, None)
            raise GrantExpired("the grant has expired: match or put again, or extend the lease before it ends")
        if grant.writes != writes:
            raise AccessDenied(f"the grant is to {'write' if grant.writes else 'read'}, and to do nothing else")
        return grant

    def _learn(self, data: bytes) -> Grant:
        if not data:
            raise AccessDenied("with a certificate for role 'reader' or 'writer' it takes a grant")
        if self._keys is None:
            raise AccessDenied("this server knows no keys of grants: see `grants` in [storage] of its configuration")
        grant = check_grant(data, self._keys.keys, tenant=self.tenant)
        while len(self._known) >= GRANTS_MAX:
            del self._known[next(iter(self._known))]
        self._known[data] = grant
        return grant


def _may_write(
    grants: Mapping[int, Sequence[Grant]], chunk_size_bytes: int, chain: int, chunk: bytes, offset: int, length: int
) -> bool:
    """`grants`: by the inodes of files that each is for."""
    if len(chunk) != CHUNK_ID_BYTES or not length:  # Of none there would be a chunk all the same.
        return False
    inode, index = split_chunk_id(chunk)
    for grant in grants.get(inode, ()):
        layout = grant.layout(inode)
        assert layout is not None
        chains = chains_of(layout)
        is_there = layout.chunk_size_bytes == chunk_size_bytes and chains[index % len(chains)] == chain
        if is_there and grant.covers(inode, index, offset, length):
            return True
    return False
