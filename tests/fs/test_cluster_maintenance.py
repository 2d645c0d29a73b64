"""The pages of a scrub, side by side. Run: pytest tests/fs/test_cluster_maintenance.py"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from emberfs.cluster.maintenance import ClusterMaintenance
from emberfs.errors import Corruption
from emberfs.testing.sim.loop import SimRuntime, run


class Walk:
    """One page that takes its time, and may fail."""

    def __init__(self, runtime: SimRuntime, error: Exception | None = None) -> None:
        self.runtime, self.error = runtime, error
        self.ended = ""

    async def page(self) -> None:
        try:
            await self.runtime.sleep(0.1 if self.error else 1.0)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "read"
        if self.error:
            raise self.error


def pages(runtime: SimRuntime, walks: list[Any]) -> Any:
    store: Any = SimpleNamespace(runtime=runtime, meta=None)
    return ClusterMaintenance(store)._page_of_each(walks)


def test_a_page_that_fails_is_told_when_the_others_are_read() -> None:
    async def main(runtime: SimRuntime) -> list[str]:
        walks = [Walk(runtime), Walk(runtime, Corruption("damaged")), Walk(runtime)]
        with pytest.raises(Corruption):
            await pages(runtime, walks)
        await pages(runtime, [])
        return [walk.ended for walk in walks]

    assert run(0, main) == ["read"] * 3


def test_an_interrupt_ends_all_pages() -> None:
    async def main(runtime: SimRuntime) -> list[str]:
        walks = [Walk(runtime) for _ in range(3)]
        scrub = runtime.spawn(pages(runtime, walks), "scrub")
        await runtime.sleep(0.5)
        scrub.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scrub
        await runtime.sleep(1.0)
        return [walk.ended for walk in walks]

    assert run(0, main) == ["cancelled"] * 3
