"""The metadata service: names, inodes, sessions, trash and garbage on the ordered KV. See `service`."""

from .chunks import ChunkOps, ClientChunkOps
from .service import MetaService
from .state import MetaConfig

__all__ = ["ChunkOps", "ClientChunkOps", "MetaConfig", "MetaService"]
