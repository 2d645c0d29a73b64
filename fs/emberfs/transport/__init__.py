"""How requests reach services: see `types` for the contract.

`memory` is one process, `tcp` is many; on one host those share memory (`region`), and between hosts large buffers may
go by UCX (`aside`).
"""

from .config import TcpConfig, TlsFiles
from .memory import MemoryConnection
from .region import allocate
from .tcp import TcpNetwork
from .turns import LoadConfig
from .types import Connection, Listener, Network, Service

__all__ = [
    "Connection",
    "Listener",
    "LoadConfig",
    "MemoryConnection",
    "Network",
    "Service",
    "TcpConfig",
    "TcpNetwork",
    "TlsFiles",
    "allocate",
]
