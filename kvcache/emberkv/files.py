"""The files of a namespace, as a seam: what the service needs of a store, and the store that gives it.

Every call is durable when it returns.

Does not know: what is in the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from emberfs import AsyncClient, AsyncFile, Corruption, NotFound
from emberfs.errors import DataLost, EmberError
from emberfs.types import Chunks

SEGMENT_CHUNK_BYTES = 1 << 19
"""Of the one that is being filled the store has taken room for all: it is little of a segment."""


class Log(Protocol):
    """A file that is only appended to, by one writer."""

    async def append(self, data: bytes) -> None:
        """It is there when this returns."""

    async def close(self) -> None:
        """Let it go."""


class Files(Protocol):
    """Paths are absolute."""

    async def get(self, path: str) -> bytes:
        """All of a file. Raises NotFound."""

    async def put(self, path: str, data: bytes) -> None:
        """The file is this now, at once; its directory is made."""

    async def claim(self, path: str, data: bytes) -> None:
        """The same, for a file that must not be there. Raises AlreadyExists."""

    async def exists(self, path: str) -> bool:
        """Something has that name."""

    async def size(self, path: str) -> int:
        """Bytes of a file. Raises NotFound."""

    async def names(self, path: str) -> list[str]:
        """Names in a directory, sorted; none if it is not there."""

    async def remove(self, path: str) -> None:
        """It is gone, if it was there."""

    async def open_log(self, path: str) -> Log:
        """A new file to append to. Raises AlreadyExists."""

    async def locate(self, path: str) -> tuple[int, Chunks] | None:
        """Its inode, and where its chunks are; None: it has none yet. Raises NotFound."""

    async def create(self, path: str, size_bytes: int) -> None:
        """A new file of zeros that takes no space yet. Raises AlreadyExists."""

    async def read(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Pieces (offset, length); None for one that is damaged or gone. Raises if nobody can say now."""

    async def write(self, path: str, offset: int, data: bytes) -> None:
        """Into a file that `create` made."""

    async def space(self) -> tuple[int, int]:
        """(bytes that still fit, bytes that are taken), as was known a few seconds ago."""


class StoreFiles:
    """`Files` of an emberfs store."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def get(self, path: str) -> bytes:
        return await self._client.get(path)

    async def put(self, path: str, data: bytes) -> None:
        await self._put(path, data, overwrite=True)

    async def claim(self, path: str, data: bytes) -> None:
        await self._put(path, data, overwrite=False)

    async def _put(self, path: str, data: bytes, *, overwrite: bool) -> None:
        try:
            await self._client.put(path, data, overwrite=overwrite)
        except NotFound:  # Its directory: made at the first file.
            await self._client.mkdir(path.rpartition("/")[0], parents=True, exist_ok=True)
            await self._client.put(path, data, overwrite=overwrite)

    async def exists(self, path: str) -> bool:
        return await self._client.exists(path)

    async def size(self, path: str) -> int:
        return (await self._client.stat(path)).length

    async def names(self, path: str) -> list[str]:
        try:
            return sorted([name async for name, _ in self._client.iterate(path)])
        except NotFound:
            return []

    async def remove(self, path: str) -> None:
        with contextlib.suppress(NotFound):
            await self._client.truncate(path, 0)  # Its space is free at once; a removed file's only after a while.
            await self._client.remove(path, trash=False)

    async def open_log(self, path: str) -> Log:
        await self.claim(path, b"")
        return _StoreLog(await self._client.open(path, "ab"))

    async def locate(self, path: str) -> tuple[int, Chunks] | None:
        inode = await self._client.stat(path)
        return (inode.id, inode.layout) if isinstance(inode.layout, Chunks) else None

    async def create(self, path: str, size_bytes: int) -> None:
        try:
            file = await self._client.open(path, "x+b", chunk_size_bytes=SEGMENT_CHUNK_BYTES)
        except NotFound:
            await self._client.mkdir(path.rpartition("/")[0], parents=True, exist_ok=True)
            file = await self._client.open(path, "x+b", chunk_size_bytes=SEGMENT_CHUNK_BYTES)
        try:
            await file.truncate(size_bytes)
        finally:
            await file.close()

    async def read(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        buffers = [bytearray(length) for _, length in ranges]
        items: list[Any] = [(path, offset, length) for offset, length in ranges]
        counts = await self._client.batch_read(items, buffers, raise_errors=False)
        for count in counts:
            if isinstance(count, Exception) and not isinstance(count, NotFound | Corruption | DataLost):
                raise count  # The page may be as good as ever.
        return [bytes(buffer) if count == len(buffer) else None for buffer, count in zip(buffers, counts, strict=True)]

    async def write(self, path: str, offset: int, data: bytes) -> None:
        await self._client.batch_write([(path, offset, data)], whole_chunks=True)

    async def space(self) -> tuple[int, int]:
        found = await self._client.space()
        return found["free_bytes"], found["used_bytes"]


class _StoreLog:
    def __init__(self, file: AsyncFile) -> None:
        self._file = file

    async def append(self, data: bytes) -> None:
        await self._file.write(data)
        await self._file.flush()

    async def close(self) -> None:
        with contextlib.suppress(EmberError):  # What was appended is there: nothing is left to say.
            await self._file.close()
