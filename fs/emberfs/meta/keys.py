"""The rows of the metadata: their keys, and how their values are encoded. Everything else here goes through this.

    V                          Superblock            the format, checked before anything else is read
    N                          IdLease               inode ids handed out so far
    I  inode                   Inode, CRC32C
    D  parent name             inode, kind, CRC32C   a directory entry; fixed bytes, see `entry_value`
    M  inode                   integer (max)         a directory's mtime
    S  inode session           SessionRow            a writer that has the file open
    T  inode                   Intent                chunks past a truncate that may still be there
    G  due_ns inode            nothing               a file nobody names: its inode and chunks go after `due_ns`
    R  trash id                TrashRow              where a trash entry was
    X  inode name              bytes                 an extended attribute
    C  counter                 integer (add)         see `Counter`

When several servers share the KV (`MetaConfig.shared`), also:

    E  inode                   integer (max)         how far a file in chunks reaches by reports since its row was put
    P  inode                   GrantRow              an inline file that one session moves to chunks
    K  client                  integer (max)         a client: see `clients`
    O  client number           a result              what a request of a client led to: see `clients`
    L  first inode             client                a block of ids that a client may write chunks under: see `blocks`
    A  inode                   nothing               an id of such a block that will never be committed
    W  name                    ClaimRow              who does what only one server may do: see `claims`

Ids are 8 bytes big-endian, so rows of one inode are neighbours and in order of age.

Invariants: an entry's value starts with the packed id, so that a path walk joins bytes and decodes nothing.
Does not know: what the operations mean.
"""

from __future__ import annotations

import enum
import struct

import msgspec

from ..checksum import crc32c
from ..errors import Corruption, StoreFormat
from ..kv.types import Transaction, decode_int
from ..types import FIRST_INODE, Chunks, Inode, Kind

FORMAT = 1
"""Version of everything in this file."""

ORPHANS_INODE = 3
"""The directory of trees that were removed and still have entries. No path leads there; nor to the trash."""

SUPERBLOCK_KEY = b"V"
IDS_KEY = b"N"

_ENTRY = struct.Struct(">QB")
_ENTRY_BYTES = _ENTRY.size
_pack_id = struct.Struct(">Q").pack
_unpack_id = struct.Struct(">Q").unpack_from

_encode = msgspec.msgpack.Encoder().encode
_decode_inode = msgspec.msgpack.Decoder(Inode).decode
_CRC = struct.Struct("<I")

KIND_AT = 8
"""Where the kind is in an entry's value."""


class Counter(enum.Enum):
    """What `usage` answers without a scan. Kept by blind adds, so nobody waits for anybody."""

    FILES = b"Cfiles"
    """Files and symlinks."""
    DIRECTORIES = b"Cdirectories"
    """Without the store's own."""
    LENGTH = b"Clength"
    """Bytes of all files."""
    TRASH = b"Ctrash"
    GARBAGE = b"Cgarbage"


class Superblock(msgspec.Struct, frozen=True, array_like=True):
    """Says what the other rows are."""

    format: int


class IdLease(msgspec.Struct, frozen=True, array_like=True):
    """The state of inode id allocation."""

    next: int
    """Ids from here on were never given out."""
    swept: int
    """Below here, no inode that was reserved and never committed has chunks."""


class SessionRow(msgspec.Struct, frozen=True, array_like=True):
    """A file open for writing."""

    opened_ns: int
    truncate_generation: int
    """The file's, when it was opened."""
    append: bool
    """At most one of a file's sessions appends."""
    client: bytes = b""
    """Whose session it is, when several servers share the KV: it ends with the client's."""


class Intent(msgspec.Struct, frozen=True, array_like=True):
    """A truncate that committed and whose chunks may not be cut yet."""

    length: int
    layout: Chunks


class GrantRow(msgspec.Struct, frozen=True, array_like=True):
    """A grant to move an inline file to chunks."""

    session: bytes
    layout: Chunks
    void: bool = False
    """It was given up, and its chunks are being removed: nobody is granted anything before they are gone."""


class ClaimRow(msgspec.Struct, frozen=True, array_like=True):
    """Somebody is at it."""

    holder: bytes
    """Random, drawn for this one time."""
    beats: int
    """Counts renewals: a row that does not change is abandoned."""


class TrashRow(msgspec.Struct, frozen=True, array_like=True):
    """What the trash remembers of an entry."""

    path: str
    deleted_ns: int


_decode_superblock = msgspec.msgpack.Decoder(Superblock).decode
_decode_ids = msgspec.msgpack.Decoder(IdLease).decode
decode_session = msgspec.msgpack.Decoder(SessionRow).decode
decode_intent = msgspec.msgpack.Decoder(Intent).decode
decode_trash = msgspec.msgpack.Decoder(TrashRow).decode
decode_grant = msgspec.msgpack.Decoder(GrantRow).decode
decode_claim = msgspec.msgpack.Decoder(ClaimRow).decode


def encode_row(row: msgspec.Struct) -> bytes:
    """The value of any of the struct rows."""
    return _encode(row)


# ---- keys


def pack_id(inode: int) -> bytes:
    """An id as it stands in keys and entry values."""
    return _pack_id(inode)


def unpack_id(row: bytes, offset: int = 0) -> int:
    """The id at `offset` of a key or an entry value."""
    inode: int = _unpack_id(row, offset)[0]
    return inode


