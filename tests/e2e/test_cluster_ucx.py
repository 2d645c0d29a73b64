"""A cluster whose large buffers go by UCX: client and storage servers in processes of their own, over each kind.

Run: pytest tests/e2e/test_cluster_ucx.py
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import emberfs
import pytest
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.transport.ucx_rail import Rail

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="UCX is not installed: pip install 'emberline[ucx]'"
)

SIZE = 9 << 20


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_what_is_written_by_ucx_is_read_by_ucx(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"send": 0, "receive": 0}

    def counted(name: str) -> None:
        act = getattr(Rail, name)

        def count(rail: Rail, view: memoryview, *args: object) -> None:
            moved[name] += len(view)
            act(rail, view, *args)

        monkeypatch.setattr(Rail, name, count)

    counted("send")
    counted("receive")
    cluster = LocalCluster(tmp_path / "cluster")
    cluster.up(Plan(cluster="ucx", replicas=2, targets_per_disk=2, nodes=["storage-1", "storage-2"], ucx=kind))
    content = random.Random(kind).randbytes(SIZE)
    credentials = str(cluster.directory / "client")
    try:
        with emberfs.connect(cluster.url, credentials=credentials, shares_memory=False, ucx=kind) as client:
            for number in range(4):  # The first bytes may go before a rail is up.
                client.put(f"/file-{number}", content)
                assert client.get(f"/file-{number}") == content
        with emberfs.connect(cluster.url, credentials=credentials) as client:
            assert client.get("/file-0") == content
    finally:
        cluster.down()
    assert moved["send"] > SIZE
    assert moved["receive"] > SIZE
