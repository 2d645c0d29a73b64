"""Many byte ranges of files read in one step, straight into the caller's memory where the filesystem can do that.

`ember://`: one `batch_read` of the store, which checks what it returns. A local path: one native call. Anything else:
fsspec's `cat_ranges`, and a copy.

Whoever overwrites the files while they are read is found out by their seal, read again behind each opening (for
`cat_ranges`, behind each batch): bytes are of the files that were asked for, or there is an error.

`Files` travel to other processes as their address. A forked child forgets what its parent had open, and opens its own:
a store's files are closed to it. Any number of threads may read.
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from emberfs.plain_files import read_files
from emberfs.types import BATCH_ITEMS_MAX

from ..errors import TokensInvalid
from ..sources import StorageOptions, open_url, protocol_of

if TYPE_CHECKING:
    from emberfs import Client, File

_DESCRIPTORS_MAX = 256


@dataclass(frozen=True, slots=True)
class Ranges:
    """Byte ranges of files, and memory that they fill one after the other."""

    paths: Sequence[str]
    """Of each range, in the filesystem."""
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    into: memoryview
    """As long as all ranges together."""

    def parts(self, count: int) -> Iterator[Ranges]:
        """The same in parts of at most `count` ranges."""
        if 0 < len(self.paths) <= count:
            yield self
            return
        done = 0
        for begin in range(0, len(self.paths), count):
            some = slice(begin, begin + count)
            lengths = self.lengths[some]
            size = int(lengths.sum())
            yield Ranges(self.paths[some], self.offsets[some], lengths, self.into[done : done + size])
            done += size


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of equal length, each of them in one range of a file or in several that follow each other. To work out where
    many are costs little more than where one is."""

    paths: Sequence[str]
    """Of each range, as are `offsets` and `lengths`."""
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    bounds: Sequence[int]
    """Row r has the ranges [bounds[r], bounds[r + 1])."""

    def ranges(self, begin: int, end: int, into: memoryview) -> Ranges:
        """The ranges of rows [begin, end), which `into` has room for."""
        some = slice(self.bounds[begin], self.bounds[end])
        return Ranges(self.paths[some], self.offsets[some], self.lengths[some], into)


@dataclass(frozen=True, slots=True)
class Seal:
    """A file that is put behind the others, and taken away before them: while it holds this, they are the same ones."""

    path: str
    held: bytes

    @contextmanager
    def unbroken(self, read: Callable[[str], bytes]) -> Iterator[None]:
        """What the block opens is of the sealed files. Raises `TokensInvalid`, whatever the block raised, if what
        `read` gives says that they were replaced."""
        try:
            yield
        finally:
            try:
                now = read(self.path)
            except FileNotFoundError:
                now = b""
            if now != self.held:
                raise TokensInvalid(
                    f"the files of {self.path} were replaced or removed while they were read: open the dataset again, "
                    "and write a new corpus to a new place"
                )


class RangeReader(Protocol):
    """Reads ranges of files that do not change."""

    def read(self, ranges: Ranges) -> None: ...

    def close(self) -> object:
        """Lets go of the files."""


class Files:
    """The files of one filesystem, opened when they are first read."""

    def __init__(self, url: str, storage_options: StorageOptions, seal: Seal) -> None:
        self._url = url
        self._storage_options = storage_options
        self._seal = seal
        self._reader: RangeReader | None = None
        self._lock = threading.Lock()
        _everyone.add(self)

    def read(self, ranges: Ranges) -> None:
        """Fills the memory. Raises `TokensInvalid` for a file that is too short or was replaced, and what the
        filesystem raises."""
        reader = self._reader
        if reader is None:
            with self._lock:
                if self._reader is None:
                    self._reader = _reader_for(open_url(self._url, self._storage_options)[0], self._seal)
                reader = self._reader
        reader.read(ranges)

    def close(self) -> None:
        """Lets go of the files; a read opens them again."""
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def forget(self) -> None:
        """What a parent had open is not ours to close."""
        self._reader = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return Files, (self._url, self._storage_options, self._seal)


_everyone: weakref.WeakSet[Files] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for files in list(_everyone):
        files.forget()


os.register_at_fork(after_in_child=_forget_after_fork)


def _reader_for(filesystem: Any, seal: Seal) -> RangeReader:
    protocol = protocol_of(filesystem)
    if protocol == "ember":
        return EmberRanges(filesystem.client, seal)
    return LocalRanges(seal) if protocol in ("file", "local") else FsspecRanges(filesystem, seal)


class LocalRanges:
    """Files of this machine, the latest ones kept open: what replaces them is not read in their stead."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, ranges: Ranges) -> None:
        for part in ranges.parts(_DESCRIPTORS_MAX):
            # Held here too, so that none is closed under us.
            opened = {path: self._descriptor(path) for path in dict.fromkeys(part.paths)}
            numbers = array("i", [opened[path].number for path in part.paths])
            done = read_files(numbers, part.offsets, part.lengths, part.into)
            if done < len(part.paths):
                raise _too_short(part.paths[done])

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _descriptor(self, path: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(path)
            if found is None:
                with self._seal.unbroken(_bytes_of):
                    opened = _Descriptor(path)
                found = self._open[path] = opened
                if len(self._open) > _DESCRIPTORS_MAX:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return found


def _bytes_of(path: str) -> bytes:
    return Path(path).read_bytes()


class _Descriptor:
    """An open file, closed when nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class EmberRanges:
    """Files of a store. They stay open: so a file that is replaced is read on, and then an error, never the new one."""

    def __init__(self, client: Client, seal: Seal) -> None:
        self._client = client
        self._seal = seal
        self._open: dict[str, File] = {}
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _let_go, self._client, self._open, os.getpid())

    def read(self, ranges: Ranges) -> None:
        for part in ranges.parts(BATCH_ITEMS_MAX):
            opened = {path: self._file(path) for path in dict.fromkeys(part.paths)}
            files, lengths = [opened[path] for path in part.paths], part.lengths.tolist()
            counts = self._client.batch_read(list(zip(files, part.offsets.tolist(), lengths, strict=True)), part.into)
            if counts != lengths:
                short = next(n for n, length in enumerate(lengths) if counts[n] < length)
                raise _too_short(part.paths[short])

    def _file(self, path: str) -> File:
        file = self._open.get(path)
        if file is None:
            with self._lock:
                file = self._open.get(path)
                if file is None:
                    with self._seal.unbroken(self._client.get):
                        opened = self._client.open(path, "rb")
                    file = self._open[path] = opened
        return file


def _let_go(client: Client, files: dict[str, File], pid: int) -> None:
    if pid == os.getpid():
        for file in files.values():
            file.close()
        client.close()


class FsspecRanges:
    """Any other filesystem. Nothing stays open, so the seal is read with every batch."""

    def __init__(self, filesystem: Any, seal: Seal) -> None:
        self._filesystem = filesystem
        self._seal = seal

    def read(self, ranges: Ranges) -> None:
        ends = ranges.offsets + ranges.lengths
        with self._seal.unbroken(self._filesystem.cat_file):
            found = self._filesystem.cat_ranges(
                list(ranges.paths), ranges.offsets.tolist(), ends.tolist(), on_error="raise"
            )
        begin = 0
        for path, length, data in zip(ranges.paths, ranges.lengths.tolist(), found, strict=True):
            if len(data) != length:
                raise _too_short(path)
            ranges.into[begin : begin + length] = data
            begin += length

    def close(self) -> None:
        pass


def _too_short(path: str) -> TokensInvalid:
    return TokensInvalid(
        f"{path} is shorter than the shard it should be: `emberline corpus verify` looks at all of them"
    )
