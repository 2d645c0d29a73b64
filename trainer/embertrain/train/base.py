"""Weights that a run begins with: those of a folder of safetensors, or the model of an earlier run's latest checkpoint.

    with open_base("ember:///srv/store/runs/1/checkpoints") as base:
        model = Model(base.shape())
        base.fill(model)

What is at the URL decides which it is: what rank 0 finds there, since ranks that each looked might not see the same. A
folder elsewhere than on this machine is copied to a temporary one, by each rank.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..checkpoint import Checkpoints
from ..checkpoint.catalog import Catalog
from ..checkpoint.export import MODEL, config_of
from ..checkpoint.index import Index, Marker
from ..checkpoint.ranks import Ranks
from ..errors import ConfigError, StateError, WeightsError
from ..model.config import ModelConfig
from ..model.model import Model
from ..weights import Source, load

_TOLD_MAX = 5
"""Names that a message holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which weights adapters were trained beside, as a checkpoint of the adapters tells it."""

    url: str
    step: int | None
    """Of a checkpoint; None: a folder of safetensors."""
    fingerprint: str
    """See `weights.fingerprint`."""


class Base(Protocol):
    """Weights."""

    url: str
    step: int | None

    def shape(self) -> ModelConfig:
        """Of the model they are of, as they tell it. Raises StateError, WeightsError, ConfigError."""

    def fill(self, model: Model, *, partial: bool = False) -> None:
        """All weights of a model; with `partial` there may be more here. Every rank calls this.

        Raises WeightsError, Damaged.
        """


@contextmanager
def open_base(url: str, *, step: int | None = None) -> Iterator[Base]:
    """`step` of checkpoints; None: the latest. Every rank calls this.

    Raises ConfigError where there is nothing to begin with, NoCheckpoint, Damaged.
    """
    fs, path = fsspec.url_to_fs(url)
    is_local = isinstance(fs, LocalFileSystem)
    url = os.path.abspath(path) if is_local else url
    with Ranks() as ranks:
        files = ranks.told(lambda: _files(fs, path))
        if any(file.suffix == ".safetensors" for file in files):
            with tempfile.TemporaryDirectory() as scratch:
                if not is_local:
                    for file in files:
                        if file.suffix in (".safetensors", ".json"):
                            fs.get_file(str(file), f"{scratch}/{file.name}")
                yield _Folder(url, Path(url if is_local else scratch))
            return
        with Checkpoints(url) as checkpoints:
            yield _Checkpoint(url, checkpoints, *ranks.told(lambda: _found(url, checkpoints.catalog, step)))


def _files(fs: Any, path: str) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in fs.ls(path, detail=False)] if fs.isdir(path) else []


def _found(url: str, catalog: Catalog, step: int | None) -> tuple[Marker, Index]:
    if catalog.latest() is None:
        raise ConfigError(f"there are neither weights (safetensors) nor checkpoints at {url}")
    entry = catalog.find(step)
    marker = catalog.marker(entry)
    return marker, catalog.index(entry, marker)


class _Folder:
    """Safetensors."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self._path = url, path
        self.step: int | None = None

    def shape(self) -> ModelConfig:
        return Source(self._path).config

    def fill(self, model: Model, *, partial: bool = False) -> None:
        load(model, self._path, config=model.config, partial=partial)


class _Checkpoint:
    """The model of a checkpoint."""

    def __init__(self, url: str, checkpoints: Checkpoints, marker: Marker, index: Index) -> None:
        self.url, self._checkpoints, self._marker, self._index = url, checkpoints, marker, index
        self.step: int | None = marker.step

    def shape(self) -> ModelConfig:
        return config_of(self._marker)

    def fill(self, model: Model, *, partial: bool = False) -> None:
        if "trainer.origin.fingerprint" in self._index.values:
            raise WeightsError(
                f"the checkpoints at {self.url} are of adapters, and no whole model: export one "
                "(emberline checkpoint export URL OUT), and begin with that"
            )
        state: dict[str, Any] = model.state_dict()
        held = {".".join(map(str, e.path[1:])) for e in self._index.tensors.values() if e.path[0] == MODEL}
        more = set() if partial else held - state.keys()
        for what, names in (("lacks", state.keys() - held), ("also has", more)):
            if names:
                some = ", ".join(sorted(names)[:_TOLD_MAX])
                raise WeightsError(
                    f"the checkpoint of step {self.step} at {self.url} is of another model: it {what} {len(names)} "
                    f"weights ({some}{', ...' if len(names) > _TOLD_MAX else ''})"
                )
        try:
            self._checkpoints.load({MODEL: state}, self.step, partial=True)
        except StateError as error:
            raise WeightsError(f"the checkpoints at {self.url} are of another model: {error}") from error
