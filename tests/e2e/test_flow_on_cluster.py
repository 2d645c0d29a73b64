"""Jobs of dataflow over a cluster of three storage nodes, one of which is killed on the way.

Run: pytest tests/e2e/test_flow_on_cluster.py.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import emberflow
import pytest
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.cluster.processes import ServerProcess

ROWS = 200_000
QUERY = "select h, count(*) n, sum(k) total, min(s) low from t group by h order by h"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of its own: a node of it is killed."""
    cluster = LocalCluster(tmp_path_factory.mktemp("trio") / "cluster")
    try:
        cluster.up(Plan(cluster="trio", targets_per_disk=2, nodes=["storage-1", "storage-2", "storage-3"]))
        yield cluster
    finally:
        if cluster.exists:
            cluster.down()


@pytest.fixture(scope="module")
def table(trio: LocalCluster) -> str:
    """200,000 rows in four files on the cluster."""
    url = f"{trio.url}/table"
    with emberflow.init(threads=1) as session:
        for part in range(4):
            low, high = part * ROWS // 4, (part + 1) * ROWS // 4
            session.sql(f"select range k, range % 7 h, 'x' || range s from range({low}, {high})").write_parquet(
                url, mode="append"
            )
    return url


def expected() -> list[dict[str, Any]]:
    with emberflow.init(threads=1) as session:
        whole = session.sql(f"select range k, range % 7 h, 'x' || range s from range({ROWS})")
        return session.sql(QUERY, t=whole).take_all()


def test_a_storage_node_that_dies_costs_no_row(trio: LocalCluster, table: str) -> None:
    node = trio.server("storage-2")
    with emberflow.init(
        executor="local", workers=2, shuffle="always", partitions=4, broadcast_bytes=0, data_root=f"{trio.url}/flow"
    ) as session:
        killer = threading.Thread(target=kill_when_begun, args=(session, node))
        killer.start()
        session.sql(QUERY, t=session.read_parquet(table)).write_parquet(f"{trio.url}/out", mode="overwrite")
        killer.join()
        assert node.pid() is None
        written = session.read_parquet(f"{trio.url}/out").sort("h").take_all()
    assert written == expected()


def kill_when_begun(session: emberflow.Session, node: ServerProcess) -> None:
    """Kills a node when the first task is done and others run: some have read and written, some have yet to."""
    while not any(event.kind == "finished" for event in list(session.jobs.last)):
        time.sleep(0.01)
    node.stop(by=signal.SIGKILL)
