"""A model, or a range of its layers.

`forward` takes packed tokens and a `Batch` and returns logits of the rows the batch asks for, and an `Aux`: losses,
loads and choices. It changes nothing: no bias is updated, nothing is counted twice when activations are recomputed.
Whose rows a cache holds and when a sequence ends are the caller's affairs.

A model of a range of layers is one stage of a pipeline. What crosses from stage to stage is a `Crossing`: the
residual, the token ids (hashed layers and MTP read them) and what the layers before have told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.cache import Cache
from ..cache.step import Fresh, Rows, Step
from ..errors import ContextError, VocabularyError
from .batch import Batch
from .config import ModelConfig
from .experts import Experts
from .hyper import HyperConnection, HyperHead
from .layer import Block, streams
from .lesson import Lessons
from .linear import Linear
from .mtp import MTPBlock
from .norm import RMSNorm
from .rope import Angles
from .router import Router, Routing


@dataclass(frozen=True, slots=True)
class Aux:
    """What a forward call tells beside its logits, by layer; MTP layers come after the others."""

    routing: Mapping[int, Routing] = field(default_factory=dict)
    index_losses: Mapping[int, Tensor] = field(default_factory=dict)
    """Scalars: what the indexers' lessons cost, summed over queries; empty unless lessons were asked for."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """What one stage of a pipeline hands to the next."""

    residual: Tensor
    """[T, H], or [T, streams, H]."""
    ids_T: Tensor
    routing: Mapping[int, Routing] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """`logits` [rows asked for, vocabulary] in the model's dtype."""

    logits: Tensor
    residual: Tensor
    """What an MTP layer reads: [T, H] or [T, streams, H]."""
    aux: Aux


