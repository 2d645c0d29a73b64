"""What clients ask of chunk storage."""

from __future__ import annotations

import msgspec

from .base import EVERYBODY, READERS, WRITERS, Message


class ReadChunks(Message):
    """Read [offset, offset+length) of each chunk into the buffer of its index. Parallel lists, no object per item."""

    may_send = READERS
    takes_turns = True
    changes_nothing = True
    fills_buffers = True

    chains: list[int]
    chunks: list[bytes]
    offsets: list[int]
    chain_versions: list[int] = msgspec.field(default_factory=list)
    """The version of each chain that the client goes by; empty on a store without replication."""
    relaxed: bool = False
    """Take what this replica has committed, even if a newer version may be committed at the tail."""
    uncommitted: bool = False
    """Take what this replica has written, even if it is never committed."""
    grant: bytes = b""
    """Of a reader or writer: what it reads under."""

    @property
    def local(self) -> bool | None:
        """None: the newest committed bytes. Else what this replica has: pending (True), or committed (False)."""
        return True if self.uncommitted else False if self.relaxed else None


class ChunksRead(Message):
    """Bytes read per item: fewer than asked at the chunk's end, 0 for a chunk that does not exist (a hole)."""

    counts: list[int]
    errors: dict[int, tuple[str, str, int]] = msgspec.field(default_factory=dict)
    """Per failed item: (kind, message, offset). Kind "corrupt"; the item's buffer holds nothing to rely on."""


class WriteChunks(Message):
    """Write the buffer of the same index at `offset` of each chunk: each chunk write is atomic, the batch is not."""

    may_send = WRITERS
    takes_turns = True

    client: bytes
    channel: int
    sequence: int
    """One sequence number for the batch; (client, channel, sequence, chunk) names a write for ever: a retry is not
    applied twice."""
    chains: list[int]
    chunks: list[bytes]
    offsets: list[int]
    chunk_size_bytes: int
    replace: bool = False
    """The chunk becomes exactly the payload (offset 0): what was there is gone."""
    chain_versions: list[int] = msgspec.field(default_factory=list)
    slots: list[int] = msgspec.field(default_factory=list)
    """Place of each item in the whole batch, when this message is one share of it: item i is request
    (client, channel * BATCH_ITEMS_MAX + slot i, sequence). Empty: 0, 1, 2 and so on."""
    whole_chunks: bool = False
    """The chunks are going to be full: a new block has room for all of `chunk_size_bytes`."""
    grants: list[bytes] = msgspec.field(default_factory=list)
    """Of a writer: what it writes under, all of them together."""


class TruncateChunk(Message):
    """Cut a chunk to `length` bytes (never extends; an absent chunk stays absent).

    With a `version` nothing happens, and StaleChunk is raised, if another one is committed.
    """

    may_send = EVERYBODY
    takes_turns = True

    chain: int
    chunk: bytes
    length: int
    client: bytes = b""
    channel: int = 0
    sequence: int = 0
    chain_version: int = 0
    version: int = 0
    """The committed version that the sender has seen. 0: whatever it is."""


class RemoveChunks(Message):
    """Remove chunks; absent ones are fine.

    With `versions` those of another committed version stay, and StaleChunk is raised once the others are gone.
    """

    may_send = EVERYBODY
    takes_turns = True

    chains: list[int]
    chunks: list[bytes]
    client: bytes = b""
    channel: int = 0
    sequence: int = 0
    chain_versions: list[int] = msgspec.field(default_factory=list)
    slots: list[int] = msgspec.field(default_factory=list)
    """Place of each item in the whole batch, when this message is one share of it: item i is request
    (client, channel * BATCH_ITEMS_MAX + slot i, sequence). Empty: 0, 1, 2 and so on."""

    versions: list[int] = msgspec.field(default_factory=list)
    """The committed version of each that the sender has seen; 0: whatever it is. Empty: for all of them."""


class ListChunks(Message):
    """Committed chunks of [begin, end) on one chain, in order, at most `limit`."""

    may_send = EVERYBODY
    takes_turns = True
    changes_nothing = True

    chain: int
    begin: bytes
    end: bytes
    limit: int = 1000
    reverse: bool = False
    chain_version: int = 0


class ChunkList(Message):
    """(chunk, committed length) pairs."""

    chunks: list[tuple[bytes, int]]
    versions: list[int] = msgspec.field(default_factory=list)
    """The committed version of each; 0: its row is damaged. Empty on a store without replication."""
