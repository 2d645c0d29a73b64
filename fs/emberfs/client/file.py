"""An open file, as coroutines: where its bytes are read from, and how what is written reaches the store.

Two ways to write, chosen by the mode:
  fresh    (`w`, `x`): the bytes go to a new inode that no name leads to; `close` names it. Readers see the old file
           or the whole new one, and a writer that dies leaves the old one.
  session  (`r+`, `a`): the bytes go into the file itself, each chunk atomically; the length follows.

Written bytes wait in one buffer of at most a chunk and go out at chunk boundaries, on `flush`, or when a write lands
elsewhere; whole chunks in a large write go straight from the caller's memory. A file reads its own writes.

Does not know: positions and threads (see `handle`), or the caller's event loop.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

from ..errors import AlreadyExists, EmberError, NotFound
from ..messages import Reserved
from ..types import INLINE_BYTES_MAX, Chunks, Inline, Inode, Kind
from .core import MESSAGE_BYTES_MAX, Core, NewFile, Range, WriteHandle, check_range

MODES = frozenset(["r", "r+", "w", "w+", "x", "x+", "a", "a+"])


def parse_mode(mode: str) -> str:
    """The mode without "b", checked. Raises ValueError for an unknown or a text mode."""
    plain = mode.replace("b", "", 1).replace("+b", "+")
    if plain not in MODES or "b" not in mode:
        raise ValueError(f"mode must be binary, one of rb r+b wb w+b xb ab a+b: {mode!r}")
    return plain


class FreshTarget:
    """A new file that is named when it is finished."""

    def __init__(self, core: Core, path: str, new: NewFile) -> None:
        self._core = core
        self._path = path
        self._new = new
        self._reserved: Reserved | None = None
        self._client = b""
        """Who reserved it."""
        self.length = 0

    @property
    def started(self) -> bool:
        """Whether any byte has left the buffer."""
        return self._reserved is not None

    async def start(self) -> Reserved:
        """The inode that the bytes go to."""
        if self._reserved is None:
            self._reserved, self._client = await self._core.reserve(self._new)
        return self._reserved

    async def write(self, offset: int, payload: memoryview) -> None:
        """Write durably, still unnamed."""
        reserved = await self.start()
        try:
            await self._core.write_reserved(reserved, offset, payload, self._client)
        except EmberError:
            with contextlib.suppress(EmberError):  # What came past the end must not turn up in a hole later.
                await self._core.truncate_reserved(reserved, self.length)
            raise
        self.length = max(self.length, offset + len(payload))

    def inode(self) -> Inode:
        """The row as it would be if the file were finished now: what reads of our own bytes go by."""
        if self._reserved is None:
            return Inode(0, Kind.FILE, self._new.permissions, 0, 0, 0, 0, layout=Inline())
        return Inode(
            self._reserved.inode, Kind.FILE, self._new.permissions, 0, self.length, 0, 0, layout=self._reserved.layout
        )

    async def truncate(self, length: int) -> None:
        """Set the length it will have."""
        if self._reserved is not None and length < self.length:
            await self._core.truncate_reserved(self._reserved, length)
        self.length = length

    async def sync(self) -> None:
        """Nothing: chunks are durable when written, and there is no name yet."""

    async def finish(self, rest: bytearray) -> None:
        """Name the file. `rest`: the whole content, if none of it was written yet."""
        length = max(self.length, len(rest))
        if self._reserved is None and length <= INLINE_BYTES_MAX:
            data = bytes(rest).ljust(length, b"\0")
            await self._core.commit_put(self._path, None, data, length, self._new)
            return
        if rest:
            await self.write(0, memoryview(rest))
        reserved = await self.start()
        await self._core.commit_put(self._path, reserved, b"", length, self._new)

    async def discard(self) -> None:
        """The file will not be: its chunks may go."""
        if self._reserved is not None:
            await self._core.abandon(self._reserved)


class SessionTarget:
    """An existing file that is changed in place."""

    def __init__(self, core: Core, handle: WriteHandle) -> None:
        self._core = core
        self.handle = handle

    @property
    def length(self) -> int:
        return self.handle.inode.length

    async def write(self, offset: int, payload: memoryview) -> None:
        """Write durably."""
        await self._core.write(self.handle, offset, payload)

    def inode(self) -> Inode:
        """The newest row we know."""
        return self.handle.inode

    async def truncate(self, length: int) -> None:
        """Set the file's length."""
        await self._core.truncate_handle(self.handle, length)

    async def sync(self) -> None:
        """Make the length durable."""
        await self._core.sync_length(self.handle)

    async def finish(self, rest: bytearray) -> None:
        """End the session."""
        assert not rest
        await self._core.close_handle(self.handle)

    async def discard(self) -> None:
        """End the session; what was written stays."""
        await self._core.close_handle(self.handle)


Target = FreshTarget | SessionTarget


