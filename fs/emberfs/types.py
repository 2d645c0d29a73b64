"""The nouns that cross the wire or the disk: chunk ids, layouts, inodes, and the limits of a store.

Rows and messages are msgspec structs in array form: a field may be added at the end with a default, never moved.
"""

from __future__ import annotations

import enum
import struct

import msgspec

INLINE_BYTES_MAX = 4096
"""A file up to this long lives in its inode row."""
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4096
SYMLINK_DEPTH_MAX = 40
CHUNK_SIZE_BYTES_MIN = 64 << 10
CHUNK_SIZE_BYTES_MAX = 64 << 20
CHUNK_SIZE_BYTES_DEFAULT = 4 << 20
FILE_BYTES_MAX = 1 << 52
BATCH_ITEMS_MAX = 4096

ROOT_INODE = 1
TRASH_INODE = 2
FIRST_INODE = 16
"""Lower ids are the store's own."""

CLIENT_ID_BYTES = 16

_CHUNK = struct.Struct(">QQ")


def chunk_id(inode: int, index: int) -> bytes:
    """16 bytes, big-endian, so that the chunks of one file are neighbours in key order. `index` counts from 0."""
    return _CHUNK.pack(inode, index)


def split_chunk_id(chunk: bytes) -> tuple[int, int]:
    """(inode, index) of a chunk id."""
    return _CHUNK.unpack(chunk)


def describe_chunk(chunk: bytes) -> str:
    """A chunk id as people read it: `inode.index` in hex."""
    inode, index = _CHUNK.unpack(chunk)
    return f"{inode:x}.{index:x}"


class Kind(enum.IntEnum):
    """What an inode is."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3


class Inline(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The file's bytes are here, in the inode row. Always the whole content."""

    data: bytes = b""


class Chunks(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The file is cut into chunks, dealt over `stripe` chains by the seeded shuffle of `striping`."""

    chunk_size_bytes: int
    chain_count: int
    """How many chains (ids 1..chain_count) there were to deal over when the file was made."""
    stripe: int
    seed: int


Layout = Inline | Chunks
"""Tag 3 is kept for `packed` (many small files in one chunk)."""


class Inode(msgspec.Struct, frozen=True, array_like=True):
    """One inode row; also what `stat` returns."""

    id: int
    kind: Kind
    mode: int
    """Permission bits only, e.g. 0o644."""
    nlink: int
    length: int
    """Bytes. Of a directory 0, of a symlink the bytes of its target."""
    mtime_ns: int
    ctime_ns: int
    uid: int = 0
    gid: int = 0
    truncate_generation: int = 0
    """Grows with each truncate: a length report from before it is refused."""
    revision: int = 0
    """Grows with each change of the row's content (inline data, layout): what `AdoptChunks` compares."""
    layout: Layout | None = None
    """Files only."""
    parent: int = 0
    """Directories only: the one directory that names this one."""
    name: str = ""
    """Directories only: the name there."""
    target: str = ""
    """Symlinks only."""

    @property
    def is_dir(self) -> bool:
        return self.kind == Kind.DIRECTORY

    @property
    def is_file(self) -> bool:
        return self.kind == Kind.FILE
