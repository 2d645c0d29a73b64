"""A folder of checkpoints at any URL that fsspec knows: what saving and loading ask of a file system.

Invariants:
  - What `write` and `put` wrote is durable when they return; `put` gives a name its whole content at once or not at
    all.
  - So is the name of what `make` made when it returns. `settle` makes the names in a folder durable where that is a
    step of its own (a local disk). It comes before the file that says that the folder is whole.

A local folder is used without fsspec, which has no word for fsync. A store of ours makes a file durable when it is
closed, and so does S3. On a file system that does neither, a machine that loses power may lose the last checkpoints.

It does not know what the files mean. Names are relative to the place: `folder` or `folder/file`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from emberfs.errors import Corruption, DataLost
from fsspec.implementations.local import LocalFileSystem


class Place(Protocol):
    """Where checkpoints are."""

    url: str

    def folders(self) -> list[str]:
        """Names of the folders, in no order; none where the place is not there yet."""

    def make(self, folder: str) -> None:
        """Make a folder, and the place with it; their names are durable."""

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """A new file from pieces in order."""

    def put(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""

    def settle(self, folder: str) -> None:
        """Make the names in a folder durable."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""

    def open(self, name: str) -> IO[bytes]:
        """A file to seek and `readinto`. Raises FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder. Raises where that cannot be told now."""

    def touched_s(self, folder: str) -> float:
        """Unix time of the last change of the folder or of a file in it, in seconds."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all in it; nothing if it is not there."""


def open_place(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Place:
    """The place at a URL or local path. `storage_options` are fsspec's."""
    fs, path = fsspec.url_to_fs(os.fspath(url), **(storage_options or {}))
    return LocalPlace(Path(path)) if isinstance(fs, LocalFileSystem) else RemotePlace(fs, path)


def is_lost(error: OSError) -> bool:
    """Whether what could not be read is damaged or gone, and not only out of reach for now."""
    return isinstance(error, FileNotFoundError | Corruption | DataLost) or error.errno == errno.EIO


def exists(fs: Any, path: str) -> bool:
    """Unlike fsspec's own, which many file systems have, it does not say no where it cannot tell: a checkpoint that is
    out of reach would be none, and be swept."""
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


class LocalPlace:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.url = str(root)

    def folders(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self._root) if entry.is_dir()]
        except FileNotFoundError:
            return []

    def make(self, folder: str) -> None:
        path = self._root / folder
        new = [path, *takewhile(lambda parent: not parent.exists(), path.parents)]
        path.mkdir(parents=True)
        for each in new:
            _sync_folder(each.parent)

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        with (self._root / name).open("xb", buffering=0) as file:
            for piece in pieces:
                while piece:
                    piece = piece[file.write(piece) :]
            os.fsync(file.fileno())

    def put(self, name: str, content: bytes) -> None:
        path = self._root / name
        new = path.with_name(f".{path.name}.new")
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync_folder(path.parent)

    def settle(self, folder: str) -> None:
        _sync_folder(self._root / folder)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return (self._root / name).open("rb", buffering=0)

    def exists(self, name: str) -> bool:
        return (self._root / name).exists()

    def touched_s(self, folder: str) -> float:
        path = self._root / folder
        return max(each.stat().st_mtime for each in (path, *path.iterdir()))

    def remove(self, name: str) -> None:
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemotePlace:
    """A folder of any other file system."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._removal = {"trash": False} if "ember" in _protocols(fs) else {}
        """A store's trash would keep the space of every checkpoint for a while longer."""
        self.url = str(fs.unstrip_protocol(root))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def folders(self) -> list[str]:
        self._fs.invalidate_cache()  # others write here too
        try:
            entries = self._fs.ls(self._root or "/", detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    def make(self, folder: str) -> None:
        self._fs.makedirs(self._path(folder), exist_ok=True)

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        with self._fs.open(self._path(name), "wb") as file:
            for piece in pieces:
                file.write(piece)

    def put(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(self._path(name), content)

    def settle(self, folder: str) -> None:
        pass

    def read(self, name: str) -> bytes:
        content: bytes = self._fs.cat_file(self._path(name))
        return content

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self._fs.open(self._path(name), "rb")
        return file

    def exists(self, name: str) -> bool:
        return exists(self._fs, self._path(name))

    def touched_s(self, folder: str) -> float:
        files = self._fs.ls(self._path(folder), detail=False)
        times = [self._fs.modified(path).timestamp() for path in files]
        return max(times, default=0.0)

    def remove(self, name: str) -> None:
        try:
            self._fs.rm(self._path(name), recursive=True, **self._removal)
        except FileNotFoundError:
            pass


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
