"""The norm of all gradients together, and gradients cut down to it.

Of a parameter that is sharded each rank counts its own part, and ranks that hold the same part count it once. Sums are
in fp64 and in the order of the parameters: the same bits on every rank and in every run, and nearly the same whatever
the number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .muon import local


@torch.no_grad()
def clip(model: nn.Module, max_norm: float) -> Tensor:
    """The norm before, a scalar in fp64; gradients are scaled so that it is at most `max_norm`. Waits for no device.

    A norm that is not finite spoils the gradients: look at it before the step.
    """
    assert max_norm > 0
    norm = gradient_norm(model)
    factor = (max_norm / norm).clamp(max=1.0)  # NaN stays NaN; a norm of 0 gives infinity, and then 1.
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = local(parameter.grad)
            grad.mul_(factor.to(grad))
    return norm


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """A scalar in fp64, the same on all ranks."""
    squares: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        groups: tuple[dist.ProcessGroup, ...] = ()
        square = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64).square()
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            square = square.to(mesh.device_type)
            groups = tuple(mesh.get_group(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())
        squares[groups] = squares[groups] + square if groups in squares else square
    total = torch.zeros((), dtype=torch.float64)
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total = square + total.to(square.device)
    return total.sqrt()
