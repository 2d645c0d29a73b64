"""Weights on disk: safetensors under DeepSeek's and transformers' names, whole or quantised."""

from .load import load
from .save import save
from .source import Source
from .verify import verify

__all__ = ["Source", "load", "save", "verify"]
