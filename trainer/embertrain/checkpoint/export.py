"""The model of a checkpoint as safetensors, at any URL.

Invariant: an export is there once its config.json is, which is written last. On this machine the whole folder comes by
one rename; elsewhere nothing hangs on one, and a process that dies half-way leaves a folder without it, that no reader
takes for a model.
"""

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
from ..weights.folder import CONFIG, INDEX
from .index import Index, Marker
from .place import exists
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
    """Write a new folder. Raises FileExistsError, also for what an export that was cut short left."""
    fs, path = fsspec.url_to_fs(os.fspath(url), **(storage_options or {}))
    if isinstance(fs, LocalFileSystem):
        save(model, path, config, **form)
        return
    path = path.rstrip("/")
    if exists(fs, path):
        half = (
            "" if exists(fs, f"{path}/{CONFIG}") else f", without {CONFIG}: if half an export is all it is, remove it"
        )
        raise FileExistsError(f"there is something at {url} already{half}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        save(model, folder, config, **form)
        fs.makedirs(path, exist_ok=True)
        try:
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG, file.name == INDEX, file.name)):
                fs.put_file(str(file), f"{path}/{file.name}")
        except BaseException:
            fs.rm(path, recursive=True)
            raise
