"""Root-mean-square norms: computed in fp32 whatever comes in, and given back in the dtype that came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from .rope import rotate


def rms(x: Tensor, eps: float, turns_TN: Tensor | None = None) -> Tensor:
    """x over the root of its mean square along the last dimension, without a weight; then turned, if there are turns.

    x is [T, ..., W], and what there is of a token has its turns in common.
    """
    if kernels.loops(x) and x.shape[-1] % 16 == 0:
        return kernels.norm(x, None, eps, turns_TN)
    x32 = x.float()
    return _turned((x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype), turns_TN)


class RMSNorm(nn.Module):
    """`rms(x) * weight`; the weight starts at one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, turns_TN: Tensor | None = None) -> Tensor:
        """`turns_TN` as in `rms`."""
        weight = self.weight
        if (
            kernels.loops(x)
            and x.shape[-1] % 16 == 0
            and weight.dtype == torch.float32
            and type(weight) is nn.Parameter
        ):
            return kernels.norm(x, weight, self.eps, turns_TN)
        x32 = x.float()
        return _turned(
            (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * weight).to(x.dtype), turns_TN
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def _turned(x: Tensor, turns_TN: Tensor | None) -> Tensor:
    return x if turns_TN is None else rotate(x, turns_TN)
