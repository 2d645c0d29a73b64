"""Rotary positions on interleaved pairs: the pair (2i, 2i+1) of a row at position p turns by p * frequency_i.

Frequencies are those of RoPE, stretched by YaRN where the config says so (arXiv 2309.00071, section 3.2: dimensions
that turn often keep their frequency, those that turn seldom get it divided by the factor, the ones between are mixed).
Angles of one forward call are computed once and shared by its layers: `Angles`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .config import Rope, Yarn


def frequencies(rope: Rope, device: torch.device) -> Tensor:
    """[dim / 2] fp32, radians a position. Kept, for a dozen small operations would be a part of every step; a compiler
    that reads this is shown how they are computed."""
    if torch.compiler.is_compiling():
        return _frequencies(rope, device)
    with torch.inference_mode(False):
        return _known_frequencies(rope, device)


def _frequencies(rope: Rope, device: torch.device) -> Tensor:
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    plain = 1.0 / rope.theta**exponents
    if rope.yarn is None:
        return plain
    kept = 1.0 - _ramp(rope, rope.yarn, device)
    return plain / rope.yarn.factor * (1 - kept) + plain * kept


_known_frequencies = lru_cache(maxsize=64)(_frequencies)


def _ramp(rope: Rope, yarn: Yarn, device: torch.device) -> Tensor:
    """0 where a dimension turns more than beta_fast times in the original context, 1 where less than beta_slow."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), rope.dim - 1)
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device=device)
    return ((steps - low) / max(high - low, 0.001)).clamp(0, 1)


def rotations(rope: Rope, positions: Tensor) -> Tensor:
    """[*positions, dim / 2] complex64: what the pairs of rows at these positions are multiplied by."""
    angles = positions.float()[..., None] * frequencies(rope, positions.device)
    scale = rope.yarn.rotation_scale if rope.yarn else 1.0
    return torch.polar(torch.full_like(angles, scale), angles)


def rotate(x: Tensor, turns_TN: Tensor, *, back: bool = False) -> Tensor:
    """x [T, ..., W] with its last 2 * N numbers turned, or turned back."""
    if kernels.loops(x) and x.shape[-1] % 16 == 0:
        return kernels.norm(x, None, -1.0, turns_TN, back=back)
    width = 2 * turns_TN.shape[-1]
    turns = turns_TN.conj() if back else turns_TN
    if x.dim() == 3:
        turns = turns[:, None]
    pairs = torch.view_as_complex(x[..., -width:].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(_turn(pairs, turns)).flatten(-2).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([x[..., :-width], turned], dim=-1)


def _turn(pairs: Tensor, turns: Tensor) -> Tensor:
    """pairs * turns. torch multiplies 16 at a time and rounds those that are left otherwise, so that a row's bits would
    depend on the rows beside it where rows are narrow: of these there are always enough for nothing to be left."""
    lacks = -pairs.shape[0] % (16 // math.gcd(16, pairs.shape[-1])) if pairs.dim() == 2 else 0
    if not lacks:
        return pairs * turns
    return (F.pad(pairs, (0, 0, 0, lacks)) * F.pad(turns, (0, 0, 0, lacks)))[:-lacks]


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """V3.2's indexer: the first 2 * n numbers turn, paired as (i, n + i)."""
    n = turns.shape[-1]
    pairs = _turn(torch.complex(x[..., :n].float(), x[..., n : 2 * n].float()), turns)
    return torch.cat([pairs.real.to(x.dtype), pairs.imag.to(x.dtype), x[..., 2 * n :]], dim=-1)


class Angles:
    """The rotations of one forward call, each computed when it is first asked for."""

    def __init__(self, positions_T: Tensor) -> None:
        self._positions_T = positions_T
        self._known: dict[tuple[Rope, int, int, int] | Rope, Tensor] = {}

    def tokens(self, rope: Rope) -> Tensor:
        """[T, dim / 2], at the tokens' own positions."""
        if rope not in self._known:
            self._known[rope] = rotations(rope, self._positions_T)
        return self._known[rope]

    def entries(self, rope: Rope, first: int, count: int, ratio: int) -> Tensor:
        """[count, dim / 2], at the first tokens of windows `first` to `first + count` of `ratio` tokens."""
        key = (rope, first, count, ratio)
        if key not in self._known:
            windows = torch.arange(first, first + count, device=self._positions_T.device)
            self._known[key] = rotations(rope, windows * ratio)
        return self._known[key]
