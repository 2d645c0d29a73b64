"""Pages in a file of their own, to be carried elsewhere: checksummed, written and read as a stream.

    "EKVX0001"
    frame: JSON of the namespace and the tenant
    frames, each a page: key 32, parent key 32, kind u16, payload
    frame: empty, then u64: how many pages there were

A frame is {length u32, CRC32C of the body u32, body}, as in the journal. What was written before a crash is good up to
the last whole frame: `Archive.resume` goes on from there.

Does not know: caches, or the order of pages, which whoever reads relies on: a page comes after its parent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import msgspec
from emberfs.checksum import crc32c
from emberfs.errors import Corruption

from .journal import FRAME, FRAME_BYTES_MAX
from .namespace import Namespace

MAGIC = b"EKVX0001"
_PAGE = struct.Struct("<32s32sH")
_END = struct.Struct("<Q")


class About(msgspec.Struct, frozen=True):
    """Whose pages an archive has."""

    namespace: Namespace
    tenant: str


class ArchivedPage(NamedTuple):
    """One payload."""

    key: bytes
    parent: bytes
    kind: int
    payload: bytes


class Archive:
    """One that is written. `pages` are there already."""

    def __init__(self, file: BinaryIO, *, pages: int = 0) -> None:
        self._file = file
        self._pages = pages

    @classmethod
    def begin(cls, file: BinaryIO, about: About) -> Archive:
        """A new one."""
        file.write(MAGIC)
        archive = cls(file)
        archive._frame(msgspec.json.encode(about))
        return archive

    @classmethod
    def resume(cls, file: BinaryIO, about: About) -> tuple[Archive, set[tuple[bytes, int]]]:
        """Go on with one that ended too soon; with it (key, kind) of what it has. `file` is read and written.

        Raises Corruption if it is no archive, ValueError if it is another's.
        """
        reader = ArchiveReader(file)
        if reader.about != about:
            raise ValueError(f"it has pages of {reader.about.namespace.name} and tenant {reader.about.tenant!r}")
        there = {(page.key, page.kind) for page in reader.pages()}
        file.seek(reader.good_bytes)
        file.truncate()
        return cls(file, pages=reader.count), there

    def add(self, key: bytes, parent: bytes, kind: int, payload: bytes | memoryview) -> None:
        """One more."""
        self._frame(_PAGE.pack(key, parent, kind), payload)
        self._pages += 1

    def end(self) -> int:
        """It is whole. How many pages it has."""
        self._frame(b"")
        self._file.write(_END.pack(self._pages))
        self._file.flush()
        return self._pages

    def _frame(self, head: bytes, payload: bytes | memoryview = b"") -> None:
        self._file.write(FRAME.pack(len(head) + len(payload), crc32c(payload, crc32c(head))) + head)
        self._file.write(payload)


class ArchiveReader:
    """One that is read. Raises Corruption for what is none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.is_whole = False
        """Its end was read."""
        self.count = 0
        self.good_bytes = len(MAGIC)
        """Whole pages end there."""
        head = self._frame() if file.read(len(MAGIC)) == MAGIC else None
        if not head:
            raise Corruption("this is no archive of KV pages")
        try:
            self.about = msgspec.json.decode(head, type=About)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Corruption(f"an archive of KV pages that this program does not read: {error}") from error

    def pages(self) -> Iterator[ArchivedPage]:
        """One by one, up to the first that is damaged or cut off: then `is_whole` stays False."""
        while body := self._frame():
            if len(body) < _PAGE.size:
                return
            self.count += 1
            key, parent, kind = _PAGE.unpack_from(body)
            yield ArchivedPage(key, parent, kind, body[_PAGE.size :])
        if body is not None:
            end = self._file.read(_END.size)
            self.is_whole = len(end) == _END.size and _END.unpack(end)[0] == self.count

    def _frame(self) -> bytes | None:
        """None: it is cut off or damaged. Empty: the pages end."""
        head = self._file.read(FRAME.size)
        if len(head) < FRAME.size:
            return None
        length, crc = FRAME.unpack(head)
        body = self._file.read(length) if length <= FRAME_BYTES_MAX else b""
        if len(body) < length or crc32c(body) != crc:
            return None
        if length:
            self.good_bytes += FRAME.size + length
        return body
