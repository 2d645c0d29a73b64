"""What an indexer is taught: to rank rows as the attention that it chooses for does.

    p_t = the attention weights of query t summed over heads, of the rows the index chooses among, scaled to sum to 1
    loss = sum over t of KL(p_t || softmax of the index's scores of the same rows)

Dense lessons are over all rows that a query sees, and attention then attends to all of them; sparse ones are over the
rows chosen. What attention does is not moved by them: p_t has no gradient, and an indexer's inputs are cut off from the
rest of the model. (arXiv 2512.02556 section 2.1.1)

T queries, H heads, N rows the index chooses among.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Lessons:
    """Those of one forward call: handed in by the caller, filled by attention layers that have an indexer."""

    def __init__(self, *, dense: bool) -> None:
        self.dense = dense
        self._parts: dict[int, list[Tensor]] = {}

    def add(self, layer: int, weights_THN: Tensor, scores_TN: Tensor, seen_TN: Tensor) -> None:
        """Some queries of a layer. Attention weights are those of the rows that scores are of."""
        with torch.no_grad():
            shares_TN = weights_THN.float().sum(1).masked_fill(~seen_TN, 0)
            shares_TN = shares_TN / shares_TN.sum(-1, keepdim=True).clamp_min(1e-20)
        self._parts.setdefault(layer, []).append(divergence(shares_TN, scores_TN, seen_TN))

    def losses(self) -> dict[int, Tensor]:
        """By layer, summed over the queries so far."""
        return {layer: torch.stack(parts).sum() for layer, parts in self._parts.items()}


def divergence(shares_TN: Tensor, scores_TN: Tensor, seen_TN: Tensor) -> Tensor:
    """The sum over queries of KL(shares || softmax(scores)), over the rows seen; 0 for a query that sees none.

    Shares of rows that are not seen must be 0.
    """
    # Not -inf: a query without rows would get NaN, and then give it to every gradient.
    logs_TN = torch.log_softmax(scores_TN.masked_fill(~seen_TN, -1e30), -1)
    return (torch.xlogy(shares_TN, shares_TN) - shares_TN * logs_TN).sum()
