"""Which optimizer a parameter has, and its groups.

Muon: weight matrices, those of routers and hyper-connections among them. AdamW: embedding and head, with decay; norms,
sinks, position biases, and the scales and biases of hyper-connections, without (arXiv 2606.19348 section 4.2.2, which
does not tell what decays).

Low-rank adapters are among the latter. Muon moves all directions of a matrix alike; of an adapter it would do so with
either of two thin factors, one of which begins as zero, and not with their product, which is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigError
from ..model.experts import Experts
from ..model.hyper import HyperConnection, HyperHead
from ..model.linear import GroupedLinear, Linear
from ..model.model import Model
from ..model.router import Router
from .muon import Muon


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How weights are moved. The learning rate is the schedule's (`set_lr`)."""

    kind: Literal["muon", "adamw"] = "muon"
    """adamw: for all parameters."""
    weight_decay: float = 0.1
    """A step takes off this part of a weight, times the learning rate."""
    momentum: float = 0.95
    """Muon's, of Nesterov's kind."""
    update_rms: float = 0.18
    """The root mean square of Muon's updates, over the learning rate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Muon's iteration. bfloat16 is several times faster; runs on other numbers of ranks then agree less closely."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    adamw_lr_scale: float = 1.0
    """The learning rate of AdamW's parameters, over that of the schedule."""

    def __post_init__(self) -> None:
        _need(self.kind in ("muon", "adamw"), f"kind is muon or adamw, not {self.kind!r}")
        _need(0 <= self.weight_decay < 1, f"weight_decay is 0 to 1, not {self.weight_decay}")
        _need(0 <= self.momentum < 1, f"momentum is 0 to 1, not {self.momentum}")
        _need(self.update_rms > 0, f"update_rms is more than 0, not {self.update_rms}")
        _need(self.precision in ("float32", "bfloat16"), f"precision is float32 or bfloat16, not {self.precision!r}")
        _need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"betas are two of 0 to 1: {self.betas}")
        _need(self.eps > 0, f"eps is more than 0, not {self.eps}")
        _need(self.adamw_lr_scale > 0, f"adamw_lr_scale is more than 0, not {self.adamw_lr_scale}")


def build(model: Model, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Of all parameters that require a gradient. A model that is made parallel must be so already.

    The learning rate is 0 until `set_lr`.
    """
    matrices, decaying, rest = _assign(model)
    if config.kind == "adamw":
        decaying = [*[p for some in matrices.values() for p in some], *decaying]
        matrices = {}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                [{"params": some, "parts": parts, "lr_scale": 1.0} for parts, some in sorted(matrices.items())],
                lr=0.0,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                rms=config.update_rms,
                dtype=getattr(torch, config.precision),
            )
        )
    scale = 1.0 if config.kind == "adamw" else config.adamw_lr_scale
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay, "lr_scale": scale},
        {"params": rest, "weight_decay": 0.0, "lr_scale": scale},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)
        _begin(adamw)
        optimizers.append(adamw)
    return optimizers


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """For the steps from here on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def _begin(adamw: torch.optim.AdamW) -> None:
    """States before the first step, of parameters that get no gradient (an indexer) too: every checkpoint of a model
    then holds the same."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _assign(model: Model) -> tuple[dict[int, list[nn.Parameter]], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices by how many a parameter holds one below the other, then what decays, then the rest."""
    parts: dict[nn.Parameter, int] = {}
    decaying: set[nn.Parameter] = set()
    for module in model.modules():
        match module:
            case GroupedLinear():
                parts[module.weight] = module.groups
            case Linear():
                parts[module.weight] = 1
            case Experts():
                parts[module.w13] = 2  # Gate and up are two matrices.
                parts[module.w2] = 1
            case Router():
                parts[module.weight] = 1
            case HyperConnection() | HyperHead():
                parts[module.fn] = 1
            case nn.Embedding():
                decaying.update(module.parameters())
    if model.is_last:
        decaying.update(model.head.parameters())
    matrices: dict[int, list[nn.Parameter]] = {}
    decays, rest = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in decaying:
            decays.append(parameter)
        elif parameter in parts:
            matrices.setdefault(parts[parameter], []).append(parameter)
        else:
            rest.append(parameter)
    return matrices, decays, rest


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"optim: {message}")
