"""What embertrain raises.

TrainError
├── ConfigError (ValueError)       a model's shape that cannot be built; the message names the field
├── WeightsError (ValueError)      weights that do not fit the model: wrong, missing, damaged
├── VocabularyError (ValueError)   tokens the model has no embedding for, or a tokenizer of another vocabulary
├── ContextError (ValueError)      more positions than the model or its cache holds
├── DataError (ValueError)         token shards that a run cannot use: too few, or of other tokens
├── ResumeError (ValueError)       a checkpoint that this run does not go on from
├── NotFinite (ArithmeticError)    a NaN or an infinity where none may be; says where it was met first
├── StateError (ValueError)        a state that a checkpoint cannot hold, or that does not fit the one it is filled from
├── NoCheckpoint (ValueError)      there is none, or none of that step, or it was removed while it was read
├── Superseded (RuntimeError)      another process has begun to save where this one does, and is gone on from
├── Damaged (OSError)              a file of a checkpoint is not what was written; `.step` and `.file` say which
└── RankFailed (RuntimeError)      another rank could not do its part; a rank that could not raises what it met
"""

from __future__ import annotations


class TrainError(Exception):
    """The root: everything embertrain raises on purpose."""


class ConfigError(TrainError, ValueError):
    """A model's shape that cannot be built."""


class WeightsError(TrainError, ValueError):
    """Weights that do not fit the model they are meant for."""


class VocabularyError(TrainError, ValueError):
    """Tokens outside the model's vocabulary."""


class ContextError(TrainError, ValueError):
    """More positions than the model or the cache holds."""


class DataError(TrainError, ValueError):
    """Token shards that a run cannot use."""


class ResumeError(TrainError, ValueError):
    """A checkpoint that this run does not go on from."""


class NotFinite(TrainError, ArithmeticError):
    """A NaN or an infinity in numbers that must be finite."""


class StateError(TrainError, ValueError):
    """A state that a checkpoint cannot hold, or that does not fit the one it is filled from."""


class NoCheckpoint(TrainError, ValueError):
    """There is no checkpoint, or none of that step, or it was removed while it was read."""


class Superseded(TrainError, RuntimeError):
    """Another process has published checkpoints where this one does: this one's run is not gone on from any more."""


class Damaged(TrainError, OSError):
    """A file of a checkpoint is missing, or is not what was written."""

    def __init__(self, step: int, file: str, what: str) -> None:
        super().__init__(f"the checkpoint of step {step} is damaged: {file} {what}")
        self.step = step
        self.file = file
        self.what = what

    def __reduce__(self) -> tuple[type[Damaged], tuple[int, str, str]]:
        return Damaged, (self.step, self.file, self.what)


class RankFailed(TrainError, RuntimeError):
    """Another rank could not write or read its part of a checkpoint."""
