"""A checkpoint of adapters as a plain model: the weights they were trained beside, with them merged in.

The checkpoint tells which weights those are. Others are refused, whatever their shape: adapters say what they learned
only beside their own.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import torch

from .. import lora
from ..checkpoint import Checkpoints
from ..checkpoint.export import MODEL, config_of, write
from ..checkpoint.values import decode
from ..errors import WeightsError
from ..lora import LoraConfig
from ..model.model import Model
from ..weights.fingerprint import fingerprint
from .base import Origin, open_base


def origin_of(checkpoints: Checkpoints, step: int | None = None) -> Origin | None:
    """What the adapters in the checkpoint of `step`, or the latest, were trained beside; None: it holds a whole model.

    Raises NoCheckpoint, Damaged.
    """
    found = _values(checkpoints, step, "trainer.origin.")
    return Origin(**found) if found else None


def export_merged(
    checkpoints: Checkpoints,
    step: int | None,
    url: str | os.PathLike[str],
    *,
    base: str | None = None,
    names: Literal["official", "transformers"] = "official",
    dtype: torch.dtype | None = None,
) -> int:
    """Write the model as safetensors with a config.json to a new folder at any URL; return the step.

    `base` is where the weights are that the adapters were trained beside, if no longer where they were. The merged
    model is in memory, in fp32. Raises NoCheckpoint, Damaged, WeightsError, ConfigError, FileExistsError.
    """
    entry = checkpoints.catalog.find(step)
    origin = origin_of(checkpoints, entry.step)
    if origin is None:
        raise WeightsError(f"the checkpoint of step {entry.step} holds no adapters: there is nothing to merge")
    model = Model(config_of(checkpoints.catalog.marker(entry)))
    with open_base(base or origin.url, step=None if base else origin.step) as weights:
        weights.fill(model, partial=True)
    if fingerprint(model) != origin.fingerprint:
        raise WeightsError(
            f"the weights at {base or origin.url} are not those that the adapters of step {entry.step} were trained "
            "beside: say where those are (--base)"
        )
    run = json.loads(_values(checkpoints, entry.step, "trainer.run.")["config"])
    config = LoraConfig(rank=run["lora.rank"], alpha=run["lora.alpha"], targets=tuple(run["lora.targets"]))
    lora.attach(model, config, torch.Generator(), mtp=run["losses.mtp_weight"] > 0)
    adapters = {name: parameter.detach() for name, parameter in lora.adapters(model).items()}
    checkpoints.load({MODEL: adapters}, entry.step, partial=True)
    lora.merge(model)
    write(model.state_dict(), url, model.config, None, names=names, dtype=dtype)
    return entry.step


def _values(checkpoints: Checkpoints, step: int | None, prefix: str) -> dict[str, Any]:
    """The plain values of a checkpoint whose names begin so, by the rest of their names."""
    catalog = checkpoints.catalog
    entry = catalog.find(step)
    values = catalog.index(entry, catalog.marker(entry)).values
    return {name.removeprefix(prefix): decode(value.text) for name, value in values.items() if name.startswith(prefix)}
