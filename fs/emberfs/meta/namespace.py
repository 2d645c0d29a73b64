"""Names: stat, list, mkdir, links and rename.

Invariants: rename is one transaction, also of a whole tree, and a directory never becomes its own descendant: the walk
up from the target is read by the transaction, so two renames that would make a cycle together conflict.
Does not know: what is in a file.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import AlreadyExists, DirectoryNotEmpty, InvalidPath, IsADirectory, NotADirectory, NotFound
from ..kv.types import RANGE_ROWS_MAX, Transaction, decode_int
from ..messages import Done, InodeReply, Link, List, Listing, Mkdir, Rename, Stat, Symlink
from ..types import NAME_BYTES_MAX, PATH_BYTES_MAX, ROOT_INODE, Inode, Kind
from . import nodes
from .keys import (
    KIND_AT,
    check_entry,
    decode_inode,
    entry_key,
    entry_name,
    entry_range,
    get_inode,
    length_key,
    pack_id,
    put_inode,
    unpack_id,
)
from .paths import Place, locate, locate_existing, locate_new, split_path
from .state import MetaState
from .truncate import finish


async def stat(state: MetaState, request: Stat) -> InodeReply:
    """What is at a path."""
    if request.follow and not request.inode and not state.hints and (known := state.stats.get(request.path)):
        return known
    if request.inode:
        # A writer asks this after its file was truncated: what it writes next must not be cut by that any more.
        await finish(state, request.inode)
    return await state.read(_stat, request)


async def _stat(state: MetaState, txn: Transaction, request: Stat) -> InodeReply:
    if request.inode:
        known = await get_inode(txn, request.inode, snapshot=True)
        if known is None:
            raise NotFound("the file was removed")
        return InodeReply(await state.current(txn, known))
    stamp = state.kv.stamp()
    walked: list[bytes] = []
    place = await locate(txn, request.path, follow=request.follow, snapshot=True, walked=walked)
    if place.entry is None:
        raise NotFound("no such file or directory", request.path)
    packed = place.entry[:8]
    row = await txn.get(b"I" + packed, snapshot=True)
    assert row is not None, "an entry names a missing inode"
    inode = decode_inode(row)
    # The common case, a file without a hint, is spared a coroutine.
    reply = InodeReply(await state.current(txn, inode) if place.is_dir or state.hints or state.shared else inode)
    if request.follow and walked and not state.hints:
        state.stats.put(request.path, stamp, (*walked, b"I" + packed, b"M" + packed, b"E" + packed), reply)
    return reply


async def list_directory(state: MetaState, request: List) -> Listing:
    """A page of a directory."""
    return await state.read(_list, request)


async def _list(state: MetaState, txn: Transaction, request: List) -> Listing:
    place = await locate_existing(txn, request.path, follow=True, snapshot=True)
    if not place.is_dir:
        raise NotADirectory("not a directory", request.path)
    parent = pack_id(place.inode)
    begin, end = entry_range(parent)
    if request.after:
        begin = entry_key(parent, request.after.encode()) + b"\0"
    limit = max(1, min(request.limit, RANGE_ROWS_MAX - 1))
    rows = await txn.range(begin, end, limit=limit + 1, snapshot=True)
    more = len(rows) > limit
    del rows[limit:]
    for _, entry in rows:
        check_entry(entry)
    inodes = await txn.get_many([b"I" + entry[:8] for _, entry in rows], snapshot=True)
    directories = [index for index, (_, entry) in enumerate(rows) if entry[KIND_AT] == Kind.DIRECTORY]
    times = await txn.get_many([b"M" + rows[index][1][:8] for index in directories], snapshot=True)
    entries: list[tuple[str, Inode]] = []
    for (key, _), row in zip(rows, inodes, strict=True):
        assert row is not None, "an entry names a missing inode"
        entries.append((entry_name(key).decode(), decode_inode(row)))
    for index, time in zip(directories, times, strict=True):
        if time is not None:
            name, inode = entries[index]
            entries[index] = (name, replace(inode, mtime_ns=decode_int(time)))
    if state.hints:
        entries = [(name, state.hinted(inode)) for name, inode in entries]
    if state.shared:
        entries = await _measured(txn, entries)
    return Listing(entries=entries, more=more)


async def _measured(txn: Transaction, entries: list[tuple[str, Inode]]) -> list[tuple[str, Inode]]:
    """`MetaState.measured` of a whole page at once."""
    ends = await txn.get_many([length_key(inode.id) for _, inode in entries], snapshot=True)
    return [
        (name, inode if end is None else replace(inode, length=max(inode.length, decode_int(end))))
        for (name, inode), end in zip(entries, ends, strict=True)
    ]


async def mkdir(state: MetaState, request: Mkdir) -> InodeReply:
    """Make a directory; with `parents` also those on the way, all in one transaction."""

    async def work(txn: Transaction) -> InodeReply:
        if request.parents:
            await make_parents(state, txn, request.path, mode=request.mode, uid=request.uid, gid=request.gid)
        place = await locate_new(txn, request.path, follow=False)
        if place.is_symlink and request.exist_ok:
            place = await locate(txn, request.path, follow=True)
        if place.entry is None:
            inode = await nodes.create(
                state,
                txn,
                place,
                request.path,
                kind=Kind.DIRECTORY,
                mode=request.mode,
                uid=request.uid,
                gid=request.gid,
            )
        elif place.is_dir and request.exist_ok:
            inode = await _inode_at(txn, place)
        else:
            raise AlreadyExists("something of that name exists", request.path)
        return InodeReply(await state.current(txn, inode))

    return await state.decide(work, InodeReply)


async def make_parents(
    state: MetaState, txn: Transaction, path: str, *, mode: int = 0o755, uid: int = 0, gid: int = 0
) -> None:
    """Make the directories above `path` that are missing. NotADirectory if something else is in the way."""
    names = [] if path == "/" else split_path(path)
    for depth in range(1, len(names)):
        above = "/" + b"/".join(names[:depth]).decode()
        place = await locate(txn, above, follow=True)
        if place.entry is None:
            await nodes.create(state, txn, place, above, kind=Kind.DIRECTORY, mode=mode, uid=uid, gid=gid)
        elif not place.is_dir:
            raise NotADirectory("a component of the path is not a directory", above)


async def link(state: MetaState, request: Link) -> InodeReply:
    """A second name for a file."""

    async def work(txn: Transaction) -> InodeReply:
        source = await locate_existing(txn, request.source, follow=False)
        if source.is_dir:
            raise IsADirectory("a directory has one name only", request.source)
        target = await _locate_free(txn, request.target)
        now_ns = state.runtime.wall_ns()
        await nodes.enter(txn, target, request.target, now_ns=now_ns)
        old = await _inode_at(txn, source)
        new = replace(old, nlink=old.nlink + 1, ctime_ns=now_ns)
        put_inode(txn, old, new)
        assert source.entry is not None
        txn.put(entry_key(target.parent, target.name), source.entry)
        return InodeReply(await state.measured(txn, new))

    return await state.decide(work, InodeReply)


async def symlink(state: MetaState, request: Symlink) -> InodeReply:
    """A symbolic link. What it points to need not exist; a relative target counts from the link's directory."""
    length = len(request.target.encode())
    if not 0 < length <= PATH_BYTES_MAX or "\0" in request.target:
        raise InvalidPath(f"the target of a link is 1 to {PATH_BYTES_MAX} bytes without NUL")
    if max(len(name.encode()) for name in request.target.split("/")) > NAME_BYTES_MAX:
        raise InvalidPath(f"a name in the target of a link is at most {NAME_BYTES_MAX} bytes: {request.target!r}")

    async def work(txn: Transaction) -> InodeReply:
        place = await _locate_free(txn, request.path)
        inode = await nodes.create(
            state,
            txn,
            place,
            request.path,
            kind=Kind.SYMLINK,
            mode=0o777,
            uid=request.uid,
            gid=request.gid,
            length=length,
            target=request.target,
        )
        return InodeReply(inode)

    return await state.decide(work, InodeReply)


