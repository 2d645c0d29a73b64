"""Checkpoints of several processes: saved by some number of ranks, loaded by another, and when one of them fails.

Run: pytest tests/trainer/test_checkpoint_ranks.py
"""

from __future__ import annotations

import json
from pathlib import Path

from . import ranks_probe
from .ranks import ranks


def together(scratch: Path, tasks: list[tuple[str, int, str]]) -> None:
    """Each (task, ranks, URL) after the one before."""
    for number, (task, count, url) in enumerate(tasks):
        ranks(count, ranks_probe.run, scratch / f"ranks-{number}", task, url)


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
