"""What training minimises, as one module around the model: a forward call gives the loss of some of a step's tokens.

    loss = cross-entropy + mtp_weight * mean over MTP layers + balance_weight * sum over layers + index_weight * sum

Each term is a sum over tokens divided by what the whole step has of them, so that losses of micro-batches and ranks add
up to the same however the step is cut. Everything that uses a parameter is called in here: whatever gathers weights or
reduces gradients can go around it. It changes nothing; loads come back as counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..model.layer import Block
from ..model.lesson import Lessons
from ..model.model import Model
from ..model.moe import MoE
from ..model.router import Router, Routing
from .config import LossSection
from .losses import cross_entropy
from .packing import Packed


@dataclass(frozen=True, slots=True)
class Totals:
    """What a whole step has, over all micro-batches and ranks."""

    tokens: int
    targets: tuple[int, ...]
    """Tokens with a target: of the model, then of each MTP layer."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one forward call: its share of the step's, fp32 scalars. All but `total` are without gradient and weight."""

    total: Tensor
    language: Tensor
    mtp: Tensor
    balance: Tensor
    index: Tensor
    counts: dict[int, Tensor] = field(default_factory=dict)
    """int64 [E] by layer: tokens that chose each expert."""

    def terms(self) -> Tensor:
        """[4] fp64: language, MTP, balance, index."""
        return torch.stack([self.language, self.mtp, self.balance, self.index]).double()


class Objective(nn.Module):
    """`model` is the plain one: names of parameters and checkpoints are its own."""

    def __init__(self, model: Model, config: LossSection) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.depths = len(model.mtp) if config.mtp_weight > 0 else 0
        """MTP layers that are trained."""

    def forward(
        self, packed: Packed, totals: Totals, *, dense: bool = False, generator: torch.Generator | None = None
    ) -> Losses:
        """`dense`: indexers learn from all rows, and attention sees them. `generator` is for routers' noise."""
        config, model = self.config, self.model
        vocab_size = model.config.vocab_size
        lessons = Lessons(dense=dense) if config.index_weight > 0 else None
        out = model(packed.ids_T, packed.batch, generator=generator, lessons=lessons, checked=True)
        routing, index_losses = dict(out.aux.routing), dict(out.aux.index_losses)
        summed = cross_entropy(model.logits, out.residual, packed.targets[0], vocab_size)
        language = summed / max(totals.targets[0], 1)
        mtp = torch.zeros_like(language)
        residual = out.residual
        for depth in range(self.depths):
            lessons = Lessons(dense=dense) if config.index_weight > 0 else None
            predicted = model.predict(
                depth, residual, packed.next_ids[depth], packed.batch, generator=generator, lessons=lessons
            )
            residual = predicted.residual
            routing |= predicted.aux.routing
            index_losses |= predicted.aux.index_losses
            head = partial(model.logits, depth=depth)
            summed = cross_entropy(head, residual, packed.targets[depth + 1], vocab_size)
            mtp = mtp + summed / max(totals.targets[depth + 1], 1) / self.depths
        balance = self._balance(routing, language) * (packed.tokens / totals.tokens)
        index = torch.stack([language.new_zeros(()), *index_losses.values()]).sum() / totals.tokens
        total = language + config.mtp_weight * mtp + config.balance_weight * balance + config.index_weight * index
        return Losses(
            total,
            language.detach(),
            mtp.detach(),
            balance.detach(),
            index.detach(),
            {layer: routed.counts_E for layer, routed in sorted(routing.items())},
        )

    def language(self, packed: Packed) -> Tensor:
        """The cross-entropy of the next token, summed over those that have one: a scalar in fp32."""
        out = self.model(packed.ids_T, packed.batch, checked=True)
        return cross_entropy(self.model.logits, out.residual, packed.targets[0], self.model.config.vocab_size)

    def _balance(self, routing: dict[int, Routing], like: Tensor) -> Tensor:
        """The mean over tokens, summed over layers that choose."""
        hashed = {layer for layer, router in routers(self.model) if router.spec.hashed}
        if self.config.balance_weight == 0:
            return like.new_zeros(())
        losses = [routed.balance_loss for layer, routed in routing.items() if layer not in hashed]
        return torch.stack([like.new_zeros(()), *losses]).sum()

    def freeze_untaught(self) -> None:
        """What no loss reaches gets no gradient: indexers without lessons, MTP layers without a weight."""
        if self.config.index_weight == 0:
            for block in blocks(self.model):
                if block.attn.indexer is not None:
                    block.attn.indexer.requires_grad_(False)
        if self.depths == 0:
            self.model.mtp.requires_grad_(False)


def blocks(model: Model) -> Iterator[Block]:
    """The layers, then the MTP layers."""
    for block in (*model.layers.values(), *model.mtp):
        assert isinstance(block, Block)
        yield block


def routers(model: Model) -> Iterator[tuple[int, Router]]:
    """By number of the layer."""
    for block in blocks(model):
        if isinstance(block.ffn, MoE):
            yield block.index, block.ffn.gate
