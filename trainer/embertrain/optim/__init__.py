"""Optimizers and schedules: Muon for matrices, AdamW for the rest, learning rates by step, gradients clipped."""

from .clip import clip, gradient_norm
from .groups import OptimConfig, build, set_lr
from .muon import NEWTON_SCHULZ, Muon, orthogonalise
from .schedule import ScheduleConfig, lr

__all__ = [
    "NEWTON_SCHULZ",
    "Muon",
    "OptimConfig",
    "ScheduleConfig",
    "build",
    "clip",
    "gradient_norm",
    "lr",
    "orthogonalise",
    "set_lr",
]