async def rename(state: MetaState, request: Rename) -> Done:
    """Move a file or a tree. Two names of the same file are left as they are, as POSIX has it."""

    async def work(txn: Transaction) -> None:
        source = await locate_existing(txn, request.source, follow=False)
        target = await locate_new(txn, request.target, follow=False)
        if not source.parent:
            raise InvalidPath("the root directory cannot be renamed")
        if target.entry is not None:
            if target.inode == source.inode:
                return
            if not request.overwrite:
                raise AlreadyExists("something of that name exists", request.target)
        if source.is_dir:
            await _refuse_cycle(txn, source.inode, target, request)
        if target.entry is not None:
            await _clear_target(state, txn, source, target, request.target)
        await nodes.move(state, txn, source, target, request.target)

    await state.decide(work, None)
    return Done()


async def _refuse_cycle(txn: Transaction, directory: int, target: Place, request: Rename) -> None:
    """Raises InvalidPath if `target` lies in the tree of `directory`."""
    above = unpack_id(target.parent) if target.parent else ROOT_INODE
    while above != ROOT_INODE:
        if above == directory:
            raise InvalidPath(f"cannot move {request.source!r} into its own subtree {request.target!r}")
        inode = await get_inode(txn, above)
        if inode is None:
            raise NotFound("the directory was removed", request.target)
        above = inode.parent


async def _clear_target(state: MetaState, txn: Transaction, source: Place, target: Place, path: str) -> None:
    """Remove what a rename replaces: a file by a file, an empty directory by a directory."""
    if target.is_dir:
        if not source.is_dir:
            raise IsADirectory("a file cannot replace a directory", path)
        if not target.parent or not await nodes.is_empty(txn, target.inode):
            raise DirectoryNotEmpty("the directory is not empty", path)
    elif source.is_dir:
        raise NotADirectory("a directory cannot replace a file", path)
    await nodes.remove(state, txn, target)


async def _locate_free(txn: Transaction, path: str) -> Place:
    place = await locate_new(txn, path, follow=False)
    if place.entry is not None:
        raise AlreadyExists("something of that name exists", path)
    return place


async def _inode_at(txn: Transaction, place: Place) -> Inode:
    inode = await get_inode(txn, place.inode)
    assert inode is not None, "an entry names a missing inode"
    return inode
