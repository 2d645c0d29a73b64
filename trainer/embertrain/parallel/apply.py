"""A plain model made parallel in place: its modules, and the names of its weights, stay what they are.

Experts become DTensors over ep, and their rows travel (`ExchangeDispatcher`). With fsdp, matrices and embedding are
cut: a layer's are a unit of FSDP2, its experts' one of their own, and all else one more, which is gathered from the
forward call to the end of the backward: `Model.logits` and `Model.predict` may so be called after `Model.forward`. MTP
layers are part of it, but for their experts. What computes in fp32 whatever the rest does (`Model.cast`) is not cut,
being small: norms, routers, hyper-connections.

Gradients are means over ranks: a rank calls backward on the sum of its tokens' losses, times the ranks, over the
tokens of all ranks. fsdp reduces them in every backward call, `reduce_gradients` those of everything else, once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import ConfigError
from ..model.dispatch import LocalDispatcher
from ..model.experts import Experts
from ..model.hybrid import HybridAttention
from ..model.linear import Linear
from ..model.model import Model
from ..model.moe import MoE
from .exchange import ExchangeDispatcher
from .mesh import Mesh

_BUCKET = 1 << 24
"""Numbers that are reduced together."""


def apply(model: Model, mesh: Mesh, *, dtype: torch.dtype = torch.float32) -> None:
    """Before optimizers are built, and with the same weights on all ranks. Raises ConfigError.

    `dtype` is what weights that fsdp cuts are gathered and computed in; gradients are reduced in fp32. It is for fsdp
    alone: without, weights are whole, and the caller may cast them. With one rank too: see `_keep_present`.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    for mixture in mixtures:
        _check(mixture, mesh)
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.register_forward_pre_hook(_keep_present)
    if mesh.ep > 1:
        for mixture in mixtures:
            _spread(mixture, mesh)
    if mesh.fsdp > 1:
        _cut(model, mixtures, mesh, dtype)


@torch.no_grad()
def reduce_gradients(model: Model, mesh: Mesh) -> None:
    """After a step's last backward call and before clipping: means over ranks, of what fsdp does not reduce."""
    if mesh.ranks == 1:
        return
    whole = (p.grad for p in model.parameters() if not isinstance(p, DTensor) and p.grad is not None)
    _sum(whole, mesh.group, 1 / mesh.ranks)
    if mesh.fsdp > 1:
        return
    spread = (p.grad.to_local() for p in model.parameters() if isinstance(p, DTensor) and isinstance(p.grad, DTensor))
    _sum(spread, mesh.along("dp").get_group() if mesh.dp > 1 else None, 1 / mesh.ranks)


def _check(mixture: MoE, mesh: Mesh) -> None:
    experts = mixture.gate.spec.experts
    if experts % (mesh.ep * mesh.fsdp):
        raise ConfigError(
            f"parallel: {experts} experts cannot be dealt out to ep {mesh.ep} * fsdp {mesh.fsdp} ranks: "
            "their product must divide the number of experts"
        )


def _spread(mixture: MoE, mesh: Mesh) -> None:
    """Each rank of ep keeps its experts."""
    over = mesh.along("ep")
    for name, parameter in list(mixture.experts.named_parameters()):
        spread = distribute_tensor(parameter.detach(), over, [Shard(0)], src_data_rank=None)
        setattr(mixture.experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    mixture.dispatcher = ExchangeDispatcher(over.get_group())


def _cut(model: Model, mixtures: Iterable[MoE], mesh: Mesh, dtype: torch.dtype) -> None:
    """FSDP2, from the inside out."""
    cut = [module for module in model.modules() if isinstance(module, Linear | nn.Embedding | Experts)]
    options: dict[str, Any] = {
        "ignored_params": set(model.parameters()) - {p for module in cut for p in module.parameters()},
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu") if mesh.offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for mixture in mixtures:
        # A dispatcher, so that weights are not read but in the experts' own forward call, which gathers them.
        mixture.dispatcher = mixture.dispatcher or LocalDispatcher()
        fully_shard(mixture.experts, mesh=mesh.experts, **options)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh.dense, **options)
    fully_shard(model, mesh=mesh.dense, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A mean over all ranks for experts too, which have met the tokens of their ep ranks already. Sums, divided
            # afterwards, are what every backend has.
            module.set_gradient_divide_factor(float(mesh.ranks))
            module.set_force_sum_reduction_for_comms(True)


def _sum(grads: Iterable[Tensor], group: dist.ProcessGroup | None, factor: float) -> None:
    """In place, many gradients in one message."""
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        if group is not None:
            dist.all_reduce(flat, group=group)
        flat *= factor
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


def _keep_present(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The weights of compressors and indexers get a gradient of zeros where all documents are too short for them.

    Without it they would have none on one rank and some on another, and ranks would reduce different lists. It is so
    with one rank too, where an optimizer would otherwise leave them alone.
    """
    assert isinstance(module, HybridAttention)
    parts = [part for part in (module.compressor, module.indexer) if part is not None]
    wanting = [p for part in parts for p in part.parameters() if p.requires_grad]
    if not wanting or not torch.is_grad_enabled():
        return args
    return (_Present.apply(args[0], *wanting), *args[1:])


class _Present(torch.autograd.Function):
    """x; zeros for the others in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others]
        return grads[0], *zeros
