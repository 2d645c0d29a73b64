"""A plain model on many ranks: data parallel, FSDP2 and expert parallel, applied from outside."""

from .apply import apply, reduce_gradients
from .exchange import ExchangeDispatcher
from .mesh import Mesh, ParallelConfig

__all__ = ["ExchangeDispatcher", "Mesh", "ParallelConfig", "apply", "reduce_gradients"]
