"""A plain model on many ranks: data parallel, FSDP2 and expert parallel, applied from outside."""

from .apply import apply
from .exchange import ExchangeDispatcher
from .gradients import reduce_gradients
from .mesh import Mesh, ParallelConfig

__all__ = ["ExchangeDispatcher", "Mesh", "ParallelConfig", "apply", "reduce_gradients"]