class Model(nn.Module):
    """Layers `layers` of `config` (all, if not said): with the embedding where the first is one of them, with the head
    where the last is. Built empty on the current default device; `reset_parameters` or `embertrain.weights` fills it.
    """

    def __init__(self, config: ModelConfig, *, layers: range | None = None, mtp: bool = True) -> None:
        super().__init__()
        self.config = config
        self.range = layers or range(len(config.layers))
        assert 0 <= self.range.start < self.range.stop <= len(config.layers) and self.range.step == 1
        self.is_first = self.range.start == 0
        self.is_last = self.range.stop == len(config.layers)
        H = config.hidden_size
        with_mtp = mtp and self.is_last and bool(config.mtp)
        if self.is_first or with_mtp or (self.is_last and config.tied):
            self.embed = nn.Embedding(config.vocab_size, H)
        self.layers = nn.ModuleDict({str(i): Block(config, config.layers[i], i) for i in self.range})
        self.hc_head: HyperHead | None = None
        if self.is_last:
            self.norm = RMSNorm(H, config.rms_eps)
            self.hc_head = HyperHead(config.hyper, H, config.rms_eps) if config.hyper else None
            self.head = Linear(H, config.vocab_size)
            if config.tied:
                self.head.weight = cast(nn.Parameter, self.embed.weight)
        count = len(config.layers)
        blocks = [MTPBlock(config, layer, count + i) for i, layer in enumerate(config.mtp)] if with_mtp else []
        self.mtp = nn.ModuleList(blocks)
        self.apart = False
        """Whether attention takes decoding sequences one by one (`batch_invariant`)."""

    def forward(
        self,
        ids_T: Tensor,
        batch: Batch,
        cache: Cache | None = None,
        *,
        selections: Mapping[int, Tensor] | None = None,
        generator: torch.Generator | None = None,
        lessons: Lessons | None = None,
        checked: bool = False,
    ) -> Output:
        """A whole model's forward call. Without a cache every segment is a whole document.

        `selections` are experts [T, K] by layer, to be used instead of the router's own choice. `generator` is for
        routers that add noise in training. `lessons` are the indexers', without a cache. `checked`: the caller knows
        that the model can take these tokens. Raises VocabularyError, ContextError.
        """
        assert self.is_first and self.is_last
        if not checked:
            self.check(ids_T, batch)
        assert cache is None or lessons is None
        rows: Rows = Fresh(batch, lessons) if cache is None else Step(cache, batch, apart=self.apart)
        crossing = self.run(self.begin(ids_T), batch, rows, selections=selections, generator=generator)
        logits = self.logits(crossing.residual, batch)
        if isinstance(rows, Step):
            rows.done()
        return Output(logits, crossing.residual, Aux(crossing.routing, lessons.losses() if lessons else {}))

    def check(self, ids_T: Tensor, batch: Batch) -> None:
        """Whether the model can take these tokens there. Waits for the device."""
        assert ids_T.shape == (batch.count,)
        low, high = (int(n) for n in torch.aminmax(ids_T))
        if low < 0 or high >= self.config.vocab_size:
            wrong = high if high >= self.config.vocab_size else low
            raise VocabularyError(f"token {wrong} is outside the model's vocabulary of {self.config.vocab_size}")
        longest = max(s.end for s in batch.segments)
        if longest > self.config.positions_max:
            raise ContextError(f"{longest} tokens are more than the {self.config.positions_max} the model is made for")

    def begin(self, ids_T: Tensor) -> Crossing:
        """Before the first layer."""
        return Crossing(streams(self.embed(ids_T), self.config.hyper), ids_T)

    def run(
        self,
        crossing: Crossing,
        batch: Batch,
        rows: Rows,
        *,
        selections: Mapping[int, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Crossing:
        """Through this model's layers."""
        x, ids_T = crossing.residual, crossing.ids_T
        angles = Angles(batch.positions_T)
        routing = dict(crossing.routing)
        for name, block in self.layers.items():
            index = int(name)
            chosen = selections.get(index) if selections else None
            x, routed = block(x, ids_T, batch, rows, angles, chosen, generator)
            if routed is not None:
                routing[index] = routed
        return Crossing(x, ids_T, routing)

    def logits(self, residual: Tensor, batch: Batch | None = None, depth: int | None = None) -> Tensor:
        """Of the rows that the batch asks for, or of all; with a depth, of that MTP layer's residual."""
        if batch is not None:
            residual = _wanted(residual, batch)
        if depth is not None:
            block = self.mtp[depth]
            assert isinstance(block, MTPBlock)
            return self.head(block.final(residual))
        x_TH = residual if self.hc_head is None else self.hc_head(residual)
        return self.head(self.norm(x_TH))

    def predict(
        self,
        depth: int,
        residual: Tensor,
        next_ids_T: Tensor,
        batch: Batch,
        cache: Cache | None = None,
        *,
        generator: torch.Generator | None = None,
        lessons: Lessons | None = None,
    ) -> Output:
        """What MTP layer `depth` says of the tokens after `next_ids_T`: logits of the rows the batch asks for.

        `next_ids_T` are the tokens that follow those `batch` names. A cache here is one of the MTP layers' own rows.
        `generator` and `lessons` as in `forward`.
        """
        block = self.mtp[depth]
        assert isinstance(block, MTPBlock)
        if depth == 0 and self.config.family != "v4":
            residual = self.norm(residual)  # V3's weights are made for what the head sees, not for the bare residual.
        assert cache is None or lessons is None
        rows: Rows = Fresh(batch, lessons) if cache is None else Step(cache, batch, apart=self.apart)
        embedded, angles = self.embed(next_ids_T), Angles(batch.positions_T)
        x_TH, residual, routed = block.predict(embedded, residual, next_ids_T, batch, rows, angles, generator)
        if isinstance(rows, Step):
            rows.done()
        routing = {} if routed is None else {block.index: routed}
        aux = Aux(routing, lessons.losses() if lessons else {})
        return Output(self.head(_wanted(x_TH, batch)), residual, aux)

    def batch_invariant(self, on: bool) -> None:
        """In this mode a token's bits do not depend on what is beside it.

        Products have a multiple of 8 rows, functions of single numbers are `pointwise`'s steady ones, and attention
        takes decoding sequences one by one.
        """
        self.apart = on
        for module in self.modules():
            if isinstance(module, Linear | Experts | Router | HyperConnection | HyperHead):
                module.pad_rows = 8 if on else 1

    def cast(self, dtype: torch.dtype) -> Model:
        """Matrices and embedding in `dtype`, which is what the model then computes in. Norms, routers, sinks, position
        biases and hyper-connections stay fp32."""
        for module in self.modules():
            if isinstance(module, Linear | nn.Embedding | Experts):
                module.to(dtype)
        return self

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, *, std: float = 0.02) -> None:
        """Random weights: normal with `std`, those that write into the residual divided by the root of twice the depth.

        Norms are one; sinks and biases begin neutral. So, nearly, do the mixtures of hyper-connections, whatever the
        hidden size: their scales are 0.01 (arXiv 2512.24880). Hashed layers get a table.
        """
        narrow = std / math.sqrt(2 * len(self.config.layers))
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 2)[-2:]
            if parameter.dim() < 2 or last[-1] == "ape":
                parameter.fill_(1.0 if "norm" in name else 0.01 if last[-1] == "scale" else 0.0)
                if name.endswith(".bias"):
                    parameter.zero_()
            else:
                writes = last[0] in ("wo", "wo_b") or last[-1] == "w2" or last[0] == "w2"
                parameter.normal_(0.0, narrow if writes else std, generator=generator)
        for module in self.modules():
            if isinstance(module, Router) and module.spec.hashed:
                module.reset_table(generator)
            elif isinstance(module, Router):
                module.bias.zero_()

    def loss(self, ids_T: Tensor, targets_T: Tensor, batch: Batch) -> tuple[Tensor, Aux]:
        """Mean cross-entropy of the tokens that follow, -100 being none, and the call's Aux."""
        out = self(ids_T, batch)
        return F.cross_entropy(out.logits.float(), targets_T, ignore_index=-100), out.aux


def _wanted(rows: Tensor, batch: Batch) -> Tensor:
    """The rows that a batch asks for, in its order."""
    if batch.logits is None or batch.logits == tuple(range(rows.shape[0])):
        return rows
    return rows[torch.tensor(batch.logits, dtype=torch.int64, device=rows.device)]
