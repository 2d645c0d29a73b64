"""Births and deaths: the steps inside a transaction that operations on names are made of.

Invariants:
  - An entry is only ever put under a directory whose inode row the same transaction read, and removing a directory
    deletes that row: of a create and a concurrent rmdir one runs again. Two creates in one directory do not meet,
    because the directory's time is a blind max in a row of its own.
  - A file without names whose chunks exist, or that somebody has open, keeps its row (with nlink 0) and is queued as
    garbage: who has it open goes on with it.

Does not know: paths beyond a `Place`, requests, retries.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from ..errors import InvalidPath, NotFound
from ..kv.types import Transaction
from ..types import NAME_BYTES_MAX, Chunks, Inline, Inode, Kind
from .keys import (
    Counter,
    entry_key,
    entry_range,
    entry_value,
    garbage_key,
    get_inode,
    intent_key,
    mtime_key,
    put_inode,
    session_range,
    unpack_id,
    xattr_range,
)
from .paths import Place
from .state import NANOSECONDS, MetaState


async def create(
    state: MetaState,
    txn: Transaction,
    place: Place,
    path: str,
    *,
    kind: Kind,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    inode: int = 0,
    layout: Inline | Chunks | None = None,
    length: int = 0,
    target: str = "",
    mtime_ns: int | None = None,
) -> Inode:
    """A new inode, named by `place`. `inode` is its id if reserved. Overwrites the entry, not what that named."""
    now_ns = state.runtime.wall_ns()
    await enter(txn, place, path, now_ns=now_ns)
    new = Inode(
        id=inode or await state.ids.take(),
        kind=kind,
        mode=mode & 0o7777,
        nlink=1,
        length=length,
        mtime_ns=now_ns if mtime_ns is None else mtime_ns,
        ctime_ns=now_ns,
        uid=uid,
        gid=gid,
        layout=layout,
        parent=unpack_id(place.parent) if kind == Kind.DIRECTORY else 0,
        name=place.name.decode() if kind == Kind.DIRECTORY else "",
        target=target,
    )
    put_inode(txn, None, new)
    txn.put(entry_key(place.parent, place.name), entry_value(new.id, kind))
    return new


async def enter(txn: Transaction, place: Place, path: str, *, now_ns: int) -> None:
    """Make sure that an entry may be put at `place`. Raises InvalidPath, or NotFound if the directory is gone."""
    if not place.parent:
        raise InvalidPath("the root directory cannot be replaced")
    if place.name in (b".", b"..") or b"\0" in place.name or len(place.name) > NAME_BYTES_MAX:
        raise InvalidPath(f"not a name: {place.name!r} in {path!r}")
    parent = unpack_id(place.parent)
    if await get_inode(txn, parent) is None:
        raise NotFound("the directory was removed", path)
    txn.max(mtime_key(parent), now_ns)


async def move(state: MetaState, txn: Transaction, source: Place, target: Place, path: str) -> None:
    """Name what is at `source` by `target` instead. Whatever `target` named must have been dealt with."""
    assert source.entry is not None
    now_ns = state.runtime.wall_ns()
    await enter(txn, target, path, now_ns=now_ns)
    txn.delete(entry_key(source.parent, source.name))
    txn.max(mtime_key(unpack_id(source.parent)), now_ns)
    txn.put(entry_key(target.parent, target.name), source.entry)
    if source.is_dir:
        old = await get_inode(txn, source.inode)
        assert old is not None
        put_inode(txn, old, replace(old, parent=unpack_id(target.parent), name=target.name.decode(), ctime_ns=now_ns))


async def is_empty(txn: Transaction, directory: int) -> bool:
    """Whether a directory has no entries."""
    begin, end = entry_range(entry_value(directory, Kind.DIRECTORY)[:8])
    return not await txn.range(begin, end, limit=1)


class Attached(NamedTuple):
    """What else there is of an inode that may die."""

    is_open: bool
    """Some session has it open for writing."""
    xattrs: list[bytes]
    """Keys of its extended attributes."""


async def attached(txn: Transaction, inode: Inode) -> Attached:
    """Read it before the transaction writes much: a range read has to look through all writes of its transaction."""
    sessions = [] if inode.is_dir else await txn.range(*session_range(inode.id), limit=1)
    return Attached(bool(sessions), [key for key, _ in await txn.range(*xattr_range(inode.id))])


async def remove(state: MetaState, txn: Transaction, place: Place) -> None:
    """Remove a file's name, or an empty directory, for good."""
    inode = await get_inode(txn, place.inode)
    assert inode is not None, "an entry names a missing inode"
    rest = await attached(txn, inode)
    txn.delete(entry_key(place.parent, place.name))
    txn.max(mtime_key(unpack_id(place.parent)), state.runtime.wall_ns())
    release(state, txn, inode, rest)


def release(state: MetaState, txn: Transaction, inode: Inode, rest: Attached) -> None:
    """One name of `inode` went. A file's last name leaves it to the garbage collection, see above."""
    if inode.is_dir:
        bury(txn, inode, rest)
        return
    now_ns = state.runtime.wall_ns()
    unnamed = replace(inode, nlink=inode.nlink - 1, ctime_ns=now_ns)
    if unnamed.nlink:
        put_inode(txn, inode, unnamed)
    elif rest.is_open or isinstance(inode.layout, Chunks):
        put_inode(txn, inode, unnamed)
        due_ns = now_ns + int(state.config.gc_delay_s * NANOSECONDS)
        txn.put(garbage_key(due_ns, inode.id), b"")
        txn.add(Counter.GARBAGE.value, 1)
    else:
        bury(txn, inode, rest)


def bury(txn: Transaction, inode: Inode, rest: Attached) -> None:
    """Delete an inode and all rows about it. Its chunks must be gone, and no session have it open."""
    assert not rest.is_open
    put_inode(txn, inode, None)
    txn.delete(mtime_key(inode.id) if inode.is_dir else intent_key(inode.id))
    for key in rest.xattrs:
        txn.delete(key)
