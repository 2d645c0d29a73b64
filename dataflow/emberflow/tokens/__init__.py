"""Corpora as tokens: written once, packed, and read at random by trainers."""

from __future__ import annotations

from .batches import Batches, TokenBatch
from .corpus import tokenize, train_tokenizer
from .dataset import Samples, TokenDataset
from .group import TokenGroup, TokensReport, Vocabulary, open_group, write_tokens
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batches",
    "Samples",
    "TokenBatch",
    "TokenDataset",
    "TokenGroup",
    "Tokenizer",
    "TokensReport",
    "Vocabulary",
    "load_tokenizer",
    "open_group",
    "tokenize",
    "train_tokenizer",
    "write_tokens",
]
