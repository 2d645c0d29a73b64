"""Root-mean-square norms: computed in fp32 whatever comes in, and given back in the dtype that came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last dimension, without a weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms(x) * weight`; the weight starts at one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
