"""What an operator asks of the servers of a cluster, page by page: no server keeps anything between two requests."""

from __future__ import annotations

import msgspec

from .base import OPERATORS, Message


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