class OpenFile:
    """A file open for reading, writing or both. Get one from `open_file`."""

    def __init__(
        self, core: Core, path: str, mode: str, inode: Inode, target: Target | None, chunk_size_bytes: int
    ) -> None:
        self._core = core
        self._inode = inode
        self._target = target
        self._chunk_size_bytes = chunk_size_bytes
        self._buffer = bytearray()
        self._buffer_offset = 0
        self.path = path
        self.readable = mode == "r" or mode.endswith("+")
        self.writable = target is not None
        self.appends = mode.startswith("a")

    @property
    def length(self) -> int:
        """Bytes, our own unwritten ones included."""
        if self._target is None:
            return self._inode.length
        return max(self._target.length, self._buffer_offset + len(self._buffer) if self._buffer else 0)

    @property
    def inode(self) -> Inode:
        """The row reads go by."""
        return self._inode if self._target is None else self._target.inode()

    async def read(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset`; returns the bytes read, fewer only at the end of the file. Raises Corruption."""
        if self._is_whole_in_buffer():
            # Nothing has left the buffer yet: the buffer is the file (and what it was extended by reads as zero).
            count = min(len(view), max(self.length - offset, 0))
            part = self._buffer[offset : offset + count]
            view[: len(part)] = part
            view[len(part) : count] = bytes(count - len(part))
            return count
        await self._flush_buffer()
        return await self._core.read_range(Range(self.inode, offset, view, self.path))

    async def write(self, offset: int, payload: memoryview) -> None:
        """Take `payload` for `offset`: buffered, or written when it fills chunks.

        After an error the buffer holds nothing of `payload`; whole chunks of it may have been written.
        """
        assert self._target is not None
        check_range(offset, len(payload))
        while payload:
            if self._buffer and offset != self._buffer_offset + len(self._buffer):
                await self._flush_buffer()
            if not self._buffer:
                self._buffer_offset = offset
                whole = _whole_chunks(offset, len(payload), self._chunk_size_bytes)
                if whole:
                    await self._target.write(offset, payload[:whole])
                    offset, payload = offset + whole, payload[whole:]
                    continue
            room = self._chunk_size_bytes - (self._buffer_offset % self._chunk_size_bytes) - len(self._buffer)
            step = min(room, len(payload))
            kept = len(self._buffer)
            self._buffer += payload[:step]
            offset, payload = offset + step, payload[step:]
            if step == room:
                try:
                    await self._flush_buffer()
                except EmberError:
                    self._buffer = self._buffer[:kept]
                    raise

    def _is_whole_in_buffer(self) -> bool:
        return isinstance(self._target, FreshTarget) and not self._target.started and self._buffer_offset == 0

    async def _flush_buffer(self) -> None:
        if self._buffer:
            assert self._target is not None
            await self._target.write(self._buffer_offset, memoryview(self._buffer))
            # A new object: the old one may still be exported.
            self._buffer = bytearray()

    def write_handle(self) -> WriteHandle:
        """The session of a file open in place. Raises UnsupportedOperation for other modes."""
        if not isinstance(self._target, SessionTarget):
            raise io.UnsupportedOperation(f"a batch writes in place: open {self.path!r} with r+b or ab")
        return self._target.handle

    def inode_in_place(self) -> Inode:
        """The row of a file that can be read past its buffer. Raises UnsupportedOperation for other modes."""
        if not self.readable or isinstance(self._target, FreshTarget):
            raise io.UnsupportedOperation(f"a batch reads in place: open {self.path!r} with rb, r+b or a+b")
        return self.inode

    async def flush(self) -> None:
        """Write what is buffered. Of a fresh file small enough to be one inode row: nothing until `close`."""
        if not (self._is_whole_in_buffer() and len(self._buffer) <= INLINE_BYTES_MAX):
            await self._flush_buffer()

    async def sync(self) -> None:
        """Flush, and make the length durable."""
        await self.flush()
        if self._target is not None:
            await self._target.sync()

    async def truncate(self, length: int) -> None:
        """Set the length."""
        assert self._target is not None
        check_range(0, length)
        if self._is_whole_in_buffer():
            del self._buffer[length:]
        else:
            await self._flush_buffer()
        await self._target.truncate(length)

    async def close(self) -> None:
        """Write everything and, for a fresh file, give it its name. After an error the file is closed all the same."""
        if self._target is None:
            return
        try:
            if not self._is_whole_in_buffer():
                await self._flush_buffer()
            await self._target.finish(self._buffer)
            self._buffer = bytearray()
        except BaseException:
            # What was not written is lost with this error; its space and its session must not be.
            with contextlib.suppress(EmberError):
                await self.discard()
            raise

    async def discard(self) -> None:
        """Close without naming a fresh file; of a session, what was flushed stays."""
        self._buffer = bytearray()
        if self._target is not None:
            await self._target.discard()


def _whole_chunks(offset: int, length: int, chunk_size_bytes: int) -> int:
    """Bytes from `offset` to a chunk boundary, if there is at least a chunk of them; one message at most."""
    end = (offset + length) // chunk_size_bytes * chunk_size_bytes
    return min(end - offset, MESSAGE_BYTES_MAX) if end - offset >= chunk_size_bytes else 0


async def open_file(core: Core, path: str, mode: str, new: NewFile | None = None) -> OpenFile:
    """Open `path`; `new` says how a file that is made is made. Raises NotFound, AlreadyExists, IsADirectory."""
    plain = parse_mode(mode)
    new = new or NewFile()
    if plain == "r":
        inode = await core.file(path)
        return OpenFile(core, path, plain, inode, None, new.chunk_size_bytes)
    if plain[0] in "wx":
        try:
            await core.file(path)
            if plain[0] == "x":
                raise AlreadyExists("file exists", path)
        except NotFound:
            await core.parent_of(path)
        fresh = FreshTarget(core, path, replace(new, overwrite=plain[0] == "w"))
        return OpenFile(core, path, plain, fresh.inode(), fresh, new.chunk_size_bytes)
    appends = plain[0] == "a"
    handle = await core.open_for_write(path, create=appends, append=appends, new=new)
    layout = handle.inode.layout
    size = layout.chunk_size_bytes if isinstance(layout, Chunks) else new.chunk_size_bytes
    return OpenFile(core, path, plain, handle.inode, SessionTarget(core, handle), size)
