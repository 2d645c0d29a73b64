"""How requests reach services: see `types` for the contract. `memory` is the one implementation so far."""

from .memory import MemoryConnection
from .types import Connection, Service

__all__ = ["Connection", "MemoryConnection", "Service"]
