"""Products in bf16 with weights in fp32.

The model's parameters are fp32: what the optimizer moves and a checkpoint holds. While a block of `computing_in` lasts,
the matrices that `Model.cast` would cast are replaced by casts of themselves, through which gradients come back in
fp32. The rest (norms, routers, sinks, hyper-connections) computes in fp32, as it does in a model that is cast.

A gradient is computed, and activations are computed again, inside the block or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..model.experts import Experts
from ..model.linear import Linear
from ..model.model import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def computing_in(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """The model computes in `dtype`, from weights cast once."""
    if dtype == torch.float32:
        yield
        return
    modules = [module for module in model.modules() if isinstance(module, Linear | nn.Embedding | Experts)]
    try:
        for module in modules:
            # An attribute of the object itself is found before the parameter that the module keeps apart.
            module.__dict__ |= {name: weight.to(dtype) for name, weight in module.named_parameters(recurse=False)}
        yield
    finally:
        for module in modules:
            for name, _ in module.named_parameters(recurse=False):
                module.__dict__.pop(name, None)
