"""What a run tells of its steps: a record a step, as lines of JSON and for TensorBoard.

Files hold every step once, whatever happened in between: a run that goes on from step n first forgets what an earlier
one wrote of later steps. Lines are handed to the operating system one by one, so that a killed process loses none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..kernels.products import linear

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Of one step, over all ranks."""

    step: int
    """1 is the first."""
    loss: float
    """Cross-entropy of the next token, in nats."""
    mtp_loss: float
    balance_loss: float
    """Summed over layers, without weight; as many as there are such layers when all is even."""
    index_loss: float
    """KL a token, summed over layers, without weight."""
    gradient_norm: float
    """Before it was cut."""
    lr: float
    tokens: int
    """Trained on since the run's first step."""
    tokens_per_s: float
    """Of this step, without checkpoints and validation."""
    mfu: float
    """FLOPs of the model over what the devices could have done meanwhile."""
    expert_load_max_over_mean: float | None
    """Of the layer where it is greatest, of those that choose their experts."""
    expert_load: dict[str, float]
    """By layer."""
    expert_tokens: dict[str, tuple[int, ...]] | None
    """By layer, each expert's; None unless asked for (`MetricsSection`)."""
    seconds: dict[str, float]
    """Of this step: waiting for data, computing; and, since the record before, checkpoint and validation."""
    validation_loss: float | None = None


class Sink(Protocol):
    """Where records go."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line a step, in `folder`/metrics.jsonl; those after step `done` are cut off first."""

    def __init__(self, folder: Path, done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _is_until(line, done)]
            new = path.with_suffix(".new")
            new.write_bytes(b"".join(kept))
            os.replace(new, path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: StepRecord) -> None:
        self._file.write(json.dumps(asdict(record)).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def _is_until(line: bytes, done: int) -> bool:
    """Whether it is a whole line of one of the first `done` steps."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= done
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoard:
    """Scalars of every step, in `folder`/tensorboard. Needs the package tensorboard."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, record: StepRecord) -> None:
        for name, value in _scalars(asdict(record)):
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


def _scalars(fields: dict[str, Any]) -> list[tuple[str, float]]:
    out = []
    for name, value in fields.items():
        if isinstance(value, dict):
            out += [(f"{name}/{key}", each) for key, each in value.items()]
        elif value is not None and name != "step":
            out.append((name, value))
    return out


def measured_peak_flops(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOPs a second of a large square product, the best of five, by the way the model takes: what MFU is a share of
    if nobody says better."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best_s = float("inf")
    for _ in range(5):
        _wait(device)
        begin_s = clock()
        linear(a, b)
        _wait(device)
        best_s = min(best_s, clock() - begin_s)
    return 2 * n**3 / max(best_s, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
