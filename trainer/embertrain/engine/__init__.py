"""Generation: requests are submitted, and every step is one forward call on all of them."""

from .engine import Engine, EngineConfig
from .request import Request, Token
from .sampling import Sampling

__all__ = ["Engine", "EngineConfig", "Request", "Sampling", "Token"]
