"""The decode benchmark on models too small to say anything about speed: every line runs, and tokens are compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from embertrain.model.model import Model
from embertrain.model.presets import preset

from benchmarks import decode
from benchmarks.runner import WrongResult

SMALL = decode.Size(
    new=2, rounds=1, far=300, very_far=900, far_steps=1, models=("micro", "micro-v3"), bandwidth_bytes=1 << 20
)


def test_all_rows_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode, "THREADS", 1)
    rows = decode.run(tmp_path, SMALL)
    assert [row.goal for row in rows] == [3.0, None, 3.5, None, None, 1.8, None, 4.0, None, 5.0, 4.0]
    assert all(row.ours > 0 for row in rows) and rows[1].ceiling is not None
    assert [row.row for row in rows][-2:] == ["v3 B1 at 300, tokens/s", "v3 B1 at 300, steps at 256 that one takes"]


def test_other_tokens_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode, "generate_theirs", lambda model, prompts, new: [[0] * new] * len(prompts))
    with pytest.raises(WrongResult, match="in fp32"):
        decode.run(tmp_path, SMALL)


def test_a_step_reads_the_experts_that_somebody_chooses() -> None:
    with torch.device("meta"):
        model = Model(preset("bench-v4"), mtp=False)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    row = model.embed.weight[0].nbytes
    rest = others - model.embed.weight.nbytes
    assert decode.step_bytes(model, 1) == pytest.approx(rest + row + experts * 4 / 32)
    assert decode.step_bytes(model, 10**6) == pytest.approx(rest + row * 10**6 + experts)
