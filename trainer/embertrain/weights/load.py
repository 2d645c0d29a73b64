"""Weights from files into a model, or into tensors by our names: one at a time, into whatever dtype is there."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from .source import Source


def load(
    target: nn.Module | MutableMapping[str, Tensor],
    path: Path | str,
    *,
    config: ModelConfig | None = None,
    partial: bool = False,
    device: torch.device | str = "cpu",
) -> Source:
    """Fill every weight of `target` from the checkpoint at `path`, and return the checkpoint.

    `target` is a model or a part of one, or tensors by our names. Tensors on the meta device are made on `device`, with
    the dtype they have; so a model that is built there never takes more than its weights and one tensor of the file.
    Quantised weights come out exact, and are then rounded to the dtype of the target.

    `config` is the model the files are of, by their config.json if not said. With `partial` the files may hold more
    weights than the target has: those of other stages, or of MTP layers. Raises WeightsError that tells all that is
    missing, unexpected and misshapen at once, before anything is filled.

    Hand what is returned to `save` as `like`, and weights that have not changed keep their bytes.
    """
    source = Source(path, config)
    wanted = _tensors(target)
    source.check(wanted, partial=partial)
    made: dict[int, Tensor] = {}
    for name, tensor in wanted.items():
        weight = source.weights[name]
        if name == "head.weight" and source.config.tied and weight.pieces[0].name not in source.folder.entries:
            weight = source.weights["embed.weight"]
        out = tensor
        if tensor.is_meta:
            if id(tensor) not in made:  # tied weights are one tensor of two names, and stay one
                made[id(tensor)] = _empty(tensor, device)
            out = made[id(tensor)]
            _put(target, name, out)
        with torch.no_grad():
            source.read(weight, out)
    return source


def _tensors(target: nn.Module | MutableMapping[str, Tensor]) -> dict[str, Tensor]:
    return target.state_dict(keep_vars=True) if isinstance(target, nn.Module) else dict(target)


def _empty(meta: Tensor, device: torch.device | str) -> Tensor:
    tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    return nn.Parameter(tensor, meta.requires_grad) if isinstance(meta, nn.Parameter) else tensor


def _put(target: nn.Module | MutableMapping[str, Tensor], name: str, tensor: Tensor) -> None:
    if isinstance(target, nn.Module):
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, tensor)
    else:
        target[name] = tensor
