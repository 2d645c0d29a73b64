"""Training: a TOML file, token shards in, checkpoints out. Torch is needed from here on."""

from .config import TrainConfig
from .metrics import StepRecord
from .trainer import Report, Trainer

__all__ = ["Report", "StepRecord", "TrainConfig", "Trainer"]
