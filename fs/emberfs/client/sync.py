"""`Client`: the blocking door to a store.

Safe to use from many threads, inside a running event loop, and after a fork (the child then opens the store anew,
with a client id of its own and nothing of the parent's state). Pickles as its URL and settings.

Paths are absolute inside the store ("/corpus/a.parquet"; a missing first slash is forgiven), ".." stops at the root.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ..errors import EmberError
from ..ledger import ClientStats
from ..maintenance import Maintenance
from ..messages import Collected, TrashEntry, UsageReply
from ..stores import Config, Store
from ..transport import allocate
from ..types import BATCH_ITEMS_MAX, CHUNK_SIZE_BYTES_DEFAULT, Inode
from .attachment import Attachment
from .batch import BatchRead, BatchWrite, batch_read, batch_write, check_sums, destinations, note_sums, open_files
from .buffers import flat_view, writable_view
from .core import Core, NewFile, Range, check_range
from .file import open_file
from .granted import GrantedFiles
from .handle import File
from .io_queue import IoQueue
from .namespace import Namespace, page_after

T = TypeVar("T")


class Client:
    """A store, blocking. Get one from `emberfs.connect`; close it, or use it in a `with` block."""

    def __init__(self, url: str | None = None, config: Config | None = None) -> None:
        self._attachment = Attachment(url, config)
        self._granted = GrantedFiles()

    def __repr__(self) -> str:
        return f"<emberfs.Client {self.url}{' closed' if self._attachment.closed else ''}>"

    def __reduce__(self) -> tuple[type[Client], tuple[str, Config | None]]:
        return (type(self), (self.url, self._attachment.config))

    @property
    def url(self) -> str:
        """The URL of the store."""
        return self._attachment.url

    def _run(self, call: Callable[[Core], Coroutine[Any, Any, T]]) -> T:
        attachment = self._attachment
        core = attachment.live()
        return attachment.store.portal.run(call(core))

    # --- files -----------------------------------------------------------------------------------------------------

    def open(
        self,
        path: str,
        mode: str = "rb",
        *,
        chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT,
        permissions: int = 0o644,
        mtime_ns: int | None = None,
    ) -> File:
        """Open a file: modes rb r+b wb w+b xb ab a+b. "w" and "x" name the file at close; see `File`.

        The last three arguments are for a file that is made. Raises NotFound, AlreadyExists, IsADirectory, Conflict (a
        second appender).
        """
        new = NewFile(permissions=permissions, mtime_ns=mtime_ns, chunk_size_bytes=chunk_size_bytes)
        handle = self._run(lambda core: open_file(core, path, mode, new))
        return File(self._attachment.store, handle, mode)

    def put(
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
        return self._run(lambda core: core.put(path, view, new))

    def get(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset+length) of a file, cut at its end. Raises NotFound, IsADirectory, Corruption."""
        return self._run(lambda core: core.get(path, offset, length))

    def buffer(self, size: int) -> memoryview:
        """Zeroed memory for reads and writes with the fewest copies: servers of this host use it in place.

        It goes with the last view of it. A forked child shares it with its parent. Raises LimitExceeded, OSError.
        """
        return allocate(size)

    def get_into(self, path: str, buffer: Any, *, offset: int = 0) -> int:
        """Fill `buffer` from `offset` of a file; returns the bytes read."""
        view = writable_view(buffer)
        check_range(offset, len(view))

        async def fill(core: Core) -> int:
            return await core.read_range(Range(await core.file(path), offset, view, path))

        return self._run(fill)

    def batch_read(
        self, items: Sequence[BatchRead], into: Any, *, raise_errors: bool = True, sums: array[int] | None = None
    ) -> list[Any]:
        """Read many (path or open File, offset, length) in one step, straight into the caller's memory.

        `into` is one buffer per item, or one buffer that is filled item after item. Returns the bytes read per item;
        with `raise_errors=False` a failed item's place holds its error instead, else the first error is raised.
        `sums`: an `array("I")` of one element per item, which gets the CRC32C of what was read of it; that of a failed
        item is any. Where the bytes were checked after the last copy it comes from there, and costs next to nothing.

        Raises ValueError where buffers or sums are not one per item, or a buffer is too small.
        """
        self._attachment.live()
        check_sums(sums, items)
        lanes = self._attachment.store.lanes
        files = open_files(items, self._attachment.store)
        for file in files:
            file.flush()
        results: list[Any] | None = None
        if lanes is not None and files and len(items) <= BATCH_ITEMS_MAX:
            ours = [file for file in files if isinstance(file, File)]
            results = lanes.read(ours, list(items), into, code=batch_read.__code__, sums=sums)
        is_summed = results is not None and -1 not in results
        if results is None:
            results = self._run(lambda core: batch_read(core, items, into, raise_errors=raise_errors))
        elif left := [place for place, count in enumerate(results) if count < 0]:
            views = destinations(items, into)
            rest, buffers = [items[place] for place in left], [views[place] for place in left]
            found = self._run(lambda core: batch_read(core, rest, buffers, raise_errors=raise_errors))
            for place, result in zip(left, found, strict=True):
                results[place] = result
        if sums is not None and not is_summed:
            note_sums(sums, destinations(items, into), results)
        return results

    def read_granted(
        self,
        grant: bytes,
        items: Sequence[tuple[int, int, int]],
        into: Sequence[Any],
        *,
        sums: array[int] | None = None,
    ) -> list[int | EmberError]:
        """Read many (file, offset, length) under a grant, one into each buffer: all that a reader can do.

        A file is a number that the grant has for it. Returns the bytes read, or what is wrong, per item; what was
        never written, or was removed, is zeros. `sums` as in `batch_read`. Raises AccessDenied where the grant is not
        good for it.
        """
        check_sums(sums, items)
        return self._granted.read(self._attachment, grant, items, into, sums)

    def write_granted(self, grants: Sequence[bytes], items: Sequence[tuple[int, int, Any]]) -> None:
        """Write many (file, offset, data) under grants to write, durably when this returns: all that a writer can do.

        A file is a number that one of the grants has for it; its length stays as it is. Each chunk is written
        atomically, the batch is not. Raises AccessDenied where no grant is good for it.
        """
        self._run(lambda core: self._granted.write(core, grants, items))

    def batch_write(self, items: Sequence[BatchWrite], *, whole_chunks: bool = False) -> None:
        """Write many (path or File open for writing, offset, data), durably when this returns; one flush for all.

        Paths must exist or are made. Each chunk is written atomically, the batch is not. `whole_chunks`: every chunk
        that is begun here will be filled, piece by piece. The store then takes room for all of it at once, which a
        chunk that stays short wastes; without it, a chunk is written anew whenever it outgrows a power of two.
        """
        for file in open_files(items, self._attachment.store):
            file.flush()
        self._run(lambda core: batch_write(core, items, whole_chunks=whole_chunks))

    def io_queue(self, depth: int = 64) -> IoQueue:
        """Reads and writes that are begun now and waited for later, at most `depth`. Close it, or use `with`."""
        core = self._attachment.live()
        return IoQueue(self._attachment.store, core, depth)

    # --- names -----------------------------------------------------------------------------------------------------

    def stat(self, path: str, *, follow: bool = True) -> Inode:
        """The inode at `path`; `follow=False` looks at a symbolic link itself."""
        attachment = self._attachment
        core = attachment.live()
        return attachment.store.portal.run(core.stat(path, follow))

    def exists(self, path: str) -> bool:
        """Whether anything is at `path`."""
        return self._run(lambda core: Namespace(core).exists(path))

    def list(self, path: str = "/") -> list[tuple[str, Inode]]:
        """(name, inode) of each entry of a directory, sorted by the bytes of the names."""
        return self._run(lambda core: Namespace(core).entries(path))

    def iterate(self, path: str = "/") -> Iterator[tuple[str, Inode]]:
        """`list`, a page at a time: for directories too large to hold."""
        after: str | None = ""
        while after is not None:
            entries, after = self._run(page_after(path, after))
            yield from entries

    def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False, mode: int = 0o755) -> Inode:
        """Make a directory."""
        return self._run(lambda core: Namespace(core).mkdir(path, mode, parents, exist_ok))

    def remove(self, path: str, *, recursive: bool = False, trash: bool = True, want: str = "any") -> str:
        """Remove a file, link or directory. Returns the id `trash_restore` takes, or "" with `trash=False`.

        Raises DirectoryNotEmpty unless `recursive`. `want`: "file" or "directory" refuses the other.
        """
        return self._run(lambda core: Namespace(core).remove(path, recursive, trash, want))

    def rename(self, source: str, target: str, *, overwrite: bool = True) -> None:
        """Move a file or a whole tree, atomically; over an existing file or empty directory if `overwrite`."""
        self._run(lambda core: Namespace(core).rename(source, target, overwrite))

    def link(self, source: str, target: str) -> Inode:
        """Give a file a second name."""
        return self._run(lambda core: Namespace(core).link(source, target))

    def symlink(self, target: str, path: str) -> Inode:
        """Make a symbolic link at `path` that says `target`."""
        return self._run(lambda core: Namespace(core).symlink(target, path))

    def readlink(self, path: str) -> str:
        """What the symbolic link at `path` says."""
        return self._run(lambda core: Namespace(core).readlink(path))

    def truncate(self, path: str, length: int) -> Inode:
        """Set a file's length; what is added reads as zero."""
        return self._run(lambda core: core.truncate(path, length))

    def set_attributes(
        self,
        path: str,
        *,
        mode: int | None = None,
        mtime_ns: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> Inode:
        """Change permission bits, modification time or owner."""
        return self._run(lambda core: Namespace(core).set_attributes(path, mode, mtime_ns, uid, gid))

    def xattrs(self, path: str) -> dict[str, bytes]:
        """All extended attributes."""
        return self._run(lambda core: Namespace(core).xattrs(path))

    def set_xattr(self, path: str, name: str, value: bytes | None) -> None:
        """Set one extended attribute (None removes it)."""
        self._run(lambda core: Namespace(core).set_xattr(path, name, value))

    # --- trash and upkeep ------------------------------------------------------------------------------------------

    def trash_list(self) -> Sequence[TrashEntry]:
        """What is in the trash, oldest first."""
        return self._run(lambda core: Namespace(core).trash_list())

    def trash_restore(self, id: str, path: str = "") -> Inode:
        """Put a trash entry back where it was, or at `path`."""
        return self._run(lambda core: Namespace(core).trash_restore(id, path))

    def trash_empty(self, *, older_than_s: float = 0.0) -> None:
        """Remove for good what has been in the trash longer than that."""
        self._run(lambda core: Namespace(core).trash_empty(older_than_s))

    def collect_garbage(self, *, force: bool = False) -> Collected:
        """Free the chunks of removed files that are due (`force`: all)."""
        return self._run(lambda core: Namespace(core).collect_garbage(force))

    def usage(self) -> UsageReply:
        """Counts of files, directories and bytes."""
        return self._run(lambda core: Namespace(core).usage())

    def space(self) -> dict[str, int]:
        """Bytes: `used_bytes` in chunks, `free_bytes` that new data may still take.

        Of a cluster both are what its files see; `disk_used_bytes` and `disk_free_bytes` count each of the `replicas`.
        """
        self._attachment.live()
        store = self._attachment.store
        return store.portal.run(store.space())

    @property
    def maintenance(self) -> Maintenance:
        """fsck, scrub, dump, load, info: what an operator does. Raises UnsupportedOperation for a cluster."""
        from ..embedded import EmbeddedStore  # It has a client in it.

        self._attachment.live()
        store = self._attachment.store
        if not isinstance(store, EmbeddedStore):
            raise io.UnsupportedOperation(
                f"{store.url} is a cluster, which its servers look after: see emberfs.cluster.maintenance"
            )
        return Maintenance(store)

    @property
    def store(self) -> Store:
        """What it is a client of: for tools that look at it from inside."""
        self._attachment.live()
        return self._attachment.store

    def stats(self) -> ClientStats:
        """What the clients that this process has of the store did, and where the time went."""
        self._attachment.live()
        return self._attachment.store.portal.ledger.stats()

    def close(self) -> None:
        """Let go of the store. Open files of this client must be closed before."""
        self._attachment.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
