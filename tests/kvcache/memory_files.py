"""`Files` in memory, for a pool in a simulated loop: other tasks run at every call, and a call may be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emberfs import AlreadyExists, NotFound
from emberfs.errors import EmberError
from emberfs.runtime import Runtime
from emberfs.types import Chunks


class MemoryFiles:
    """What several pools of a test share: it survives them."""

    def __init__(self, runtime: Runtime) -> None:
        self.files: dict[str, bytearray] = {}
        self.left_bytes = 1 << 40
        """What others leave of this memory."""
        self.fails: Callable[[str, str], EmberError | None] = lambda operation, path: None
        self._runtime = runtime

    async def _step(self, operation: str, path: str) -> None:
        await self._runtime.sleep(0.001)
        if (error := self.fails(operation, path)) is not None:
            raise error

    async def get(self, path: str) -> bytes:
        await self._step("get", path)
        if path not in self.files:
            raise NotFound("no such file", path)
        return bytes(self.files[path])

    async def put(self, path: str, data: bytes) -> None:
        await self._step("put", path)
        self.files[path] = bytearray(data)

    async def claim(self, path: str, data: bytes) -> None:
        await self._step("claim", path)
        if path in self.files:
            raise AlreadyExists("it is there", path)
        self.files[path] = bytearray(data)

    async def exists(self, path: str) -> bool:
        await self._step("exists", path)
        return path in self.files

    async def size(self, path: str) -> int:
        return len(await self.get(path))

    async def names(self, path: str) -> list[str]:
        await self._step("names", path)
        return sorted({each[len(path) + 1 :].split("/")[0] for each in self.files if each.startswith(f"{path}/")})

    async def remove(self, path: str) -> None:
        await self._step("remove", path)
        self.files.pop(path, None)

    async def locate(self, path: str) -> tuple[int, Chunks] | None:
        await self._step("locate", path)
        if path not in self.files:
            raise NotFound("no such file", path)
        return 1000 + int(path.rpartition("/")[2], 16), Chunks(1 << 19, 2, 2, 7)

    async def open_log(self, path: str) -> MemoryLog:
        await self.claim(path, b"")
        return MemoryLog(self, path)

    async def create(self, path: str, size_bytes: int) -> None:
        await self._step("create", path)
        await self.claim(path, bytes(size_bytes))

    async def read(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        await self._step("read", path)
        data = self.files.get(path)
        return [None if data is None else bytes(data[offset : offset + length]) for offset, length in ranges]

    async def write(self, path: str, offset: int, data: bytes) -> None:
        await self._step("write", path)
        if path not in self.files:
            raise NotFound("no such file", path)
        self.files[path][offset : offset + len(data)] = data

    async def space(self) -> tuple[int, int]:
        await self._step("space", "")
        used_bytes = sum(len(data.rstrip(b"\0")) for data in self.files.values())
        return self.left_bytes - used_bytes, used_bytes


class MemoryLog:
    """Appends as long as its file is there; of what fails a piece is there."""

    def __init__(self, files: MemoryFiles, path: str) -> None:
        self._files, self._path = files, path

    async def append(self, data: bytes) -> None:
        try:
            await self._files._step("append", self._path)
        except EmberError:
            self._add(data[: len(data) // 40])
            raise
        self._add(data)

    def _add(self, data: bytes) -> None:
        if self._path in self._files.files:
            self._files.files[self._path] += data

    async def close(self) -> None:
        pass
