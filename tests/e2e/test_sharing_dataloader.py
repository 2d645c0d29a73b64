"""A training job on an embedded store: DataLoader workers, by fork and by spawn, read while their parent writes.

Run: pytest tests/e2e/test_sharing_dataloader.py
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import emberfs
import pytest

from tests.fs.sharing_run import no_server_left

torch = pytest.importorskip("torch")

SAMPLES = 64


def sample(number: int) -> bytes:
    return random.Random(number).randbytes(10_000 + number * 3_001)


class Samples(torch.utils.data.Dataset):  # type: ignore[misc]
    """Pickled, or inherited by a fork, as any data set of a user's that holds a client."""

    def __init__(self, client: emberfs.Client) -> None:
        self.client = client

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, bytes]:
        return number, self.client.get(f"/samples/{number}")


def as_they_are(batch: Any) -> Any:
    return batch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("method", "workers"), [("fork", 4), ("spawn", 2)])
def test_workers_read_while_their_parent_writes(tmp_path: Path, method: str, workers: int) -> None:
    if method == "fork" and sys.version_info >= (3, 12):
        pytest.skip("Python 3.12 warns of any fork with threads")
    store = tmp_path / "store"
    with no_server_left(store), emberfs.connect(f"ember://{store}") as client:
        client.mkdir("/samples")
        for number in range(SAMPLES):
            client.put(f"/samples/{number}", sample(number))
        loader = torch.utils.data.DataLoader(
            Samples(client),
            batch_size=4,
            num_workers=workers,
            multiprocessing_context=method,
            collate_fn=as_they_are,
            timeout=120,
        )
        seen = {}
        with client.open("/metrics", "ab") as metrics:
            for step, batch in enumerate(loader):
                seen.update(batch)
                client.put("/checkpoint", sample(step))
                metrics.write(b"step %d\n" % step)
                metrics.flush()
        assert seen == {number: sample(number) for number in range(SAMPLES)}
        assert client.get("/checkpoint") == sample(SAMPLES // 4 - 1)
        assert client.get("/metrics") == b"".join(b"step %d\n" % step for step in range(SAMPLES // 4))
        assert client.maintenance.fsck().findings == []
