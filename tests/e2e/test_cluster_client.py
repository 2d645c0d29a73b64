"""A client of a cluster is a client of a store: fsspec's own suite, and the tests of files that need no more."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import fsspec.tests.abstract as abstract
import pytest
from emberfs.filesystem import EmberFileSystem

from tests.fs import test_client_files

for _name, _test in vars(test_client_files).items():
    # Those that ask for more look inside of an embedded store.
    if _name.startswith("test_") and set(inspect.signature(_test).parameters) <= {"client", "mode", "size"}:
        globals()[_name] = _test


class ClusterFixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, url: str) -> Iterator[EmberFileSystem]:
        filesystem = EmberFileSystem(url=url, skip_instance_cache=True)
        yield filesystem
        filesystem.close()

    @pytest.fixture
    def fs_path(self) -> str:
        return "/data"


class TestCopy(abstract.AbstractCopyTests, ClusterFixtures):
    pass


class TestGet(abstract.AbstractGetTests, ClusterFixtures):
    pass


class TestPut(abstract.AbstractPutTests, ClusterFixtures):
    pass


class TestOpen(abstract.AbstractOpenTests, ClusterFixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, ClusterFixtures):
    pass
