"""The exchange file: what lies where in it, and how its parts are checked.

One producer writes one file, however many consumers there are. Rows lie in blocks, each for one partition, and the
footer says where each block is, so that a consumer reads only its ranges:

    magic, zeros to 64 bytes | block | block | ... | footer | footer's CRC32C, footer's length, magic

Invariants: blocks follow each other without a gap and begin at multiples of 64; each has its CRC32C in the footer, over
its padding too; nothing in the file is without a checksum or a known value. A file without its last 16 bytes is no
exchange. There are no Arrow dictionaries, so that a block can be read alone: `types.sent` casts them away.

The index is the footer as a value. It travels in a task's manifest, and then nobody reads the footer of the file.
docs/formats.md has the bytes. Does not know how rows get into blocks (`writer.py`) or out of them (`reader.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from emberfs.checksum import crc32c
from numpy.typing import NDArray

from ..errors import ExchangeCorrupt, InvalidArgument
from ..plan.nodes import Column

FORMAT_VERSION = 1
MAGIC = b"EMBEXCHG"
ALIGNMENT_BYTES = 64
"""Arrow recommends it for buffers, and DuckDB reads 16-byte integers where they lie."""
HEAD = MAGIC.ljust(ALIGNMENT_BYTES, b"\0")
PARTITIONS_MAX = 65_536
"""The largest number that 16 bits sort: numpy's radix sort ends there."""

_TAIL = struct.Struct("<II8s")
TAIL_BYTES = _TAIL.size
FOOTER_BYTES_MAX = 2**32 - 1


class Block(NamedTuple):
    """Rows of one partition, and where they are."""

    partition: int
    rows: int
    offset: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.length


_BLOCK = np.dtype(list(zip(Block._fields, ("<u4", "<u4", "<u8", "<u8", "<u4"), strict=True)))
assert _BLOCK.itemsize == 28


class ExchangeIndex(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Where each block of one exchange file is. An array in msgpack: fields are added at the end, with a default."""

    format: int = FORMAT_VERSION
    schema: bytes
    """The Arrow schema, as an IPC message."""
    columns: tuple[Column, ...]
    """The names and DuckDB types that the rows had, and get again from `types.restored`."""
    num_partitions: int
    packed_blocks: bytes
    """`blocks`, 28 bytes each, in the order of the file."""

    @property
    def blocks(self) -> NDArray[Any]:
        """partition, rows, offset, length, crc of each block; read only."""
        return np.frombuffer(self.packed_blocks, dtype=_BLOCK)

    @property
    def arrow_schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    @property
    def partition_rows(self) -> NDArray[np.int64]:
        return self._per_partition("rows")

    @property
    def partition_bytes(self) -> NDArray[np.int64]:
        """As they lie in the file: compressed if it is."""
        return self._per_partition("length")

    @property
    def num_rows(self) -> int:
        return int(self.blocks["rows"].sum(dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        """Of all blocks."""
        return int(self.blocks["length"].sum(dtype=np.int64))

    def blocks_of(self, partitions: Iterable[int]) -> list[Block]:
        """The blocks of these partitions, in the order of the file."""
        numbers = list(partitions)
        assert all(0 <= number < self.num_partitions for number in numbers)
        wanted = np.zeros(self.num_partitions, dtype=bool)
        wanted[numbers] = True
        return [Block(*block) for block in self.blocks[wanted[self.blocks["partition"]]].tolist()]

    def only(self, partitions: Iterable[int]) -> ExchangeIndex:
        """The index of these partitions alone, for whoever reads no others."""
        return msgspec.structs.replace(self, packed_blocks=pack_blocks(self.blocks_of(partitions)))

    def _per_partition(self, field: str) -> NDArray[np.int64]:
        blocks = self.blocks
        sums = np.zeros(self.num_partitions, dtype=np.int64)
        np.add.at(sums, blocks["partition"], blocks[field].astype(np.int64))
        return sums


def pack_blocks(blocks: list[Block]) -> bytes:
    """The blocks as `ExchangeIndex.packed_blocks`."""
    return np.array(blocks, dtype=_BLOCK).tobytes()


def encode_footer(index: ExchangeIndex) -> bytes:
    """Everything after the last block."""
    footer = msgspec.msgpack.encode(index)
    assert len(footer) <= FOOTER_BYTES_MAX
    return footer + _TAIL.pack(crc32c(footer), len(footer), MAGIC)


def footer_length(tail: bytes, path: str) -> int:
    """Of a file's last `TAIL_BYTES`: the length of the footer before them."""
    if len(tail) != TAIL_BYTES or not tail.endswith(MAGIC):
        raise ExchangeCorrupt(f"{path} does not end as an exchange file: it is cut short or something else", path)
    return int(_TAIL.unpack(tail)[1])


def decode_footer(head: bytes, end: bytes, path: str) -> ExchangeIndex:
    """The index, of a file's first bytes and its end: footer and tail. Raises `ExchangeCorrupt`, or `InvalidArgument`
    for a file of a newer version."""
    length = footer_length(end[-TAIL_BYTES:], path)
    footer = end[:-TAIL_BYTES]
    if head != HEAD:
        raise ExchangeCorrupt(f"{path} does not begin as an exchange file", path)
    if len(footer) != length or crc32c(footer) != _TAIL.unpack(end[-TAIL_BYTES:])[0]:
        raise ExchangeCorrupt(f"the footer of {path} does not match its checksum", path)
    # The version first and alone: the rest may be anything.
    fields = msgspec.msgpack.decode(footer)
    if fields[0] > FORMAT_VERSION:
        raise InvalidArgument(
            f"{path} is an exchange file of format {fields[0]}, written by a newer emberflow; "
            f"this one reads formats up to {FORMAT_VERSION}"
        )
    return msgspec.convert(fields, ExchangeIndex)
