"""DuckDB's door to any fsspec URL.

`UrlFileSystem` is what DuckDB is given for a protocol. It keeps whole URLs and finds the filesystem behind each
one when it is used, so one session may read from several stores of the same protocol, and a URL that is only a
string in the data costs nothing. Plain paths and `file://` stay with DuckDB's own reader.

Two things DuckDB gets wrong on plain fsspec files are put right here:
- it seeks and reads one shared handle from several threads (2.0): `SharedFile` gives each its own position;
- it turns an exception of the filesystem into text, so failures are kept, for the session to raise again.

DuckDB opens a file several times, since it binds a query twice and opens what was bound again to read it: whoever runs
one query at a time may have each file of a store opened once for it (`keeping`).

What is read often is read from `Copies`, where the session has some, by DuckDB itself.

This module does not know of sessions or SQL beyond the URLs in it.
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from .copies import Copies
from .errors import InvalidArgument

STAGING_PREFIX = ".emberflow-"
"""Directories that start so hold a write that is not finished. Readers pass them by."""

_NATIVE_PROTOCOLS = frozenset({"file", "local"})
# Handles of these keep their position per thread, so one may be sought and read from many at once.
_POSITIONAL_PROTOCOLS = frozenset({"ember"})
_FAILURES_KEPT_MAX = 16
_FILES_KEPT_MAX = 256
_QUOTED_PROTOCOL = re.compile(r"""['"]([A-Za-z][A-Za-z0-9+.\-]*)://""")
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_GLOB_CHARACTERS = frozenset("*?[")

StorageOptions = Mapping[str, Mapping[str, Any]]


def protocols_in(query: str, values: Iterable[object] = ()) -> set[str]:
    """The protocols of the URLs quoted in `query` or given among the parameter `values`, less `file`."""
    found = set(_QUOTED_PROTOCOL.findall(query))
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, str) and (match := _PROTOCOL.match(item)):
                found.add(match[1])
    return found - _NATIVE_PROTOCOLS


def open_url(url: str, options: StorageOptions) -> tuple[Any, str]:
    """The fsspec filesystem behind `url` and the path in it. Raises `InvalidArgument` for an unknown protocol."""
    match = _PROTOCOL.match(url)
    given = options.get(match[1], {}) if match else {}
    try:
        if match and "url" in given:  # url_to_fs has an argument of that name.
            kind = fsspec.get_filesystem_class(match[1])
            return kind(**{**given, **kind._get_kwargs_from_urls(url)}), str(kind._strip_protocol(url))
        filesystem, path = url_to_fs(url, **given)
    except ValueError as error:
        raise InvalidArgument(f"cannot open {url!r}: {error}") from error
    return filesystem, path


def open_kept(url: str, options: StorageOptions) -> tuple[Any, str]:
    """`open_url` for what jobs keep: nobody wants it back, so a store's trash is passed by."""
    return open_url(url, {**options, "ember": {**options.get("ember", {}), "trash": False}})


def url_of(filesystem: Any, path: str) -> str:
    """What DuckDB is told to open: the bare path on a local disk, else the whole URL."""
    if protocol_of(filesystem) in _NATIVE_PROTOCOLS:
        return path
    return str(filesystem.unstrip_protocol(path))


def expand_directories(urls: str | Iterable[str], *, pattern: str, options: StorageOptions) -> list[str]:
    """Each directory among `urls` becomes `directory/pattern`; files and patterns stay as they are.

    Costs one metadata call per URL that is not a pattern.
    """
    expanded = []
    for url in [urls] if isinstance(urls, str) else list(urls):
        if not _GLOB_CHARACTERS.intersection(url):
            filesystem, path = open_url(url, options)
            if filesystem.isdir(path):
                expanded.append(f"{url.rstrip('/')}/{pattern}")
                continue
        expanded.append(url)
    if not expanded:
        raise InvalidArgument("no path was given to read")
    return expanded


def protocol_of(filesystem: Any) -> str:
    """The protocol by which a filesystem is known."""
    protocol = filesystem.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])


