"""One matrix product, `x @ weight.T`, by whichever of torch's libraries is the faster here.

torch gives fp32 products on CPUs to MKL, which on processors that are not Intel's leaves AVX-512 alone; oneDNN, which
bf16 products go to, does not. torch has an operation that asks for oneDNN by name, made for its compiler. Without
AVX-512 MKL is the faster one, by twice for gradients of weights.

Without AVX-512 neither multiplies bf16 numbers faster than one by one: there they go through fp32, which sums them just
so, and the result is rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import AVX512

_asks_onednn = AVX512 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def slow(x: Tensor) -> bool:
    """Whether products of such tensors are better made in fp32."""
    return x.dtype == torch.bfloat16 and not AVX512 and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K], [N, K] -> [M, N], without gradients; M, N and K are positive."""
    if slow(x):
        return linear(x.float(), weight.float()).bfloat16()
    if _for_onednn(x) and _for_onednn(weight):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


def _for_onednn(x: Tensor) -> bool:
    """Whether rows, or columns, follow one another: for what is strided both ways oneDNN has a loop of its own that is
    a hundred times slower. torch.compile knows nothing of what that operation gives, and does not get it."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _asks_onednn or torch.compiler.is_compiling():
        return False
    return x.is_contiguous() or x.t().is_contiguous()


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """`linear` written to `out`, which is contiguous."""
    if slow(out) or _for_onednn(x):
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def matmul_into(held: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[M, K], [K, N] -> [M, N], without gradients: the first numbers of `held`, where that is as quick."""
    if slow(a):
        return matmul(a, b)
    return torch.mm(a, b, out=held[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1]))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K], [..., K, N] -> [..., M, N]; this one has gradients."""
    if slow(a):
        return (a.float() @ b.float()).bfloat16()
    return a @ b
