"""The manager's rows in the KV: keys, and how values are encoded.

    \\xffm F              Format                the format of all these rows, and the versions of the two lists
    \\xffm L              Lease                 who is primary
    \\xffm S              Setup                 how the chain table was made
    \\xffm C              ConfigRow             the configuration of the cluster; absent: all defaults
    \\xffm n name         NodeRow
    \\xffm t target       Target
    \\xffm c chain        Chain                 the id as 8 bytes, big-endian
    \\xffm s client       SessionRow

Metadata in the same KV has keys below \\xff. A value ends with a CRC32C of what is before it.
Does not know: what the rows mean.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from ..checksum import crc32c
from ..errors import Corruption, StoreFormat
from ..kv.types import RANGE_ROWS_MAX, Transaction
from ..routing import Node
from ..settings import Settings, Value

FORMAT = 1
PREFIX = b"\xffm"
FORMAT_KEY = PREFIX + b"F"
LEASE_KEY = PREFIX + b"L"
SETUP_KEY = PREFIX + b"S"
CONFIG_KEY = PREFIX + b"C"
NODES = PREFIX + b"n"
TARGETS = PREFIX + b"t"
CHAINS = PREFIX + b"c"
SESSIONS = PREFIX + b"s"
RETIRED_MAX = 16

_CRC = struct.Struct("<I")
_pack_chain = struct.Struct(">Q").pack
_encode = msgspec.msgpack.Encoder().encode

Row = TypeVar("Row", bound=msgspec.Struct)


class Format(msgspec.Struct, frozen=True, array_like=True):
    format: int = FORMAT
    routing_version: int = 1
    sessions_version: int = 1


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """The lease row: whoever changes its epoch is primary from then on."""

    epoch: int
    holder: bytes
    """Random, drawn when the manager started; empty: it stepped down and another may begin at once."""
    counter: int
    """Counts renewals, so that every one of them is seen."""
    address: str
    """Where the holder is reached."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    replicas: int
    targets_per_disk: int
    same_host: bool
    """All nodes were on one host: replicas may share it."""


class ConfigRow(msgspec.Struct, frozen=True, array_like=True):
    version: int = 1
    values: dict[str, Value] = {}
    """What was set. Names of a newer release are kept."""
    waits_s: float = Settings().dead_after_s
    """The longest `dead_after_s` under which a lease may have been granted that is still valid."""


class NodeRow(msgspec.Struct, frozen=True, array_like=True):
    node: Node
    member: bool = False
    """Takes targets (after `SetupChains` or `AddNode`)."""
    joining: bool = False
    """Chains move to it until it has its share."""
    retired: tuple[bytes, ...] = ()
    """Incarnations before the present one, the newest last, at most RETIRED_MAX: what they say is late."""
    known_from: int = 0
    """The routing version that first named the present incarnation."""


class SessionRow(msgspec.Struct, frozen=True, array_like=True):
    description: str


def chain_key(chain: int) -> bytes:
    return CHAINS + _pack_chain(chain)


def encode(row: msgspec.Struct) -> bytes:
    value = _encode(row)
    return value + _CRC.pack(crc32c(value))


def decode(value: bytes, kind: type[Row], *, key: bytes) -> Row:
    """Raises Corruption, naming the row."""
    body = value[: -_CRC.size]
    if len(value) < _CRC.size or _CRC.pack(crc32c(body)) != value[-_CRC.size :]:
        raise Corruption(f"the cluster manager's row {key!r} is damaged")
    return msgspec.msgpack.decode(body, type=kind)


async def get(txn: Transaction, key: bytes, kind: type[Row]) -> Row | None:
    value = await txn.get(key)
    return None if value is None else decode(value, kind, key=key)


async def get_all(txn: Transaction, prefix: bytes, kind: type[Row]) -> dict[bytes, Row]:
    """Every row of a letter, by its key without the prefix."""
    rows: dict[bytes, Row] = {}
    begin, end = prefix, prefix[:-1] + bytes([prefix[-1] + 1])
    while True:
        page = await txn.range(begin, end)
        rows.update((key[len(prefix) :], decode(value, kind, key=key)) for key, value in page)
        if len(page) < RANGE_ROWS_MAX:
            return rows
        begin = page[-1][0] + b"\x00"


async def get_format(txn: Transaction) -> Format:
    """The format row, or what a new cluster begins with. Raises StoreFormat if it is newer than this program."""
    found = await get(txn, FORMAT_KEY, Format)
    if found is not None and found.format > FORMAT:
        raise StoreFormat(f"the cluster's tables have format {found.format}, this emberline knows up to {FORMAT}")
    return found or Format()
