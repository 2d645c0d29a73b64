"""Looks at every byte of a group of token shards.

A read for training checks nothing but lengths, where the filesystem does not check by itself (`ember://` does): a
sample is a small part of the chunk that its checksum is over. This is for the others, and for copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from emberfs.checksum import crc32c

from ..errors import TokensInvalid
from .array import CRC_BYTES, ArrayLayout, bytes_view
from .group import TokenGroup, checksum_of
from .ranges import Files, Ranges

Items = npt.NDArray[Any]


def problems(
    group: TokenGroup, files: Files | None = None, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[str]:
    """What is wrong with the group, a sentence each. `advance` is told of tokens that were looked at."""
    files = files or Files(group.url, {}, group.seal)
    end = 0
    for first, offsets in (chunks := _Chunks(group.offsets, files)):
        if first == 0 and offsets[0] != 0:
            yield f"the first document begins at {offsets[0]}, not at 0"
        if offsets[0] < end or np.any(offsets[1:] <= offsets[:-1]):
            yield f"the offsets from document {first} on do not rise"
        end = int(offsets[-1])
    yield from chunks.problems(group.checksums[1])
    is_sound = not chunks.bad
    if is_sound and end != group.tokens.length:
        yield f"the last document ends at {end}, and there are {group.tokens.length} tokens"
    document = 0
    for first, tokens in (chunks := _Chunks(group.tokens, files)):
        if (highest := int(tokens.max())) >= group.vocabulary.vocab_size:
            yield f"token {highest} between {first} and {first + len(tokens)} is not in the vocabulary"
        ends = first + np.flatnonzero(tokens == group.vocabulary.eos_id) + 1
        if is_sound and not chunks.bad:
            if not np.array_equal(ends, _read(group.offsets, files, document + 1, len(ends))):
                yield f"eos tokens between {first} and {first + len(tokens)} are not where documents end"
                is_sound = False
            document += len(ends)
        advance(len(tokens))
    yield from chunks.problems(group.checksums[0])
    if is_sound and not chunks.bad and document != group.documents:
        yield f"there are {document} eos tokens, and {group.documents} documents"


class _Chunks:
    """The chunks of an array that can be read, each checked: (first item, items)."""

    def __init__(self, layout: ArrayLayout, files: Files) -> None:
        self._layout = layout
        self._files = files
        self._sums: list[int] = []
        self.bad: list[str] = []
        """What is wrong with chunks and files."""

    def __iter__(self) -> Iterator[tuple[int, Items]]:
        layout = self._layout
        for shard in range(layout.shards):
            path, held = layout.shard_path(shard), layout.chunks_of(shard)
            for number in range(held):
                first = (shard * layout.shard_chunks + number) * layout.chunk_items
                data = self._bytes(path, number * layout.chunk_bytes, layout.chunk_bytes)
                if data is None:
                    # The file is gone or too short: of the rest of it nothing more is to be said.
                    self._sums += [0] * (held - number)
                    break
                self._sums.append(crc32c(data[:-CRC_BYTES]))
                if self._sums[-1] != int.from_bytes(data[-CRC_BYTES:], "little"):
                    self.bad.append(f"{path}: the chunk at byte {number * layout.chunk_bytes} is damaged")
                items = np.frombuffer(data[:-CRC_BYTES], layout.dtype)[: layout.length - first]
                yield first, items
            else:
                index = layout.index(shard)
                found = self._bytes(path, held * layout.chunk_bytes, len(index))
                if found is not None and found != index:
                    self.bad.append(f"{path}: the index at its end is damaged")

    def problems(self, checksum: str) -> Iterator[str]:
        """What was found, and whether all chunks together are those that the group was written with."""
        yield from self.bad
        if not self.bad and checksum_of(self._sums) != checksum:
            self.bad.append(f"{self._layout.path} is sound, but not what the group was written with")
            yield self.bad[-1]

    def _bytes(self, path: str, offset: int, length: int) -> memoryview | None:
        data = memoryview(bytearray(length))
        try:
            self._files.read(Ranges([path], np.array([offset]), np.array([length]), data))
        except (OSError, TokensInvalid) as error:
            self.bad.append(str(error) if path in str(error) else f"{path}: {error}")
            return None
        return data


def _read(layout: ArrayLayout, files: Files, begin: int, count: int) -> Items:
    """Some items of an array, as many as there are."""
    count = max(0, min(count, layout.length - begin))
    items = np.empty(count, layout.dtype)
    if count:
        files.read(layout.rows(np.array([begin]), count).ranges(0, 1, bytes_view(items)))
    return items
