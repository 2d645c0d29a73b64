"""The metadata service: one handler per request, on an ordered KV. Start here.

The rows are in `keys`, the walk along a path in `paths`, and each noun of the requests has its file. A handler is a
coroutine function (state, request) -> reply; all that it changes, it changes in one transaction, which `kv.run` runs
again after a conflict.

When several servers share the KV (`MetaConfig.shared`), a request may reach any of them, or two of them: it comes as
`Once`, and its handler gets a state of its own (`MetaState.named`). Start with `clients`.

Replies: InodeReply of Stat, CommitPut, WriteInline, AdoptChunks, Truncate, SetAttr, Mkdir, Link, Symlink, TrashRestore;
Opened of Open; Reserved of Reserve; Promoted of Promote; Listing, Removed, Xattrs, TrashListing, Collected, UsageReply
of what they are named for; Done of the rest.

Does not know: which transport brought a request, how chunks are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from .. import messages
from ..errors import ProtocolError, StoreFormat, Unavailable, UpdateUnknown
from ..kv.types import KV, Transaction
from ..messages import Message
from ..runtime import Runtime
from ..settings import Config
from ..transport.codec import decode_message
from ..types import ROOT_INODE, TRASH_INODE, Inode, Kind
from . import attributes, background, files, gc, namespace, reading, recovery, session, trash
from .check import Finding, check
from .chunks import ChunkOps
from .clients import RequestName
from .handover import Unwritten, forget_clients, recover_nameless, unwritten, write_down
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
    messages.ReadRows: reading.read_rows,
}


class MetaService:
    """Serves metadata requests. `start` before the first, `close` after the last; the KV is the caller's to close.

    `ask_sessions` is called when a client is not among the sessions that we were told of: have us told of them soon.
    """

    def __init__(
        self,
        kv: KV,
        runtime: Runtime,
        storage: ChunkOps,
        *,
        config: MetaConfig | None = None,
        ask_sessions: Callable[[], None] = lambda: None,
    ) -> None:
        self._state = MetaState(kv, runtime, storage, config or MetaConfig(), ask_sessions)
        self._background: asyncio.Task[None] | None = None

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Coroutine[Any, Any, Message]:
        """Serve one request. Not a coroutine function itself, so that a call costs no frame more than its handler."""
        if self._state.shared and not request.changes_nothing:
            return self._handle_once(request)
        return HANDLERS[type(request)](self._state, request)

    async def _handle_once(self, request: Message) -> Message:
        """Serve a request that changes something, when several servers share the KV. Raises ProtocolError."""
        if not isinstance(request, messages.Once):
            raise ProtocolError(f"{type(request).__name__} must come as Once: it may reach several servers")
        inner = decode_message(memoryview(request.request))
        if inner.changes_nothing or type(inner) not in HANDLERS:
            raise ProtocolError(f"a Once with a {type(inner).__name__} in it")
        name = RequestName(request.client, request.number, request.done_below)
        if request.attempt:
            self._state.clients.take(name, request.attempt)
        if not self._state.is_configured:
            await self._state.wait_for_settings()
        state = self._state.named(name)
        try:
            return await HANDLERS[type(inner)](state, inner)
        except Unavailable as error:
            if not state.is_decided:
                raise
            raise UpdateUnknown(f"it happened, but what follows from it could not be done yet: {error}") from error

    def chains_changed(self, chains: Sequence[int], stripe: int | None = None) -> None:
        """There are these chains, by their ids, from now on. New files are dealt over 1, 2, ... as far as they go.

        A file uses `stripe` of them; None: all, but at most STRIPE_DEFAULT.
        """
        self._state.chains_changed(chains, stripe)

    def configure(self, config: Config) -> None:
        """The cluster manager said that this holds. Call it before `sessions_changed` of the same answer.

        Until the first call nothing is collected, and requests that change something wait: see `has_settings`.
        """
        self._state.configure(config)

    async def sessions_changed(self, live: Collection[bytes]) -> None:
        """The cluster manager said that these are the clients with a live session.

        Call it with each answer that brought other sessions than the one before, the first after `start`. A client
        that is missing for `client_grace_s` has ended: its requests are refused, its files recovered.
        """
        self._state.clients.heard(live)

    async def start(self) -> None:
        """Make the namespace if there is none, finish what a crash left, start the background work.

        Raises StoreFormat if the rows are of a newer format, and what the chunk storage raises.
        """
        state = self._state
        await state.kv.run(self._format)
        if state.shared:
            self._background = state.runtime.spawn(background.run_shared(state), "meta-background")
            return
        begin, end = await state.ids.unswept()
        state.background.unswept = (begin, end) if begin < end else None
        await recovery.recover(state)
        self._background = state.runtime.spawn(background.run(state), "emberfs-gc")

    async def close(self) -> None:
        """Stop the background work. Sessions that are still open are recovered at the next start; shared: never."""
        state = self._state
        await background.end(state, self._background)
        self._background = None
        if not state.reserved and not state.shared:
            await state.ids.give_back()

    def unwritten(self, client: bytes) -> Unwritten:
        """What a service alone has in memory, for a shared one: see `handover`. Ask after the last call."""
        return unwritten(self._state, client)

    async def take_over(self, left: Unwritten | None) -> None:
        """Before the first request to a shared service on a KV that one alone may have served: go on from its state.

        None: that one said nothing, because it died or because there was none.
        """
        if left is not None:
            await write_down(self._state, left)
        else:
            await recover_nameless(self._state)

    async def forget_clients(self) -> bool:
        """Before the close of a shared service without clients: see `handover`. False if that could not be done."""
        return await forget_clients(self._state)

    async def check(self, *, repair: bool = False) -> list[Finding]:
        """fsck of a running service: see `check.check`. Chunks of files that are just being made are nobody's fault."""
        state = self._state
        await recovery.sweep(state)
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
