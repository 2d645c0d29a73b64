"""`AsyncClient`: the awaitable door to a store. The same calls as `Client`, for programs with an event loop.

A call never blocks the caller's loop for I/O: what is at hand is answered at once, the rest goes on in the store's
own loop. A cancelled call leaves only when the store has let go of the caller's buffers.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..errors import EmberError
from ..ledger import ClientStats
from ..messages import Collected, TrashEntry, UsageReply
from ..stores import Config, Store
from ..transport import allocate
from ..types import CHUNK_SIZE_BYTES_DEFAULT, Inode
from .attachment import Attachment
from .batch import BatchRead, BatchWrite, batch_read, batch_write, check_sums, destinations, note_sums, open_files
from .buffers import flat_view, writable_view
from .core import Core, NewFile, Range, check_range
from .file import open_file
from .granted import GrantedFiles
from .handle import AsyncFile, File
from .namespace import Namespace, page_after

T = TypeVar("T")


class AsyncClient:
    """A store, awaited. Get one from `emberfs.connect_async`; close it, or use it in an `async with` block.

    It has no `io_queue`: `asyncio.gather` over its calls keeps as many reads in the air.
    """

    def __init__(self, url: str | None = None, config: Config | None = None) -> None:
        self._attachment = Attachment(url, config)
        self._granted = GrantedFiles()

    def __repr__(self) -> str:
        return f"<emberfs.AsyncClient {self.url}{' closed' if self._attachment.closed else ''}>"

    def __reduce__(self) -> tuple[type[AsyncClient], tuple[str, Config | None]]:
        return (type(self), (self.url, self._attachment.config))

    @property
    def url(self) -> str:
        """The URL of the store."""
        return self._attachment.url

    async def _run(self, call: Callable[[Core], Coroutine[Any, Any, T]]) -> T:
        core = self._attachment.live()
        return await self._attachment.store.portal.run_async(call(core))

    async def _change(self, call: Callable[[Core], Coroutine[Any, Any, T]]) -> T:
        core = self._attachment.live()
        return await self._attachment.store.portal.run_async(call(core), mutates=True)

    # --- files -----------------------------------------------------------------------------------------------------

    async def open(
        self,
        path: str,
        mode: str = "rb",
        *,
        chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT,
        permissions: int = 0o644,
        mtime_ns: int | None = None,
    ) -> AsyncFile:
        """Open a file: modes rb r+b wb w+b xb ab a+b. "w" and "x" name the file at close; see `AsyncFile`.

        The last three arguments are for a file that is made. Raises NotFound, AlreadyExists, IsADirectory, Conflict (a
        second appender).
        """
        new = NewFile(permissions=permissions, mtime_ns=mtime_ns, chunk_size_bytes=chunk_size_bytes)
        handle = await self._run(lambda core: open_file(core, path, mode, new))
        return AsyncFile(self._attachment.store, handle, mode)

    async def put(
        self,
        path: str,
        data: Any,
        *,
        overwrite: bool = True,
        chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT,
        permissions: int = 0o644,
        mtime_ns: int | None = None,
    ) -> Inode:
        """Make `data` the file at `path`, durably and atomically: readers see the old file or the whole new one."""
        view = flat_view(data)
        new = NewFile(
            overwrite=overwrite, permissions=permissions, mtime_ns=mtime_ns, chunk_size_bytes=chunk_size_bytes
        )
        return await self._change(lambda core: core.put(path, view, new))

    async def get(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset+length) of a file, cut at its end. Raises NotFound, IsADirectory, Corruption."""
        return await self._run(lambda core: core.get(path, offset, length))

    def buffer(self, size: int) -> memoryview:
        """Zeroed memory for reads and writes with the fewest copies: servers of this host use it in place.

        It goes with the last view of it. A forked child shares it with its parent. Raises LimitExceeded, OSError.
        """
        return allocate(size)

    async def get_into(self, path: str, buffer: Any, *, offset: int = 0) -> int:
        """Fill `buffer` from `offset` of a file; returns the bytes read."""
        view = writable_view(buffer)
        check_range(offset, len(view))

        async def fill(core: Core) -> int:
            return await core.read_range(Range(await core.file(path), offset, view, path))

        return await self._run(fill)

    async def batch_read(
        self, items: Sequence[BatchRead], into: Any, *, raise_errors: bool = True, sums: array[int] | None = None
    ) -> list[Any]:
        """Read many (path or open File, offset, length) in one step, straight into the caller's memory.

        `into` is one buffer per item, or one buffer that is filled item after item. Returns the bytes read per item;
        with `raise_errors=False` a failed item's place holds its error instead, else the first error is raised.
        `sums`: an `array("I")` of one element per item, which gets the CRC32C of what was read of it; that of a failed
        item is any.

        Raises ValueError where buffers or sums are not one per item, or a buffer is too small.
        """
        check_sums(sums, items)
        for file in open_files(items, self._attachment.store):
            await _flushed(file)
        results = await self._run(lambda core: batch_read(core, items, into, raise_errors=raise_errors))
        if sums is not None:
            note_sums(sums, destinations(items, into), results)
        return results

    async def read_granted(
        self,
        grant: bytes,
        items: Sequence[tuple[int, int, int]],
        into: Sequence[Any],
        *,
        sums: array[int] | None = None,
    ) -> Sequence[int | EmberError]:
        """Read many (file, offset, length) under a grant, one into each buffer: all that a reader can do.

        A file is a number that the grant has for it. Returns the bytes read, or what is wrong, per item; what was
        never written, or was removed, is zeros. `sums` as in `batch_read`. Raises AccessDenied where the grant is not
        good for it.
        """
        check_sums(sums, items)
        results = await self._run(lambda core: self._granted.fetch(core, grant, items, into))
        if sums is not None:
            note_sums(sums, destinations(items, into), results)
        return results

    async def write_granted(self, grants: Sequence[bytes], items: Sequence[tuple[int, int, Any]]) -> None:
        """Write many (file, offset, data) under grants to write, durably when this returns: all that a writer can do.

        A file is a number that one of the grants has for it; its length stays as it is. Each chunk is written
        atomically, the batch is not. Raises AccessDenied where no grant is good for it.
        """
        await self._change(lambda core: self._granted.write(core, grants, items))

    async def batch_write(self, items: Sequence[BatchWrite], *, whole_chunks: bool = False) -> None:
        """Write many (path or File open for writing, offset, data), durably when this returns; one flush for all.

        Paths must exist or are made. Each chunk is written atomically, the batch is not. `whole_chunks`: every chunk
        that is begun here will be filled, piece by piece. The store then takes room for all of it at once, which a
        chunk that stays short wastes; without it, a chunk is written anew whenever it outgrows a power of two.
        """
        for file in open_files(items, self._attachment.store):
            await _flushed(file)
        await self._change(lambda core: batch_write(core, items, whole_chunks=whole_chunks))

    # --- names -----------------------------------------------------------------------------------------------------

    async def stat(self, path: str, *, follow: bool = True) -> Inode:
        """The inode at `path`; `follow=False` looks at a symbolic link itself."""
        return await self._run(lambda core: core.stat(path, follow))

    async def exists(self, path: str) -> bool:
        """Whether anything is at `path`."""
        return await self._run(lambda core: Namespace(core).exists(path))

    async def list(self, path: str = "/") -> list[tuple[str, Inode]]:
        """(name, inode) of each entry of a directory, sorted by the bytes of the names."""
        return await self._run(lambda core: Namespace(core).entries(path))

    async def iterate(self, path: str = "/") -> AsyncIterator[tuple[str, Inode]]:
        """`list`, a page at a time: for directories too large to hold."""
        after: str | None = ""
        while after is not None:
            entries, after = await self._run(page_after(path, after))
            for entry in entries:
                yield entry

    async def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False, mode: int = 0o755) -> Inode:
        """Make a directory."""
        return await self._change(lambda core: Namespace(core).mkdir(path, mode, parents, exist_ok))

    async def remove(self, path: str, *, recursive: bool = False, trash: bool = True, want: str = "any") -> str:
        """Remove a file, link or directory. Returns the id `trash_restore` takes, or "" with `trash=False`.

        Raises DirectoryNotEmpty unless `recursive`. `want`: "file" or "directory" refuses the other.
        """
        return await self._change(lambda core: Namespace(core).remove(path, recursive, trash, want))

    async def rename(self, source: str, target: str, *, overwrite: bool = True) -> None:
        """Move a file or a whole tree, atomically; over an existing file or empty directory if `overwrite`."""
        await self._change(lambda core: Namespace(core).rename(source, target, overwrite))

    async def link(self, source: str, target: str) -> Inode:
        """Give a file a second name."""
        return await self._change(lambda core: Namespace(core).link(source, target))

    async def symlink(self, target: str, path: str) -> Inode:
        """Make a symbolic link at `path` that says `target`."""
        return await self._change(lambda core: Namespace(core).symlink(target, path))

    async def readlink(self, path: str) -> str:
        """What the symbolic link at `path` says."""
        return await self._run(lambda core: Namespace(core).readlink(path))

    async def truncate(self, path: str, length: int) -> Inode:
        """Set a file's length; what is added reads as zero."""
        return await self._change(lambda core: core.truncate(path, length))

    async def set_attributes(
        self,
        path: str,
        *,
        mode: int | None = None,
        mtime_ns: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> Inode:
        """Change permission bits, modification time or owner."""
        return await self._change(lambda core: Namespace(core).set_attributes(path, mode, mtime_ns, uid, gid))

    async def xattrs(self, path: str) -> dict[str, bytes]:
        """All extended attributes."""
        return await self._run(lambda core: Namespace(core).xattrs(path))

    async def set_xattr(self, path: str, name: str, value: bytes | None) -> None:
        """Set one extended attribute (None removes it)."""
        await self._change(lambda core: Namespace(core).set_xattr(path, name, value))

    # --- trash and upkeep ------------------------------------------------------------------------------------------

    async def trash_list(self) -> Sequence[TrashEntry]:
        """What is in the trash, oldest first."""
        return await self._run(lambda core: Namespace(core).trash_list())

    async def trash_restore(self, id: str, path: str = "") -> Inode:
        """Put a trash entry back where it was, or at `path`."""
        return await self._change(lambda core: Namespace(core).trash_restore(id, path))

    async def trash_empty(self, *, older_than_s: float = 0.0) -> None:
        """Remove for good what has been in the trash longer than that."""
        await self._change(lambda core: Namespace(core).trash_empty(older_than_s))

    async def collect_garbage(self, *, force: bool = False) -> Collected:
        """Free the chunks of removed files that are due (`force`: all)."""
        return await self._change(lambda core: Namespace(core).collect_garbage(force))

    async def usage(self) -> UsageReply:
        """Counts of files, directories and bytes."""
        return await self._run(lambda core: Namespace(core).usage())

    async def space(self) -> dict[str, int]:
        """Bytes used and free: see `Client.space`."""
        self._attachment.live()
        store = self._attachment.store
        return await store.portal.run_async(store.space())

    @property
    def store(self) -> Store:
        """What it is a client of: for tools that look at it from inside."""
        self._attachment.live()
        return self._attachment.store

    def stats(self) -> ClientStats:
        """What the clients that this process has of the store did, and where the time went."""
        self._attachment.live()
        return self._attachment.store.portal.ledger.stats()

    async def close(self) -> None:
        """Let go of the store. Open files of this client must be closed before."""
        self._attachment.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _flushed(file: File | AsyncFile) -> None:
    if isinstance(file, File):
        file.flush()
    else:
        await file.flush()
