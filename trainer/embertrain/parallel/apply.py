"""A plain model made parallel in place: its modules, and the names of its weights, stay what they are.

Experts become DTensors over ep, and their rows travel (`ExchangeDispatcher`). With fsdp, matrices and embedding are
cut: a layer's are a unit of FSDP2, its experts' one of their own, and all else one more, which is gathered from the
forward call to the end of the backward: `Model.logits` and `Model.predict` may so be called after `Model.forward`. MTP
layers are part of it, but for their experts. What computes in fp32 whatever the rest does (`Model.cast`) is not cut,
being small: norms, routers, hyper-connections.

Gradients are sums over ranks: see `gradients.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ..errors import ConfigError
from ..model.dispatch import LocalDispatcher
from ..model.experts import Experts
from ..model.hybrid import HybridAttention
from ..model.linear import Linear
from ..model.model import Model
from ..model.moe import MoE
from .exchange import ExchangeDispatcher
from .gradients import HAS_FP64, sum_in_fp64
from .mesh import Mesh


def apply(model: Model, mesh: Mesh, *, dtype: torch.dtype = torch.float32, exact: bool = False) -> None:
    """Before optimizers are built, and with the same weights on all ranks. Raises ConfigError.

    `dtype` is what weights that fsdp cuts are gathered and computed in; gradients are reduced in fp32 at least. It is
    for fsdp alone: without, weights are whole, and the caller may cast them. With one rank too: see `_keep_present`.

    `exact`: a step has the same bits, but for accidents of rounding, however its forward calls are dealt out to ranks.
    Experts multiply the rows of each rank by themselves, and gradients are added up in fp64 (`gradients.py`), which
    takes torch 2.10.
    """
    if exact and not HAS_FP64:
        raise ConfigError(f"exact sums of gradients need torch 2.10 or later; this is {torch.__version__}")
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    for mixture in mixtures:
        _check(mixture, mesh)
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.register_forward_pre_hook(_keep_present)
    if mesh.ep > 1:
        for mixture in mixtures:
            _spread(mixture, mesh, exact)
    if mesh.fsdp > 1:
        _cut(model, mixtures, mesh, dtype, torch.float64 if exact else torch.float32)
    if exact:
        sum_in_fp64(model, mesh)


def _check(mixture: MoE, mesh: Mesh) -> None:
    experts = mixture.gate.spec.experts
    if experts % (mesh.ep * mesh.fsdp):
        raise ConfigError(
            f"parallel: {experts} experts cannot be dealt out to ep {mesh.ep} * fsdp {mesh.fsdp} ranks: "
            "their product must divide the number of experts"
        )


def _spread(mixture: MoE, mesh: Mesh, apart: bool) -> None:
    """Each rank of ep keeps its experts."""
    over = mesh.along("ep")
    for name, parameter in list(mixture.experts.named_parameters()):
        spread = distribute_tensor(parameter.detach(), over, [Shard(0)], src_data_rank=None)
        setattr(mixture.experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    mixture.dispatcher = ExchangeDispatcher(over.get_group(), apart=apart)


def _cut(model: Model, mixtures: Sequence[MoE], mesh: Mesh, dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """FSDP2, from the inside out."""
    cut = [module for module in model.modules() if isinstance(module, Linear | nn.Embedding | Experts)]
    options: dict[str, Any] = {
        "ignored_params": set(model.parameters()) - {p for module in cut for p in module.parameters()},
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu") if mesh.offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False),
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
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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
