"""Ordered transactional KV: see `types` for the contract.

Engines of this process are `memory` and `lmdb`; elsewhere are `remote` (a `server` of one of those) and `postgres`.
"""

from .lmdb import LmdbKV
from .memory import MemoryKV
from .opening import open_kv
from .remote import RemoteKV
from .server import KvServer
from .types import KV, Transaction

__all__ = ["KV", "KvServer", "LmdbKV", "MemoryKV", "RemoteKV", "Transaction", "open_kv"]
