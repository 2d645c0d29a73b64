"""Functions of single numbers whose bits do not depend on where in a tensor a number stands.

torch works through a tensor in vectors and does what is left at the end one by one, by another exp: sigmoid, silu and
softplus of the same number differ in the last bit by place, and so by what is beside it. exp, log1p and the four
operations do not. `steady` forms are made of those, and cost a few more operations; batch-invariant mode uses them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(x: Tensor, *, steady: bool) -> Tensor:
    """1 / (1 + exp(-x)), in x's dtype."""
    return 1 / (1 + torch.exp(-x)) if steady else torch.sigmoid(x)


def silu(x: Tensor, *, steady: bool) -> Tensor:
    """x * sigmoid(x), computed in fp32 and given in x's dtype."""
    if not steady:
        return F.silu(x)
    x32 = x.float()
    return (x32 / (1 + torch.exp(-x32))).to(x.dtype)


def softplus(x: Tensor, *, steady: bool) -> Tensor:
    """log(1 + exp(x)), in x's dtype."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0) if steady else F.softplus(x)
