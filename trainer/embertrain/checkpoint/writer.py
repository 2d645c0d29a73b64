"""torch DCP's StorageWriter onto a place: each rank writes its image, rank 0 publishes when all have.

Bytes are copied once where they have to be: into the staging memory on an asynchronous save, into a piece where one
tensor ends and the next begins otherwise. The inside of a large tensor goes from its own memory to the file system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .catalog import Catalog
from .image import Image, Part, flat, view
from .index import (
    FORMAT,
    PIECE_BYTES,
    File,
    Files,
    Index,
    Marker,
    Shard,
    TensorEntry,
    ValueEntry,
    checksum,
    file_bytes_of,
    sums_of,
)
from .ranks import sends_errors
from .threads import in_threads

_FILES = MetadataIndex("")
"""Where the last result of a rank stands that wrote files."""


class Writer(StorageWriter):
    """One save. `stage` makes the copy that is written, and is called once; then the state may change. `told` has
    rank 0 do something for all: see `Ranks`."""

    def __init__(
        self,
        catalog: Catalog,
        step: int,
        *,
        threads: int,
        config: dict[str, Any] | None,
        stage: Callable[[Image], Image],
        told: Callable[[Callable[[], None]], None],
        now: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._step = step
        self._threads = threads
        self._config = config
        self._stage = stage
        self._told = told
        self._now = now
        self.attempt: str | None = None
        """On rank 0: the folder, from when it has a name until it is published."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @sends_errors
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.attempt = self._catalog.begin(self._step)
        return [dataclasses.replace(plan, storage_data=(self.attempt, rank)) for rank, plan in enumerate(plans)]

    @sends_errors
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, rank = plan.storage_data
        try:
            results, image = self._staged(plan, planner, rank)
        finally:
            # Not before: to make a folder waits for the disk, and others' writes to it, and the caller for the copy.
            # All ranks come here, whatever they met.
            self._told(partial(self._catalog.make, folder))
        del planner
        files = self._write(f"{folder}/rank-{rank:05d}", image)
        results.append(WriteResult(_FILES, image.size, files))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _staged(self, plan: SavePlan, planner: SavePlanner, rank: int) -> tuple[list[WriteResult], Image]:
        results, parts, end = [], [], 0
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                text = data.getvalue().decode()  # type: ignore[union-attr]
                results.append(WriteResult(item.index, len(text), text))
            else:
                part = Part(end, flat(data))  # type: ignore[arg-type]
                parts.append(part)
                results.append(WriteResult(item.index, part.data.numel(), (rank, end)))
                end = part.end
        return results, self._stage(Image(parts))

    def _write(self, stem: str, image: Image) -> Files:
        """All files of an image."""
        file_bytes = file_bytes_of(image.size, self._threads)
        begins = range(0, image.size, file_bytes)
        files: list[File | None] = [None] * len(begins)

        def write(number: int) -> None:
            begin = begins[number]
            end = min(begin + file_bytes, image.size)
            name = f"{stem}-{number}.bin"
            sums = bytearray()
            self._catalog.place.write(name, _pieces(image, begin, end, sums))
            files[number] = File(name.rpartition("/")[2], end - begin, bytes(sums))

        in_threads([partial(write, number) for number in range(len(begins))])
        return Files(file_bytes, [file for file in files if file])

    @sends_errors
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.attempt is not None
        index = _index(metadata, results)
        text = index.encode()
        marker = Marker(
            format=FORMAT,
            step=self._step,
            time=self._now(),
            ranks=len(results),
            size_bytes=sum(image.size for image in index.images),
            tensors=len(index.tensors),
            index_bytes=len(text),
            index_crc32c=checksum(text),
            config=self._config,
        )
        self._catalog.publish(self.attempt, text, marker)
        self.attempt = None


def _pieces(image: Image, begin: int, end: int, sums: bytearray) -> Iterator[memoryview]:
    """Bytes [begin, end) of an image piece by piece; the checksums of what was handed out are added to `sums`."""
    scratch = None
    for at in range(begin, end, PIECE_BYTES):
        size = min(PIECE_BYTES, end - at)
        piece = image.direct(at, at + size)
        if piece is None:
            if scratch is None:
                scratch = torch.empty(size, dtype=torch.uint8)
            piece = scratch[:size]
            image.gather(at, piece)
        data = view(piece)
        sums += sums_of(data)
        yield data


def _index(metadata: Metadata, results: list[list[WriteResult]]) -> Index:
    """What DCP planned, with where the ranks put it."""
    images: list[Files] = []
    found: dict[MetadataIndex, Any] = {}
    for rank in results:
        images.append(rank[-1].storage_data)
        found.update((result.index, result.storage_data) for result in rank[:-1])
    tensors, texts = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        path = metadata.planner_data[name]
        if not isinstance(entry, TensorStorageMetadata):
            texts[name] = ValueEntry(path, found[MetadataIndex(name)])
            continue
        dtype = entry.properties.dtype
        shards = []
        for chunk in entry.chunks:
            image, offset = found[MetadataIndex(name, chunk.offsets)]
            shards.append(Shard(tuple(chunk.offsets), tuple(chunk.sizes), image, offset))
        tensors[name] = TensorEntry(path, str(dtype).removeprefix("torch."), dtype.itemsize, tuple(entry.size), shards)
    return Index(images, tensors, texts)
