"""What a reader may read on its connection: what the grants say that it shows, and nothing else.

A request brings its grant along, whole. The signature is checked at the first one; then a grant that is still known
here costs a range test per item. So nothing has to be said again after a connection was lost, and what one connection
has shown is of no use to another.

Does not know: who makes grants, or lanes, whose native server checks the same by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import AccessDenied
from ..grants import Grant, check_grant
from ..messages import Message, ReadChunks
from ..types import split_chunk_id
from .grant_keys import GrantKeys

GRANTS_MAX = 64
"""Of a connection, that are known; the one that was shown first goes first."""
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
        """May this be read, so many bytes of each item? Raises AccessDenied."""
        if not isinstance(request, ReadChunks):
            return
        # One that was taken out is good for nothing from now on.
        if self._keys is not None and self._keys.keys is not self._checked_with:
            self._known, self._checked_with = {}, self._keys.keys
        grant = self._known.get(request.grant) or self._learn(request.grant)
        if self._wall_ns() >= grant.expires_s * 1_000_000_000:
            self._known.pop(request.grant, None)
            raise AccessDenied("the grant has expired: match again, or extend the lease before it ends")
        if not len(request.chunks) == len(request.offsets) == len(lengths):
            raise AccessDenied("a read under a grant says of each item where it begins and how long it is")
        for chunk, offset, length in zip(request.chunks, request.offsets, lengths, strict=True):
            if len(chunk) != CHUNK_ID_BYTES or not grant.covers(*split_chunk_id(chunk), offset, length):
                raise AccessDenied("the grant is for other bytes than these")

    def _learn(self, data: bytes) -> Grant:
        if not data:
            raise AccessDenied("a certificate for role 'reader' reads under a grant only")
        if self._keys is None:
            raise AccessDenied("this server knows no keys of grants: see `grants` in [storage] of its configuration")
        grant = check_grant(data, self._keys.keys, tenant=self.tenant)
        while len(self._known) >= GRANTS_MAX:
            del self._known[next(iter(self._known))]
        self._known[data] = grant
        return grant
