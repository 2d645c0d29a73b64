"""The bench of the engine's conformance suite: an engine on a disk and an index, in calls that fit a line of a test.

Does not know: which disk it is; it damages bytes by writing to the block files behind the engine's back.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from ..disk import Disk, WriteItem
from ..engine import Action, ChunkEngine, EngineConfig, Update
from ..engine.record import Extent
from ..engine.scrub import check
from ..errors import Corruption
from ..kv.types import KV
from ..runtime import Runtime
from ..types import chunk_id

Run = Callable[[Coroutine[Any, Any, Any]], Any]

KIB, MIB = 1 << 10, 1 << 20


def chunk(number: int = 0) -> bytes:
    return chunk_id(7, number)


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes of which no two granules or sectors are the same, up to 256 MiB."""
    period = random.Random(f"{seed} {length}").randbytes(min(length, 65_537))
    return (period * (length // 65_537 + 1))[:length]


@dataclass
class Bench:
    """What an engine stands on, with the few calls that the tests are written in."""

    runtime: Runtime
    disk: Disk
    index: KV
    writes: list[WriteItem] = field(default_factory=list)
    """Every write to a block file, in order."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the engine, from the first `open` on."""
    engine: ChunkEngine = field(init=False)

    async def open(self, **settings: Any) -> ChunkEngine:
        """Open (or open again) the engine. Settings stay for the next time."""
        self.settings |= settings
        self.engine = await ChunkEngine.open(self.disk, self.index, self.runtime, config=EngineConfig(**self.settings))
        return self.engine

    async def reopen(self) -> ChunkEngine:
        """Close the engine and open it again: what is durable is still there."""
        await self.engine.close()
        return await self.open()

    def note_writes(self) -> None:
        """Keep what is written from now on in `writes`."""
        write = self.disk.write

        async def noted(items: Any) -> None:
            self.writes += items
            await write(items)

        self.disk.write = noted  # type: ignore[method-assign]

    async def update(
        self, action: Action, offset: int = 0, payload: bytes = b"", *, name: bytes = chunk(), **options: Any
    ) -> int:
        """One update of one chunk, published at once unless `publish=False`; returns its version."""
        publish, checks_requests = options.pop("publish", True), options.pop("checks_requests", True)
        one = Update(name, action, offset, memoryview(payload), **options)
        (prepared,) = await self.engine.prepare([one], publish=publish, checks_requests=checks_requests)
        return prepared.version

    async def write(self, offset: int, payload: bytes, **options: Any) -> int:
        return await self.update(Action.WRITE, offset, payload, **options)

    async def replace(self, payload: bytes, **options: Any) -> int:
        return await self.update(Action.REPLACE, 0, payload, **options)

    async def truncate(self, length: int, **options: Any) -> int:
        return await self.update(Action.TRUNCATE, length, **options)

    async def remove(self, **options: Any) -> int:
        return await self.update(Action.REMOVE, **options)

    async def commit(self, version: int, *, name: bytes = chunk()) -> None:
        await self.engine.commit([name], [version])

    async def read(self, offset: int = 0, length: int | None = None, *, name: bytes = chunk()) -> bytes:
        """Committed bytes, by default all of them. Raises the Corruption that is found."""
        if length is None:
            committed = await self.committed(name)
            length = (committed.length if committed is not None else 0) + KIB
        buffer = bytearray(length)
        (count,) = await self.engine.read([name], [offset], [memoryview(buffer)])
        if isinstance(count, Corruption):
            raise count
        return bytes(buffer[:count])

    async def committed(self, name: bytes = chunk()) -> Extent | None:
        record = await self.engine.record(name)
        return record.committed if record is not None else None

    async def pending(self, name: bytes = chunk()) -> Extent | None:
        record = await self.engine.record(name)
        return record.pending if record is not None else None

    async def damage(self, extent: Extent, offset: int) -> None:
        """Flip a bit of the block of `extent`, `offset` bytes behind its start."""
        file, begin = self.engine.allocator.place(extent.position)
        byte = bytearray(1)
        await self.disk.read([(file, [memoryview(byte)], begin + offset)])
        byte[0] ^= 1 << offset % 8
        await self.disk.write([(file, memoryview(byte), begin + offset)])

    async def damage_record(self, name: bytes = chunk()) -> None:
        """Flip a bit of the index record."""
        txn = self.index.begin()
        row = await txn.get(b"c" + name)
        assert row is not None
        txn.put(b"c" + name, row[:40] + bytes([row[40] ^ 1]) + row[41:])
        await txn.commit()

    async def blocks(self) -> int:
        """How many blocks records name, after `check` found nothing."""
        report = await check(self.engine)
        assert report.findings == []
        return report.blocks


def driven(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a test that pytest can call of an async one: it gets the bench with an open engine."""

    def driven_test(self: object, bench: Bench, run: Run, **parameters: Any) -> None:
        async def body() -> None:
            await bench.open()
            await test(self, bench, **parameters)
            await bench.engine.close()

        run(body())

    return _with_parameters_of(test, driven_test)


def _with_parameters_of(test: Callable[..., Any], driven_test: Callable[..., None]) -> Callable[..., None]:
    """Pytest reads the names of the fixtures and parameters from the signature."""
    wrapped = wraps(test)(driven_test)
    own = list(inspect.signature(test).parameters.values())
    run = inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapped.__signature__ = inspect.Signature([*own, run])  # type: ignore[attr-defined]
    del wrapped.__wrapped__
    return wrapped
