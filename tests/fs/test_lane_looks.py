"""Who may look for the answer of a lane, and who sleeps until it comes. Run: pytest tests/fs/test_lane_looks.py"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from emberfs.lane.client import LATELY_S, LaneReader

from tests.fs.stores import needs_native

pytestmark = needs_native


class Clock:
    """The runtime, as far as it is asked."""

    def __init__(self) -> None:
        self.s = 0.0

    def now_s(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(clock: Any, cores: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[LaneReader]:
    """Of a process that has so many cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    nothing: Any = None
    reader = LaneReader(clock, nothing, nothing, nothing, usual=lambda chain: [])
    yield reader
    reader.close()


@pytest.mark.parametrize(("cores", "lookers"), [(1, 0), (2, 1), (3, 1), (4, 2), (8, 4)])
def test_who_looks_has_a_core_and_so_has_the_server(reader: LaneReader, lookers: int) -> None:
    taken = [reader._take() for _ in range(lookers + 2)]
    assert [lanes.may_look for lanes in taken] == lookers * [True] + 2 * [False]


@pytest.mark.parametrize("cores", [2])
def test_who_read_a_moment_ago_counts(reader: LaneReader, clock: Clock) -> None:
    first, second = reader._take(), reader._take()
    reader._give(first)
    reader._give(second)
    clock.s += LATELY_S / 2
    alone = reader._take()
    assert not alone.may_look
    reader._give(alone)
    clock.s += 2 * LATELY_S
    for _ in range(2):
        alone = reader._take()
        assert alone.may_look
        reader._give(alone)
