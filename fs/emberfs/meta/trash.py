"""The trash: what was removed, until it is put back, expires, or is emptied.

An entry of the trash is an ordinary directory entry of the trash directory, named by its id, and a row that says where
it was. Ids come from the inode ids, so the order of names is the order of removal, at one server. No path leads there.

Does not know: when expiry is looked at (see `gc`).
"""

from __future__ import annotations

from ..errors import AlreadyExists, InvalidPath, NotFound
from ..kv.types import Transaction
from ..messages import Done, InodeReply, TrashEmpty, TrashEntry, TrashList, TrashListing, TrashRestore
from ..types import TRASH_INODE, Inode
from . import nodes
from .keys import (
    Counter,
    TrashRow,
    decode_inode,
    decode_trash,
    encode_row,
    entry_key,
    get_inode,
    pack_id,
    trash_key,
)
from .namespace import make_parents
from .orphans import detach, start_sweeper
from .paths import Place, locate
from .scan import pages
from .state import NANOSECONDS, MetaState

_TRASH = pack_id(TRASH_INODE)


async def throw_away(state: MetaState, txn: Transaction, place: Place, path: str) -> str:
    """Move what is at `place` to the trash and return its id there."""
    trash_id = f"{await state.ids.take():016x}"
    await nodes.move(state, txn, place, Place(_TRASH, trash_id.encode(), None), path)
    txn.put(trash_key(trash_id), encode_row(TrashRow(path=path, deleted_ns=state.runtime.wall_ns())))
    txn.add(Counter.TRASH.value, 1)
    return trash_id


async def trash_list(state: MetaState, request: TrashList) -> TrashListing:
    """All entries of the trash, oldest first."""
    entries: list[TrashEntry] = []
    async for page in pages(state.kv, b"R"):
        txn = state.kv.begin()
        names = await txn.get_many([entry_key(_TRASH, key[1:]) for key, _ in page], snapshot=True)
        # An entry that was restored since the page was read is not in the trash any more.
        there = [(key, value, entry[:8]) for (key, value), entry in zip(page, names, strict=True) if entry is not None]
        inodes = await txn.get_many([b"I" + inode for _, _, inode in there], snapshot=True)
        for (key, value, _), inode in zip(there, inodes, strict=True):
            assert inode is not None, "an entry names a missing inode"
            row = decode_trash(value)
            entries.append(TrashEntry(key[1:].decode(), row.path, row.deleted_ns, decode_inode(inode)))
    if state.shared:  # The servers' ids are not of one sequence.
        entries.sort(key=lambda entry: entry.deleted_ns)
    return TrashListing(entries=entries)


async def trash_restore(state: MetaState, request: TrashRestore) -> InodeReply:
    """Put an entry back where it was, making directories that are gone, or at a path whose directory must exist."""

    async def work(txn: Transaction) -> Inode:
        source, row = await _entry(txn, request.id)
        path = request.path or row.path
        if not request.path:
            await make_parents(state, txn, path)
        target = await locate(txn, path, follow=False)
        if target.entry is not None:
            raise AlreadyExists("something of that name exists", path)
        await nodes.move(state, txn, source, target, path)
        _forget(txn, request.id)
        inode = await get_inode(txn, source.inode)
        assert inode is not None
        return await state.current(txn, inode)

    return InodeReply(await state.decide(work, Inode))


async def trash_empty(state: MetaState, request: TrashEmpty) -> Done:
    """Remove for good what was thrown away at least `older_than_s` ago."""
    await expire(state, older_than_s=request.older_than_s)
    await state.decide(_nothing, None)
    return Done()


async def _nothing(txn: Transaction) -> None:
    """A request that is done in steps is decided when they are done: a late copy of it then removes no more."""


async def expire(state: MetaState, *, older_than_s: float) -> None:
    """`trash_empty`, also for the background. 0 is everything."""
    now_ns = state.runtime.wall_ns()
    async for page in pages(state.kv, b"R"):
        for key, value in page:
            if state.background.stopping:
                return
            # Not by age alone: the wall clock may have been set back.
            if older_than_s > 0 and now_ns - decode_trash(value).deleted_ns < older_than_s * NANOSECONDS:
                if state.shared:  # The order is only that of each server.
                    continue
                return
            await _remove(state, key[1:].decode())


async def _remove(state: MetaState, trash_id: str) -> None:
    """Remove one entry for good. It may have been restored meanwhile."""

    async def work(txn: Transaction) -> bool:
        try:
            place, _ = await _entry(txn, trash_id)
        except NotFound:
            return False
        _forget(txn, trash_id)
        if place.entry is None:  # damage, which fsck names; it must not stop the expiry of all others
            return False
        if place.is_dir and not await nodes.is_empty(txn, place.inode):
            await detach(state, txn, place)
            return True
        await nodes.remove(state, txn, place)
        return False

    if await state.step(work, reclaims=True):
        start_sweeper(state)


async def _entry(txn: Transaction, trash_id: str) -> tuple[Place, TrashRow]:
    if len(trash_id) != 16:
        raise InvalidPath(f"a trash id is 16 hex digits: {trash_id!r}")
    row = await txn.get(trash_key(trash_id))
    if row is None:
        raise NotFound("not in the trash", trash_id)
    name = trash_id.encode()
    return Place(_TRASH, name, await txn.get(entry_key(_TRASH, name))), decode_trash(row)


def _forget(txn: Transaction, trash_id: str) -> None:
    txn.delete(trash_key(trash_id))
    txn.add(Counter.TRASH.value, -1)
