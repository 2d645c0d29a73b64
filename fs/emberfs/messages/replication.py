"""What storage nodes say to each other about one chain. See docs/replication.md for the protocol.

Every request names the chain version it belongs to; a node that is in another one refuses it with `StaleRouting`.

What goes to the successor and changes something is numbered by its sender, from 1 in each chain version (`number`), and
names the sender's oldest call that has not ended (`oldest`): the receiver takes each number once, refuses late copies
of what ended, and gives up what the sender has given up.
"""

from __future__ import annotations

import msgspec

from .base import Message


class Forward(Message):
    """Updates on their way from a node to its successor. Buffer i is the payload of item i (may be empty).

    Answered by `Forwarded` once the last serving target has committed and every node from the receiver on has too.
    """

    chain: int
    chain_version: int
    number: int
    oldest: int
    chunks: list[bytes]
    actions: list[str]
    """Values of `Action`: see `engine.update`."""
    offsets: list[int]
    versions: list[int]
    """Given by the head. The receiver's committed version is one less, or the item is a full replacement."""
    requests: list[tuple[bytes, int, int]]
    """(client, channel, sequence) of each item."""
    granules_log2: list[int]
    vouched: bool = False
    """The sender, and all before it, hold these updates durably already: no `Vouch` will follow."""
    whole: bool = False
    """Each item is all of its chunk (a replacement or a removal) and goes over whatever the receiver has."""
    chain_versions: list[int] = msgspec.field(default_factory=list)
    """Under which each item was first prepared; empty: all under `chain_version`."""
    rooms_bytes: list[int] = msgspec.field(default_factory=list)
    """What a new block for each item has room for, at least; empty: no more than it needs."""


class Forwarded(Message):
    """What each item's chunk is now, for the sender to compare: length and CRC32C of the content (0, 0: removed)."""

    lengths: list[int]
    crcs: list[int]


class Vouch(Message):
    """The sender and all before it hold the updates of Forward `number` durably: the tail may commit them."""

    chain: int
    chain_version: int
    number: int
    abandoned: bool = False
    """The other way round: the sender could not prepare it, so nobody will commit it, and the receiver drops it."""


class Settled(Message):
    """The sender has brought the receiver all it held pending since older chain versions.

    What the receiver still holds from them was never vouched for, so nobody has committed it: the receiver drops it.
    """

    chain: int
    chain_version: int
    number: int
    oldest: int
    stuck: list[bytes] = msgspec.field(default_factory=list)
    """Chunks that could not be brought yet: of these the receiver drops nothing."""


class AskCommitted(Message):
    """A reader met pending versions and asks the last serving target which are committed."""

    changes_nothing = True

    chain: int
    chain_version: int
    chunks: list[bytes]


class CommittedVersions(Message):
    """Per chunk the committed version; 0: none."""

    versions: list[int]


class ListVersions(Message):
    """What the syncing successor has, in chunk order after `after`, at most `limit`."""

    changes_nothing = True

    chain: int
    chain_version: int
    after: bytes
    limit: int


class ChunkVersion(msgspec.Struct, frozen=True, array_like=True):
    """One chunk row as replicas compare it."""

    chunk: bytes
    version: int
    chain_version: int
    length: int
    crc: int
    """CRC32C of the content."""
    pending: bool = False
    removed: bool = False
    """A tombstone: the chunk was removed by `version`."""
    damaged: bool = False
    """The row itself cannot be read: always replaced."""


class ChunkVersions(Message):
    chunks: list[ChunkVersion]
    floor: int
    """New chunks of this replica begin above this version."""


class Install(Message):
    """Make these chunks of the syncing successor exactly this. Buffer i is the content of item i."""

    chain: int
    chain_version: int
    number: int
    oldest: int
    chunks: list[ChunkVersion]
    requests: list[tuple[bytes, int, int]]
    granules_log2: list[int]


class Drop(Message):
    """The predecessor has no row at all of these chunks: the syncing successor forgets them."""

    chain: int
    chain_version: int
    number: int
    oldest: int
    chunks: list[bytes]


class InstallRequests(Message):
    """Last sequence per (client, channel), so that a retry is not applied twice by the new replica."""

    chain: int
    chain_version: int
    number: int
    oldest: int
    rows: list[tuple[bytes, int, int]]
    floor: int


class SyncDone(Message):
    """The successor has everything: it reports itself up to date under this chain version."""

    chain: int
    chain_version: int
    number: int
    oldest: int
