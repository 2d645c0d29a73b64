"""One dimension of numbers on any filesystem, as zarr v3 keeps it, in a form where an element's place is arithmetic.

The numbers are in chunks, each with its CRC32C behind it, and the chunks in shards, a file each: zarr's
`sharding_indexed` codec with the inner codecs `bytes` (little-endian) and `crc32c` and the index at the end. Written in
order and not compressed, so that chunk k of a shard begins at k * (chunk bytes + 4): who knows that reads without the
index, which is there for zarr. The last chunk is filled up with zeros; the last shard holds no chunk that has none.

Does not know: what the numbers mean.
"""

from __future__ import annotations

import json
import posixpath
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from emberfs.checksum import crc32c

from ..errors import TokensInvalid
from ..sources import protocol_of
from .ranges import Rows

CHUNK_ITEMS = 1 << 18
SHARD_CHUNKS = 1 << 12
"""A shard of tokens is 4 GiB: a thousand files for 10^12 tokens."""
CRC_BYTES = 4
STORE_OPTIONS = {"chunk_size_bytes": 1 << 20}
"""Of shards in a store. It keeps a checksum for each 4 KiB of such chunks, for each 16 KiB of its usual ones, and reads
whole what a sample touches of them."""

METADATA = "zarr.json"
_MISSING = 2**64 - 1
"""Offset and length of a chunk that a shard does not hold."""
_TYPES = {"uint32": "<u4", "int64": "<i8"}
_INNER: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
"""Codecs of chunks, and of the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayLayout:
    """Where the numbers of an array are."""

    path: str
    """Of the array's folder, in its filesystem."""
    kind: str
    """"uint32" or "int64"."""
    length: int
    chunk_items: int
    shard_chunks: int

    @property
    def item_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_TYPES[self.kind])

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk in its file, checksum included."""
        return self.chunk_items * self.item_bytes + CRC_BYTES

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk_items)

    @property
    def shards(self) -> int:
        return -(-self.chunks // self.shard_chunks)

    @property
    def size_bytes(self) -> int:
        """Of its shards."""
        index_bytes = 16 * self.shard_chunks + CRC_BYTES
        return self.chunks * self.chunk_bytes + self.shards * index_bytes

    def shard_path(self, shard: int) -> str:
        return posixpath.join(self.path, "c", str(shard))

    def rows(self, begins: npt.NDArray[np.int64], count: int) -> Rows:
        """Where rows of `count` items, at least one, are that begin at each of `begins`."""
        size = self.chunk_items
        chunks, inside = np.divmod(begins, size)
        # A row is read in a piece from each chunk that it touches.
        pieces = (inside + (count - 1)) // size + 1
        ends = np.cumsum(pieces)
        begins = np.repeat(begins, pieces)
        chunks = np.repeat(chunks - (ends - pieces), pieces) + np.arange(len(begins))
        from_items = np.maximum(begins, chunks * size)
        to_items = np.minimum(begins + count, (chunks + 1) * size)
        shards, numbers = np.divmod(chunks, self.shard_chunks)
        offsets = numbers * self.chunk_bytes + (from_items - chunks * size) * self.item_bytes
        of_pieces = shards.tolist()
        paths = {shard: self.shard_path(shard) for shard in set(of_pieces)}
        lengths = (to_items - from_items) * self.item_bytes
        return Rows([paths[shard] for shard in of_pieces], offsets, lengths, [0, *ends.tolist()])

    def chunks_of(self, shard: int) -> int:
        """How many chunks a shard holds."""
        return min(self.shard_chunks, self.chunks - shard * self.shard_chunks)

    def index(self, shard: int) -> bytes:
        """What stands behind the chunks of a shard."""
        held = self.chunks_of(shard)
        rows = [(n * self.chunk_bytes, self.chunk_bytes) if n < held else (_MISSING, _MISSING)
                for n in range(self.shard_chunks)]  # fmt: skip
        packed = np.array(rows, "<u8").tobytes()
        return packed + struct.pack("<I", crc32c(packed))

    def to_json(self) -> bytes:
        """The array's zarr.json."""
        sharding = {
            "chunk_shape": [self.chunk_items],
            "codecs": _INNER,
            "index_codecs": _INNER,
            "index_location": "end",
        }
        fields = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.length],
            "data_type": self.kind,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.chunk_items * self.shard_chunks]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }
        return json.dumps(fields, indent=2).encode()

    @classmethod
    def from_json(cls, path: str, kind: str, data: bytes) -> ArrayLayout:
        """Raises `TokensInvalid` for an array of any other form."""
        try:
            fields = json.loads(data)
            (sharding,) = fields["codecs"]
            (chunk_items,) = sharding["configuration"]["chunk_shape"]
            (shard_items,) = fields["chunk_grid"]["configuration"]["chunk_shape"]
            layout = cls(path=path, kind=kind, length=fields["shape"][0], chunk_items=chunk_items,
                         shard_chunks=shard_items // chunk_items)  # fmt: skip
            if json.loads(layout.to_json()) == fields | {"attributes": {}}:
                return layout
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise TokensInvalid(f"{path}/{METADATA} does not describe an array: {error!r}") from error
        raise TokensInvalid(f"{path} is an array of another form than token shards have (see docs/formats.md)")


def bytes_view(items: npt.NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return items.reshape(-1).data.cast("B") if items.size else memoryview(b"")


class ArrayWriter:
    """Writes an array in order; it can be read once `close` has given its layout."""

    def __init__(self, filesystem: Any, path: str, kind: str) -> None:
        self._filesystem = filesystem
        self._layout = ArrayLayout(path=path, kind=kind, length=0, chunk_items=CHUNK_ITEMS, shard_chunks=SHARD_CHUNKS)
        """As it is in the shards that are written; its length is that of all whole chunks."""
        self._chunk = np.zeros(CHUNK_ITEMS, self._layout.dtype)
        self._filled = 0
        self._file: Any = None
        self.length = 0
        self.sums: list[int] = []
        """CRC32C of each chunk."""

    def append(self, items: npt.NDArray[Any]) -> None:
        """Adds numbers at the end."""
        self.length += len(items)
        while len(items):
            count = min(len(items), len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + count] = items[:count]
            self._filled += count
            items = items[count:]
            if self._filled == len(self._chunk):
                self._write_chunk()

    def close(self) -> ArrayLayout:
        """Writes what is left, and what makes an array of it."""
        if self._filled:
            if not self.sums:
                # All of a small array is one chunk of its own size.
                self._chunk = self._chunk[: self._filled]
                self._layout = replace(self._layout, chunk_items=self._filled)
            self._chunk[self._filled :] = 0
            self._write_chunk()
        if len(self.sums) <= self._layout.shard_chunks:
            self._layout = replace(self._layout, shard_chunks=max(1, len(self.sums)))
        if self._file is not None:
            self._end_shard()
        self._layout = replace(self._layout, length=self.length)
        self._filesystem.makedirs(self._layout.path, exist_ok=True)
        self._filesystem.pipe_file(posixpath.join(self._layout.path, METADATA), self._layout.to_json())
        return self._layout

    def discard(self) -> None:
        """Lets go of the file that is open, after a failure."""
        file, self._file = self._file, None
        if file is not None:
            # What it could not write, it tries to write again.
            with suppress(OSError):
                file.close()

    def _write_chunk(self) -> None:
        shard, number = divmod(len(self.sums), self._layout.shard_chunks)
        if self._file is not None and number == 0:
            self._end_shard()
        if self._file is None:
            path = self._layout.shard_path(shard)
            self._filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
            options = STORE_OPTIONS if protocol_of(self._filesystem) == "ember" else {}
            self._file = self._filesystem.open(path, "wb", **options)
        data = bytes_view(self._chunk)
        self.sums.append(crc32c(data))
        self._file.write(data)
        self._file.write(struct.pack("<I", self.sums[-1]))
        self._layout = replace(self._layout, length=len(self.sums) * self._layout.chunk_items)
        self._filled = 0

    def _end_shard(self) -> None:
        file, self._file = self._file, None
        file.write(self._layout.index((len(self.sums) - 1) // self._layout.shard_chunks))
        file.close()
