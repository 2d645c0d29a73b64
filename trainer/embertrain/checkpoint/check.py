"""Bytes of a checkpoint's files against their checksums. It does not know torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO

from ..errors import Damaged
from .catalog import Catalog, Entry
from .index import GRANULE_BYTES, PIECE_BYTES, File, Index, shard_bytes, sums_of
from .place import is_lost

_TOLD_MAX = 3
"""Tensors that a problem names."""


def read_checked(source: IO[bytes], file: File, begin: int, into: memoryview, step: int) -> None:
    """Fill `into` from byte `begin` of an open file: whole granules, of which the file's last may be short.

    Raises Damaged.
    """
    source.seek(begin)
    filled = 0
    while filled < len(into) and (count := source.readinto(into[filled:])):  # type: ignore[attr-defined]
        filled += count
    if filled < len(into):
        raise Damaged(step, file.name, f"ends at byte {begin + filled} of {file.size}")
    found = sums_of(into)
    first = 4 * (begin // GRANULE_BYTES)
    want = file.sums[first : first + len(found)]
    if found != want:
        bad = next(at for at in range(0, len(found), 4) if found[at : at + 4] != want[at : at + 4]) // 4
        raise Damaged(step, file.name, f"is not what was written, in the MiB at byte {begin + bad * GRANULE_BYTES}")


def problems(catalog: Catalog, entry: Entry, progress: Callable[[int], object] = lambda _: None) -> Iterator[Damaged]:
    """What is wrong with a checkpoint, piece by piece: every byte is read. `progress` is told how many were."""
    try:
        index = catalog.index(entry, catalog.marker(entry))
    except Damaged as damaged:
        yield damaged
        return
    buffer = memoryview(bytearray(PIECE_BYTES))
    for number, image in enumerate(index.images):
        for place, file in enumerate(image.files):
            try:
                with catalog.place.open(f"{entry.folder}/{file.name}") as source:
                    for begin in range(0, file.size, PIECE_BYTES):
                        piece = buffer[: min(PIECE_BYTES, file.size - begin)]
                        try:
                            read_checked(source, file, begin, piece, entry.step)
                        except Damaged as damaged:
                            yield _with_tensors(damaged, index, number, place * image.file_bytes + begin, len(piece))
                        progress(len(piece))
            except OSError as error:
                if not is_lost(error):
                    raise
                yield Damaged(entry.step, file.name, f"cannot be read: {error}")


def _with_tensors(damaged: Damaged, index: Index, image: int, begin: int, size: int) -> Damaged:
    """The same with the tensors that lie in the piece."""
    names = [
        name
        for name, entry in index.tensors.items()
        for shard in entry.shards
        if shard.image == image and shard.offset < begin + size and shard.offset + shard_bytes(entry, shard) > begin
    ]
    told = ", ".join(names[:_TOLD_MAX]) + (f" and {len(names) - _TOLD_MAX} more" if len(names) > _TOLD_MAX else "")
    return Damaged(damaged.step, damaged.file, f"{damaged.what}; the piece holds {told}")
