"""What embertrain raises.

TrainError
├── ConfigError (ValueError)       a model's shape that cannot be built; the message names the field
├── WeightsError (ValueError)      weights that do not fit the model: wrong, missing, damaged
├── VocabularyError (ValueError)   tokens the model has no embedding for, or a tokenizer of another vocabulary
├── ContextError (ValueError)      more positions than the model or its cache holds
├── DataError (ValueError)         token shards that a run cannot use: too few, or of other tokens
├── ResumeError (ValueError)       a checkpoint that this run does not go on from
└── NotFinite (ArithmeticError)    a NaN or an infinity where none may be; says where it was met first
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
