"""Trees that were removed for good: detached at once, deleted in bounded transactions, resumable after a crash.

The orphans directory holds the tops of such trees. One step takes a top and at most STEP_ENTRIES of its entries: names
of files go, directories become tops themselves, and a top without entries goes. So no step is recursive, and there is
nothing to remember between two.

Does not know: why a tree went.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from ..errors import EmberError
from ..kv.types import Transaction
from ..types import Kind
from . import nodes
from .keys import (
    ORPHANS_INODE,
    decode_inode,
    entry_key,
    entry_name,
    entry_range,
    entry_value,
    pack_id,
    put_inode,
    unpack_id,
)
from .paths import Place
from .state import MetaState

STEP_ENTRIES = 256
"""Entries per transaction. Nobody else is served during a step, so it is not the most that a transaction takes."""

_ORPHANS = pack_id(ORPHANS_INODE)

log = logging.getLogger("emberline.meta")


async def detach(state: MetaState, txn: Transaction, place: Place) -> None:
    """Make the directory at `place` an orphan, with all that is in it."""
    orphan = Place(_ORPHANS, _orphan_name(place.inode), None)
    await nodes.move(state, txn, place, orphan, "")


def start_sweeper(state: MetaState) -> None:
    """Delete the orphans in the background."""
    background = state.background
    if background.sweeper is None or background.sweeper.done():
        background.sweeper = state.runtime.spawn(_sweep(state), "emberfs-orphans")


async def _sweep(state: MetaState) -> None:
    try:
        await delete_orphans(state)
    except EmberError as error:
        log.warning("deleting removed trees: %s; the garbage collection tries again", error)


async def delete_orphans(state: MetaState) -> None:
    """Delete all orphan trees. Returns when there are none, also if it was somebody else who deleted them."""
    # One at a time: two would take the same top and lose their steps to each other.
    async with state.claims.of("orphans"):
        while not state.background.stopping and await state.kv.run(lambda txn: _step(state, txn), reclaims=True):
            pass


async def _step(state: MetaState, txn: Transaction) -> bool:
    """One bounded step; False when there are no orphans."""
    begin, end = entry_range(_ORPHANS)
    tops = await txn.range(begin, end, limit=1)
    if not tops:
        return False
    top_key, top = tops[0]
    begin, end = entry_range(top[:8])
    entries = await txn.range(begin, end, limit=STEP_ENTRIES)
    rows = await txn.get_many([b"I" + entry[:8] for _, entry in entries])
    inodes = {inode.id: inode for row in rows if row is not None for inode in (decode_inode(row),)}
    rest = {inode.id: await nodes.attached(txn, inode) for inode in inodes.values() if not inode.is_dir}
    for key, entry in entries:
        txn.delete(key)
        inode = inodes.get(unpack_id(entry))
        if inode is None:
            continue  # damage, which fsck names; it must not keep the rest of the tree
        if inode.is_dir:
            name = _orphan_name(inode.id)
            txn.put(entry_key(_ORPHANS, name), entry_value(inode.id, Kind.DIRECTORY))
            put_inode(txn, inode, replace(inode, parent=ORPHANS_INODE, name=name.decode()))
        else:
            nodes.release(state, txn, inode, rest[inode.id])
            # Two names of one file may be in the same step: the second must see what the first did.
            inodes[inode.id] = replace(inode, nlink=inode.nlink - 1)
    if len(entries) < STEP_ENTRIES:
        await nodes.remove(state, txn, Place(_ORPHANS, entry_name(top_key), top))
    return True


def _orphan_name(inode: int) -> bytes:
    return b"%016x" % inode