class Failures:
    """The last exceptions raised below DuckDB, found again by their text. Safe to use from many threads."""

    def __init__(self) -> None:
        self._kept: deque[Exception] = deque(maxlen=_FAILURES_KEPT_MAX)

    def add(self, error: Exception) -> None:
        self._kept.append(error)

    def find(self, message: str) -> Exception | None:
        """The latest failure whose text DuckDB quotes in `message`; it is forgotten."""
        for error in reversed(list(self._kept)):
            if (text := str(error)) and text in message:
                self._kept.remove(error)
                return error
        return None


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _noted(method: _Method) -> _Method:
    """Keep what `method` raises in `self.failures`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.failures.add(error)
            raise

    return cast(_Method, call)


class UrlFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """One protocol as DuckDB sees it: every path is a whole URL, and each goes to the filesystem it names."""

    cachable = False

    def __init__(
        self, protocol: str, *, options: StorageOptions, failures: Failures, copies: Copies | None = None
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.options = options
        self.failures = failures
        self.copies = copies if protocol in _POSITIONAL_PROTOCOLS else None
        self._latest: weakref.WeakValueDictionary[tuple[int, str], SharedFile] = weakref.WeakValueDictionary()
        """The file that a thread of DuckDB's opened last by a path: it opens, and asks then what the path is like. By
        the thread's number, since Python forgets threads that are not its own as soon as they leave."""
        self._kept: dict[str, Any] | None = None
        """Handles by URL, while each file is opened once."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def unstrip_protocol(self, name: str) -> str:
        return name

    def _at(self, url: str) -> tuple[Any, str]:
        return open_url(url, self.options)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """In the block each file of a store is opened once, and read as it was then. For one query at a time."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def _opened(self, path: str) -> SharedFile | None:
        """The file that DuckDB has just opened, in this thread, when it asks by its path what the file is like."""
        return self._latest.get((threading.get_ident(), path))

    @_noted
    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        filesystem, inner = self._at(path)
        if mode != "rb":
            return OutputFile(filesystem.open(inner, mode, **kwargs), failures=self.failures)
        kept = self._kept_handle(path)
        file = SharedFile(filesystem, inner, failures=self.failures, copies=self.copies, kept=kept)
        self._latest[threading.get_ident(), path] = file
        return file

    def _kept_handle(self, url: str) -> Any | None:
        """The handle of a file that is opened once; None if none are kept, or no more of them."""
        kept = self._kept
        if kept is None or self.protocol not in _POSITIONAL_PROTOCOLS:
            return None
        handle = kept.get(url)
        if handle is None and len(kept) < _FILES_KEPT_MAX:
            handle = kept.setdefault(url, self._handle(url))
        return handle

    @_noted
    def glob(self, path: str, **kwargs: Any) -> list[str]:
        filesystem, inner = self._at(path)
        if self.copies is None:
            return self._found(filesystem, inner, **kwargs)
        is_pattern = not _GLOB_CHARACTERS.isdisjoint(inner)
        urls = self._found(filesystem, inner, **kwargs) if is_pattern else [url_of(filesystem, inner)]
        local = self.copies.stand_ins(path, urls, self._handle)
        if local is not None:
            return local
        return urls if is_pattern else self._found(filesystem, inner, **kwargs)

    def _found(self, filesystem: Any, pattern: str, **kwargs: Any) -> list[str]:
        if self.protocol in _POSITIONAL_PROTOCOLS and _GLOB_CHARACTERS.isdisjoint(pattern):
            # What fsspec's glob would give, without the way through its event loop.
            names = [pattern] if self._is_there(filesystem, pattern) else []
        else:
            names = filesystem.glob(pattern, **kwargs)
        return [url_of(filesystem, name) for name in names if f"/{STAGING_PREFIX}" not in name]

    def _is_there(self, filesystem: Any, path: str) -> bool:
        with suppress(OSError):
            if self._kept_handle(url_of(filesystem, path)) is not None:
                return True
        return bool(filesystem.exists(path))

    def _handle(self, url: str) -> Any:
        filesystem, inner = self._at(url)
        return filesystem.open(inner, "rb")

    @_noted
    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        filesystem, inner = self._at(path)
        return dict(filesystem.info(inner, **kwargs))

    @_noted
    def size(self, path: str) -> int:
        file = self._opened(path)
        return int(self.info(path)["size"]) if file is None else file.size_bytes

    @_noted
    def modified(self, path: str) -> datetime:
        file = self._opened(path)
        if file is not None and file.modified is not None:
            return file.modified
        filesystem, inner = self._at(path)
        try:
            modified: datetime = filesystem.modified(inner)
        except NotImplementedError:
            # DuckDB wants one; nothing is cached by it, because the session turns that cache off.
            return datetime.fromtimestamp(0, UTC)
        return modified

    @_noted
    def isfile(self, path: str) -> bool:
        filesystem, inner = self._at(path)
        return bool(filesystem.isfile(inner))

    @_noted
    def isdir(self, path: str) -> bool:
        filesystem, inner = self._at(path)
        return bool(filesystem.isdir(inner))

    @_noted
    def exists(self, path: str, **kwargs: Any) -> bool:
        filesystem, inner = self._at(path)
        return bool(filesystem.exists(inner, **kwargs))

    @_noted
    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        filesystem, inner = self._at(path)
        return list(filesystem.ls(inner, detail=detail, **kwargs))

    @_noted
    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        filesystem, inner = self._at(path)
        filesystem.makedirs(inner, exist_ok=True)

    @_noted
    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        filesystem, inner = self._at(path)
        filesystem.rm(inner, recursive=recursive, maxdepth=maxdepth)


