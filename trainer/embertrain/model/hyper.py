"""Hyper-connections on a manifold: the residual of V4 is four streams, read and written through learned mixtures.

Before a block, `pre` collapses the streams to one; after it, `post` spreads the block's output over them and `comb`, a
doubly stochastic matrix, mixes what was there. All three come from the streams themselves, through one linear layer,
in fp32 (arXiv 2606.19348 section 2.2).

T tokens, S streams, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from .config import Hyper
from .linear import product
from .norm import rms
from .pointwise import sigmoid


def sinkhorn(logits_TSS: Tensor, iterations: int, eps: float) -> Tensor:
    """A matrix of positive numbers whose rows and columns sum to one, nearly: the softmax of each row, then columns and
    rows normalised in turn, columns first and last."""
    m = torch.softmax(logits_TSS, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


class HyperConnection(nn.Module):
    """The mixtures around one block."""

    def __init__(self, spec: Hyper, hidden_size: int, rms_eps: float) -> None:
        super().__init__()
        S = spec.streams
        self.spec, self.rms_eps, self.pad_rows = spec, rms_eps, 1
        self.fn = nn.Parameter(torch.empty((2 + S) * S, S * hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros((2 + S) * S, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def forward(self, x_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's input [T, D], and post [T, S] and comb [T, S, S] for `expand`, both fp32."""
        spec = self.spec
        few = self.pad_rows == 1 and x_TSD.shape[0] <= kernels.FEW and self.fn.dtype == torch.float32
        if few and kernels.loops(x_TSD) and x_TSD.shape[-1] % 32 == 0:
            return kernels.hyper_begin(
                *(x_TSD, self.fn, self.scale, self.base),
                iterations=spec.iterations,
                eps=spec.eps,
                rms_eps=self.rms_eps,
            )
        logits = product(rms(x_TSD.flatten(1).float(), self.rms_eps), self.fn, self.pad_rows)
        if kernels.loops(logits):
            mixtures = kernels.hyper_mix(logits, self.scale, self.base, spec.streams, spec.iterations, spec.eps)
        else:
            mixtures = self.mix(logits)
        pre_TS, post_TS, comb_TSS = mixtures
        return collapse(pre_TS, x_TSD), post_TS, comb_TSS

    def mix(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre, post and comb of a linear layer's output [T, (2 + S) * S]."""
        S, steady = self.spec.streams, self.pad_rows > 1
        pre_scale, post_scale, comb_scale = self.scale.unbind()
        pre_base, post_base, comb_base = self.base.split([S, S, S * S])
        pre_TS, post_TS, comb = logits.split([S, S, S * S], -1)
        pre_TS = sigmoid(pre_TS * pre_scale + pre_base, steady=steady) + self.spec.eps
        post_TS = 2 * sigmoid(post_TS * post_scale + post_base, steady=steady)
        comb_TSS = (comb * comb_scale + comb_base).unflatten(-1, (S, S))
        return pre_TS, post_TS, sinkhorn(comb_TSS, self.spec.iterations, self.spec.eps)


class HyperHead(nn.Module):
    """The last collapse of the streams, before the final norm."""

    def __init__(self, spec: Hyper, hidden_size: int, rms_eps: float) -> None:
        super().__init__()
        S = spec.streams
        self.spec, self.rms_eps, self.pad_rows = spec, rms_eps, 1
        self.fn = nn.Parameter(torch.empty(S, S * hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros(S, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def forward(self, x_TSD: Tensor) -> Tensor:
        mix = product(rms(x_TSD.flatten(1).float(), self.rms_eps), self.fn, self.pad_rows)
        pre_TS = sigmoid(mix * self.scale + self.base, steady=self.pad_rows > 1) + self.spec.eps
        return collapse(pre_TS, x_TSD)


def collapse(pre_TS: Tensor, x_TSD: Tensor) -> Tensor:
    """The streams' sum, weighted by pre: [T, D]."""
    return torch.bmm(pre_TS[:, None], x_TSD.float())[:, 0].to(x_TSD.dtype)


def expand(y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, x_TSD: Tensor) -> Tensor:
    """The streams after a block: stream k is post_k * y + the sum over j of comb_jk * x_j."""
    if kernels.loops(x_TSD) and x_TSD.shape[-1] % 16 == 0:
        return kernels.expand(y_TD, post_TS, comb_TSS, x_TSD)
    mixed = torch.bmm(comb_TSS.transpose(1, 2), x_TSD.float())
    return torch.baddbmm(mixed, post_TS[:, :, None], y_TD[:, None].float()).to(x_TSD.dtype)
