"""Which token comes next, from logits.

A request's randomness is its own: a number made of its seed and of how many tokens it has, so that what it gets does
not depend on what else runs, on the order of steps, or on the device. Of equal logits the lowest id is taken first.

R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a request's tokens are drawn."""

    temperature: float = 0.0
    """Logits are divided by it; 0: the most likely token, always."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    top_k: int | None = None
    """Only so many of the most likely tokens; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"sampling: temperature is {self.temperature}, and must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p is {self.top_p}, and must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampling: top_k is {self.top_k}, and must be 1 or more")


def uniform(seed: int, step: int) -> float:
    """In [0, 1), the same everywhere for the same two numbers."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def choose(logits_RV: Tensor, wanted: Sequence[tuple[Sampling, int]]) -> list[int | None]:
    """A token for each row, by its sampling and step; None where a logit is not finite. Waits for the device once."""
    logits_RV = logits_RV.float()
    finite_R = torch.isfinite(logits_RV).all(-1)
    best_R = lowest(logits_RV)
    picks = [
        best_R[row] if sampling.temperature == 0 else draw(logits_RV[row], sampling, uniform(sampling.seed, step))
        for row, (sampling, step) in enumerate(wanted)
    ]
    chosen = torch.where(finite_R, torch.stack(picks), -1).tolist()
    return [None if token < 0 else token for token in chosen]


def lowest(logits_RV: Tensor) -> Tensor:
    """[R]: the lowest of the ids with the highest logit."""
    V = logits_RV.shape[-1]
    ids_V = torch.arange(V, device=logits_RV.device)
    best_R1 = logits_RV.amax(-1, keepdim=True)
    return torch.where(logits_RV == best_R1, ids_V, V - 1).amin(-1)


def draw(logits_V: Tensor, sampling: Sampling, number: float) -> Tensor:
    """The token at `number` of [0, 1), where tokens lie one after the other, each as wide as it is likely."""
    scaled_V = (logits_V - logits_V.amax()) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return _at(torch.softmax(scaled_V, -1), number)
    values, ids = torch.sort(scaled_V, descending=True, stable=True)
    if sampling.top_k is not None:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    likely = torch.softmax(values, -1)
    if sampling.top_p < 1:
        before = likely.cumsum(-1) - likely
        likely = likely.masked_fill((before >= sampling.top_p) & (before > 0), 0)
    return ids[_at(likely, number)]


def _at(likely: Tensor, number: float) -> Tensor:
    """The first place where the sum of what stands up to there is more than `number` of the whole."""
    total = likely.cumsum(-1)
    place = torch.searchsorted(total, total[-1:] * number, right=True)[0]
    last = torch.where(likely > 0, torch.arange(len(likely), device=likely.device), 0).amax()  # rounding stays inside
    return torch.minimum(place, last)
