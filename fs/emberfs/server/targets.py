"""The targets of one disk as a storage server keeps them: a directory each, with an index and block files.

Does not know: which targets are ours.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ..disk import LocalDisk
from ..engine import ChunkEngine, EngineConfig
from ..errors import EmberError
from ..kv import LmdbKV
from ..runtime import AsyncioRuntime


class TargetDirectories:
    """Under `root`. The engines are the caller's to close, each before `drop` and all before `close`."""

    def __init__(self, root: Path, runtime: AsyncioRuntime, *, reserve_bytes: int) -> None:
        self._root = root
        self._runtime = runtime
        self._reserve_bytes = reserve_bytes
        self._indexes: dict[bytes, LmdbKV] = {}

    async def open(self, target: bytes) -> ChunkEngine:
        """The engine of a target; absent, it is made. Raises OSError, EmberError; then it may be tried again."""
        directory = self._directory(target)
        (directory / "index").mkdir(parents=True, exist_ok=True)
        index = LmdbKV.open(directory / "index", self._runtime)
        disk: LocalDisk | None = None
        config = EngineConfig(reserve_bytes=self._reserve_bytes, keeps_tombstones=True, target=target)
        try:
            disk = LocalDisk(str(directory), self._runtime)
            engine = await ChunkEngine.open(disk, index, self._runtime, config=config)
        except BaseException:
            # It is tried again, and an index is opened once. What closing says is less than why we close.
            if disk is not None:
                with contextlib.suppress(EmberError, OSError):
                    disk.close()
            with contextlib.suppress(EmberError, OSError):
                await index.close()
            raise
        self._indexes[target] = index
        return engine

    async def drop(self, target: bytes) -> None:
        """Remove it."""
        if index := self._indexes.pop(target, None):
            await index.close()
        await self._runtime.offload(shutil.rmtree, self._directory(target), True)

    async def close(self) -> None:
        """Close all indexes."""
        for index in self._indexes.values():
            await index.close()

    def _directory(self, target: bytes) -> Path:
        return self._root / f"target-{target.hex()}"
