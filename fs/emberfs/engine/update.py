"""What an update does to a chunk: from the committed extent and a request to the way the next one is made.

Three ways, chosen by `plan_update`:
  fresh     the new bytes replace everything: written to a new block
  in place  an append whose first byte is on a sector boundary: written behind the committed bytes, in the same block
            (no sector with committed bytes is ever written again, so a crash cannot tear them)
  copy      every other partial write: the old bytes are read and verified, and a new block gets the merged content

A truncate keeps the block and only shortens the extent. Nothing here is durable or visible; the engine commits.

A pending version in the committed block (an append or a truncate that is prepared) is durable too: an update that
replaces it must not write over its bytes or sums, and so copies.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from ..checksum import cumulative_sums, sum_before
from .record import NO_REQUEST, Extent, Request

SECTOR_BYTES = 4096


class Action(enum.Enum):
    """What an update asks for."""

    WRITE = "write"
    """Payload at `offset`; the chunk grows if need be, and a gap before the payload reads as zero."""
    REPLACE = "replace"
    """The chunk becomes exactly the payload."""
    TRUNCATE = "truncate"
    """The chunk keeps its first `offset` bytes. Never extends."""
    REMOVE = "remove"


class Update(NamedTuple):
    """One update of one chunk."""

    chunk: bytes
    action: Action
    offset: int = 0
    payload: memoryview = memoryview(b"")
    version: int | None = None
    """The update version the chain's head gave it; None lets the engine take the next one. An update with one is always
    carried out, as other replicas do: a truncate that cuts nothing makes a version, and so does removing a tombstone.
    """
    chain_version: int = 1
    request: Request = NO_REQUEST
    granule_log2: int = 14
    """For a chunk that does not exist yet; a chunk keeps the granule it was made with."""
    room_bytes: int = 0
    """A new block has room for so many at least: the chunk is going to grow, and each block it outgrows is a copy."""


class Prepared(NamedTuple):
    """What an update made of its chunk, for replicas to compare."""

    version: int
    """0: there is no such chunk, and the update made none."""
    length: int
    crc: int
    """CRC32C of the content. 0, as the length, for a removed chunk."""


class Plan(NamedTuple):
    """How one update is carried out."""

    way: str
    """"fresh", "in place", "copy", "truncate", "remove" or "nothing"."""
    length: int
    """Of the chunk afterwards."""


def plan_update(update: Update, committed: Extent | None, pending: Extent | None, *, block_bytes: int) -> Plan:
    """Choose the way. `block_bytes`: size of the committed block, 0 without one."""
    old_length = committed.length if committed is not None else 0
    end = update.offset + len(update.payload)
    shared = committed is not None and pending is not None and pending.position == committed.position
    match update.action:
        case Action.REMOVE:
            return Plan("remove", 0)
        case Action.TRUNCATE:
            if committed is None or (update.offset >= old_length and update.version is None):
                return Plan("nothing", old_length)
            return Plan("copy" if shared else "truncate", min(update.offset, old_length))
        case Action.REPLACE:
            assert update.offset == 0
            return Plan("fresh", len(update.payload))
    if committed is None or (update.offset == 0 and end >= old_length):
        return Plan("fresh", end)
    if update.offset >= old_length and old_length % SECTOR_BYTES == 0 and end <= block_bytes and not shared:
        return Plan("in place", end)
    return Plan("copy", max(end, old_length))


def padded_payload(update: Update, *, begin: int) -> memoryview:
    """The payload with zeros before it, so that it starts at `begin` (no copy when it does already)."""
    if update.offset == begin:
        return update.payload
    return memoryview(bytes(update.offset - begin) + bytes(update.payload))


def appended_sums(sums: bytes, *, length: int, granule: int, payload: memoryview) -> bytes:
    """Sums of `length` bytes with sums `sums`, followed by `payload`."""
    if not payload:
        return sums
    whole, inside = divmod(length, granule)
    running = sum_before(sums, whole + (1 if inside else 0))
    return sums[: 4 * whole] + cumulative_sums(payload, granule=granule, offset=length, start=running)
