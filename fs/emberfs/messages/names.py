"""What clients ask of the metadata service.

Paths are absolute, normalised by the client: "/" or "/a/b", no "." or "..", no doubled slash.
"""

from __future__ import annotations

import msgspec

from ..types import Chunks, Inode
from .base import EVERYBODY, Message


class Stat(Message):
    may_send = EVERYBODY
    changes_nothing = True

    path: str
    follow: bool = True
    inode: int = 0
    """Used instead of `path` when not 0: an open handle follows its file through renames and unlink."""


class InodeReply(Message):
    inode: Inode


class Open(Message):
    """Open for writing: opens a session, so that the length survives a crash of the writer."""

    may_send = EVERYBODY

    path: str
    create: bool
    exclusive: bool
    truncate: bool
    mode: int
    chunk_size_bytes: int
    uid: int = 0
    gid: int = 0
    append: bool = False
    """An append session: at most one per file at a time, a second one raises Conflict."""


class Opened(Message):
    inode: Inode
    session: bytes


class CloseSession(Message):
    """End a session. Carries the last length report, durable when this returns."""

    may_send = EVERYBODY

    session: bytes
    inode: int
    end: int
    """The largest acknowledged end offset of this session; 0 when nothing was written."""
    truncate_generation: int


class ReportLength(Message):
    """The file now reaches at least `end`. Raises StaleChunk if `truncate_generation` is not the file's own."""

    may_send = EVERYBODY

    session: bytes
    inode: int
    end: int
    truncate_generation: int
    durable: bool


class Reserve(Message):
    """A new inode id and a layout, named by nobody yet: `put` writes its chunks, then commits them."""

    may_send = EVERYBODY

    chunk_size_bytes: int


class Reserved(Message):
    inode: int
    layout: Chunks


class CommitPut(Message):
    """Make `inode` (reserved, or 0 with inline `data`) the file at `path`, in one transaction."""

    may_send = EVERYBODY

    path: str
    inode: int
    layout: Chunks | None
    data: bytes
    length: int
    mode: int
    overwrite: bool
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None
    """None: now."""


class Abandon(Message):
    """A reserved inode will not be committed: its chunks may go now."""

    may_send = EVERYBODY

    inode: int
    layout: Chunks


class WriteInline(Message):
    """Write `data` at `offset` of a file that is inline and stays within INLINE_BYTES_MAX; else raises StaleChunk."""

    may_send = EVERYBODY

    session: bytes
    inode: int
    offset: int
    data: bytes


class Promote(Message):
    """A chunk layout for a file that outgrows its inode row. Changes nothing yet: see AdoptChunks. -> Promoted"""

    may_send = EVERYBODY

    inode: int
    chunk_size_bytes: int
    session: bytes


class Promoted(Message):
    """`inode` is the row as it is now (inline data and revision included)."""

    inode: Inode
    layout: Chunks


class AdoptChunks(Message):
    """The inline file `inode` becomes `layout`, whose chunks the client wrote. StaleChunk if it changed meanwhile."""

    may_send = EVERYBODY

    session: bytes
    inode: int
    revision: int
    layout: Chunks
    length: int


class DropTail(Message):
    """A write of this session failed half way, and none of its is under way: what it left past the file's end goes.

    Of an inline file: the chunks of a Promote of this session, and its grant.
    """

    may_send = EVERYBODY

    session: bytes
    inode: int


class Truncate(Message):
    """Set the length: bytes past it are gone, bytes up to it read as zero."""

    may_send = EVERYBODY

    path: str
    inode: int
    """Used instead of `path` when not 0."""
    length: int


class SetAttr(Message):
    may_send = EVERYBODY

    path: str
    mode: int | None = None
    mtime_ns: int | None = None
    uid: int | None = None
    gid: int | None = None
    follow: bool = True


class Mkdir(Message):
    may_send = EVERYBODY

    path: str
    mode: int
    parents: bool
    exist_ok: bool
    uid: int = 0
    gid: int = 0


class List(Message):
    """Entries of a directory in byte order of their names, after `after`, at most `limit`."""

    may_send = EVERYBODY
    changes_nothing = True

    path: str
    after: str
    limit: int


class Listing(Message):
    entries: list[tuple[str, Inode]]
    more: bool


class Remove(Message):
    may_send = EVERYBODY

    path: str
    recursive: bool
    trash: bool
    """Move it to the trash instead of removing it for good."""
    want: str
    """"any", "file" or "directory": anything else there raises."""


class Removed(Message):
    trash_id: str
    """What `TrashRestore` takes; empty when removed for good."""


class Rename(Message):
    """Atomic; over an existing file or an empty directory when `overwrite`."""

    may_send = EVERYBODY

    source: str
    target: str
    overwrite: bool


class Link(Message):
    may_send = EVERYBODY

    source: str
    target: str


class Symlink(Message):
    may_send = EVERYBODY

    target: str
    path: str
    uid: int = 0
    gid: int = 0


class GetXattrs(Message):
    may_send = EVERYBODY
    changes_nothing = True

    path: str
    follow: bool = True


class Xattrs(Message):
    values: dict[str, bytes]


class SetXattr(Message):
    may_send = EVERYBODY

    path: str
    name: str
    value: bytes | None
    """None removes it."""


class TrashList(Message):
    may_send = EVERYBODY
    changes_nothing = True


class TrashEntry(msgspec.Struct, frozen=True, array_like=True):
    id: str
    path: str
    """Where it was."""
    deleted_ns: int
    inode: Inode


class TrashListing(Message):
    entries: list[TrashEntry]


class TrashRestore(Message):
    may_send = EVERYBODY

    id: str
    path: str
    """Where to; empty means where it was."""


class TrashEmpty(Message):
    may_send = EVERYBODY

    older_than_s: float


class CollectGarbage(Message):
    """Remove chunks of files unlinked longer than gc_delay ago (`force`: all of them), and expired trash."""

    may_send = EVERYBODY

    force: bool


class Collected(Message):
    files: int
    chunks: int
    pending: int
    """Files still waiting for their delay."""


class Usage(Message):
    may_send = EVERYBODY
    changes_nothing = True


class UsageReply(Message):
    files: int
    directories: int
    length_bytes: int
    """Sum of file lengths, trash included."""
    trash_entries: int
    gc_pending: int


class Once(Message):
    """A request that changes something, in a cluster: done once, however often it is sent and to whichever server.

    The reply is that of the request inside. Raises SessionExpired if the client's session has ended.
    """

    may_send = EVERYBODY

    client: bytes
    """The session with the cluster (`OpenSession`)."""
    number: int
    """Of the request: from 1, each used once in a session, the same in every attempt."""
    done_below: int
    """Requests with lower numbers are done with: they are not sent again."""
    request: bytes
    """The encoded message."""
    attempt: int = 0
    """From 1, another one each time it is sent. 0: not counted, over a way that makes no copies."""
