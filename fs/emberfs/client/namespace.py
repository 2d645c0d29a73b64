"""Name operations as coroutines: paths in, one message, rows out."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import InvalidPath, NotFound
from ..messages import (
    Collected,
    CollectGarbage,
    GetXattrs,
    InodeReply,
    Link,
    List,
    Listing,
    Mkdir,
    Remove,
    Removed,
    Rename,
    SetAttr,
    SetXattr,
    Symlink,
    TrashEmpty,
    TrashEntry,
    TrashList,
    TrashListing,
    TrashRestore,
    Usage,
    UsageReply,
    Xattrs,
)
from ..types import Inode, Kind
from .core import Core
from .paths import normalise

LIST_PAGE_ENTRIES = 2000

Page = tuple[list[tuple[str, Inode]], str | None]


class Namespace:
    """The name operations of one `Core`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ask = core.ask

    async def page(self, path: str, after: str) -> Page:
        """Entries of a directory after the name `after`, sorted by the bytes of their names; what to go on after."""
        page = await self._ask(List(normalise(path), after, LIST_PAGE_ENTRIES), Listing)
        return page.entries, page.entries[-1][0] if page.more else None

    async def entries(self, path: str) -> list[tuple[str, Inode]]:
        """All entries of a directory."""
        found: list[tuple[str, Inode]] = []
        after: str | None = ""
        while after is not None:
            page, after = await self.page(path, after)
            found += page
        return found

    async def exists(self, path: str) -> bool:
        """Whether anything is at `path`."""
        try:
            await self._core.stat(path)
        except (NotFound, NotADirectoryError):
            return False
        return True

    async def mkdir(self, path: str, mode: int, parents: bool, exist_ok: bool) -> Inode:
        """Make a directory."""
        request = Mkdir(normalise(path), mode, parents, exist_ok, os.getuid(), os.getgid())
        return (await self._ask(request, InodeReply)).inode

    async def remove(self, path: str, recursive: bool, trash: bool, want: str) -> str:
        """Remove a file, link or directory; returns the trash id, or ""."""
        return (await self._ask(Remove(normalise(path), recursive, trash, want), Removed)).trash_id

    async def rename(self, source: str, target: str, overwrite: bool) -> None:
        """Move a file or a tree, atomically."""
        await self._core.call_meta(Rename(normalise(source), normalise(target), overwrite))

    async def link(self, source: str, target: str) -> Inode:
        """A second name for a file."""
        return (await self._ask(Link(normalise(source), normalise(target)), InodeReply)).inode

    async def symlink(self, target: str, path: str) -> Inode:
        """A symbolic link at `path` that says `target`."""
        request = Symlink(target, normalise(path), os.getuid(), os.getgid())
        return (await self._ask(request, InodeReply)).inode

    async def readlink(self, path: str) -> str:
        """What a symbolic link says."""
        inode = await self._core.stat(path, False)
        if inode.kind != Kind.SYMLINK:
            raise InvalidPath(f"not a symbolic link: {path!r}")
        return inode.target

    async def set_attributes(
        self, path: str, mode: int | None, mtime_ns: int | None, uid: int | None, gid: int | None
    ) -> Inode:
        """Change the given attributes."""
        return (await self._ask(SetAttr(normalise(path), mode, mtime_ns, uid, gid), InodeReply)).inode

    async def xattrs(self, path: str) -> dict[str, bytes]:
        """All extended attributes."""
        return (await self._ask(GetXattrs(normalise(path)), Xattrs)).values

    async def set_xattr(self, path: str, name: str, value: bytes | None) -> None:
        """Set (None: remove) one extended attribute."""
        await self._core.call_meta(SetXattr(normalise(path), name, value))

    async def trash_list(self) -> list[TrashEntry]:
        """What is in the trash, oldest first."""
        entries = (await self._ask(TrashList(), TrashListing)).entries
        return sorted(entries, key=lambda entry: (entry.deleted_ns, entry.id))

    async def trash_restore(self, id: str, path: str) -> Inode:
        """Put a trash entry back."""
        return (await self._ask(TrashRestore(id, normalise(path) if path else ""), InodeReply)).inode

    async def trash_empty(self, older_than_s: float) -> None:
        """Remove for good what is in the trash longer than that."""
        await self._core.call_meta(TrashEmpty(older_than_s))

    async def collect_garbage(self, force: bool) -> Collected:
        """Free the chunks of removed files."""
        return await self._ask(CollectGarbage(force), Collected)

    async def usage(self) -> UsageReply:
        """Counts of files and bytes."""
        return await self._ask(Usage(), UsageReply)


def page_after(path: str, after: str) -> Callable[[Core], Coroutine[Any, Any, Page]]:
    """`Namespace.page` as a call on a core."""
    return lambda core: Namespace(core).page(path, after)
