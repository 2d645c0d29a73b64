"""A cluster of three storage nodes on this host, started once for all tests that only use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emberfs
import pytest
from emberfs import Client
from emberfs.cluster.local import LocalCluster, Plan

CHAOS_S = 900.0
"""For what is harmed under load, beside the time that it was told to take: loads go on until they have done enough."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Faults under load have more time. fsspec's 98 tests of how it expands patterns are left out: they ask the same of
    any store, and take a minute on a cluster."""
    limit = pytest.mark.timeout(CHAOS_S + config.getoption("--chaos-seconds"))
    for item in items:
        if item.path.name in {"test_chaos.py", "test_kv_faults.py"}:
            item.add_marker(limit)
    if not config.getoption("--long"):
        patterns = [item for item in items if "test_cluster_" in item.nodeid and "glob_edge_cases" in item.name]
        config.hook.pytest_deselected(items=patterns)
        items[:] = [item for item in items if item not in patterns]


@pytest.fixture(scope="session", autouse=True)
def config_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Credentials are left here, and not in the home of whoever runs the tests."""
    home = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home))
        patch.delenv("EMBERLINE_CREDENTIALS", raising=False)
        patch.delenv("EMBERLINE_CLUSTER", raising=False)
        yield home


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """All servers run and all chains serve; a test that changes that makes a cluster of its own."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster") / "shared")
    try:
        cluster.up(Plan(cluster="shared", targets_per_disk=2, nodes=["storage-1", "storage-2", "storage-3"]))
        yield cluster
    finally:
        if cluster.exists:
            cluster.down()


@pytest.fixture
def url(cluster: LocalCluster) -> Iterator[str]:
    """The cluster with nothing in it."""
    with emberfs.connect(cluster.url) as client:
        for name, _ in client.list("/"):
            client.remove(f"/{name}", recursive=True, trash=False)
        client.trash_empty()
        yield cluster.url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A client of the empty cluster; the test may close it."""
    with emberfs.connect(url) as client:
        yield client
