"""One matrix product, `x @ weight.T`, by whichever of torch's libraries is the faster here; without gradients.

torch gives fp32 products on CPUs to MKL, which on processors that are not Intel's leaves AVX-512 alone; oneDNN, which
bf16 products go to, does not. torch has an operation that asks for oneDNN by name, made for its compiler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K], [N, K] -> [M, N]; M, N and K are positive, and either may be a transposed view."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """`linear` written to `out`, which is contiguous."""
    if out.dtype == torch.float32:
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)
