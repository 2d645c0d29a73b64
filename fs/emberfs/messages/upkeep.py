"""What an operator asks of the servers of a cluster, page by page: no server keeps anything between two requests."""

from __future__ import annotations

import msgspec

from ..meter import KindStats
from .base import EVERYBODY, OPERATORS, Message


class ScrubChunks(Message):
    """To a storage node: read chunks of a target back from the medium, and mend what is damaged. -> ChunksScrubbed

    Raises StaleRouting if the target is not there or does not serve.
    """

    may_send = OPERATORS

    chain: int
    target: bytes
    after: bytes = b""
    """Begin behind this chunk."""
    bytes_max: int = 32 << 20
    """End after the chunk that goes over this."""


class DamagedChunk(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that is not as it was written."""

    chunk: bytes
    detail: str
    repaired: bool


class ChunksScrubbed(Message):
    after: bytes | None
    """Go on behind this chunk. None: it was the last one."""
    chunks: int
    read_bytes: int
    damaged: list[DamagedChunk] = msgspec.field(default_factory=list)


class ReadRows(Message):
    """To a metadata server: rows of the metadata, as they are when it looks. -> RowsRead

    Either the values of `keys`, or up to `limit` rows of [begin, end).
    """

    may_send = OPERATORS
    changes_nothing = True

    keys: list[bytes] = msgspec.field(default_factory=list)
    begin: bytes = b""
    end: bytes = b""
    limit: int = 1000
    reverse: bool = False


class RowsRead(Message):
    values: list[bytes | None] = msgspec.field(default_factory=list)
    """In the order of the keys, and maybe not of all of them: then ask for the rest. Never empty if there are keys."""
    rows: list[tuple[bytes, bytes]] = msgspec.field(default_factory=list)
    more: bool = False
    """There may be rows behind these, within the limit that was asked for."""


class ReadMeter(Message):
    """To any server: what it has served since it began. -> MeterRead"""

    may_send = EVERYBODY
    changes_nothing = True


class MeterRead(Message):
    up_s: float
    """Seconds, by the server's clock, in which that was. Less than at the last look: it is another process."""
    kinds: dict[str, KindStats]
