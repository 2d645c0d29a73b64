"""What commits tell those who serve reads from an engine's mirror. Run: pytest tests/fs/test_engine_mirror.py"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from emberfs.engine.extents import Known
from emberfs.engine.scrub import check
from emberfs.errors import TargetFailed, UpdateUnknown
from emberfs.kv.memory import MemoryKV
from emberfs.testing.engine import chunk, pattern

from tests.fs.test_engine_sim import SimBench, on_sim


class Mirrored:
    """A mirror that remembers, and that fails so often."""

    def __init__(self) -> None:
        self.known: dict[bytes, Known] = {}
        self.breaks = 0

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        if self.breaks:
            self.breaks -= 1
            raise MemoryError("no room for an entry")
        self.known[chunk] = known

    def drop(self, chunk: bytes) -> None:
        self.known.pop(chunk, None)

    def clear(self) -> None:
        self.known.clear()


def mirror_of(bench: SimBench) -> Mirrored:
    bench.engine.extents.mirror = mirror = Mirrored()
    return mirror


class WatchedKV(MemoryKV):
    """An index that has somebody look while it commits, and may fail when it has."""

    mirror: Mirrored | None = None
    seen: list[int]
    error: Exception | None = None

    async def _apply_group(self, group: Sequence[Any]) -> None:
        if self.mirror is not None:
            self.seen.append(len(self.mirror.known))
        await super()._apply_group(group)
        if self.error is not None:
            for batch in group:
                batch.error = self.error


def test_what_is_committed_is_told_once_it_is() -> None:
    async def work(bench: SimBench) -> None:
        mirror = mirror_of(bench)
        index: Any = bench.index
        index.mirror, index.seen = mirror, []
        for number in range(3):
            await bench.write(number * 1000, pattern(1000, number))
            assert list(mirror.known) == [chunk(0)]
            assert mirror.known[chunk(0)].extent.length == (number + 1) * 1000
        assert index.seen == [0, 0, 0], "not before, nor what was"
        await bench.remove()
        assert not mirror.known

    on_sim(work, index=WatchedKV)


@pytest.mark.parametrize("error", [TargetFailed, UpdateUnknown])
def test_nothing_is_told_of_a_commit_in_doubt(error: type[Exception]) -> None:
    async def work(bench: SimBench) -> None:
        mirror = mirror_of(bench)
        await bench.write(0, pattern(1000))
        index: Any = bench.index
        index.error = error("it may have happened")
        with pytest.raises(TargetFailed):
            await bench.write(0, pattern(1000, 1), name=chunk(1))
        assert not mirror.known

    on_sim(work, index=WatchedKV)


def test_a_mirror_that_fails_harms_no_commit() -> None:
    async def work(bench: SimBench) -> None:
        mirror = mirror_of(bench)
        mirror.breaks = 1
        await bench.write(0, pattern(100_000))
        await bench.write(0, pattern(100_000, 1), name=chunk(1))
        await bench.write(0, pattern(100_000, 2), name=chunk(2))
        await bench.remove(name=chunk(1))
        assert await bench.read() == pattern(100_000)
        assert await bench.read(name=chunk(2)) == pattern(100_000, 2)
        assert (await check(bench.engine)).findings == []
        assert list(mirror.known) == [chunk(2)]

    on_sim(work)
