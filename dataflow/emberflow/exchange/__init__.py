"""Rows from stage to stage: one indexed file per producer, of which each consumer reads its partitions."""

from .format import ExchangeIndex
from .hashing import HASH_VERSION, hash_columns, partition_of
from .reader import ExchangeReader, Source, read, read_index
from .types import SETTINGS, are_narrow, restored, sent
from .writer import ExchangeWriter

__all__ = [
    "HASH_VERSION",
    "SETTINGS",
    "ExchangeIndex",
    "ExchangeReader",
    "ExchangeWriter",
    "Source",
    "are_narrow",
    "hash_columns",
    "partition_of",
    "read",
    "read_index",
    "restored",
    "sent",
]