class OutputFile:
    """A file open for writing. DuckDB 1.4 drops a compressed one without closing it, so that closes it too."""

    def __init__(self, handle: Any, *, failures: Failures) -> None:
        self._handle = handle
        self.failures = failures

    @_noted
    def write(self, data: bytes) -> int:
        return int(self._handle.write(data))

    @_noted
    def flush(self) -> None:
        self._handle.flush()

    @_noted
    def close(self) -> None:
        self._handle.close()

    def __del__(self) -> None:
        if not self._handle.closed:
            self.close()


class SharedFile:
    """A file open for reading that DuckDB may use from many threads at once.

    DuckDB uses a handle in one of two ways. Random access: any number of threads, each seeks and then reads. One
    stream (compressed files): reads follow each other, one at a time, but each may come from another thread. So a
    seek counts for the next read of its own thread, and a read without one goes on where the last read ended.
    """

    def __init__(
        self,
        filesystem: Any,
        path: str,
        *,
        failures: Failures,
        copies: Copies | None = None,
        kept: Any | None = None,
    ) -> None:
        """`kept`: a handle of the file that others use, too."""
        self._filesystem = filesystem
        self._path = path
        self._copies = copies
        self._url = url_of(filesystem, path)
        # Kept open where that is safe: it goes on reading the same file when the name is given to a new one.
        self._handle = kept
        self._closes_handle = kept is None
        if kept is None and protocol_of(filesystem) in _POSITIONAL_PROTOCOLS:
            self._handle = filesystem.open(path, "rb")
        self.size_bytes: int = filesystem.info(path)["size"] if self._handle is None else self._handle.size
        self.modified: datetime | None = None
        """When it was, if the handle knows: of a file that is open nobody need be asked."""
        if self._handle is not None:
            self.modified = datetime.fromtimestamp(self._handle.inode_to_read.mtime_ns / 1e9, UTC)
        self._lock = threading.Lock()
        self._position = 0
        self._streamed_reads = 0
        self._sought: dict[int, tuple[int, int]] = {}
        self.failures = failures

    def seek(self, offset: int) -> int:
        with self._lock:
            self._position = offset
            self._sought[threading.get_ident()] = (offset, self._streamed_reads)
        return offset

    def tell(self) -> int:
        with self._lock:
            return self._sought.get(threading.get_ident(), (self._position, 0))[0]

    @_noted
    def read(self, size: int = -1) -> bytes:
        start = self._start_of_read()
        end = self.size_bytes if size < 0 else min(start + size, self.size_bytes)
        data = self._read_at(start, end) if start < end else b""
        with self._lock:
            self._position = start + len(data)
        return data

    def close(self) -> None:
        if self._handle is not None and self._closes_handle:
            self._handle.close()

    def _start_of_read(self) -> int:
        with self._lock:
            offset, streamed_reads = self._sought.pop(threading.get_ident(), (None, 0))
            # A seek that another thread has streamed on from since is used up.
            if offset is not None and streamed_reads == self._streamed_reads:
                return offset
            self._streamed_reads += 1
            return self._position

    def _read_at(self, start: int, end: int) -> bytes:
        if self._handle is None:
            return bytes(self._filesystem.cat_file(self._path, start=start, end=end))
        self._handle.seek(start)
        data = bytes(self._handle.read(end - start))
        if self._copies is not None:
            self._copies.note(self._url, self._handle.inode_to_read, len(data))
        return data
