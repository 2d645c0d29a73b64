"""What a checkpoint's own files say: `index.json`, where every tensor's bytes are, and `checkpoint.json`, the marker.

A rank's bytes are one image, cut into files of equal length (the last is shorter). Each file has a CRC32C for every
granule of 1 MiB, so that any part of it can be read and checked. The marker has the checksum of the index and its own;
so every byte of a checkpoint is under a checksum.

A checkpoint may come from anywhere: what is decoded here is checked to make sense before it is used, and nothing in it
is run. It does not know torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
from emberfs.checksum import crc32c

from ..errors import Damaged

FORMAT = 1
MARKER = "checkpoint.json"
INDEX = "index.json"
ATTEMPT = "attempt.json"

GRANULE_BYTES = 1 << 20
PIECE_BYTES = 64 << 20
"""Written and read at once: as much as one message to a store takes, and so one commit of it."""
FILE_BYTES_MIN = 64 << 20
"""A rank with less than two of these writes one file."""

assert PIECE_BYTES % GRANULE_BYTES == 0
assert FILE_BYTES_MIN % PIECE_BYTES == 0

ITEM_BYTES_MAX = 16
"""Of one number: complex128."""


class File(msgspec.Struct, frozen=True):
    """One file of an image."""

    name: str
    size: int
    sums: bytes
    """Little-endian CRC32C of each granule."""


class Files(msgspec.Struct, frozen=True):
    """One rank's image."""

    file_bytes: int
    """Length of every file but the last."""
    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return sum(file.size for file in self.files)


class Shard(msgspec.Struct, frozen=True):
    """A box of a tensor: where it begins in the tensor, its shape, and its place in an image."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    image: int
    offset: int


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor in shards that do not overlap."""

    path: tuple[str | int, ...]
    dtype: str
    """As torch calls it, "bfloat16"."""
    item_bytes: int
    shape: tuple[int, ...]
    shards: list[Shard]


class ValueEntry(msgspec.Struct, frozen=True):
    """A plain value."""

    path: tuple[str | int, ...]
    text: str
    """See `values`."""


class Index(msgspec.Struct, frozen=True):
    """Everything but the bytes."""

    images: list[Files]
    tensors: dict[str, TensorEntry]
    values: dict[str, ValueEntry]

    def encode(self) -> bytes:
        """`index.json`."""
        return msgspec.json.encode(self)

    def problems(self) -> Iterator[str]:
        """What of it makes no sense."""
        for image in self.images:
            for file in image.files:
                if "/" in file.name or file.name.startswith("."):
                    yield f"a file is called {file.name!r}"
                if file.size < 0 or len(file.sums) != 4 * -(-file.size // GRANULE_BYTES):
                    yield f"{file.name} of {file.size} bytes has {len(file.sums) // 4} checksums"
            if any(file.size != image.file_bytes for file in image.files[:-1]):
                yield "files of a rank are not of one length"
            if image.file_bytes <= 0 or image.file_bytes % GRANULE_BYTES:
                yield f"files are cut every {image.file_bytes} bytes"
        for name, entry in self.tensors.items():
            yield from self._problems_of(name, entry)

    def _problems_of(self, name: str, entry: TensorEntry) -> Iterator[str]:
        if not 0 < entry.item_bytes <= ITEM_BYTES_MAX or any(size < 0 for size in entry.shape):
            yield f"{name} has the shape {list(entry.shape)} of {entry.item_bytes} bytes"
            return
        for shard in entry.shards:
            ends = [begin + size for begin, size in zip(shard.begin, shard.shape, strict=False)]
            inside = len(shard.begin) == len(shard.shape) == len(entry.shape) and all(
                min(begin, size) >= 0 and end <= whole
                for begin, size, end, whole in zip(shard.begin, shard.shape, ends, entry.shape, strict=True)
            )
            if not inside or not 0 <= shard.image < max(len(self.images), 1):
                yield f"a shard of {name} is outside of it"
            elif (size := shard_bytes(entry, shard)) and not (
                self.images and 0 <= shard.offset <= self.images[shard.image].size - size
            ):
                yield f"a shard of {name} is outside of its files"
        if sum(math.prod(shard.shape) for shard in entry.shards) != math.prod(entry.shape):
            yield f"the shards of {name} are not the whole of it"


def shard_bytes(entry: TensorEntry, shard: Shard) -> int:
    """How long a shard is in its image."""
    return math.prod(shard.shape) * entry.item_bytes


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """`checkpoint.json`: that there is a checkpoint, and what it is."""

    format: int
    step: int
    time: float
    """When it was published, Unix time in seconds: for people. Orders nothing."""
    ranks: int
    """How many wrote it."""
    size_bytes: int
    """Of all files of all ranks."""
    tensors: int
    index_bytes: int
    index_crc32c: str
    config: dict[str, Any] | None = None
    """`config.json` of the model, if it was told."""

    def encode(self) -> bytes:
        """`checkpoint.json`: the object, its last field the checksum of all bytes before that field."""
        text = msgspec.json.encode(self)[:-1]
        return text + _seal(text)


class _Versioned(msgspec.Struct):
    format: int


def decode_marker(text: bytes, step: int) -> Marker:
    """Raises Damaged, also for a format that is newer than this code."""
    try:
        version = msgspec.json.decode(text, type=_Versioned).format
        if version > FORMAT:
            raise Damaged(step, MARKER, f"is of format {version}, and this code reads {FORMAT}: update emberline")
        marker = msgspec.json.decode(text, type=Marker)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Damaged(step, MARKER, f"makes no sense ({error})") from error
    if _seal(text[:-_SEAL_BYTES]) != text[-_SEAL_BYTES:]:
        raise Damaged(step, MARKER, "is not what was written")
    return marker


def decode_index(text: bytes, marker: Marker) -> Index:
    """Raises Damaged."""
    if len(text) != marker.index_bytes or checksum(text) != marker.index_crc32c:
        raise Damaged(marker.step, INDEX, "is not what was written")
    try:
        index = msgspec.json.decode(text, type=Index)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Damaged(marker.step, INDEX, f"makes no sense ({error})") from error
    if problem := next(index.problems(), None):
        raise Damaged(marker.step, INDEX, f"makes no sense ({problem})")
    return index


def checksum(content: bytes) -> str:
    """CRC32C in hex."""
    return f"{crc32c(content):08x}"


def _seal(text: bytes) -> bytes:
    """The end of a marker."""
    return b',"crc32c":"%s"}' % checksum(text).encode()


_SEAL_BYTES = len(_seal(b""))


def sums_of(piece: memoryview) -> bytes:
    """Packed checksums of the granules of a piece that begins with one."""
    sums = [crc32c(piece[begin : begin + GRANULE_BYTES]) for begin in range(0, len(piece), GRANULE_BYTES)]
    return struct.pack(f"<{len(sums)}I", *sums)


def file_bytes_of(size: int, threads: int) -> int:
    """How long the files of an image are, so that as many threads have as much to do each."""
    count = max(min(threads, size // FILE_BYTES_MIN), 1)
    return max(-(-size // (count * PIECE_BYTES)) * PIECE_BYTES, PIECE_BYTES)
