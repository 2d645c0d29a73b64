"""Training: a TOML file, token shards in, checkpoints out. Torch is needed from here on."""

from .config import TrainConfig
from .merged import export_merged, origin_of
from .metrics import StepRecord
from .trainer import Report, Trainer

__all__ = ["Report", "StepRecord", "TrainConfig", "Trainer", "export_merged", "origin_of"]
