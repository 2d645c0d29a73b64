"""Weights in 8 and 4 bits with a scale for every block, as DeepSeek publishes them.

    fp8    e4m3 codes [O, I], a scale for every 128 x 128: fp32 (V3, `weight_scale_inv`) or a power of two (V4, `scale`)
    fp4    e2m1 codes [O, I / 2], a power of two for every 1 x 32 (V4's experts); the even column is in the low half

A weight is code * scale. Powers of two are kept as e8m0, a bare exponent, and then the weight is a bf16 number exactly
(above bf16's subnormals); with an fp32 scale it is the fp32 product.

Quantising takes the smallest scale with which a block's largest magnitude fits, rounds to nearest, ties to even, and so
gives back every weight that came out of `dequantise` with power-of-two scales. (arXiv 2412.19437 section 3.3; OCP MX
specification 1.0 for e2m1 and e8m0)

O, I a weight's two sizes; B, C how many blocks there are of each.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NotFinite, WeightsError

FP8_BLOCK = (128, 128)
FP4_BLOCK = (1, 32)
FP8_MAX = 448.0
FP4_MAX = 6.0

_FP8_AMAX_MIN = 1e-4
"""Of a block: scales of blocks that are all but zero stay ordinary numbers."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
"""Middles between two e2m1 magnitudes of which the lower has the even code."""
_TIES_UP = (0.75, 1.75, 3.5)
_ROWS = 1024
"""Rows worked on at once: what fp32 copies of a weight may take."""

Scales = Literal["fp32", "e8m0"]


def is_fp4(codes: Tensor) -> bool:
    """Whether codes are packed in pairs."""
    return codes.dtype in (torch.int8, torch.uint8)


def weight_shape(codes: Tensor) -> tuple[int, int]:
    """[O, I] of the weight that codes stand for."""
    rows, columns = codes.shape
    return (rows, 2 * columns) if is_fp4(codes) else (rows, columns)


def scale_shape(shape: tuple[int, int], *, fp4: bool) -> tuple[int, int]:
    """[B, C] of a weight [O, I]."""
    block = FP4_BLOCK if fp4 else FP8_BLOCK
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def exact_dtype(scale: Tensor) -> torch.dtype:
    """The dtype in which weights with such scales are exact."""
    return torch.float32 if scale.dtype == torch.float32 else torch.bfloat16


def dequantise(codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight, in its exact dtype or rounded to that of `out`. WeightsError if the two do not belong together."""
    shape = weight_shape(codes)
    if tuple(scale.shape) != scale_shape(shape, fp4=is_fp4(codes)):
        raise WeightsError(f"a weight of {list(shape)} cannot have scales of {list(scale.shape)}")
    block = FP4_BLOCK if is_fp4(codes) else FP8_BLOCK
    out = torch.empty(shape, dtype=exact_dtype(scale), device=codes.device) if out is None else out
    step = _ROWS // block[0] * block[0]
    for begin in range(0, shape[0], step):
        rows = slice(begin, min(begin + step, shape[0]))
        values = _unpack(codes[rows]) if is_fp4(codes) else codes[rows].float()
        factors = _factors(scale[begin // block[0] : -(-rows.stop // block[0])])
        out[rows] = values.mul_(_spread(factors, block, values.shape))
    return out


def quantise_fp8(weight: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight [O, I]. Raises NotFinite."""
    amax = _amax(weight, FP8_BLOCK).clamp(min=_FP8_AMAX_MIN)
    scale = amax / FP8_MAX if scales == "fp32" else _power_of_two(amax / FP8_MAX)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for begin in range(0, weight.shape[0], _ROWS):
        part = weight[begin : begin + _ROWS].float()
        factors = scale[begin // FP8_BLOCK[0] : -(-(begin + _ROWS) // FP8_BLOCK[0])]
        scaled = part / _spread(factors, FP8_BLOCK, part.shape)
        codes[begin : begin + _ROWS] = scaled.clamp(-FP8_MAX, FP8_MAX).to(codes.dtype)
    return codes, scale if scales == "fp32" else scale.to(torch.float8_e8m0fnu)


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight [O, I], I a multiple of 32. Raises NotFinite."""
    rows, columns = weight.shape
    if columns % FP4_BLOCK[1]:
        raise WeightsError(f"fp4 weights have a multiple of {FP4_BLOCK[1]} columns, not {columns}")
    scale = _power_of_two((_amax(weight, FP4_BLOCK) / FP4_MAX).clamp(min=2.0**-126))
    codes = torch.empty(rows, columns // 2, dtype=torch.int8, device=weight.device)
    for begin in range(0, rows, _ROWS):
        part = weight[begin : begin + _ROWS].float()
        scaled = part / _spread(scale[begin : begin + _ROWS], FP4_BLOCK, part.shape)
        codes[begin : begin + _ROWS] = _pack(scaled)
    return codes, scale.to(torch.float8_e8m0fnu)


def _amax(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block: [B, C] fp32."""
    down, across = (-(-size // b) * b - size for size, b in zip(weight.shape, block, strict=True))
    parts = []
    for part in torch.split(weight, _ROWS):
        padded = F.pad(part.float().abs(), (0, across, 0, down if len(part) % block[0] else 0))
        rows, columns = padded.shape
        parts.append(padded.view(rows // block[0], block[0], columns // block[1], block[1]).amax((1, 3)))
    amax = torch.cat(parts)
    if not bool(torch.isfinite(amax).all()):
        raise NotFinite("a weight that is to be quantised holds a NaN or an infinity")
    return amax


def _power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is not less: x > 0, fp32."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def _factors(scale: Tensor) -> Tensor:
    """Scales as fp32; those that are bytes are e8m0 too."""
    return scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale.float()


def _spread(factors: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """[B, C] -> [O, I]."""
    wide = factors.repeat_interleave(block[1], 1)[:, : shape[1]]
    return wide if block[0] == 1 else wide.repeat_interleave(block[0], 0)[: shape[0]]


def _unpack(codes: Tensor) -> Tensor:
    """[O, I / 2] bytes -> [O, I] fp32."""
    table = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=codes.device)
    pairs = codes.view(torch.uint8)
    both = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    return table[both.int()]


def _pack(x: Tensor) -> Tensor:
    """[O, I] fp32 -> [O, I / 2] bytes."""
    magnitude = x.abs()
    down, up = (torch.tensor(ties, device=x.device) for ties in (_TIES_DOWN, _TIES_UP))
    code = torch.bucketize(magnitude, down, out_int32=True) + torch.bucketize(magnitude, up, out_int32=True, right=True)
    code += torch.signbit(x).int() * 8
    return (code[..., 0::2] + code[..., 1::2] * 16).to(torch.uint8).view(torch.int8)
