"""The rows of a target's index beside the bitmaps, and what one update changes in them.

Invariants: a chunk with a pending version has a row in the list of those, and a chunk that is a tombstone one in that
list; both change in the transaction that changes the record. Request rows and the floor only ever grow (`Change.maxima`
are the index's atomic `max`), so whoever writes them need not know what they say.

Does not know: when anything is committed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kv.types import encode_int
from .allocator import GROUP_BLOCKS
from .record import NO_REQUEST, Record, Request

IDENTITY_KEY = b"f"
FLOOR_KEY = b"v"
"""The version that new chunks begin above."""
CHUNK, GROUP, PENDING, TOMBSTONE, REQUEST = b"c", b"g", b"p", b"t", b"q"
"""What keys begin with: records, bitmaps, chunks with a pending version, tombstones, last sequences."""
GROUP_ROW_BYTES = 7 + GROUP_BLOCKS // 8
INT_ROW_BYTES = 29
"""At most: a request row."""
NOTHING = Record(0, None)
"""For what has no record."""


def request_key(client: bytes, channel: int) -> bytes:
    """Where the last committed sequence of a client's channel stands."""
    return REQUEST + client + channel.to_bytes(4, "big")


def decode_request_key(key: bytes) -> tuple[bytes, int]:
    """(client, channel)"""
    return key[1:17], int.from_bytes(key[17:], "big")


def is_named(request: Request) -> bool:
    """Whether somebody could send it again."""
    return request is not NO_REQUEST and request.client != NO_REQUEST.client


class Change:
    """What one update wants of the next flush."""

    __slots__ = ("files", "freed", "maxima", "named", "published", "rows")

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes | None]] = []
        self.maxima: list[tuple[bytes, int]] = []
        """(key, value): the integer row becomes at least that."""
        self.named: list[int] = []
        """Blocks that only this change knows of. Emptied once a record names them, or may name them."""
        self.freed: list[int] = []
        self.files: list[int] = []
        self.published: dict[bytes, tuple[bytes, Record] | None] = {}
        """Of each chunk its row and what that says; None: something is pending then, or there is nothing to read."""

    def put_record(self, chunk: bytes, old: Record | None, new: Record | None) -> None:
        """The record of `chunk` was `old` and becomes `new` (None: no row); what only `old` names is freed."""
        before, after = old or NOTHING, new or NOTHING
        row = new.encode(chunk) if new is not None else None
        self.rows.append((CHUNK + chunk, row))
        is_read = after.committed is not None and not after.is_pending
        self.published[chunk] = (row, after) if is_read and row is not None else None
        if before.is_pending != after.is_pending:
            self.rows.append((PENDING + chunk, b"" if after.is_pending else None))
        if before.tombstone != after.tombstone:
            tombstone = after.tombstone
            self.rows.append((TOMBSTONE + chunk, encode_int(tombstone.version) if tombstone is not None else None))
        if old is not None:
            kept = after.positions()
            self.freed += [position for position in old.positions() if position not in kept]

    def delete_damaged(self, chunk: bytes) -> None:
        """Delete a row that cannot be read. Which blocks it named is not known: they are free once fsck has looked."""
        self.rows += [(prefix + chunk, None) for prefix in (CHUNK, PENDING, TOMBSTONE)]
        self.published[chunk] = None

    def note_request(self, request: Request) -> None:
        """Its update is published: whoever sends it again is told so."""
        if is_named(request):
            self.maxima.append((request_key(request.client, request.channel), request.sequence))

    def raise_floor(self, version: int) -> None:
        """New chunks begin above `version`."""
        self.maxima.append((FLOOR_KEY, version))

    def index_bytes(self) -> int:
        """At most this much goes into the index transaction: the rows, and a group row per block."""
        rows = sum(len(key) + (len(row) if row is not None else 0) for key, row in self.rows)
        return rows + INT_ROW_BYTES * len(self.maxima) + GROUP_ROW_BYTES * (len(self.named) + len(self.freed))


def only_deletes(changes: Sequence[Change]) -> bool:
    """Rows go, and none comes."""
    rows = [row for change in changes for _, row in change.rows]
    return bool(rows) and all(row is None for row in rows)
