"""`EmberFileSystem`: the store as fsspec sees it, so that pandas, pyarrow, DuckDB, zarr and torch can use it.

    fsspec.filesystem("ember", url="ember:///data/store").cat_file("/corpus/a.txt")
    pandas.read_parquet("ember:///data/store/corpus/a.parquet")

Blocking calls go straight to the store in the caller's thread, without fsspec's loop thread; the underscore methods
are the awaitable twins for `asynchronous=True`. Nothing is cached: a listing is what the store says now.

Names are absolute paths inside the store. `rm` moves to the trash (storage option `trash=False` removes for good);
writing into a directory that does not exist makes it (`auto_mkdir=False` refuses).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.utils import stringify_path

from . import operations
from .client.attachment import Attachment, LazyAttachment
from .client.buffers import flat_view
from .client.core import Core, NewFile
from .client.file import OpenFile, open_file
from .client.handle import AsyncFile, File
from .client.sync import Client
from .errors import NotFound
from .urls import split_url

T = TypeVar("T")


_CREATING = frozenset(
    (operations.copy, operations.mkdir, operations.move, operations.pipe, operations.put_file, operations.touch)
)
"""Operations that make a store that is not there; the others raise NotFound."""


class HeldFile(File):
    """A file written inside an fsspec transaction: closed, it waits for `commit` to get its name."""

    _held = False

    @property
    def closed(self) -> bool:
        """True once the writer has closed it."""
        return self._held or self._ended

    def close(self) -> None:
        """Take no more writes; keep what was written for `commit`."""
        self._held = True

    def commit(self) -> None:
        """Name the file."""
        self._held = False
        super().close()

    def discard(self) -> None:
        """Forget the file."""
        self._held = False
        super().discard()


class EmberFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """fsspec's interface to a store. `url`: the store, e.g. ember:///data/store; None: EMBERLINE_URL."""

    protocol = "ember"
    root_marker = "/"
    async_impl = True
    mirror_sync_methods = True

    def __init__(
        self, url: str | None = None, *, trash: bool = True, auto_mkdir: bool = True, **storage_options: Any
    ) -> None:
        super().__init__(**storage_options)
        self._trash = trash
        self._auto_mkdir = auto_mkdir
        self._attachment = LazyAttachment(url, None)

    # --- the store -------------------------------------------------------------------------------------------------

    def _attached(self, *, creates: bool = False) -> Attachment:
        return self._attachment.get(creates=creates)

    def _do(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        attachment = self._attached(creates=call in _CREATING)
        core = attachment.live()
        return attachment.store.portal.run(call(core, *args))

    async def _ado(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, mutates: bool = False) -> T:
        attachment = self._attached(creates=call in _CREATING)
        core = attachment.live()
        return await attachment.store.portal.run_async(call(core, *args), mutates=mutates)

    @property
    def client(self) -> Client:
        """A new blocking client of the same store (made if it is not there); close it after use."""
        return Client(self._attachment.url)

    def close(self) -> None:
        """Let go of the store. The next call opens it again."""
        self._attachment.close()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        path = stringify_path(path)
        if path.startswith("ember:"):
            path = split_url(path)[1]
        if path[-1:] == "/":
            path = path.rstrip("/")
        if path[:1] != "/":
            path = "/" + path
        return path

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        store = split_url(stringify_path(path))[0]
        return {} if store is None else {"url": store}

    def unstrip_protocol(self, name: str) -> str:
        """The full URL of a path, in the explicit form."""
        return f"{self._attachment.url}/!{self._strip_protocol(name)}"

    @property
    def fsid(self) -> str:
        """The store's id."""
        return f"ember_{self._attached().store.id}"

    # --- looking ---------------------------------------------------------------------------------------------------

    def info(self, path: Any, **_: Any) -> dict[str, Any]:
        """name, size, type and times of one path."""
        return self._do(operations.info, self._strip_protocol(path))

    async def _info(self, path: Any, **_: Any) -> dict[str, Any]:
        return await self._ado(operations.info, self._strip_protocol(path))

    def ls(self, path: Any, detail: bool = True, **_: Any) -> list[Any]:
        """Entries of a directory, or the file itself."""
        return self._do(operations.ls, self._strip_protocol(path), detail)

    async def _ls(self, path: Any, detail: bool = True, **_: Any) -> list[Any]:
        return await self._ado(operations.ls, self._strip_protocol(path), detail)

    def exists(self, path: Any, **_: Any) -> bool:
        """Whether anything is at `path`."""
        return self._kind(path) is not None

    async def _exists(self, path: Any, **_: Any) -> bool:
        try:
            return await self._ado(operations.kind, self._strip_protocol(path)) is not None
        except NotFound:  # no store either
            return False

    def _kind(self, path: Any) -> str | None:
        try:
            return self._do(operations.kind, self._strip_protocol(path))
        except NotFound:  # no store either
            return None

    def isfile(self, path: Any) -> bool:
        """Whether `path` is a file."""
        return self._kind(path) == "file"

    def isdir(self, path: Any) -> bool:
        """Whether `path` is a directory."""
        return self._kind(path) == "directory"

    def modified(self, path: Any) -> datetime.datetime:
        """When the content last changed."""
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def created(self, path: Any) -> datetime.datetime:
        """When the row last changed: the nearest thing to a creation time that is kept."""
        return datetime.datetime.fromtimestamp(self.info(path)["ctime"], tz=datetime.UTC)

    # fsspec's walks take any OSError of a listing for an empty directory: what is wrong with the store itself is said
    # before they begin.

    def _check_store(self) -> None:
        """Raise what is wrong with the store; that there is none is a listing's to say."""
        with contextlib.suppress(NotFound):
            self._attached()

    async def _walk(self, path: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        self._check_store()
        async for step in super()._walk(path, *args, **kwargs):
            yield step

    async def _glob(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_store()
        return await super()._glob(path, *args, **kwargs)

    async def _find(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_store()
        return await super()._find(path, *args, **kwargs)

    # --- whole files -----------------------------------------------------------------------------------------------

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Bytes [start, end) of a file; negative counts from its end."""
        if start is None and end is None:
            return self._do(Core.get, self._strip_protocol(path))
        return self._do(operations.cat, self._strip_protocol(path), start, end)

    async def _cat_file(self, path: Any, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return await self._ado(operations.cat, self._strip_protocol(path), start, end)

    def cat_ranges(
        self,
        paths: Sequence[Any],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Bytes of many ranges in one batch. `on_error="return"` puts an error in its range's place."""
        names = [self._strip_protocol(path) for path in paths]
        return self._do(operations.cat_ranges, names, starts, ends, on_error)

    async def _cat_ranges(
        self,
        paths: Sequence[Any],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        names = [self._strip_protocol(path) for path in paths]
        return await self._ado(operations.cat_ranges, names, starts, ends, on_error)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        """Make `value` the file at `path`, atomically. `mode="create"` refuses an existing one.

        `kwargs`: permissions, mtime_ns, chunk_size_bytes, as for `open`.
        """
        if self._intrans:
            with self.open(path, "wb" if mode == "overwrite" else "xb", **kwargs) as file:
                file.write(value)
            return
        new = _new_file(kwargs, overwrite=mode != "create")
        self._do(operations.pipe, self._strip_protocol(path), flat_view(value), new, self._auto_mkdir)

    async def _pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        new = _new_file(kwargs, overwrite=mode != "create")
        name = self._strip_protocol(path)
        await self._ado(operations.pipe, name, flat_view(value), new, self._auto_mkdir, mutates=True)

    async def _cp_file(self, path1: Any, path2: Any, **_: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        await self._ado(operations.copy, source, target, self._auto_mkdir, mutates=True)

    async def _get_file(self, rpath: Any, lpath: Any, callback: Any = DEFAULT_CALLBACK, **_: Any) -> None:
        if os.path.isdir(lpath):
            return
        path = self._strip_protocol(rpath)
        await self._ado(operations.get_file, path, os.fspath(lpath), callback)

    async def _put_file(
        self, lpath: Any, rpath: Any, mode: str = "overwrite", callback: Any = DEFAULT_CALLBACK, **_: Any
    ) -> None:
        path = self._strip_protocol(rpath)
        if os.path.isdir(lpath):
            await self._makedirs(path, exist_ok=True)
            return
        await self._ado(operations.put_file, os.fspath(lpath), path, mode, self._auto_mkdir, callback)

    # --- names -----------------------------------------------------------------------------------------------------

    def mkdir(self, path: Any, create_parents: bool = True, **_: Any) -> None:
        """Make a directory. Raises AlreadyExists."""
        self._do(operations.mkdir, self._strip_protocol(path), create_parents, False)

    async def _mkdir(self, path: Any, create_parents: bool = True, **_: Any) -> None:
        await self._ado(operations.mkdir, self._strip_protocol(path), create_parents, False, mutates=True)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Make a directory and its parents."""
        self._do(operations.mkdir, self._strip_protocol(path), True, exist_ok)

    async def _makedirs(self, path: Any, exist_ok: bool = False) -> None:
        await self._ado(operations.mkdir, self._strip_protocol(path), True, exist_ok, mutates=True)

    def rm_file(self, path: Any) -> None:
        """Remove one file."""
        self._do(operations.remove, self._strip_protocol(path), False, self._trash, "file")

    async def _rm_file(self, path: Any, **_: Any) -> None:
        await self._ado(operations.remove, self._strip_protocol(path), False, self._trash, "file", mutates=True)

    def rmdir(self, path: Any) -> None:
        """Remove an empty directory."""
        self._do(operations.remove, self._strip_protocol(path), False, False, "directory")

    async def _rm(
        self, path: Any, recursive: bool = False, maxdepth: int | None = None, trash: bool | None = None, **_: Any
    ) -> None:
        trash = self._trash if trash is None else trash
        if recursive and maxdepth is not None:
            for name in reversed(await self._expand_path(path, recursive=True, maxdepth=maxdepth)):
                await self._ado(operations.remove_if_empty, name, trash, mutates=True)
            return
        # A tree goes as one: what was expanded from a pattern is removed root by root.
        for name in await self._expand_path(path, recursive=False):
            want = "any" if recursive else "file"
            await self._ado(operations.remove, name, recursive, trash, want, mutates=True)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """Move a file or tree, atomically, into `path2` if that is a directory."""
        if isinstance(path1, (list, tuple)) or isinstance(path2, (list, tuple)) or maxdepth is not None:
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)
            return
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        into = stringify_path(path2).endswith("/")
        self._do(operations.move, source, target, into, self._auto_mkdir)

    async def _mv_file(self, path1: Any, path2: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        await self._ado(operations.move, source, target, False, self._auto_mkdir, mutates=True)

    def touch(self, path: Any, truncate: bool = True, **_: Any) -> None:
        """Make an empty file, or (`truncate=False`) set its time."""
        self._do(operations.touch, self._strip_protocol(path), truncate, self._auto_mkdir)

    # --- open ------------------------------------------------------------------------------------------------------

    def _open(self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: Any) -> File:
        attachment = self._attached(creates=mode[0] in "wxa")
        core = attachment.live()
        new = _new_file(kwargs, overwrite=True)

        def opening() -> Coroutine[Any, Any, OpenFile]:
            return open_file(core, path, mode, new)

        try:
            handle = attachment.store.portal.run(opening())
        except NotFound:
            if mode == "rb" or mode.startswith("r") or not self._auto_mkdir:
                raise
            self.makedirs(self._parent(path), exist_ok=True)
            handle = attachment.store.portal.run(opening())
        held = not autocommit and mode[0] in "wx"
        return (HeldFile if held else File)(attachment.store, handle, mode)

    def open(self, path: Any, mode: str = "rb", **kwargs: Any) -> Any:
        """Open a file. Outside a transaction a binary one is opened without fsspec's detour."""
        if "b" in mode and not self._intrans and "compression" not in kwargs:
            return self._open(self._strip_protocol(path), mode, **kwargs)
        return super().open(path, mode, **kwargs)

    async def open_async(self, path: Any, mode: str = "rb", **kwargs: Any) -> Any:
        """Open a file whose methods are awaited."""
        attachment = self._attached(creates=mode[0] in "wxa")
        core = attachment.live()
        call = open_file(core, self._strip_protocol(path), mode, _new_file(kwargs, overwrite=True))
        return AsyncFile(attachment.store, await attachment.store.portal.run_async(call), mode)


def _new_file(options: dict[str, Any], *, overwrite: bool) -> NewFile:
    """How to make a file, from what fsspec passes on; what is not ours is other filesystems' business."""
    known = {name: options[name] for name in ("permissions", "mtime_ns", "chunk_size_bytes") if name in options}
    return NewFile(overwrite=overwrite, **known)
