"""Checkpoints of a training: sharded, checksummed, asynchronous, at any URL that fsspec knows."""

from .checkpoints import Checkpoints

__all__ = ["Checkpoints"]
