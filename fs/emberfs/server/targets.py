"""The targets of one disk as a storage server keeps them: a directory each, with an index and block files.

Invariant: what is removed is what was opened. A disk that is mounted over the directory of a running server is another
one's, or an older state of ours: nothing of it goes.

Does not know: which targets are ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from ..disk import LocalDisk
from ..engine import ChunkEngine, EngineConfig
from ..errors import EmberError
from ..kv import LmdbKV
from ..runtime import AsyncioRuntime

log = logging.getLogger("emberline.server")


class TargetDirectories:
    """Under `root`. The engines are the caller's to close, each before `drop` and all before `close`."""

    def __init__(self, root: Path, runtime: AsyncioRuntime, *, reserve_bytes: int) -> None:
        self._root = root
        self._runtime = runtime
        self._reserve_bytes = reserve_bytes
        self._opened: dict[bytes, tuple[LmdbKV, tuple[int, int]]] = {}
        """Target -> its index, and which directory it is in."""

    async def open(self, target: bytes) -> ChunkEngine:
        """The engine of a target; absent, it is made. Raises OSError, EmberError; then it may be tried again."""
        directory = self._directory(target)
        (directory / "index").mkdir(parents=True, exist_ok=True)
        index = LmdbKV.open(directory / "index", self._runtime)
        disk: LocalDisk | None = None
        config = EngineConfig(reserve_bytes=self._reserve_bytes, keeps_tombstones=True, target=target)
        try:
            disk = LocalDisk(str(directory), self._runtime)
            which = disk.which()
            engine = await ChunkEngine.open(disk, index, self._runtime, config=config)
        except BaseException:
            # It is tried again, and an index is opened once. What closing says is less than why we close.
            if disk is not None:
                with contextlib.suppress(EmberError, OSError):
                    disk.close()
            with contextlib.suppress(EmberError, OSError):
                await index.close()
            raise
        self._opened[target] = index, which
        return engine

    async def drop(self, target: bytes) -> None:
        """Remove what was opened."""
        if target in self._opened:
            index, which = self._opened.pop(target)
            await index.close()
            await self._runtime.offload(_remove, self._directory(target), which)

    async def close(self) -> None:
        """Close all indexes."""
        for index, _ in self._opened.values():
            await index.close()

    def _directory(self, target: bytes) -> Path:
        return self._root / f"target-{target.hex()}"


def _remove(directory: Path, which: tuple[int, int]) -> None:
    try:
        status = os.stat(directory)
    except OSError:
        status = None
    if status is not None and (status.st_dev, status.st_ino) == which:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        log.warning("not removed, because this is not what was opened at the start any more: %s", directory)