def inode_key(inode: int) -> bytes:
    return b"I" + _pack_id(inode)


def entry_key(parent: bytes, name: bytes) -> bytes:
    """`parent` packed."""
    return b"D" + parent + name


def entry_range(parent: bytes) -> tuple[bytes, bytes]:
    """All entries of a directory. `parent` packed."""
    return b"D" + parent, b"D" + _pack_id(_unpack_id(parent)[0] + 1)


def entry_value(inode: int, kind: Kind) -> bytes:
    """A directory entry: 8 bytes id, 1 byte kind, CRC32C of both."""
    value = _ENTRY.pack(inode, kind)
    return value + _CRC.pack(crc32c(value))


def check_entry(entry: bytes) -> None:
    """Raises Corruption if an entry's value is not as it was written: it would lead to somebody else's file."""
    if crc32c(entry[:_ENTRY_BYTES]) != int.from_bytes(entry[_ENTRY_BYTES:], "little"):
        raise Corruption("a directory entry is damaged: run `emberline fs fsck`")


def entry_name(key: bytes) -> bytes:
    return key[9:]


def mtime_key(directory: int) -> bytes:
    return b"M" + _pack_id(directory)


def session_key(inode: int, session: bytes) -> bytes:
    return b"S" + _pack_id(inode) + session


def session_range(inode: int) -> tuple[bytes, bytes]:
    return b"S" + _pack_id(inode), b"S" + _pack_id(inode + 1)


def intent_key(inode: int) -> bytes:
    return b"T" + _pack_id(inode)


def garbage_key(due_ns: int, inode: int) -> bytes:
    return b"G" + _pack_id(due_ns) + _pack_id(inode)


def trash_key(trash_id: str) -> bytes:
    return b"R" + trash_id.encode()


def xattr_key(inode: int, name: str) -> bytes:
    return b"X" + _pack_id(inode) + name.encode()


def xattr_range(inode: int) -> tuple[bytes, bytes]:
    return b"X" + _pack_id(inode), b"X" + _pack_id(inode + 1)


def length_key(inode: int) -> bytes:
    return b"E" + _pack_id(inode)


def grant_key(inode: int) -> bytes:
    return b"P" + _pack_id(inode)


def client_key(client: bytes) -> bytes:
    return b"K" + client


def result_key(client: bytes, number: int) -> bytes:
    return b"O" + client + _pack_id(number)


def block_key(begin: int) -> bytes:
    return b"L" + _pack_id(begin)


def abandoned_key(inode: int) -> bytes:
    return b"A" + _pack_id(inode)


def claim_key(name: str) -> bytes:
    return b"W" + name.encode()


def rows_of(prefix: bytes) -> tuple[bytes, bytes]:
    """All rows of one letter."""
    return prefix, bytes([prefix[0] + 1])


# ---- rows


def encode_inode(inode: Inode) -> bytes:
    """An inode row: msgpack, then its CRC32C. A small file's bytes are in it, and must not change unseen."""
    row = _encode(inode)
    return row + _CRC.pack(crc32c(row))


def decode_inode(row: bytes) -> Inode:
    """The inode of a row. Raises Corruption."""
    if len(row) < _CRC.size or crc32c(row[:-4]) != _CRC.unpack_from(row, len(row) - 4)[0]:
        raise Corruption("the metadata row of a file is damaged: run `emberline fs fsck`")
    return _decode_inode(row[:-4])


async def get_inode(txn: Transaction, inode: int, *, snapshot: bool = False) -> Inode | None:
    """An inode row, or None."""
    row = await txn.get(inode_key(inode), snapshot=snapshot)
    return None if row is None else decode_inode(row)


def put_inode(txn: Transaction, old: Inode | None, new: Inode | None) -> None:
    """Replace an inode row, either side None for a birth or a death. The only writer of inode rows: it also counts."""
    inode = new or old
    assert inode is not None and (old is None or new is None or old.id == new.id)
    if inode.id >= FIRST_INODE:
        born = (new is not None and new.nlink > 0) - (old is not None and old.nlink > 0)
        if born:
            txn.add((Counter.DIRECTORIES if inode.is_dir else Counter.FILES).value, born)
        grown = counted_length(new) - counted_length(old)
        if grown:
            txn.add(Counter.LENGTH.value, grown)
    if new is None:
        txn.delete(inode_key(inode.id))
    else:
        txn.put(inode_key(inode.id), encode_inode(new))


def counted_length(inode: Inode | None) -> int:
    """What an inode adds to `Counter.LENGTH`: nothing once nobody names it."""
    return inode.length if inode is not None and inode.is_file and inode.nlink else 0


async def get_ids(txn: Transaction) -> IdLease:
    row = await txn.get(IDS_KEY)
    return IdLease(next=FIRST_INODE, swept=FIRST_INODE) if row is None else _decode_ids(row)


async def get_counter(txn: Transaction, counter: Counter) -> int:
    return decode_int(await txn.get(counter.value, snapshot=True))


def check_superblock(row: bytes) -> None:
    """Raises StoreFormat if the rows are not of a format this program knows."""
    try:
        superblock = _decode_superblock(row)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"the metadata superblock is damaged: {error}") from None
    if superblock.format > FORMAT:
        raise StoreFormat(
            f"the metadata is of format {superblock.format} and this emberline knows up to {FORMAT}: upgrade emberline"
        )
