"""fsspec's own conformance suite, every class of it, on an embedded store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec.tests.abstract as abstract
import pytest
from emberfs.filesystem import EmberFileSystem


class EmberFixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, tmp_path: Path) -> Iterator[EmberFileSystem]:
        filesystem = EmberFileSystem(url=f"ember://{tmp_path}/store", skip_instance_cache=True)
        yield filesystem
        filesystem.close()

    @pytest.fixture
    def fs_path(self) -> str:
        return "/data"


class TestCopy(abstract.AbstractCopyTests, EmberFixtures):
    pass


class TestGet(abstract.AbstractGetTests, EmberFixtures):
    pass


class TestPut(abstract.AbstractPutTests, EmberFixtures):
    pass


class TestOpen(abstract.AbstractOpenTests, EmberFixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, EmberFixtures):
    pass
