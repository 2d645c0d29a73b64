"""The storage service: of one process (`service`), and of a node of a cluster (`node`, `replica`)."""

from .config import StorageConfig
from .node import StorageNode
from .replica import Replica
from .service import StorageService

__all__ = ["Replica", "StorageConfig", "StorageNode", "StorageService"]
