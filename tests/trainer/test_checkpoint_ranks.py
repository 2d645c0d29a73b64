"""Checkpoints of several processes: saved by some number of ranks, loaded by another, and when one of them fails.

Run: pytest tests/trainer/test_checkpoint_ranks.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 240


def together(scratch: Path, jobs: list[tuple[str, int, str]]) -> None:
    """Run (task, ranks, URL) after each other in the probe's processes, and see that every one ends well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.ranks_probe"]
    processes = [
        subprocess.Popen([*command, str(rank), str(scratch), json.dumps(jobs)], cwd=ROOT, env=environment)
        for rank in range(max(ranks for _, ranks, _ in jobs))
    ]
    try:
        assert [process.wait(TIMEOUT_S) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    store, local = f"ember://{tmp_path}/store/!/checkpoints", str(tmp_path / "checkpoints")
    together(
        tmp_path,
        [
            *(("save", 2, store), ("load", 1, store), ("load", 4, store)),
            *(("save", 1, store), ("load", 2, store)),
            *(("save", 4, local), ("load", 2, local)),
        ],
    )


def test_what_one_rank_meets_all_of_them_raise(tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    together(tmp_path, [("fail", 2, str(url)), ("fallback", 2, str(tmp_path / "damaged"))])
    (folder,) = url.iterdir()
    index = json.loads((folder / "index.json").read_text())
    assert len(index["images"]) == 2
    sizes = [sum(file["size"] for file in image["files"]) for image in index["images"]]
    assert min(sizes) > 0.4 * sum(sizes), "the ranks share the work"
