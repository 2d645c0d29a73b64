"""What every client does, as coroutines: name operations by message, file bytes by chunk messages.

`Core` holds the connections and turns paths, ranges and buffers into messages; `Client` and `AsyncClient` are two
doors to it. It keeps no cache of metadata: what a call returns was true when the service answered.

Invariants: a payload or destination is never copied on its way to a chunk; holes and what lies between a chunk's end
and the file's end read as zero; a write is acknowledged only once its chunks are durable and its length is known to
the metadata service.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import msgspec

from ..errors import Conflict, Corruption, EmberError, IsADirectory, LimitExceeded, NotADirectory, NotFound, StaleChunk
from ..locks import KeyedLocks
from ..messages import (
    Abandon,
    AdoptChunks,
    ChunksRead,
    CloseSession,
    CommitPut,
    DropTail,
    InodeReply,
    Message,
    Open,
    Opened,
    Promote,
    Promoted,
    ReadChunks,
    ReportLength,
    Reserve,
    Reserved,
    Stat,
    Truncate,
    WriteChunks,
    WriteInline,
)
from ..meta.chunks import ClientChunkOps
from ..runtime import Runtime
from ..striping import chains_of
from ..transport import Connection
from ..types import (
    BATCH_ITEMS_MAX,
    CHUNK_SIZE_BYTES_DEFAULT,
    FILE_BYTES_MAX,
    INLINE_BYTES_MAX,
    Chunks,
    Inline,
    Inode,
    chunk_id,
    describe_chunk,
)
from .buffers import NewBytes
from .paths import normalise

Reply = TypeVar("Reply", bound=Message)

MESSAGE_BYTES_MAX = 64 << 20
"""Payload of one chunk message; larger reads and writes are cut, so that no call holds the store for long."""
STALE_ATTEMPTS_MAX = 20


def check_range(offset: int, length: int) -> None:
    """Raises LimitExceeded unless [offset, offset+length) may lie in a file."""
    if offset < 0 or length < 0 or offset + length > FILE_BYTES_MAX:
        raise LimitExceeded(f"a file has bytes 0 to {FILE_BYTES_MAX}, not {offset} to {offset + length}")


def _of_file(error: Corruption, path: str) -> Corruption:
    """The same, and it names the file."""
    return Corruption(error.message, path, chunk=error.chunk, offset=error.offset)


class Range(NamedTuple):
    """Bytes of one file on their way: `view` is the destination of a read or the payload of a write."""

    inode: Inode
    offset: int
    view: memoryview
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NewFile:
    """How a new file is made."""

    overwrite: bool = True
    """Replace a file of that name; else raise AlreadyExists."""
    permissions: int = 0o644
    mtime_ns: int | None = None
    """None: now."""
    chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT


Part = tuple[int, int, bytes, int, memoryview]
"""(index of the range it belongs to, chain, chunk, offset in the chunk, destination or payload)"""


class WriteHandle:
    """A file open for writing: its session and the newest row we know."""

    __slots__ = ("chunk_size_bytes", "client", "end", "inode", "path", "session")

    def __init__(self, path: str, inode: Inode, session: bytes, chunk_size_bytes: int, client: bytes) -> None:
        self.path = path
        self.inode = inode
        self.session = session
        self.chunk_size_bytes = chunk_size_bytes
        self.client = client
        """Whose session with the cluster it is part of: nothing is written under another one."""
        self.end = 0
        """Largest end we wrote to; 0 when nothing was."""


class Core:
    """One client: an id, a connection to the metadata service and one per chain."""

    def __init__(
        self,
        runtime: Runtime,
        meta: Connection,
        chains: Mapping[int, Connection],
        *,
        client: Callable[[], bytes] | None = None,
    ) -> None:
        """`client`: our session with the cluster, which may end and be another one then. None: there is none."""
        self.runtime = runtime
        client_id = runtime.random_bytes(16)
        self.client = client or (lambda: client_id)
        self._meta = meta
        self._chains = chains
        self._only = next(iter(chains.values())) if len(set(chains.values())) == 1 else None
        self._moves = KeyedLocks(runtime)

    async def ask(self, request: Message, reply: type[Reply]) -> Reply:
        """A metadata request whose answer is a `reply`."""
        answer = await self._meta.call(request)
        assert isinstance(answer, reply)
        return answer

    async def call_meta(self, request: Message) -> None:
        """A metadata request whose answer says no more than that it is done."""
        await self._meta.call(request)

    async def stat(self, path: str, follow: bool = True) -> Inode:
        """The inode at `path`."""
        return (await self._meta.call(Stat(normalise(path), follow))).inode  # type: ignore[attr-defined,no-any-return]

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset+length) of a file, cut at its end."""
        check_range(offset, length or 0)
        inode = await self.file(path)
        layout = inode.layout
        if type(layout) is Inline:
            return layout.data[offset:] if length is None else layout.data[offset : offset + length]
        size = max(inode.length - offset, 0)
        target = NewBytes(size if length is None else min(length, size))
        return target.finish(await self.read_range(Range(inode, offset, target.view, path)))

    async def file(self, path: str) -> Inode:
        """The inode of a regular file at `path`. Raises IsADirectory."""
        inode = await self.stat(path)
        if inode.layout is None:
            raise IsADirectory("is a directory", path)
        return inode

    async def parent_of(self, path: str) -> Inode:
        """The directory that would hold `path`. Raises NotFound, NotADirectory."""
        parent = await self.stat(normalise(path).rpartition("/")[0] or "/")
        if not parent.is_dir:
            raise NotADirectory("not a directory", path)
        return parent

    async def read_range(self, wanted: Range) -> int:
        """Fill one range; returns the bytes read. Raises what was found wrong."""
        inode, offset, view, _ = wanted
        layout = inode.layout
        if type(layout) is Chunks and offset + len(view) <= inode.length:
            index, inside = divmod(offset, layout.chunk_size_bytes)
            if inside + len(view) <= layout.chunk_size_bytes and view:
                # One range of one chunk, the commonest read there is, is spared the lists of the general way.
                chains = chains_of(layout)
                chain = chains[index % len(chains)]
                request = ReadChunks([chain], [chunk_id(inode.id, index)], [inside])
                reply = await self._chains[chain].call(request, (view,))
                assert type(reply) is ChunksRead
                if not reply.errors and reply.counts[0] == len(view):
                    return len(view)
        (result,) = await self.read_ranges([wanted])
        if isinstance(result, EmberError):
            raise result
        return result

    async def read_ranges(self, ranges: Sequence[Range], *, grant: bytes = b"") -> list[int | EmberError]:
        """Fill every range: bytes read (cut at the end of the file), or Corruption, or NotFound if its file is gone.

        `grant`: what a reader reads under. Of a file that it knows by one nobody tells whether it is gone: zeros.
        """
        results: list[int | EmberError] = []
        parts: list[Part] = []
        for number, (inode, offset, view, _) in enumerate(ranges):
            count = min(len(view), max(inode.length - offset, 0))
            results.append(count)
            layout = inode.layout
            if type(layout) is Chunks:
                size = layout.chunk_size_bytes
                chains = chains_of(layout)
                index, inside = divmod(offset, size)
                if inside + count <= size:
                    if count:
                        part = view if count == len(view) else view[:count]
                        parts.append((number, chains[index % len(chains)], chunk_id(inode.id, index), inside, part))
                    continue
                for _, chain, chunk, begin, part in self._parts(inode.id, layout, offset, view[:count]):
                    parts.append((number, chain, chunk, begin, part))
            elif count:
                assert type(layout) is Inline
                view[:count] = layout.data[offset : offset + count]
        if parts:
            await self._read_parts(ranges, parts, results, grant)
        return results

    async def _read_parts(
        self,
        ranges: Sequence[Range],
        parts: list[Part],
        results: list[int | EmberError],
        grant: bytes,
    ) -> None:
        short: dict[int, list[int]] = {}
        for connection, batch in self._batches(parts):
            numbers, chains, chunks, offsets, views = map(list, zip(*batch, strict=True))
            reply = await connection.call(ReadChunks(chains, chunks, offsets, grant=grant), views)
            assert type(reply) is ChunksRead
            for number, view, count in zip(numbers, views, reply.counts, strict=True):
                if count < len(view):
                    view[count:] = bytes(len(view) - count)
                    short.setdefault(ranges[number].inode.id, []).append(number)
            for item, (_, message, offset) in reply.errors.items():
                inode, path, chunk = ranges[numbers[item]].inode, ranges[numbers[item]].path, chunks[item]
                assert type(inode.layout) is Chunks
                in_file = int.from_bytes(chunk[8:], "big") * inode.layout.chunk_size_bytes + offset
                results[numbers[item]] = Corruption(
                    f"{message} (file offset {in_file})", path, chunk=describe_chunk(chunk), offset=in_file
                )
        for found in short.values():
            if await self._is_gone(ranges[found[0]].inode):
                for number in found:
                    results[number] = NotFound("the file was removed while it was open", ranges[number].path)

    async def _is_gone(self, inode: Inode) -> bool:
        """Whether chunks may be missing because their file was removed: then they are no holes."""
        if not inode.nlink:
            return False  # our own new file, which has no name yet
        try:
            row = (await self.ask(Stat("", True, inode.id), InodeReply)).inode
        except NotFound:
            return True
        return not row.nlink

    def _batches(self, parts: list[Part]) -> list[tuple[Connection, list[Part]]]:
        """Parts by connection, each message at most MESSAGE_BYTES_MAX."""
        if self._only is not None:
            groups = {self._only: parts}
        else:
            groups = {}
            for part in parts:
                groups.setdefault(self._chains[part[1]], []).append(part)
        batches = []
        for connection, group in groups.items():
            batch: list[Part] = []
            size = 0
            for part in group:
                if batch and (size + len(part[4]) > MESSAGE_BYTES_MAX or len(batch) == BATCH_ITEMS_MAX):
                    batches.append((connection, batch))
                    batch, size = [], 0
                batch.append(part)
                size += len(part[4])
            batches.append((connection, batch))
        return batches

    # --- whole files -----------------------------------------------------------------------------------------------

    async def put(self, path: str, payload: memoryview, new: NewFile) -> Inode:
        """Make `payload` the file at `path`: a new inode and one swap of the entry, so readers see old or new."""
        if len(payload) <= INLINE_BYTES_MAX:
            return await self.commit_put(path, None, bytes(payload), len(payload), new)
        reserved, client = await self.reserve(new)
        try:
            await self.write_reserved(reserved, 0, payload, client)
            return await self.commit_put(path, reserved, b"", len(payload), new)
        except Exception:
            # The first error says whether the file may be there. What is left of it goes with our session.
            with contextlib.suppress(EmberError):
                await self.abandon(reserved)
            raise

    async def reserve(self, new: NewFile) -> tuple[Reserved, bytes]:
        """A new inode that no name leads to yet, and the client that it is of."""
        while True:
            client = self.client()
            reserved = await self.ask(Reserve(new.chunk_size_bytes), Reserved)
            if client == self.client():
                return reserved, client

    async def abandon(self, reserved: Reserved) -> None:
        """Give a reserved inode and its chunks up."""
        await self._meta.call(Abandon(reserved.inode, reserved.layout))

    async def write_reserved(self, reserved: Reserved, offset: int, payload: memoryview, client: bytes) -> None:
        """Write chunks of an inode that was reserved by `client`."""
        await self._write_chunks(reserved.inode, reserved.layout, offset, payload, client)

    async def truncate_reserved(self, reserved: Reserved, length: int) -> None:
        """Remove what was written past `length` of a reserved inode: it has no length yet but that of its chunks."""
        await ClientChunkOps(self._chains).truncate(reserved.inode, reserved.layout, length)

    async def commit_put(self, path: str, reserved: Reserved | None, data: bytes, length: int, new: NewFile) -> Inode:
        """Name a new inode: the reserved one, or (None) one that holds `data` itself."""
        request = CommitPut(
            normalise(path),
            reserved.inode if reserved is not None else 0,
            reserved.layout if reserved is not None else None,
            data,
            length,
            new.permissions,
            new.overwrite,
            os.getuid(),
            os.getgid(),
            new.mtime_ns,
        )
        return (await self.ask(request, InodeReply)).inode

    # --- writing in place ------------------------------------------------------------------------------------------

    async def open_for_write(
        self, path: str, *, create: bool, append: bool = False, new: NewFile | None = None
    ) -> WriteHandle:
        """Open a session on the file at `path`; `new` says how a file that is made is made."""
        new = new or NewFile()
        size = new.chunk_size_bytes
        request = Open(
            normalise(path), create, False, False, new.permissions, size, os.getuid(), os.getgid(), append=append
        )
        while True:
            client = self.client()
            try:
                opened = await self.ask(request, Opened)
            except Corruption as error:
                raise _of_file(error, path) from error
            handle = WriteHandle(path, opened.inode, opened.session, size, client)
            if client == self.client():
                return handle
            # Which of our two sessions it is of is not known.
            with contextlib.suppress(EmberError):
                await self.close_handle(handle)

    async def refresh(self, handle: WriteHandle) -> None:
        """Take the newest row of an open file."""
        generation = handle.inode.truncate_generation
        handle.inode = (await self.ask(Stat("", True, handle.inode.id), InodeReply)).inode
        if handle.inode.truncate_generation != generation:
            handle.end = 0  # What was written before the truncate must not be reported after it.

    async def write(self, handle: WriteHandle, offset: int, payload: memoryview) -> None:
        """Write `payload` at `offset`, durably; the file then reaches at least offset + len(payload)."""
        end = offset + len(payload)
        check_range(offset, len(payload))
        if not payload:
            return
        for _ in range(STALE_ATTEMPTS_MAX):
            try:
                if type(handle.inode.layout) is Chunks:
                    await self._write_in_chunks(handle, offset, payload)
                elif end <= INLINE_BYTES_MAX:
                    request = WriteInline(handle.session, handle.inode.id, offset, bytes(payload))
                    handle.inode = (await self.ask(request, InodeReply)).inode
                else:
                    await self._promote(handle, offset, payload)
                handle.end = max(handle.end, end)
                return
            except Corruption as error:
                raise _of_file(error, handle.path) from error
            except StaleChunk:
                # Somebody truncated or promoted the file: what we wrote may be cut off, so write it again.
                await self.refresh(handle)
        raise Conflict("the file kept changing while it was written; try again", handle.path)

    async def write_many(
        self, work: Sequence[tuple[WriteHandle, int, memoryview]], *, whole_chunks: bool = False
    ) -> None:
        """Write many payloads, each as `write` does; those of files in chunks share their messages and flushes."""
        parts: dict[tuple[int, bytes], list[Part]] = {}
        together: list[tuple[WriteHandle, int, memoryview]] = []
        for handle, offset, payload in work:
            check_range(offset, len(payload))
            layout = handle.inode.layout
            if not payload:
                continue
            if type(layout) is Chunks:
                size = layout.chunk_size_bytes
                parts.setdefault((size, handle.client), []).extend(
                    self._parts(handle.inode.id, layout, offset, payload)
                )
                together.append((handle, offset, payload))
            else:
                await self.write(handle, offset, payload)
        ends: dict[WriteHandle, int] = {}
        for handle, offset, payload in together:
            ends[handle] = max(ends.get(handle, 0), offset + len(payload))
        generations = {handle: handle.inode.truncate_generation for handle in ends}
        try:
            for (size, client), alike in parts.items():
                await self._write_parts(alike, size, client, whole_chunks=whole_chunks)
        except EmberError:
            for handle in ends:
                await self._drop_tail(handle)
            raise
        for handle, end in ends.items():
            try:
                await self._report(handle, end, generations[handle], durable=False)
                handle.end = max(handle.end, end)
            except StaleChunk:
                # Truncated meanwhile: some of it may be cut off, so this file's payloads are written again.
                await self.refresh(handle)
                for again, offset, payload in together:
                    if again is handle:
                        await self.write(handle, offset, payload)

    async def write_ranges(self, ranges: Sequence[Range], grants: Sequence[bytes]) -> None:
        """Write under grants into files of a known length, without a session on them; a new block has room for a whole
        chunk. Of a file that is gone nobody hears."""
        parts: dict[int, list[Part]] = {}
        for inode, offset, payload, _ in ranges:
            layout = inode.layout
            assert type(layout) is Chunks
            parts.setdefault(layout.chunk_size_bytes, []).extend(self._parts(inode.id, layout, offset, payload))
        for size, alike in parts.items():
            await self._write_parts(alike, size, b"", whole_chunks=True, grants=grants)

    async def _write_in_chunks(self, handle: WriteHandle, offset: int, payload: memoryview) -> None:
        layout = handle.inode.layout
        assert type(layout) is Chunks
        generation = handle.inode.truncate_generation
        try:
            await self._write_chunks(handle.inode.id, layout, offset, payload, handle.client)
        except EmberError:
            await self._drop_tail(handle)
            raise
        await self._report(handle, offset + len(payload), generation, durable=False)

    async def _drop_tail(self, handle: WriteHandle) -> None:
        """After a failed write: chunks of it past the end must not turn up as file content later."""
        with contextlib.suppress(EmberError):  # The first error says what is wrong; a cut that began stays due.
            await self.call_meta(DropTail(handle.session, handle.inode.id))
            await self.refresh(handle)

    async def _report(self, handle: WriteHandle, end: int, generation: int, *, durable: bool) -> None:
        """Say how far the file reaches, even if we think that it did before: it may have been truncated since.

        `generation`: the truncate generation from before the chunks were written.
        """
        await self._meta.call(ReportLength(handle.session, handle.inode.id, end, generation, durable))
        newest = handle.inode  # another write of the same handle may have changed it meanwhile
        if newest.truncate_generation == generation and end > newest.length:
            handle.inode = msgspec.structs.replace(newest, length=end)

    async def _promote(self, handle: WriteHandle, offset: int, payload: memoryview) -> None:
        """Move an inline file into chunks, with `payload` written into it. One at a time per handle: see Promote."""
        async with self._moves.of(handle.session):
            if type(handle.inode.layout) is not Inline:
                raise StaleChunk("promoted by another call on this file", handle.path)
            try:
                await self._move(handle, offset, payload)
            except EmberError:
                if type(handle.inode.layout) is Inline:
                    with contextlib.suppress(EmberError):
                        await self.call_meta(DropTail(handle.session, handle.inode.id))
                raise

    async def _move(self, handle: WriteHandle, offset: int, payload: memoryview) -> None:
        promoted = await self.ask(Promote(handle.inode.id, handle.chunk_size_bytes, handle.session), Promoted)
        inode = promoted.inode
        if type(inode.layout) is not Inline:
            handle.inode = inode
            raise StaleChunk("promoted by another writer", handle.path)
        end = offset + len(payload)
        if inode.layout.data:
            old = memoryview(inode.layout.data)
            await self._write_chunks(inode.id, promoted.layout, 0, old, handle.client)
        await self._write_chunks(inode.id, promoted.layout, offset, payload, handle.client)
        adopt = AdoptChunks(handle.session, inode.id, inode.revision, promoted.layout, max(end, inode.length))
        handle.inode = (await self.ask(adopt, InodeReply)).inode

    async def truncate(self, path: str, length: int) -> Inode:
        """Set the length of the file at `path`."""
        handle = await self.open_for_write(path, create=False)
        try:
            await self.truncate_handle(handle, length)
        finally:
            # Not an error of ours, whatever became of the truncate: a session that stays open goes with our own.
            with contextlib.suppress(EmberError):
                await self.close_handle(handle)
        return handle.inode

    async def truncate_handle(self, handle: WriteHandle, length: int) -> None:
        """Set the length of an open file."""
        if type(handle.inode.layout) is Inline and length > INLINE_BYTES_MAX:
            # Only a file in chunks can be longer; its first byte beyond the row makes it one. Not its last: up to there
            # a chunk would be zeros that are written.
            await self.write(handle, INLINE_BYTES_MAX, memoryview(b"\0"))
        try:
            handle.inode = (await self.ask(Truncate("", handle.inode.id, length), InodeReply)).inode
        except Corruption as error:
            raise _of_file(error, handle.path) from error
        handle.end = min(handle.end, length)

    async def sync_length(self, handle: WriteHandle) -> None:
        """Make the length durable as well (chunks are already)."""
        if handle.end and type(handle.inode.layout) is Chunks:
            try:
                await self._report(handle, handle.end, handle.inode.truncate_generation, durable=True)
            except StaleChunk:
                # Somebody truncated after our last write: the length is theirs, and durable.
                await self.refresh(handle)

    async def close_handle(self, handle: WriteHandle) -> None:
        """End the session."""
        inode = handle.inode
        end = handle.end if type(inode.layout) is Chunks else 0
        try:
            await self._meta.call(CloseSession(handle.session, inode.id, end, inode.truncate_generation))
        except StaleChunk:
            pass  # Somebody truncated after our last write: the length is theirs, and the session is closed.

    async def _write_chunks(self, inode: int, layout: Chunks, offset: int, payload: memoryview, client: bytes) -> None:
        await self._write_parts(self._parts(inode, layout, offset, payload), layout.chunk_size_bytes, client)

    def _parts(self, inode: int, layout: Chunks, offset: int, payload: memoryview) -> list[Part]:
        """`payload` at `offset` of a file, cut at chunk boundaries."""
        chains = chains_of(layout)
        size = layout.chunk_size_bytes
        parts = []
        index, inside = divmod(offset, size)
        done = 0
        while done < len(payload):
            step = min(size - inside, len(payload) - done)
            view = payload[done : done + step]
            parts.append((0, chains[index % len(chains)], chunk_id(inode, index), inside, view))
            done, index, inside = done + step, index + 1, 0
        return parts

    async def _write_parts(
        self, parts: list[Part], chunk_size_bytes: int, client: bytes, *, whole_chunks: bool = False,
        grants: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        """Write parts of files with one chunk size. Raises SessionExpired when `client` has ended; b"": no one does."""
        for connection, batch in self._batches(parts):
            _, chains, chunks, offsets, views = map(list, zip(*batch, strict=True))
            # Who may have to send it again names it: see `channels`. In one process nobody has to.
            request = WriteChunks(
                client, 0, 0, chains, chunks, offsets, chunk_size_bytes, whole_chunks=whole_chunks, grants=list(grants)
            )
            await connection.call(request, views)
