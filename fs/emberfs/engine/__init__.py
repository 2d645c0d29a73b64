"""The chunk engine: see `engine` for the contract, `record` for the index rows, `update` for how writes land."""

from .engine import ChunkEngine, EngineConfig, EngineCounters
from .record import Request
from .update import Action, Update

__all__ = ["Action", "ChunkEngine", "EngineConfig", "EngineCounters", "Request", "Update"]
