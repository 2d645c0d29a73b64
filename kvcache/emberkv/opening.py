"""The segments that a writer fills: as files of a store, or under grants.

To open a file for writing takes as long as to write some MiB, so a thread of its own does it as soon as a place in it
is known; what is put next is copied meanwhile. Under a grant nothing is opened.

Does not know: pages, or who writes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from emberfs import Client, File
from emberfs.errors import EmberError

Piece = tuple[int, int, memoryview]
"""(segment, offset there, what is to be written)."""


class OpenSegments(Protocol):
    """Safe to use from many threads."""

    def begin(self, number: int, in_use: Collection[int]) -> None:
        """This one is written to soon; those that are not in use are not."""

    def write(self, pieces: Sequence[Piece], grants: Mapping[int, bytes]) -> None:
        """Durable when this returns; the rest of each chunk comes with later pages. `grants`: by segment. Raises what
        the store raises."""

    def close(self) -> None:
        """Nothing more is written."""


class GrantedSegments:
    """Of a writer that knows no names: see `grants`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def begin(self, number: int, in_use: Collection[int]) -> None:
        pass

    def write(self, pieces: Sequence[Piece], grants: Mapping[int, bytes]) -> None:
        self._client.write_granted(list(dict.fromkeys(grants.values())), pieces)

    def close(self) -> None:
        pass


class SegmentFiles:
    """Files of the store."""

    def __init__(self, client: Client, directory: str) -> None:
        self._client, self._directory = client, directory
        self._lock = threading.Lock()
        self._files: dict[int, Future[File]] = {}

    def begin(self, number: int, in_use: Collection[int]) -> None:
        with self._lock:
            if number not in self._files:
                self._open(number, [self._files.pop(each) for each in list(self._files) if each not in in_use])

    def write(self, pieces: Sequence[Piece], grants: Mapping[int, bytes]) -> None:
        items = [(self._file(number), offset, data) for number, offset, data in pieces]
        self._client.batch_write(items, whole_chunks=True)

    def _file(self, number: int) -> File:
        """It is open. Raises what the store raises."""
        with self._lock:
            opened = self._files.get(number) or self._open(number, [])
        try:
            return opened.result()
        except BaseException:
            with self._lock:
                if self._files.get(number) is opened:  # Whoever needs it next tries again.
                    del self._files[number]
            raise

    def close(self) -> None:
        with self._lock:
            files, self._files = list(self._files.values()), {}
        for each in files:
            each.add_done_callback(_close)

    def _open(self, number: int, ended: Sequence[Future[File]]) -> Future[File]:
        opened = self._files[number] = Future[File]()

        def run() -> None:
            try:
                opened.set_result(self._client.open(f"{self._directory}/{number:08x}", "r+b"))
            except BaseException as error:
                opened.set_exception(error)
            for each in ended:
                each.add_done_callback(_close)

        try:
            threading.Thread(target=run, name="emberkv-open", daemon=True).start()
        except RuntimeError:  # No thread can be had: then whoever waits for it does it.
            run()
        return opened


def _close(opened: Future[File]) -> None:
    if opened.exception() is None:
        with contextlib.suppress(EmberError):  # Its session goes with the client's own.
            opened.result().close()
