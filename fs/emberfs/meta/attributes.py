"""Mode bits, owners, times and extended attributes.

Does not know: who may do what; permissions are kept, not enforced.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import InvalidPath, LimitExceeded, NotFound
from ..kv.types import Transaction, encode_int
from ..messages import Done, GetXattrs, InodeReply, SetAttr, SetXattr, Xattrs
from ..types import NAME_BYTES_MAX, Inode
from .keys import get_inode, mtime_key, put_inode, xattr_key, xattr_range
from .paths import locate_existing
from .state import MetaState

XATTR_BYTES_MAX = 64 << 10
"""Longest value."""


async def set_attr(state: MetaState, request: SetAttr) -> InodeReply:
    """Set those attributes of what is at a path that are not None."""

    async def work(txn: Transaction) -> Inode:
        place = await locate_existing(txn, request.path, follow=request.follow)
        old = await get_inode(txn, place.inode)
        assert old is not None, "an entry names a missing inode"
        asked = {"mtime_ns": request.mtime_ns, "uid": request.uid, "gid": request.gid}
        if request.mode is not None:
            asked["mode"] = request.mode & 0o7777
        changes = {name: value for name, value in asked.items() if value is not None}
        new = replace(old, ctime_ns=state.runtime.wall_ns(), **changes)
        put_inode(txn, old, new)
        if old.is_dir and request.mtime_ns is not None:
            txn.put(mtime_key(old.id), encode_int(request.mtime_ns))
        return await state.current(txn, new)

    return InodeReply(await state.decide(work, Inode))


async def get_xattrs(state: MetaState, request: GetXattrs) -> Xattrs:
    """All extended attributes of what is at a path."""
    return await state.read(_get_xattrs, request)


async def _get_xattrs(state: MetaState, txn: Transaction, request: GetXattrs) -> Xattrs:
    place = await locate_existing(txn, request.path, follow=request.follow, snapshot=True)
    rows = await txn.range(*xattr_range(place.inode), snapshot=True)
    return Xattrs({key[9:].decode(): value for key, value in rows})


async def set_xattr(state: MetaState, request: SetXattr) -> Done:
    """Set an extended attribute, or remove it: NotFound if it is not there."""
    if not 0 < len(request.name.encode()) <= NAME_BYTES_MAX or "\0" in request.name:
        raise InvalidPath(f"the name of an attribute is 1 to {NAME_BYTES_MAX} bytes without NUL: {request.name!r}")
    value = request.value
    if value is not None and len(value) > XATTR_BYTES_MAX:
        raise LimitExceeded(f"an attribute of {len(value)} bytes, at most {XATTR_BYTES_MAX}")

    async def work(txn: Transaction) -> None:
        place = await locate_existing(txn, request.path, follow=True)
        # Read, so that the file cannot go at the same time and leave the attribute behind.
        assert await get_inode(txn, place.inode) is not None, "an entry names a missing inode"
        key = xattr_key(place.inode, request.name)
        if value is not None:
            txn.put(key, value)
        elif await txn.get(key) is None:
            raise NotFound(f"no attribute {request.name!r}", request.path)
        else:
            txn.delete(key)

    await state.decide(work, None)
    return Done()
