"""Ordered transactional KV: see `types` for the contract; engines are `memory` and `lmdb`."""

from .lmdb import LmdbKV
from .memory import MemoryKV
from .types import KV, Transaction

__all__ = ["KV", "LmdbKV", "MemoryKV", "Transaction"]
