"""How requests reach services: see `types` for the contract. `memory` is one process, `tcp` is many."""

from .config import TcpConfig, TlsFiles
from .memory import MemoryConnection
from .tcp import TcpNetwork
from .types import Connection, Listener, Network, Service

__all__ = ["Connection", "Listener", "MemoryConnection", "Network", "Service", "TcpConfig", "TcpNetwork", "TlsFiles"]
