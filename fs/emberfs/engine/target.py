"""Who a target is, and its settings.

Does not know: what its chunks are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from ..errors import StoreFormat
from ..kv.types import Transaction
from ..runtime import Runtime
from .rows import IDENTITY_KEY

ENGINE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one target; may differ between targets."""

    reserve_bytes: int = 64 << 20
    """New blocks are refused (NoSpace) when the disk has less than this left."""
    keeps_tombstones: bool = False
    """A removed chunk leaves a row with its version, which replicas need to agree what is newer."""
    target: bytes | None = None
    """The id (16 bytes) that a new target gets, and that one which is there must have. None: a random one, or any."""

    extents_bytes_max: int = 64 << 20
    """Memory for where chunks lie, so that a read of one that was read before needs no look at the index."""

    def __post_init__(self) -> None:
        if self.reserve_bytes < 0:
            raise ValueError(f"reserve_bytes must not be negative: {self.reserve_bytes}")


class TargetIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Who this target is: written once, when its index is made."""

    format: int
    target: bytes
    """16 random bytes."""
    generation: bytes = b""
    """16 random bytes, drawn when the index was made: another generation means another content."""


async def identify(txn: Transaction, *, runtime: Runtime, target: bytes | None) -> TargetIdentity:
    """The identity row, made when there is none; a generation is added where it is missing. Raises StoreFormat."""
    row = await txn.get(IDENTITY_KEY)
    if row is None:
        identity = TargetIdentity(ENGINE_FORMAT, target or runtime.random_bytes(16))
    else:
        # The format first and alone: what else a newer one says is not known.
        (newest, *_) = msgspec.msgpack.decode(row)
        if newest > ENGINE_FORMAT:
            raise StoreFormat(f"target format {newest} is newer than {ENGINE_FORMAT}; upgrade emberline")
        identity = msgspec.msgpack.decode(row, type=TargetIdentity)
    if not identity.generation:
        identity = msgspec.structs.replace(identity, generation=runtime.random_bytes(16))
        txn.put(IDENTITY_KEY, msgspec.msgpack.encode(identity))
    return identity


class TargetSpace(NamedTuple):
    """What a target takes, and what new data may, in bytes."""

    used_bytes: int
    """In blocks of chunks."""
    free_bytes: int
    """What the disk has left above the reserve; 0 if it does not answer. Targets of one disk share it."""
    idle_bytes: int
    """What free blocks take of the disk: new data has it, too."""


class EngineCounters(msgspec.Struct):
    """What the engine did since it was opened; for benchmarks and metrics."""

    flushes: int = 0
    updates: int = 0
    payload_bytes: int = 0
    """Bytes callers asked to write."""
    block_bytes: int = 0
    """Bytes written to block files for it."""
