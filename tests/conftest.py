"""Options of the whole test-suite. They live here because pytest reads options only from the outermost conftest."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# Timings never decide a test: neither an example's nor that of making one, which a busy machine stretches.
settings.register_profile("emberline", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("emberline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay this one seed in every simulation test")
    parser.addoption(
        "--sim-seeds", type=int, default=8, help="how many seeds each simulation test tries (0, 1, 2, ...)"
    )
    parser.addoption(
        "--chaos-seconds", type=float, default=0.0, help="how long the chaos test goes on (0: each fault once)"
    )
    parser.addoption("--long", action="store_true", help="tests too that take minutes")
