"""Low-rank adapters: a model is fine-tuned by small matrices beside its weights, which stay as they are.

    y = x W' + (alpha / rank) * (x A') B',    A [rank, in], B [out, rank], B begins as zero      (arXiv 2106.09685)

`attach` puts adapters beside the matrices of a model in place, experts' too: each expert has its own A and B. What is
left to train are the adapters alone. `merge` adds them to the weights and takes them away; what then remains is a plain
model, which is what decoding fast, exporting and prefixes want.

Names: beside `wq_a.weight` lie `wq_a.lora_a` and `wq_a.lora_b`; beside `experts.w13` lie `experts.a13` and
`experts.b13`. A state dict of the adapters alone is `adapters`.

E experts, R rows, r rank, I and O what a product takes and gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .model.experts import Counts, Experts, grouped_linear, swiglu
from .model.linear import GroupedLinear, Linear, product
from .model.model import Model

TARGETS = ("attention", "shared", "experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Which matrices get adapters, and of what rank."""

    rank: int = 8
    alpha: float = 16.0
    """Adapters count alpha / rank times."""
    targets: tuple[str, ...] = TARGETS
    """attention: its projections, not the compressors' or the indexers'. shared: dense feed-forward parts and shared
    experts. experts: the routed ones."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ConfigError("lora: rank is 1 or more, and alpha more than 0")
        unknown = set(self.targets) - set(TARGETS)
        if unknown or not self.targets:
            raise ConfigError(f"lora: targets are some of {', '.join(TARGETS)}, not {', '.join(sorted(unknown))}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(Linear):
    """A `Linear` whose weight stays, with its adapter."""

    def __init__(self, plain: Linear, config: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        out_size, in_size = plain.weight.shape
        self.weight, self.pad_rows, self.scale = plain.weight, plain.pad_rows, config.scale
        self.lora_a = _first(plain.weight, (config.rank, in_size), generator)
        self.lora_b = nn.Parameter(plain.weight.new_zeros(out_size, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = product(x, self.lora_a, self.pad_rows)
        return product(x, self.weight, self.pad_rows) + product(low, self.lora_b, self.pad_rows) * self.scale

    def whole(self) -> Tensor:
        return self.weight + (self.lora_b @ self.lora_a) * self.scale

    def plain(self) -> Linear:
        """One without an adapter, that gives the same."""
        with torch.device("meta"):
            plain = Linear(self.weight.shape[1], self.weight.shape[0])
        plain.weight, plain.pad_rows = nn.Parameter(self.whole().detach()), self.pad_rows
        return plain


class LoraGroupedLinear(GroupedLinear):
    """A `GroupedLinear` with an adapter for each group."""

    def __init__(self, plain: GroupedLinear, config: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.weight, self.pad_rows, self.groups = plain.weight, plain.pad_rows, plain.groups
        self.scale = config.scale
        out_size, in_size = plain.weight.shape
        self.lora_a = _first(plain.weight, (self.groups * config.rank, in_size), generator)
        self.lora_b = nn.Parameter(plain.weight.new_zeros(out_size, config.rank))

    def forward(self, x_TGI: Tensor) -> Tensor:
        low_TGr = self.multiply(x_TGI, self.lora_a)
        return self.multiply(x_TGI, self.weight) + self.multiply(low_TGr, self.lora_b) * self.scale

    def whole(self) -> Tensor:
        a_GrI = self.lora_a.unflatten(0, (self.groups, -1))
        b_GOr = self.lora_b.unflatten(0, (self.groups, -1))
        return self.weight + torch.bmm(b_GOr, a_GrI).flatten(0, 1) * self.scale

    def plain(self) -> GroupedLinear:
        """One without adapters, that gives the same."""
        with torch.device("meta"):
            plain = GroupedLinear(self.weight.shape[1], self.weight.shape[0] // self.groups, self.groups)
        plain.weight, plain.pad_rows = nn.Parameter(self.whole().detach()), self.pad_rows
        return plain


class LoraExperts(Experts):
    """`Experts` whose weights stay, with an adapter for each."""

    def __init__(self, plain: Experts, config: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.spec, self.pad_rows, self.scale = plain.spec, plain.pad_rows, config.scale
        self.w13, self.w2 = plain.w13, plain.w2
        (E, O13, H), I2 = plain.w13.shape, plain.w2.shape[2]
        self.a13 = _first(plain.w13, (E, config.rank, H), generator)
        self.b13 = nn.Parameter(plain.w13.new_zeros(E, O13, config.rank))
        self.a2 = _first(plain.w2, (E, config.rank, I2), generator)
        self.b2 = nn.Parameter(plain.w2.new_zeros(E, H, config.rank))

    def multiply(self, rows_RH: Tensor, counts: Counts, fullest: int = 0) -> Tensor:
        gate_up = self._product(rows_RH, self.w13, self.a13, self.b13, counts, fullest)
        inner = swiglu(gate_up, self.spec.swiglu_limit, self.pad_rows > 1)
        return self._product(inner, self.w2, self.a2, self.b2, counts, fullest)

    def _product(self, rows_RI: Tensor, weight: Tensor, a: Tensor, b: Tensor, counts: Counts, fullest: int) -> Tensor:
        low_Rr = grouped_linear(rows_RI, a, counts, self.pad_rows, fullest)
        beside = grouped_linear(low_Rr, b, counts, self.pad_rows, fullest)
        return grouped_linear(rows_RI, weight, counts, self.pad_rows, fullest) + beside * self.scale

    def few(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
        return None

    def padded(self, rows_EMH: Tensor) -> Tensor:
        return self.plain().padded(rows_EMH)

    def plain(self) -> Experts:
        """Ones without adapters, that give the same."""
        with torch.device("meta"):
            plain = Experts(self.spec, self.w13.shape[2])
        plain.pad_rows = self.pad_rows
        plain.w13 = nn.Parameter((self.w13 + torch.bmm(self.b13, self.a13) * self.scale).detach())
        plain.w2 = nn.Parameter((self.w2 + torch.bmm(self.b2, self.a2) * self.scale).detach())
        return plain


def attach(model: Model, config: LoraConfig, generator: torch.Generator, *, mtp: bool = True) -> None:
    """Adapters beside the matrices that `config` names, those of MTP layers if `mtp`; everything else is frozen. The
    model says what it said before, until the adapters are trained."""
    model.requires_grad_(False)
    for parent, name, module in list(_targets(model, config, mtp)):
        match module:
            case Experts():
                fresh: nn.Module = LoraExperts(module, config, generator)
            case GroupedLinear():
                fresh = LoraGroupedLinear(module, config, generator)
            case _:
                fresh = LoraLinear(module, config, generator)
        setattr(parent, name, fresh)


@torch.no_grad()
def merge(model: Model) -> None:
    """The adapters are added to the weights, and gone; what was frozen for them can be trained again."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLinear | LoraGroupedLinear | LoraExperts):
                setattr(parent, name, module.plain())
    model.requires_grad_(True)


def adapters(model: Model) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    modules = [m for m in model.modules() if isinstance(m, LoraLinear | LoraGroupedLinear | LoraExperts)]
    ours = {id(p) for m in modules for n, p in m.named_parameters(recurse=False) if n not in ("weight", "w13", "w2")}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ours}


def _targets(model: Model, config: LoraConfig, mtp: bool) -> Iterator[tuple[nn.Module, str, Linear | Experts]]:
    """Parent, name and module of each matrix that gets an adapter."""
    for path, parent in model.named_modules():
        last = path.rpartition(".")[2]
        if path.startswith("mtp.") and not mtp:
            continue
        for name, module in parent.named_children():
            if isinstance(module, Experts):
                if "experts" in config.targets:
                    yield parent, name, module
            elif isinstance(module, Linear) and last in _PARENTS and _PARENTS[last] in config.targets:
                yield parent, name, module


_PARENTS = {"attn": "attention", "shared": "shared", "ffn": "shared"}
"""Whose direct matrices are whose."""


def _first(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    """A: as torch initialises a linear layer, uniform to 1 / sqrt(in)."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(like.new_empty(shape).uniform_(-bound, bound, generator=generator))
