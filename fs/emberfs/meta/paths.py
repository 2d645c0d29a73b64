"""From a path to a place: the walk along directory entries, with symbolic links.

The walk is on the way of every call, so the common one (no link) is a loop of one `get` per component that joins bytes
and decodes nothing: an entry carries the id and kind of what it names. Only a link starts the slower general walk.

Invariants: no directory is the child of two, so ".." in a link's target is the step back along the walk.
Does not know: inode rows, except those of links.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ..errors import InvalidPath, NotADirectory, NotFound
from ..kv.types import Transaction
from ..types import NAME_BYTES_MAX, PATH_BYTES_MAX, ROOT_INODE, SYMLINK_DEPTH_MAX, Kind
from .keys import KIND_AT, check_entry, entry_key, entry_value, get_inode, pack_id, unpack_id

_ROOT = pack_id(ROOT_INODE)
# Plain integers: comparing with a member of the enum costs as much as a step of the walk.
_DIRECTORY = int(Kind.DIRECTORY)
_SYMLINK = int(Kind.SYMLINK)


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a path leads: a name in a directory, and what is there."""

    parent: bytes
    """The directory's packed id; empty for the root, which nothing names."""
    name: bytes
    entry: bytes | None
    """The entry's value, None if there is nothing of that name."""

    @property
    def inode(self) -> int:
        """The id of what is there."""
        assert self.entry is not None
        return unpack_id(self.entry)

    @property
    def is_dir(self) -> bool:
        return self.entry is not None and self.entry[KIND_AT] == _DIRECTORY

    @property
    def is_symlink(self) -> bool:
        return self.entry is not None and self.entry[KIND_AT] == _SYMLINK


_ROOT_PLACE = Place(b"", b"", entry_value(ROOT_INODE, Kind.DIRECTORY))


def split_path(path: str) -> list[bytes]:
    """The names of an absolute, normalised path. Raises InvalidPath for anything else, or a name that is too long."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidPath(f"a path must be valid Unicode: {path!r}") from None
    names = encoded.split(b"/")
    if names.pop(0) or b"" in names or not names:
        raise InvalidPath(f"not an absolute, normalised path: {path!r}")
    if len(encoded) > NAME_BYTES_MAX:
        if len(encoded) > PATH_BYTES_MAX:
            raise InvalidPath(f"a path of {len(encoded)} bytes, at most {PATH_BYTES_MAX}")
        if max(map(len, names)) > NAME_BYTES_MAX:
            raise InvalidPath(f"a name in a path is at most {NAME_BYTES_MAX} bytes: {path!r}")
    return names


async def locate(
    txn: Transaction, path: str, *, follow: bool, snapshot: bool = False, walked: list[bytes] | None = None
) -> Place:
    """The place of `path`. All but the last name must exist; `follow` says whether a link at the end is followed.

    `walked` gets the keys that were read, and stays empty when there were links (or nothing to read) on the way.
    `snapshot` adds no read conflicts: for requests that only read. Raises NotFound, NotADirectory, InvalidPath.
    """
    if path == "/":
        return _ROOT_PLACE
    names = split_path(path)
    last = names.pop()
    parent = _ROOT
    keys = []
    for name in names:
        key = b"D" + parent + name
        keys.append(key)
        entry = await txn.get(key, snapshot=snapshot)
        if entry is None:
            raise NotFound("no such file or directory", path)
        check_entry(entry)
        kind = entry[KIND_AT]
        if kind != _DIRECTORY:
            if kind == _SYMLINK:
                break
            raise NotADirectory("a component of the path is not a directory", path)
        parent = entry[:8]
    else:
        key = b"D" + parent + last
        entry = await txn.get(key, snapshot=snapshot)
        if entry is not None:
            check_entry(entry)
        if not follow or entry is None or entry[KIND_AT] != _SYMLINK:
            if walked is not None:
                walked += [*keys, key]
            return Place(parent, last, entry)
    return await _locate_along_links(txn, [*names, last], path, follow=follow, snapshot=snapshot)


async def _locate_along_links(
    txn: Transaction, names: list[bytes], path: str, *, follow: bool, snapshot: bool
) -> Place:
    """`locate` in general."""
    pending = deque(names)
    walked = [_ROOT_PLACE]
    links = 0
    while pending:
        name = pending.popleft()
        if name == b"..":  # of a link's target: no entry has that name
            if len(walked) > 1:
                walked.pop()
            continue
        parent = pack_id(walked[-1].inode)
        place = Place(parent, name, await txn.get(entry_key(parent, name), snapshot=snapshot))
        if place.entry is not None:
            check_entry(place.entry)
        if place.is_symlink and (follow or pending):
            links += 1
            if links > SYMLINK_DEPTH_MAX:
                raise InvalidPath(f"more than {SYMLINK_DEPTH_MAX} symbolic links on the way: {path!r}")
            link = await get_inode(txn, place.inode, snapshot=snapshot)
            assert link is not None
            target = link.target.encode()
            if target.startswith(b"/"):
                del walked[1:]
            pending.extendleft(name for name in reversed(target.split(b"/")) if name not in (b"", b"."))
        elif not pending:
            return place
        elif place.entry is None:
            raise NotFound("no such file or directory", path)
        elif not place.is_dir:
            raise NotADirectory("a component of the path is not a directory", path)
        else:
            walked.append(place)
    return walked[-1]


async def locate_existing(txn: Transaction, path: str, *, follow: bool, snapshot: bool = False) -> Place:
    """`locate` something that must be there."""
    place = await locate(txn, path, follow=follow, snapshot=snapshot)
    if place.entry is None:
        raise NotFound("no such file or directory", path)
    return place


async def locate_new(txn: Transaction, path: str, *, follow: bool) -> Place:
    """`locate` for something that is to be made: NotFound names the first directory that is missing."""
    try:
        return await locate(txn, path, follow=follow)
    except NotFound:
        names = split_path(path)
        for depth in range(1, len(names)):
            above = "/" + b"/".join(names[:depth]).decode()
            try:
                is_missing = (await locate(txn, above, follow=True)).entry is None
            except NotFound:  # A link on the way leads nowhere.
                is_missing = True
            if is_missing:
                raise NotFound("the parent directory is missing", above) from None
        raise
