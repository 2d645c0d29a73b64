"""A store per test, open in this process, and the mark that ties tests to docs/rely.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emberfs
import pytest
from emberfs import Client


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sentence(number, ...): the sentences of docs/rely.md that a test carries")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the test's store is, or will be."""
    return tmp_path / "store"


@pytest.fixture
def client(store: Path) -> Iterator[Client]:
    """A client of an open store; the test may close it."""
    with emberfs.connect(f"ember://{store}") as client:
        yield client
