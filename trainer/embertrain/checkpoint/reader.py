"""torch DCP's StorageReader from a place: of each file the granules that this rank needs, checked, to their tensors.

A wanted box of a stored shard is read as the rows that hold it (the shard's first dimension); a contiguous one goes
straight into the tensor. Runs of granules are read at once, up to a piece, and a piece that lies within one wanted
tensor of host memory is read into that memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..errors import Damaged, StateError
from .check import read_checked
from .image import Image, Part, flat, view
from .index import GRANULE_BYTES, PIECE_BYTES, File, Files, Index, Shard, TensorEntry
from .place import Place, is_lost
from .ranks import sends_errors
from .threads import in_threads


class Reader(StorageReader):
    """One load of the checkpoint in a folder, of which the index is known."""

    def __init__(self, place: Place, folder: str, step: int, index: Index, *, threads: int) -> None:
        self._place = place
        self._folder = folder
        self._step = step
        self._index = index
        self._threads = threads
        # Made here: what is wrong with it would not come out of DCP as it went in.
        self._metadata = Metadata(
            {name: _tensor(name, entry) for name, entry in index.tensors.items()}
            | {name: BytesStorageMetadata() for name in index.values}
        )

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @sends_errors
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        parts: dict[int, list[Part]] = {}
        copies: list[_Copy] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self._index.values[name].text.encode()))
                continue
            entry = self._index.tensors[name]
            assert item.storage_index.index is not None
            shard = entry.shards[item.storage_index.index]
            copy = _Copy.of(item, entry, shard, planner.resolve_tensor(item).detach())
            parts.setdefault(shard.image, []).append(copy.part)
            copies.append(copy)
        work = [
            partial(self._read, file, Image(sorted(parts[number], key=lambda part: part.begin)), begin)
            for number in parts
            for begin, file in _files(self._index.images[number])
        ]
        in_threads([partial(_each, work[first :: self._threads]) for first in range(min(self._threads, len(work)))])
        for copy in copies:
            copy.finish()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: File, image: Image, begin: int) -> None:
        """What an image wants of the file whose first byte is the image's byte `begin`."""
        runs = list(_runs(image, begin, file.size))
        if not runs:
            return
        scratch = None
        try:
            with self._place.open(f"{self._folder}/{file.name}") as source:
                for first, last in runs:
                    piece = image.direct(begin + first, begin + last)
                    if piece is None:
                        if scratch is None:
                            scratch = torch.empty(PIECE_BYTES, dtype=torch.uint8)
                        data = scratch[: last - first]
                        read_checked(source, file, first, view(data), self._step)
                        image.scatter(begin + first, data)
                    else:
                        read_checked(source, file, first, view(piece), self._step)
        except OSError as error:
            if not is_lost(error):
                raise
            raise Damaged(self._step, file.name, f"cannot be read: {error}") from error


def _each(work: list[Any]) -> None:
    for each in work:
        each()


def _files(files: Files) -> Iterator[tuple[int, File]]:
    """(first byte in the image, file)"""
    return ((number * files.file_bytes, file) for number, file in enumerate(files.files))


def _runs(image: Image, begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of a file, in order: of whole granules in which something is wanted, at most a piece long."""
    first, last = 0, 0  # the run that grows
    for part in image.parts:
        if part.end <= begin or part.begin >= begin + size:
            continue
        a = max(part.begin - begin, 0) // GRANULE_BYTES * GRANULE_BYTES
        b = min(-(-(part.end - begin) // GRANULE_BYTES) * GRANULE_BYTES, size)
        if a > last:
            yield from _cut(first, last)
            first = a
        last = max(last, b)
    yield from _cut(first, last)


def _cut(first: int, last: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + PIECE_BYTES, last)) for at in range(first, last, PIECE_BYTES))


@dataclass(frozen=True, slots=True)
class _Copy:
    """How one box of a stored shard comes into a tensor."""

    part: Part
    """Where the bytes of its rows go."""
    box: Tensor | None
    """The wanted box of these rows, if they do not go straight into the tensor."""
    target: Tensor

    @classmethod
    def of(cls, item: ReadItem, entry: TensorEntry, shard: Shard, target: Tensor) -> _Copy:
        rows = (0, 1) if not shard.shape else (item.storage_offsets[0], item.lengths[0])
        row_bytes = math.prod(shard.shape[1:]) * entry.item_bytes
        begin = shard.offset + rows[0] * row_bytes
        whole_rows = tuple(item.lengths[1:]) == shard.shape[1:]
        if whole_rows and target.is_contiguous():
            return cls(Part(begin, flat(target)), None, target)
        data = torch.empty((rows[1], *shard.shape[1:]), dtype=target.dtype)
        box = data
        for dimension, (at, length) in enumerate(zip(item.storage_offsets[1:], item.lengths[1:], strict=True), 1):
            box = box.narrow(dimension, at, length)
        return cls(Part(begin, flat(data)), box, target)

    def finish(self) -> None:
        """Once the rows are read."""
        if self.box is not None:
            self.target.copy_(self.box.reshape(self.target.shape))


def _tensor(name: str, entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype_of(name, entry)),
        torch.Size(entry.shape),
        [ChunkStorageMetadata(torch.Size(shard.begin), torch.Size(shard.shape)) for shard in entry.shards],
    )


def dtype_of(name: str, entry: TensorEntry) -> torch.dtype:
    """torch's dtype of an entry. Raises StateError for one that this torch does not have."""
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != entry.item_bytes:
        raise StateError(f"{name} is of {entry.item_bytes}-byte {entry.dtype}, which this torch does not have")
    return dtype
