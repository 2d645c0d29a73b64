"""What a metadata server or manager asks of the server of the ordered KV (`emberfs.kv.server`).

A `version` is the server's number of a committed state. It means something to this server since its last start only;
a transaction of before conflicts.
"""

from __future__ import annotations

from typing import Literal

from .base import Message

KeyInterval = tuple[bytes, bytes]
"""[begin, end) of keys."""


class KvGet(Message):
    """Rows by key, as they were at `version`, or now. Raises Conflict if that is no longer known. -> KvValues"""

    changes_nothing = True

    keys: list[bytes]
    version: int | None = None


class KvValues(Message):
    version: int
    """What the values are of: the version that was asked for, or the newest."""
    values: list[bytes | None]
    """In the order of the keys, and maybe not of all of them: then ask for the rest. Never empty."""


class KvScan(Message):
    """Up to `limit` rows of [begin, end), as they were at `version`, or now. Raises Conflict. -> KvRows"""

    changes_nothing = True

    begin: bytes
    end: bytes
    limit: int
    reverse: bool = False
    version: int | None = None


class KvRows(Message):
    version: int
    rows: list[tuple[bytes, bytes]]
    more: bool = False
    """The reply would have become too large: there may be rows behind these, within the limit that was asked for."""


class KvCommit(Message):
    """Apply the writes, durably, if nothing that was read has changed since `version`. -> Done

    Raises Conflict, NoSpace or LimitExceeded (nothing happened), UpdateUnknown. Sent again with the same `number` it is
    applied once.
    """

    client: bytes
    channel: int
    """One commit at a time is in the air on a channel of a client."""
    number: int
    """Rises along a channel, from 1. A number proves that those before it are of no interest any more."""
    version: int | None
    """None: nothing was read."""
    keys: list[bytes]
    intervals: list[KeyInterval]
    clears: list[KeyInterval]
    """Done first."""
    rows: list[tuple[bytes, bytes | None]]
    """None deletes."""
    steps: list[tuple[bytes, list[tuple[Literal["add", "max"], int]]]]
    """Integer arithmetic on the row as it is then."""
    reclaims: bool = False


class KvForget(Message):
    """The client ends: what is remembered of its commits may go. -> Done"""

    client: bytes
