"""The model of a checkpoint as safetensors, at any URL."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from ..errors import StateError
from ..model.config import ModelConfig
from ..model.published import from_published
from ..weights import save
from .index import Index, Marker
from .reader import dtype_of

MODEL = "model"
"""Under which key of a state the weights are."""


def config_of(marker: Marker) -> ModelConfig:
    """The model that a checkpoint says it is of. Raises StateError if it does not."""
    if marker.config is None:
        raise StateError(f"the checkpoint of step {marker.step} does not say which model it is of: pass its config")
    return from_published(marker.config)


def model_of(index: Index) -> dict[str, Tensor]:
    """Memory for the model's tensors, by our names. Raises StateError if there is none."""
    model = {
        ".".join(map(str, entry.path[1:])): torch.empty(entry.shape, dtype=dtype_of(name, entry))
        for name, entry in index.tensors.items()
        if entry.path[0] == MODEL
    }
    if not model:
        raise StateError(f"the checkpoint has no tensors under {MODEL!r}")
    return model


def write(
    model: dict[str, Tensor],
    url: str | os.PathLike[str],
    config: ModelConfig,
    storage_options: dict[str, Any] | None,
    **form: Any,
) -> None:
    """Write a new folder. Elsewhere than on this machine it is written beside its place first, and moved."""
    fs, path = fsspec.url_to_fs(os.fspath(url), **(storage_options or {}))
    if isinstance(fs, LocalFileSystem):
        save(model, path, config, **form)
        return
    if fs.exists(path):
        raise FileExistsError(f"there is something at {url} already")
    partial = f"{path.rstrip('/')}.partial"
    if fs.exists(partial):
        fs.rm(partial, recursive=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        save(model, folder, config, **form)
        for file in sorted(folder.iterdir()):
            fs.put_file(str(file), f"{partial}/{file.name}")
    fs.mv(partial, path.rstrip("/"), recursive=True)
