"""Small runs of training for tests: their tables, and processes that run them and may be killed."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from embertrain.train import TrainConfig, Trainer

from . import texts

STEPS = 8
"""Of a run, unless it is said."""
TOLD = ("seconds", "tokens_per_s", "mfu")
"""What differs between runs that compute the same."""


def tables(url: str, folder: Path | None = None, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run of V4 in miniature on the shards at `url`; with a folder it saves and tells. `changes`: keys by table."""
    out: dict[str, Any] = {
        "seed": 3,
        "model": {"preset": "micro", "vocab_size": texts.VOCABULARY},
        "data": {"url": url, "sequence_tokens": 64, "batch_samples": 4},
        "schedule": {"lr": 3e-3, "steps": STEPS, "warmup_steps": 2},
        "losses": {"bias_rate": 0.01},
        "compute": {"threads": 1},
        "metrics": {"peak_flops": 1e11},
    }
    if folder is not None:
        out["checkpoint"] = {"url": str(folder / "checkpoints"), "every_steps": 2}
        out["metrics"]["folder"] = str(folder)
    for table, keys in changes.items():
        out[table] = out.get(table, {}) | keys
    return out


def run(tables: dict[str, Any], until: int | None = None) -> None:
    with Trainer(TrainConfig.of(tables)) as trainer:
        trainer.run(until=until)


def forkserver() -> ForkServerContext:
    """Its processes have what they import already, which takes seconds. The first preload of all is the one that
    counts, so there is one list: dynamo is what torch loads with the first optimizer or DTensor."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.ranks", "torch._dynamo"])
    return context


def start(work: Any, *args: Any) -> BaseProcess:
    process = forkserver().Process(target=_single, args=(work, args))
    process.start()
    return process


def _single(work: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(*args)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records so far, whole lines only, without what time decides."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{key: value for key, value in record.items() if key not in TOLD} for record in records]


def weights(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {path: t for key, value in items for path, t in weights(value, f"{name}/{key}").items()}
