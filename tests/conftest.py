"""Options of the whole test-suite. They live here because pytest reads options only from the outermost conftest."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes take all cores: torch's threads would wait for each other busily. Set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not look at it again and again."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How `-n` shares the tests out: by files, the one with the most tests first. All that start clusters are one file.

    Two clusters that start at once might choose the same port; and these tests, which mostly wait, go well with others.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/e2e" if file.startswith("tests/e2e/") else file

    return Scheduling(config, log)
