"""Learning rates as a function of the step alone, so that a run that is resumed has the rate it would have had.

    cosine: warm-up, then half a wave from the peak to the floor
    wsd:    warm-up, the peak, then a decay to the floor (arXiv 2404.06395; 1-sqrt: 2405.18392)

Step 0 is the first. Warm-up takes it to 1 / warmup_steps of the peak, and step warmup_steps - 1 to the peak. The last
step, steps - 1, is as near to the floor as one step is; from step `steps` on the rate is the floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """A schedule."""

    lr: float
    """The peak."""
    steps: int
    """Of the whole run."""
    warmup_steps: int = 0
    floor: float = 0.1
    """The last rate, as a part of the peak."""
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_steps: int = 0
    """wsd: how many of the steps, the last ones, the decay takes."""
    decay: Literal["linear", "1-sqrt"] = "1-sqrt"
    """wsd: how the rate falls. 1-sqrt falls faster at first."""

    def __post_init__(self) -> None:
        _need(math.isfinite(self.lr) and self.lr > 0, f"lr is more than 0, not {self.lr}")
        _need(self.steps > 0, f"steps is more than 0, not {self.steps}")
        _need(0 <= self.warmup_steps <= self.steps, f"warmup_steps is 0 to steps, not {self.warmup_steps}")
        _need(0 <= self.floor <= 1, f"floor is a part of lr, 0 to 1, not {self.floor}")
        _need(self.kind in ("cosine", "wsd", "constant"), f"kind is cosine, wsd or constant, not {self.kind!r}")
        _need(self.decay in ("linear", "1-sqrt"), f"decay is linear or 1-sqrt, not {self.decay!r}")
        room = self.steps - self.warmup_steps
        _need(0 <= self.decay_steps <= room, f"decay_steps is 0 to {room}, what warm-up leaves, not {self.decay_steps}")
        _need(self.decay_steps == 0 or self.kind == "wsd", "decay_steps is for wsd alone")


def lr(config: ScheduleConfig, step: int) -> float:
    """Of a step, 0 being the first."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * (config.floor + (1 - config.floor) * _height(config, step))


def _height(config: ScheduleConfig, step: int) -> float:
    """After warm-up: 1 at the peak, 0 at the floor."""
    if config.kind == "constant":
        return 1.0
    length = config.steps - config.warmup_steps if config.kind == "cosine" else config.decay_steps
    past = step - (config.steps - length)
    if past < 0:
        return 1.0
    if past >= length:
        return 0.0
    part = past / length
    if config.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * part))
    return 1 - part if config.decay == "linear" else 1 - math.sqrt(part)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"schedule: {message}")
