"""The metadata service: one handler per request, on an ordered KV. Start here.

The rows are in `keys`, the walk along a path in `paths`, and each noun of the requests has its file. A handler is a
coroutine function (state, request) -> reply; all that it changes, it changes in one transaction, which `kv.run` runs
again after a conflict.

Replies: InodeReply of Stat, CommitPut, WriteInline, AdoptChunks, Truncate, SetAttr, Mkdir, Link, Symlink, TrashRestore;
Opened of Open; Reserved of Reserve; Promoted of Promote; Listing, Removed, Xattrs, TrashListing, Collected, UsageReply
of what they are named for; Done of the rest.

Does not know: which transport brought a request, how chunks are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from .. import messages
from ..errors import StoreFormat
from ..kv.types import KV, Transaction
from ..messages import Message
from ..runtime import Runtime
from ..types import ROOT_INODE, TRASH_INODE, Inode, Kind
from . import attributes, files, gc, namespace, session, trash
from .check import Finding, check
from .chunks import ChunkOps
from .keys import FORMAT, ORPHANS_INODE, SUPERBLOCK_KEY, Superblock, check_superblock, encode_row, put_inode
from .remove import remove
from .state import MetaConfig, MetaState
from .truncate import truncate

Handler = Callable[[MetaState, Any], Coroutine[Any, Any, Message]]

HANDLERS: dict[type[Message], Handler] = {
    messages.Stat: namespace.stat,
    messages.List: namespace.list_directory,
    messages.Mkdir: namespace.mkdir,
    messages.Link: namespace.link,
    messages.Symlink: namespace.symlink,
    messages.Rename: namespace.rename,
    messages.Remove: remove,
    messages.Open: session.open_session,
    messages.CloseSession: session.close_session,
    messages.ReportLength: session.report_length,
    messages.DropTail: session.drop_tail,
    messages.Reserve: files.reserve,
    messages.CommitPut: files.commit_put,
    messages.Abandon: files.abandon,
    messages.WriteInline: files.write_inline,
    messages.Promote: files.promote,
    messages.AdoptChunks: files.adopt_chunks,
    messages.Truncate: truncate,
    messages.SetAttr: attributes.set_attr,
    messages.GetXattrs: attributes.get_xattrs,
    messages.SetXattr: attributes.set_xattr,
    messages.TrashList: trash.trash_list,
    messages.TrashRestore: trash.trash_restore,
    messages.TrashEmpty: trash.trash_empty,
    messages.CollectGarbage: gc.collect_garbage,
    messages.Usage: gc.usage,
}


class MetaService:
    """Serves metadata requests. `start` before the first, `close` after the last; the KV is the caller's to close."""

    def __init__(self, kv: KV, runtime: Runtime, storage: ChunkOps, *, config: MetaConfig | None = None) -> None:
        self._state = MetaState(kv, runtime, storage, config or MetaConfig())
        self._background: asyncio.Task[None] | None = None

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Coroutine[Any, Any, Message]:
        """Serve one request. Not a coroutine function itself, so that a call costs no frame more than its handler."""
        return HANDLERS[type(request)](self._state, request)

    async def start(self) -> None:
        """Make the namespace if there is none, finish what a crash left, start the garbage collection.

        Raises StoreFormat if the rows are of a newer format, and what the chunk storage raises.
        """
        state = self._state
        await state.kv.run(self._format)
        begin, end = await state.ids.unswept()
        state.unswept = (begin, end) if begin < end else None
        await session.recover(state)
        self._background = state.runtime.spawn(gc.run_in_background(state), "emberfs-gc")

    async def close(self) -> None:
        """Stop the background work. Sessions that are still open are recovered at the next start."""
        state = self._state
        state.stopping = True
        if self._background is not None:
            if state.resting:
                self._background.cancel()
            await _ended(self._background)
        if state.sweeper is not None:
            await _ended(state.sweeper)
        self._background = state.sweeper = None
        if not state.reserved:
            await state.ids.give_back()

    async def check(self, *, repair: bool = False) -> list[Finding]:
        """fsck of a running service: see `check.check`. Chunks of files that are just being made are nobody's fault."""
        state = self._state
        await gc.sweep(state)
        return await check(state.kv, state.chunks, reserved=state.reserved, repair=repair)

    async def _format(self, txn: Transaction) -> None:
        row = await txn.get(SUPERBLOCK_KEY)
        if row is not None:
            check_superblock(row)
            return
        if await txn.range(b"", b"\xff", limit=1):
            raise StoreFormat("there are rows but no metadata superblock: not a store, or a damaged one")
        now_ns = self._state.runtime.wall_ns()
        txn.put(SUPERBLOCK_KEY, encode_row(Superblock(format=FORMAT)))
        for inode in (ROOT_INODE, TRASH_INODE, ORPHANS_INODE):
            put_inode(
                txn,
                None,
                Inode(
                    id=inode,
                    kind=Kind.DIRECTORY,
                    mode=0o755,
                    nlink=1,
                    length=0,
                    mtime_ns=now_ns,
                    ctime_ns=now_ns,
                    parent=ROOT_INODE,
                ),
            )


async def _ended(task: Awaitable[None]) -> None:
    """Wait for a cancelled task."""
    try:
        await task
    except asyncio.CancelledError:
        pass
