"""Products in bf16 with weights in fp32.

The model's parameters are fp32: what the optimizer moves and a checkpoint holds. While a block of `computing_in` lasts,
the matrices that `Model.cast` would cast are replaced by casts of themselves, through which gradients come back in
fp32. The rest (norms, routers, sinks, hyper-connections) computes in fp32, as it does in a model that is cast.

A gradient is computed, and activations are computed again, inside the block or not at all. Where gradients are added up
exactly, what the uses of a cast give its weight is, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.experts import Experts
from ..model.linear import Linear
from ..model.model import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def computing_in(model: Model, dtype: torch.dtype, *, exact: bool = False) -> Iterator[None]:
    """The model computes in `dtype`, from weights cast once. `exact`: as in `parallel.apply`; gradients come back at
    the end of the block."""
    if dtype == torch.float32:
        yield
        return
    modules = [module for module in model.modules() if isinstance(module, Linear | nn.Embedding | Experts)]
    exact = exact and torch.is_grad_enabled()
    try:
        for module in modules:
            # An attribute of the object itself is found before the parameter that the module keeps apart.
            module.__dict__ |= {
                name: _leaf(weight, dtype) if exact else weight.to(dtype)
                for name, weight in module.named_parameters(recurse=False)
            }
        yield
        if exact:
            for module in modules:
                for name, weight in module.named_parameters(recurse=False):
                    _add(weight, module.__dict__[name].grad)
    finally:
        for module in modules:
            for name, _ in module.named_parameters(recurse=False):
                module.__dict__.pop(name, None)


def _leaf(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast that has a gradient of its own, in fp64."""
    cast = weight.detach().to(dtype).requires_grad_(weight.requires_grad)
    cast.grad_dtype = torch.float64
    return cast


def _add(weight: Tensor, grad: Tensor | None) -> None:
    if grad is not None:
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
