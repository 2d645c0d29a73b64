"""Files as Python programs hold them: `File` (blocking, an `io.BufferedIOBase`) and `AsyncFile`.

Bounds: a file that is read in small steps keeps one window of at most READ_AHEAD_BYTES_MAX; one that is written keeps
at most one chunk. Reads of READ_AHEAD_BYTES_MIN and more go straight into the caller's memory.

Positions: a seek counts for the next read or write of its own thread; one without goes on where the last one ended,
whichever thread that was in. So many threads may each seek and read one handle, and a stream may be passed from
thread to thread. DuckDB does both. The calls on a file that is open for writing take turns: each `write` is whole,
whoever else writes.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import warnings
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import StoreClosed
from ..types import Inode
from .buffers import NewBytes, flat_view, writable_view
from .core import check_range
from .file import OpenFile

if TYPE_CHECKING:
    from ..stores import Store

T = TypeVar("T")

READ_AHEAD_BYTES_MIN = 64 << 10
READ_AHEAD_BYTES_MAX = 1 << 20


class File(io.BufferedIOBase):
    """A file of the store, opened by `Client.open`. Binary; wrap it in `io.TextIOWrapper` for text.

    Leaving a `with` block by an exception discards a file opened with "w" or "x": no half-written file gets a name.
    """

    def __init__(self, store: Store, open_file: OpenFile, mode: str) -> None:
        self._store = store
        self._file = open_file
        self._ended = False
        self._position = open_file.length if open_file.appends else 0
        self._sought: dict[int, tuple[int, int]] = {}
        """Thread -> (where it sought, how many steps had gone on without a seek by then)."""
        self._steps_on = 0
        self._ahead_lock = threading.Lock()
        self._turn = threading.RLock() if open_file.writable else nullcontext()
        self._ahead = b""
        self._ahead_offset = 0
        self._window_bytes = 0
        self.name = open_file.path
        self.mode = mode
        self.lane_spec: bytes | None = None
        """What lanes know of it; see `lane.client`, whose these three are."""
        self.lane_servers: list[str] = []
        self.lane_version = (-1, -1)

    def __repr__(self) -> str:
        return f"<emberfs.File {self.name!r} mode={self.mode!r}{' closed' if self.closed else ''}>"

    @property
    def size(self) -> int:
        """Length in bytes, unwritten buffers included."""
        return self._file.length

    @property
    def inode_to_read(self) -> Inode | None:
        """The row that reads go by, of a file that does not change through this handle."""
        return None if self._file.writable else self._file.inode

    def _fill(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset`: over a lane, or else through the store's loop."""
        if (lanes := self._store.lanes) is not None:
            counts = lanes.read([self], [(self, offset, len(view))], [view], code=OpenFile.read.__code__)
            if counts is not None and counts[0] >= 0:
                return counts[0]
        return self._run(self._file.read(offset, view))

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._store.forked:
            call.close()
            raise StoreClosed(f"{self.name!r} was opened before this process forked; open it again")
        return self._store.portal.run(call)

    def _check(self, *, writing: bool = False) -> None:
        if self.closed:
            raise StoreClosed(f"the file {self.name!r} is closed")
        _check_mode(self._file, self.mode, writing=writing)

    # --- position --------------------------------------------------------------------------------------------------

    def tell(self) -> int:
        """Where this thread's next read or write begins."""
        offset, steps_on = self._sought.get(threading.get_ident(), (0, -1))
        return offset if steps_on == self._steps_on else self._position

    def _step(self) -> int:
        """`tell`, using a seek up. One that another thread has gone on from since is used up already."""
        offset, steps_on = self._sought.pop(threading.get_ident(), (0, -1))
        if steps_on == self._steps_on:
            return offset
        self._steps_on += 1
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Say where this thread goes on; past the end is allowed. Raises ValueError for a negative place."""
        if self.closed:
            raise StoreClosed(f"the file {self.name!r} is closed")
        offset = _sought(offset, whence, now=self.tell(), end=self.size)
        self._sought[threading.get_ident()] = (offset, self._steps_on)
        self._position = offset
        return offset

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes (all that is left if negative or None); fewer only at the end of the file."""
        self._check()
        with self._turn:
            position = self._step()
            left = max(self._file.length - position, 0)
            size = left if size is None or size < 0 else min(size, left)
            if size == 0:
                self._position = position
                return b""
            if size < READ_AHEAD_BYTES_MIN and not self._file.writable:
                data = self._read_ahead(position, size)
            else:
                target = NewBytes(size)
                count = self._fill(position, target.view)
                data = target.finish(count)
            self._position = position + len(data)
            return data

    read1 = read

    def peek(self, size: int = 1, /) -> bytes:
        """Some bytes from the position on, without moving it: what makes `readline` quick."""
        self._check()
        with self._turn:
            position = self.tell()
            left = max(self._file.length - position, 0)
            if self._file.writable:
                target = NewBytes(min(left, 8192))
                return target.finish(self._run(self._file.read(position, target.view)))
            return self._read_ahead(position, min(left, READ_AHEAD_BYTES_MIN - 1))

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` in place; returns the bytes read."""
        self._check()
        view = writable_view(buffer)
        with self._turn:
            position = self._step()
            if 0 < len(view) < READ_AHEAD_BYTES_MIN and not self._file.writable:
                data = self._read_ahead(position, min(len(view), max(self._file.length - position, 0)))
                count = len(data)
                view[:count] = data
            else:
                count = self._fill(position, view)
            self._position = position + count
            return count

    readinto1 = readinto

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset+size) without using or moving a position."""
        self._check()
        check_range(offset, size)
        with self._turn:
            target = NewBytes(min(size, max(self._file.length - offset, 0)))
            return target.finish(self._fill(offset, target.view) if target.view else 0)

    def _read_ahead(self, position: int, size: int) -> bytes:
        """A small read: from the window, which grows while reads go on where the last window ended."""
        if size == 0:
            return b""
        with self._ahead_lock:
            begin = position - self._ahead_offset
            if begin >= 0 and begin + size <= len(self._ahead):
                return self._ahead[begin : begin + size]
            goes_on = 0 <= begin <= len(self._ahead)
            grown = min(max(self._window_bytes * 2, READ_AHEAD_BYTES_MIN), READ_AHEAD_BYTES_MAX)
            self._window_bytes = grown if goes_on else 0
            want = min(max(size, self._window_bytes), self._file.length - position)
            target = NewBytes(want)
            count = self._fill(position, target.view)
            self._ahead, self._ahead_offset = target.finish(count), position
            return self._ahead[:size]

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, data: Any, /) -> int:
        """Write all of `data` at the position (at the end, in append mode). It must not change until this returns.

        After an error (NoSpace) none of it waits in the buffer, but whole chunks of it may have been written.
        """
        self._check(writing=True)
        view = flat_view(data)
        with self._turn:
            position = self._step()
            if self._file.appends:
                position = self._file.length
            self._run(self._file.write(position, view))
            self._position = position + len(view)
            return len(view)

    def flush(self) -> None:
        """Write out what is buffered (see `OpenFile.flush`)."""
        if not self._ended and self._file.writable:
            with self._turn:
                self._run(self._file.flush())

    def fsync(self) -> None:
        """Flush, and make the length durable too. A file opened with "w" or "x" still gets its name only at close."""
        self._check(writing=True)
        with self._turn:
            self._run(self._file.sync())

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length to `size` (the position, if None)."""
        self._check(writing=True)
        with self._turn:
            length = self.tell() if size is None else size
            self._run(self._file.truncate(length))
            return length

    def close(self) -> None:
        """Write everything; a file opened with "w" or "x" gets its name now."""
        self._end(self._file.close)

    def discard(self) -> None:
        """Close without giving a file opened with "w" or "x" its name."""
        self._end(self._file.discard)

    def _end(self, end: Any) -> None:
        with self._turn:
            if self._ended:
                return
            self._ended = True
            try:
                if self._file.writable:
                    self._run(end())
            finally:
                super().close()

    def __exit__(self, error_type: Any, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._ended = True
            _discard_unclosed(self, self._store, self._file)

    def readable(self) -> bool:
        return self._file.readable

    def writable(self) -> bool:
        return self._file.writable

    def seekable(self) -> bool:
        return True


def _discard_unclosed(owner: File | AsyncFile, store: Store, file: OpenFile) -> None:
    # A finalizer may run in the middle of a call of this very store, so it must not wait for anything.
    if file.writable and not store.forked:
        warnings.warn(f"{owner!r} was never closed: what it wrote is discarded", ResourceWarning, stacklevel=3)
        if not store.closed:
            store.portal.post(file.discard())


def _check_mode(file: OpenFile, mode: str, *, writing: bool) -> None:
    if writing and not file.writable:
        raise io.UnsupportedOperation(f"{file.path!r} is open for reading only (mode {mode!r})")
    if not writing and not file.readable:
        raise io.UnsupportedOperation(f"{file.path!r} is open for writing only (mode {mode!r})")


def _sought(offset: int, whence: int, *, now: int, end: int) -> int:
    """The position that `seek` is asked for."""
    bases = {os.SEEK_SET: 0, os.SEEK_CUR: now, os.SEEK_END: end}
    if whence not in bases:
        raise ValueError(f"whence is 0, 1 or 2: {whence}")
    if bases[whence] + offset < 0:
        raise ValueError(f"cannot seek to {bases[whence] + offset}")
    return bases[whence] + offset


class AsyncFile:
    """A file of the store, opened by `AsyncClient.open`. The same as `File`, awaited; one position.

    Calls take turns: tasks that write to one file write one after the other.
    """

    def __init__(self, store: Store, open_file: OpenFile, mode: str) -> None:
        self._store = store
        self._file = open_file
        self._position = open_file.length if open_file.appends else 0
        self._turn = asyncio.Lock()
        self._ended = False
        self.name = open_file.path
        self.mode = mode

    def __repr__(self) -> str:
        return f"<emberfs.AsyncFile {self.name!r} mode={self.mode!r}{' closed' if self._ended else ''}>"

    @property
    def size(self) -> int:
        """Length in bytes, unwritten buffers included."""
        return self._file.length

    def _check(self, *, writing: bool = False) -> None:
        if self._ended:
            raise StoreClosed(f"the file {self.name!r} is closed")
        _check_mode(self._file, self.mode, writing=writing)

    async def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._store.forked:
            call.close()
            raise StoreClosed(f"{self.name!r} was opened before this process forked; open it again")
        return await self._store.portal.run_async(call)

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; past the end is allowed. Raises ValueError for a negative one."""
        self._position = _sought(offset, whence, now=self._position, end=self.size)
        return self._position

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes (all that is left if negative)."""
        self._check()
        async with self._turn:
            left = max(self._file.length - self._position, 0)
            target = NewBytes(left if size < 0 else min(size, left))
            count = await self._run(self._file.read(self._position, target.view)) if target.view else 0
            self._position += count
            return target.finish(count)

    async def readinto(self, buffer: Any) -> int:
        """Fill `buffer` in place; returns the bytes read."""
        self._check()
        view = writable_view(buffer)
        async with self._turn:
            count = await self._run(self._file.read(self._position, view))
            self._position += count
            return count

    async def write(self, data: Any) -> int:
        """Write all of `data` at the position (at the end, in append mode). It must not change until this returns.

        After an error (NoSpace) none of it waits in the buffer, but whole chunks of it may have been written.
        """
        self._check(writing=True)
        view = flat_view(data)
        async with self._turn:
            position = self._file.length if self._file.appends else self._position
            await self._run(self._file.write(position, view))
            self._position = position + len(view)
            return len(view)

    async def flush(self) -> None:
        """Write out what is buffered."""
        if not self._ended and self._file.writable:
            async with self._turn:
                await self._run(self._file.flush())

    async def fsync(self) -> None:
        """Flush, and make the length durable too. A file opened with "w" or "x" still gets its name only at close."""
        self._check(writing=True)
        async with self._turn:
            await self._run(self._file.sync())

    async def truncate(self, size: int | None = None) -> int:
        """Set the length to `size` (the position, if None)."""
        self._check(writing=True)
        async with self._turn:
            length = self._position if size is None else size
            await self._run(self._file.truncate(length))
            return length

    async def close(self) -> None:
        """Write everything; a file opened with "w" or "x" gets its name now."""
        await self._end(self._file.close)

    async def discard(self) -> None:
        """Close without giving a file opened with "w" or "x" its name."""
        await self._end(self._file.discard)

    async def _end(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self._turn:
            if not self._ended:
                self._ended = True
                await self._run(end())

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._ended = True
            _discard_unclosed(self, self._store, self._file)

    async def __aenter__(self) -> AsyncFile:
        return self

    async def __aexit__(self, error_type: Any, *_: object) -> None:
        await (self.close() if error_type is None else self.discard())
