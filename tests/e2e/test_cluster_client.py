"""A client of a cluster is a client of a store: fsspec's own suite, and the tests of files that need no more."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator

import emberfs
import fsspec.tests.abstract as abstract
import pytest
from emberfs import Client
from emberfs.cluster.store import ClusterStore
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


def test_a_client_on_the_servers_host_shares_its_memory(url: str) -> None:
    """Through the door of each storage server, with the rights of its certificate, and the bytes are right."""
    with emberfs.connect(url) as client:
        content = os.urandom(9 << 20)
        buffer = client.buffer(len(content))
        buffer[:] = content
        client.put("/shared", buffer, chunk_size_bytes=1 << 20)
        buffer[:] = bytes(len(content))
        assert client.get_into("/shared", buffer) == len(content)
        assert buffer == content
        assert client.get("/shared") == content
        store = client._attachment.store
        assert isinstance(store, ClusterStore)
        storage = {store.routes.address(target.id) for target in store.routes.routing.targets}
        links = [store.network.connection(address)._link for address in storage]
        assert any(link is not None and link._blocks is not None for link in links)


def test_a_queue_of_reads_and_writes(client: Client) -> None:
    content = os.urandom(1 << 20)
    with client.io_queue(depth=256) as queue:
        for at in range(0, len(content), 64 << 10):
            queue.submit_write("/queued", at, content[at : at + (64 << 10)])
        assert [each.error for each in queue.wait(n=16)] == [None] * 16
        memory = client.buffer(len(content))
        with client.open("/queued") as file:
            for at in range(0, len(content), 4 << 10):
                queue.submit_read(file, at, memory[at : at + (4 << 10)])
            assert {each.nbytes for each in queue.wait(n=256)} == {4 << 10}
        assert memory == content
