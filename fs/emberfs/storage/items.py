"""What a request asks of each chain: its items by chain, each of them as an update, and what becomes of all of them.

Does not know: replicas, or who may send what.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from ..engine import Action, Request, Update
from ..errors import (
    LimitExceeded,
    ProtocolError,
    SessionExpired,
    StaleChunk,
    StaleRouting,
    Unavailable,
    UpdateUnknown,
)
from ..messages import Forward, RemoveChunks, TruncateChunk, WriteChunks
from ..runtime import Runtime
from ..types import BATCH_ITEMS_MAX
from ..waiting import all_of
from .service import granule_log2_of, room_of

CHANNELS_MAX = 1 << 20
"""A client has as many as it has updates in the air."""
_ACTIONS = {action.value for action in Action}


def by_chain(chains: Sequence[int], versions: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """(chain, version that the client goes by) -> indices of its items."""
    if len(versions) != len(chains):
        raise ProtocolError("a request to a cluster names the version of each chain")
    groups: dict[tuple[int, int], list[int]] = {}
    for index, key in enumerate(zip(chains, versions, strict=True)):
        groups.setdefault(key, []).append(index)
    return groups


def name_of(request: WriteChunks | TruncateChunk | RemoveChunks, slot: int) -> Request:
    """Under which the item in `slot` is applied once. Raises ProtocolError: an index has no room for such a name, and a
    version with it could not be committed."""
    channel, sequence = request.channel, request.sequence
    if not (0 <= channel < CHANNELS_MAX and 0 <= slot < BATCH_ITEMS_MAX and 0 <= sequence < 1 << 63):
        raise ProtocolError(f"no name for an update: channel {channel}, slot {slot}, sequence {sequence}")
    return Request(request.client, channel * BATCH_ITEMS_MAX + slot, sequence)


def writes(request: WriteChunks, buffers: Sequence[memoryview]) -> list[tuple[int, Update]]:
    """(chain, update) of each item. Raises LimitExceeded."""
    action = Action.REPLACE if request.replace else Action.WRITE
    granule_log2 = granule_log2_of(request.chunk_size_bytes)
    slots = request.slots or range(len(request.chunks))
    updates = []
    for chain, chunk, offset, slot, payload in zip(
        request.chains, request.chunks, request.offsets, slots, buffers, strict=True
    ):
        if offset + len(payload) > request.chunk_size_bytes:
            raise LimitExceeded(f"a write ends at {offset + len(payload)} of a {request.chunk_size_bytes} B chunk")
        name = name_of(request, slot)
        update = Update(
            chunk, action, offset, payload, request=name, granule_log2=granule_log2, room_bytes=room_of(request)
        )
        updates.append((chain, update))
    return updates


def removals(request: RemoveChunks) -> list[tuple[int, Update]]:
    """(chain, update) of each item."""
    slots = request.slots or range(len(request.chunks))
    return [
        (chain, Update(chunk, Action.REMOVE, request=name_of(request, slot)))
        for chain, chunk, slot in zip(request.chains, request.chunks, slots, strict=True)
    ]


def forwarded(request: Forward, buffers: Sequence[memoryview]) -> list[Update]:
    """What a predecessor passes on. Raises ProtocolError."""
    if not set(request.actions) <= _ACTIONS:
        raise ProtocolError(f"unknown actions: {sorted(set(request.actions) - _ACTIONS)}")
    versions = request.chain_versions or [request.chain_version] * len(request.chunks)
    return [
        Update(
            chunk,
            Action(request.actions[index]),
            request.offsets[index],
            buffers[index],
            request.versions[index],
            versions[index],
            Request(*request.requests[index]),
            request.granules_log2[index],
            request.rooms_bytes[index] if request.rooms_bytes else 0,
        )
        for index, chunk in enumerate(request.chunks)
    ]


async def run_parts(runtime: Runtime, works: Sequence[Coroutine[Any, Any, None]], *, changes: bool = False) -> None:
    """Run what is asked of each chain side by side. Raises an error of theirs; of updates (`changes`) not one that says
    that nothing happened while something did."""
    if len(works) == 1:
        await works[0]
        return
    errors = [each for each in await all_of(runtime, works, "storage-part") if isinstance(each, Exception)]
    if not errors:
        return
    worst = next((each for each in errors if isinstance(each, UpdateUnknown)), errors[0])
    # After StaleChunk the rest of that part was done.
    is_part_done = len(errors) < len(works) or any(isinstance(each, StaleChunk) for each in errors)
    if changes and is_part_done and isinstance(worst, StaleRouting | Unavailable | SessionExpired):
        raise UpdateUnknown(f"a part was done, then: {worst}") from worst
    raise worst
