"""The chunk engine: see `engine` for the contract, `replica` for what chains ask, `record` and `rows` for the index."""

from .record import NO_REQUEST, Request
from .replica import ChunkEngine, ChunkState, Content, InstallItem
from .target import EngineConfig, EngineCounters, TargetIdentity
from .update import Action, Prepared, Update

__all__ = [
    "NO_REQUEST",
    "Action",
    "ChunkEngine",
    "ChunkState",
    "Content",
    "EngineConfig",
    "EngineCounters",
    "InstallItem",
    "Prepared",
    "Request",
    "TargetIdentity",
    "Update",
]
