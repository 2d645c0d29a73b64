"""Corpora as tokens: written once, packed, and read at random by trainers."""

from __future__ import annotations

from .batches import Batches, TokenBatch
from .dataset import Samples, TokenDataset
from .group import TokenGroup, TokensReport, open_group, write_tokens

__all__ = [
    "Batches",
    "Samples",
    "TokenBatch",
    "TokenDataset",
    "TokenGroup",
    "TokensReport",
    "open_group",
    "write_tokens",
]
