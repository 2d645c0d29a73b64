"""Feed-forward parts: SwiGLUs, one for all tokens or many for some each.

    y = (silu(x W1) * (x W3)) W2

In V4 routed experts clamp what goes in: gate <= limit, -limit <= up <= limit. The shared one does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Mixture
from .linear import Linear


class Shared(nn.Module):
    """One SwiGLU for all tokens."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, inner_size)
        self.w3 = Linear(hidden_size, inner_size)
        self.w2 = Linear(inner_size, hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x_TH)) * self.w3(x_TH))
        return y


class Experts(nn.Module):
    """Many SwiGLUs; `w13` [E, 2 I, H] holds gate rows, then up rows."""

    def __init__(self, spec: Mixture, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.w13 = nn.Parameter(torch.empty(spec.experts, 2 * spec.inner_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(spec.experts, hidden_size, spec.inner_size))

    def forward(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts: [T, H]."""
        out_TH = torch.zeros_like(x_TH)
        for expert in experts_TK.unique().tolist():
            tokens, choice = torch.where(experts_TK == expert)
            gate, up = F.linear(x_TH[tokens], self.w13[expert]).chunk(2, -1)
            if self.spec.swiglu_limit is not None:
                limit = self.spec.swiglu_limit
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            rows = F.linear(F.silu(gate) * up, self.w2[expert])
            out_TH = out_TH.index_add(0, tokens, rows * weights_TK[tokens, choice, None].to(rows.dtype))
        return out_TH
