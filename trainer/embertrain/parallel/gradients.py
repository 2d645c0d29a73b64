"""Gradients, which are sums: over the forward calls of a step, and over ranks.

A rank calls backward on the sum of its tokens' losses over the tokens of all ranks, as often as it likes. fsdp reduces
what it cuts in every backward call, `reduce_gradients` everything else, once a step.

In fp64 a sum of some fp32 numbers is exact, unless one is 2^29 times as large as another, and then nearly so. Rounded
once, it does not depend on who adds what first (`sum_in_fp64`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from ..model.model import Model
from ..optim.muon import local
from .mesh import Mesh

HAS_FP64 = hasattr(torch.Tensor, "grad_dtype")
"""Whether this torch can add gradients of another type than their weights': since 2.10."""
_BUCKET = 1 << 24
"""Numbers that are reduced together."""


@torch.no_grad()
def reduce_gradients(model: Model, mesh: Mesh) -> None:
    """After a step's last backward call and before clipping: sums over ranks, of what fsdp does not reduce."""
    ours = [parameter for parameter in _uncut(model, mesh) if parameter.grad is not None]
    if mesh.ranks > 1:
        _sum((p for p in ours if not isinstance(p, DTensor)), mesh.group)
    if mesh.dp > 1:
        # Experts have met the tokens of their ep ranks already.
        _sum((p for p in ours if isinstance(p, DTensor)), mesh.along("dp").get_group())
    for parameter in ours:
        _round(parameter)
    for unit in _units.get(model, ()):
        unit.total = None


def sum_in_fp64(model: Model, mesh: Mesh) -> None:
    """From now on, gradients are added up in fp64. They are rounded by `reduce_gradients`, or by fsdp, which has to be
    applied before, with fp64 to reduce in. A step begins without gradients: to one that is zero fp32 is added."""
    uncut = list(_uncut(model, mesh))
    model.register_forward_pre_hook(lambda *_: _ask(uncut))
    seen: set[nn.Module] = set()
    units = _units[model] = []
    for module in reversed(list(model.modules())):  # What is inside comes first.
        if isinstance(module, FSDPModule):
            cut = [m for m in module.modules() if m not in seen and any(isinstance(p, DTensor) for p in _own(m))]
            units.append(_Unit(module, cut))
            seen.update(cut)


class _Unit:
    """What a unit of fsdp has reduced in a step, in fp64: fsdp itself would round it after every backward call."""

    def __init__(self, unit: FSDPModule, modules: Sequence[nn.Module]) -> None:
        """`modules` are those whose weights it cuts."""
        self.modules = modules
        self.cut = [parameter for module in modules for parameter in _own(module)]
        self.total: Tensor | None = None
        assert isinstance(unit, nn.Module)
        unit.register_forward_pre_hook(self.begin)
        unit.set_all_reduce_hook(self.add)

    def begin(self, *_: Any) -> None:
        """A forward call begins, and weights are whole."""
        if all(parameter.grad is None for parameter in self.cut):
            self.total = None  # The last step was given up.
        for module in self.modules:
            _ask(_own(module))

    def add(self, reduced: Tensor) -> None:
        """`reduced` is a backward call's sum over ranks, and then the step's so far, in place of the gradients.

        The total is memory of its own: fsdp's is made on another stream of the device, and used again on that one.
        """
        if self.total is None:
            self.total = reduced.clone()
        elif self.total.shape != reduced.shape:
            raise ConfigError("exact sums need every forward call of a step to use the same weights of a layer")
        else:
            self.total += reduced
            reduced.copy_(self.total)
        for parameter in self.cut:
            parameter.grad = None


_units: WeakKeyDictionary[Model, list[_Unit]] = WeakKeyDictionary()
"""Of models whose gradients are added up in fp64."""


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Whole ones while a unit of fsdp computes, otherwise shards."""
    return module.parameters(recurse=False)


def _uncut(model: Model, mesh: Mesh) -> Iterator[nn.Parameter]:
    """What fsdp leaves alone."""
    return (p for p in model.parameters() if mesh.fsdp == 1 or not isinstance(p, DTensor))


def _ask(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients to come, if there are any, are added in fp64."""
    for parameter in parameters if torch.is_grad_enabled() else ():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad_dtype = torch.float64


def _round(parameter: nn.Parameter) -> None:
    """To what optimizers take."""
    grad = parameter.grad
    if grad is None or grad.dtype == parameter.dtype:
        return
    parameter.grad = None
    parameter.grad_dtype = parameter.dtype
    parameter.grad = grad.to(parameter.dtype)


def _sum(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """In place, many gradients in one message."""
    for bucket in _buckets(local(p.grad) for p in parameters if p.grad is not None):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order; of one dtype each."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size + grad.numel() > _BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket
