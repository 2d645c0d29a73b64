"""A plain model on many ranks: data parallel, FSDP2 and expert parallel, applied from outside."""

from .apply import apply
from .exchange import ExchangeDispatcher
from .gradients import HAS_FP64, reduce_gradients
from .mesh import Mesh, ParallelConfig

__all__ = ["HAS_FP64", "ExchangeDispatcher", "Mesh", "ParallelConfig", "apply", "reduce_gradients"]
