"""Seeds for the simulation tests: `pytest tests/sim --sim-seeds=1000` looks harder, `--seed=N` replays one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Sequence[int]:
    """The seeds that a test tries one after the other. `run` notes the failing one in the exception."""
    seed: int | None = request.config.getoption("seed")
    return range(request.config.getoption("sim_seeds")) if seed is None else [seed]
