"""Which experts a token goes to, and with what weights.

Scores are a function of one linear layer in fp32. Experts are chosen by score plus a bias that training moves to even
the load (never by a loss), weights come from the scores alone. The first layers of V4 do not choose: a table gives each
token its experts. (arXiv 2412.19437 section 2.1.2; 2606.19348 section 2.1)

T tokens, K choices, E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch
from .config import Mixture


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided of T tokens."""

    experts_TK: Tensor
    """int64."""
    weights_TK: Tensor
    """fp32; what the outputs of the experts are multiplied by."""
    scores_TE: Tensor
    """fp32; what losses are made of."""


class Router(nn.Module):
    """Scores, a choice and its weights."""

    def __init__(self, spec: Mixture, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, hidden_size, dtype=torch.float32))
        if spec.hashed:
            self.tid2eid = nn.Buffer(torch.zeros(vocab_size, spec.top_k, dtype=torch.int32))
        else:
            self.bias = nn.Buffer(torch.zeros(spec.experts, dtype=torch.float32))

    def forward(self, x_TH: Tensor, ids_T: Tensor, batch: Batch, *, selection_TK: Tensor | None = None) -> Routing:
        """`selection_TK` are experts to be used instead of the router's own."""
        scores_TE = self.scores(x_TH)
        if selection_TK is None:
            selection_TK = self.tid2eid[ids_T].long() if self.spec.hashed else self.choose(scores_TE)
        weights_TK = scores_TE.gather(1, selection_TK)
        if self.spec.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(selection_TK, weights_TK * self.spec.scale, scores_TE)

    def scores(self, x_TH: Tensor) -> Tensor:
        """[T, E] fp32."""
        logits = F.linear(x_TH.float(), self.weight)
        match self.spec.scoring:
            case "sqrtsoftplus":
                return F.softplus(logits).sqrt()
            case "sigmoid":
                return logits.sigmoid()
            case "softmax":
                return logits.softmax(-1)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """[T, K]: the best by score and bias, within the best groups where there are groups."""
        spec = self.spec
        choice_TE = scores_TE + self.bias
        if spec.groups > 1:
            in_groups = choice_TE.unflatten(-1, (spec.groups, -1))
            kept = in_groups.topk(min(2, in_groups.shape[-1]), -1).values.sum(-1).topk(spec.groups_kept, -1).indices
            left_out = torch.ones(in_groups.shape[:-1], dtype=torch.bool, device=kept.device).scatter(1, kept, False)
            choice_TE = in_groups.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        return choice_TE.topk(spec.top_k, -1).indices
