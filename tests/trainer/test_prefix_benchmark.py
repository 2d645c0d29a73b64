"""The prefix benchmark on a model too small to say anything about speed: every line runs, and bytes are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import prefix

SMALL = prefix.Size(prompts=(896,), rounds=1, model="micro", interval_tokens=512)


def test_all_rows_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefix, "THREADS", 1)
    monkeypatch.setattr(prefix, "GOALS_AT", 896)
    rows = prefix.run(tmp_path, SMALL)
    assert [row.goal for row in rows] == [0.15, 0.02, None, 0.02, 0.35, 0.02]
    assert [row.ours for row in rows[1::2]] == [0, 0, 0]  # the formula is exact
    assert all(row.ratio is not None and row.ratio > 0 for row in rows[::2])
