"""Where a step's outputs lie, and which attempt of each task has won.

    <root>/steps/<identity>/00003-<attempt>.exchange    an attempt's data
    <root>/steps/<identity>/00003.won                   which attempt counts; created once, by whoever is first

Invariants: a `.won` is complete when it is there, names data that was complete before it, and is never changed, only
taken away when its data turns out to be damaged. So a step can be read while others work on it, and done work outlives
every process.

Does not know: what the outputs mean.
"""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fsspec.implementations.local import LocalFileSystem

from ..exchange import ExchangeIndex
from ..files import FileOutput
from ..sources import StorageOptions, open_kept

_FORMAT = 1


class Output(msgspec.Struct, kw_only=True):
    """What an attempt has made."""

    attempt: str
    rows: int
    size_bytes: int
    url: str = ""
    index: bytes = b""
    files: list[FileOutput] = []
    inputs: list[str] = []
    """The attempts that it read."""
    seconds: float = 0.0
    cpu_s: float = 0.0
    spilled_bytes: int = 0
    """The most that lay in temporary files at a moment."""
    worker: str = ""
    format: int = _FORMAT

    def exchange(self) -> ExchangeIndex:
        """Where its partitions are."""
        return _index(self.index)


@functools.lru_cache(maxsize=4096)
def _index(data: bytes) -> ExchangeIndex:
    return msgspec.msgpack.decode(data, type=ExchangeIndex)


def new_attempt() -> str:
    """A name that no other attempt has."""
    return uuid.uuid4().hex[:12]


def create(filesystem: Any, path: str, data: bytes) -> None:
    """Makes a file that was not there, whole or not at all. Raises `FileExistsError`; of any number at once, for all
    but one."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, data, mode="create")
        return
    # fsspec looks first and writes then; a link is made in one step.
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.link(temporary, path)
    finally:
        os.unlink(temporary)


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one step."""

    url: str
    storage_options: StorageOptions = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The step's."""
        return self.url.rsplit("/", 1)[-1]

    def data_url(self, index: int, attempt: str) -> str:
        return f"{self.url}/{index:05d}-{attempt}.exchange"

    def _won(self, index: int) -> tuple[Any, str]:
        return open_kept(f"{self.url}/{index:05d}.won", self.storage_options)

    def prepare(self) -> None:
        filesystem, path = open_kept(self.url, self.storage_options)
        filesystem.makedirs(path, exist_ok=True)

    def winner(self, index: int) -> Output | None:
        """What counts for a task, if anything does yet. A manifest that cannot be read counts as none, and goes."""
        filesystem, path = self._won(index)
        try:
            data = filesystem.cat_file(path)
        except FileNotFoundError:
            return None
        try:
            output = msgspec.msgpack.decode(data, type=Output)
        except msgspec.MsgspecError:
            output = None
        if output is None or output.format != _FORMAT:
            self.drop(index)
            return None
        return output

    def winners(self) -> dict[int, Output]:
        """All that counts, by task: one listing, and one read for each."""
        filesystem, path = open_kept(self.url, self.storage_options)
        found: dict[int, Output] = {}
        try:
            names = filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return found
        for name in names:
            stem, _, suffix = name.rsplit("/", 1)[-1].partition(".")
            if suffix == "won" and (output := self.winner(int(stem))) is not None:
                found[int(stem)] = output
        return found

    def publish(self, index: int, output: Output) -> Output:
        """Makes the output count, unless another does already; gives back the one that counts."""
        filesystem, path = self._won(index)
        try:
            create(filesystem, path, msgspec.msgpack.encode(output))
        except FileExistsError:
            winner = self.winner(index)
            if winner is None:
                return self.publish(index, output)
            if winner.attempt != output.attempt:
                self._remove(output)
            return winner
        return output

    def drop(self, index: int) -> None:
        """What counted for a task no longer does; its data is damaged, gone, or read what no longer counts."""
        filesystem, path = self._won(index)
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            pass

    def _remove(self, output: Output) -> None:
        for url in [output.url, *(file.staged_url for file in output.files)]:
            if url:
                filesystem, path = open_kept(url, self.storage_options)
                try:
                    filesystem.rm_file(path)
                except FileNotFoundError:
                    pass
