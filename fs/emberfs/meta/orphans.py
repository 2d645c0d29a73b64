"""Trees that were removed for good: detached at once, deleted in bounded transactions, resumable after a crash.

The orphans directory holds the tops of such trees. One step takes a top and at most STEP_ENTRIES of its entries: names
of files go, directories become tops themselves, and a top without entries goes. So no step is recursive, and there is
nothing to remember between two.

Does not know: why a tree went.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..kv.types import Transaction
from ..types import Inode, Kind
from . import nodes
from .keys import (
    KIND_AT,
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

STEP_ENTRIES = 1000

_ORPHANS = pack_id(ORPHANS_INODE)


async def detach(state: MetaState, txn: Transaction, place: Place) -> None:
    """Make the directory at `place` an orphan, with all that is in it."""
    orphan = Place(_ORPHANS, _orphan_name(place.inode), None)
    await nodes.move(state, txn, place, orphan, "")


def start_sweeper(state: MetaState) -> None:
    """Delete the orphans in the background."""
    if state.sweeper is None or state.sweeper.done():
        state.sweeper = state.runtime.spawn(delete_orphans(state), "emberfs-orphans")


async def delete_orphans(state: MetaState) -> None:
    """Delete all orphan trees. Several may run at once; they share the work by conflicts."""
    while await state.kv.run(lambda txn: _step(state, txn), reclaims=True):
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
    inodes: dict[int, Inode] = {}
    for (key, entry), row in zip(entries, rows, strict=True):
        txn.delete(key)
        if row is None:
            continue
        # Two names of one file may be in the same step: the second must see what the first did.
        inode = inodes.get(unpack_id(entry)) or decode_inode(row)
        if entry[KIND_AT] == Kind.DIRECTORY:
            name = _orphan_name(inode.id)
            txn.put(entry_key(_ORPHANS, name), entry_value(inode.id, Kind.DIRECTORY))
            put_inode(txn, inode, replace(inode, parent=ORPHANS_INODE, name=name.decode()))
        else:
            await nodes.release(state, txn, inode)
            inodes[inode.id] = replace(inode, nlink=inode.nlink - 1)
    if len(entries) < STEP_ENTRIES:
        await nodes.remove(state, txn, Place(_ORPHANS, entry_name(top_key), top))
    return True


def _orphan_name(inode: int) -> bytes:
    return b"%016x" % inode
