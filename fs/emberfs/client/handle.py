"""Files as Python programs hold them: `File` (blocking, an `io.BufferedIOBase`) and `AsyncFile`.

Bounds: a file that is read in small steps keeps one window of at most READ_AHEAD_BYTES_MAX; one that is written keeps
at most one chunk. Reads of READ_AHEAD_BYTES_MIN and more go straight into the caller's memory.

Positions: a seek counts for the next read or write of its own thread; one without goes on where the last one ended,
whichever thread that was in. So many threads may each seek and read one handle, and a stream may be passed from
thread to thread. DuckDB does both.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import StoreClosed
from .buffers import NewBytes, flat_view, writable_view
from .file import OpenFile

if TYPE_CHECKING:
    from ..embedded import EmbeddedStore

T = TypeVar("T")

READ_AHEAD_BYTES_MIN = 64 << 10
READ_AHEAD_BYTES_MAX = 1 << 20


class File(io.BufferedIOBase):
    """A file of the store, opened by `Client.open`. Binary; wrap it in `io.TextIOWrapper` for text.

    Leaving a `with` block by an exception discards a file opened with "w" or "x": no half-written file gets a name.
    """

    def __init__(self, store: EmbeddedStore, open_file: OpenFile, mode: str) -> None:
        self._store = store
        self._file = open_file
        self._ended = False
        self._position = open_file.length if open_file.appends else 0
        self._sought: dict[int, tuple[int, int]] = {}
        """Thread -> (where it sought, how many steps had gone on without a seek by then)."""
        self._steps_on = 0
        self._ahead_lock = threading.Lock()
        self._ahead = b""
        self._ahead_offset = 0
        self._window_bytes = 0
        self.name = open_file.path
        self.mode = mode

    def __repr__(self) -> str:
        return f"<emberfs.File {self.name!r} mode={self.mode!r}{' closed' if self.closed else ''}>"

    @property
    def size(self) -> int:
        """Length in bytes, unwritten buffers included."""
        return self._file.length

    def _run(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        if self._store.forked:
            call.close()
            raise StoreClosed(f"{self.name!r} was opened before this process forked; open it again")
        return self._store.portal.run(call, mutates=mutates)

    def _check(self, *, writing: bool = False) -> None:
        if self.closed:
            raise StoreClosed(f"the file {self.name!r} is closed")
        if writing and not self._file.writable:
            raise io.UnsupportedOperation(f"{self.name!r} is open for reading only (mode {self.mode!r})")
        if not writing and not self._file.readable:
            raise io.UnsupportedOperation(f"{self.name!r} is open for writing only (mode {self.mode!r})")

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
        if whence:
            offset += self.tell() if whence == os.SEEK_CUR else self.size
        if offset < 0:
            raise ValueError(f"cannot seek to {offset}")
        self._sought[threading.get_ident()] = (offset, self._steps_on)
        self._position = offset
        return offset

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes (all that is left if negative or None); fewer only at the end of the file."""
        self._check()
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
            count = self._run(self._file.read(position, target.view))
            data = target.finish() if count == size else target.finish()[:count]
        self._position = position + len(data)
        return data

    read1 = read

    def peek(self, size: int = 1, /) -> bytes:
        """Some bytes from the position on, without moving it: what makes `readline` quick."""
        self._check()
        position = self.tell()
        left = max(self._file.length - position, 0)
        if self._file.writable:
            target = NewBytes(min(left, 8192))
            self._run(self._file.read(position, target.view))
            return target.finish()
        return self._read_ahead(position, min(left, READ_AHEAD_BYTES_MIN - 1))

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` in place; returns the bytes read."""
        self._check()
        view = writable_view(buffer)
        position = self._step()
        if 0 < len(view) < READ_AHEAD_BYTES_MIN and not self._file.writable:
            data = self._read_ahead(position, min(len(view), max(self._file.length - position, 0)))
            count = len(data)
            view[:count] = data
        else:
            count = self._run(self._file.read(position, view))
        self._position = position + count
        return count

    readinto1 = readinto

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset+size) without using or moving a position."""
        self._check()
        target = NewBytes(min(size, max(self._file.length - offset, 0)))
        if target.view:
            self._run(self._file.read(offset, target.view))
        return target.finish()

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
            self._run(self._file.read(position, target.view))
            self._ahead, self._ahead_offset = target.finish(), position
            return self._ahead[:size]

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, data: Any, /) -> int:
        """Write all of `data` at the position (at the end, in append mode). It must not change until this returns."""
        self._check(writing=True)
        view = flat_view(data)
        position = self._step()
        if self._file.appends:
            position = self._file.length
        self._run(self._file.write(position, view), mutates=True)
        self._position = position + len(view)
        return len(view)

    def flush(self) -> None:
        """Write out what is buffered (see `OpenFile.flush`)."""
        if not self._ended and self._file.writable:
            self._run(self._file.flush(), mutates=True)

    def fsync(self) -> None:
        """Flush, and make the length durable too. A file opened with "w" or "x" still gets its name only at close."""
        self._check(writing=True)
        self._run(self._file.sync(), mutates=True)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length to `size` (the position, if None)."""
        self._check(writing=True)
        length = self.tell() if size is None else size
        if length < 0:
            raise ValueError(f"a length is not negative: {length}")
        self._run(self._file.truncate(length), mutates=True)
        return length

    def close(self) -> None:
        """Write everything; a file opened with "w" or "x" gets its name now."""
        self._end(self._file.close)

    def discard(self) -> None:
        """Close without giving a file opened with "w" or "x" its name."""
        self._end(self._file.discard)

    def _end(self, end: Any) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            if self._file.writable:
                self._run(end(), mutates=True)
        finally:
            super().close()

    def __exit__(self, error_type: Any, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # A finalizer may run in the middle of a call of this very store, so it must not wait for anything.
        if getattr(self, "_ended", True):
            return
        self._ended = True
        if self._file.writable and not self._store.forked:
            warnings.warn(f"{self!r} was never closed: what it wrote is discarded", ResourceWarning, stacklevel=2)
            if not self._store.closed:
                self._store.portal.post(self._file.discard())

    def readable(self) -> bool:
        return self._file.readable

    def writable(self) -> bool:
        return self._file.writable

    def seekable(self) -> bool:
        return True


class AsyncFile:
    """A file of the store, opened by `AsyncClient.open`. The same as `File`, awaited; one position."""

    def __init__(self, store: EmbeddedStore, open_file: OpenFile, mode: str) -> None:
        self._store = store
        self._file = open_file
        self._position = open_file.length if open_file.appends else 0
        self._ended = False
        self.name = open_file.path
        self.mode = mode

    @property
    def size(self) -> int:
        """Length in bytes, unwritten buffers included."""
        return self._file.length

    async def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._ended:
            call.close()
            raise StoreClosed(f"the file {self.name!r} is closed")
        return await self._store.portal.run_async(call)

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes (all that is left if negative)."""
        left = max(self._file.length - self._position, 0)
        target = NewBytes(left if size < 0 else min(size, left))
        if target.view:
            await self._run(self._file.read(self._position, target.view))
        self._position += len(target.view)
        return target.finish()

    async def readinto(self, buffer: Any) -> int:
        """Fill `buffer` in place; returns the bytes read."""
        count = await self._run(self._file.read(self._position, writable_view(buffer)))
        self._position += count
        return count

    async def write(self, data: Any) -> int:
        """Write all of `data` at the position (at the end, in append mode)."""
        if not self._file.writable:
            raise io.UnsupportedOperation(f"{self.name!r} is open for reading only (mode {self.mode!r})")
        view = flat_view(data)
        position = self._file.length if self._file.appends else self._position
        await self._run(self._file.write(position, view))
        self._position = position + len(view)
        return len(view)

    async def flush(self) -> None:
        """Write out what is buffered."""
        await self._run(self._file.flush())

    async def fsync(self) -> None:
        """Flush, and make the length durable too."""
        await self._run(self._file.sync())

    async def truncate(self, size: int) -> int:
        """Set the length."""
        await self._run(self._file.truncate(size))
        return size

    async def close(self) -> None:
        """Write everything; a file opened with "w" or "x" gets its name now."""
        if not self._ended:
            await self._run(self._file.close())
            self._ended = True

    async def discard(self) -> None:
        """Close without giving a file opened with "w" or "x" its name."""
        if not self._ended:
            await self._run(self._file.discard())
            self._ended = True

    async def __aenter__(self) -> AsyncFile:
        return self

    async def __aexit__(self, error_type: Any, *_: object) -> None:
        await (self.close() if error_type is None else self.discard())
