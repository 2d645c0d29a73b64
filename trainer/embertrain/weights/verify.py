"""Is a checkpoint sound? Every name, every shape, every number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import WeightsError
from ..model.config import Mixture
from .names import Weight
from .source import Source

_NUMBERS = 1 << 26
"""Looked at in one go."""


def verify(source: Source) -> Iterator[str]:
    """What is wrong with a checkpoint, a line each: names and shapes first, then numbers, weight by weight."""
    try:
        source.check()
    except WeightsError as error:
        yield str(error)
        return
    experts = max((layer.ffn.experts for layer in source.config.layers if isinstance(layer.ffn, Mixture)), default=0)
    for weight in source.weights.values():
        for piece in weight.pieces:
            if source.holds(weight, piece) is None:  # a tied head
                continue
            tensor = source.piece(weight, piece)
            if weight.form == "table":
                low, high = (int(n) for n in torch.aminmax(tensor))
                if low < 0 or high >= experts:
                    yield f"{piece.name} names experts {low} to {high} of {experts}"
            elif count := _wild(tensor):
                yield f"{piece.name} holds {count} numbers that are not finite"
            source.forget(piece)
        yield from _different_copies(source, weight)


def _different_copies(source: Source, weight: Weight) -> Iterator[str]:
    for copy in weight.copies:
        name = weight.pieces[0].name
        if copy in source.folder.entries and not torch.equal(source.folder.tensor(copy), source.folder.tensor(name)):
            yield f"{copy} is not the copy of {name} that it is meant to be"


def _wild(tensor: Tensor) -> int:
    flat = tensor.flatten()
    return sum(int((~torch.isfinite(part)).sum()) for part in torch.split(flat, _NUMBERS))
