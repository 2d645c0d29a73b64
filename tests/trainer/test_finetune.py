"""Runs that begin with weights: all of them trained on, or adapters beside them.

A model learns Python's sources, and then its manual.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from embertrain import lora
from embertrain.checkpoint import Checkpoints
from embertrain.errors import ConfigError, ResumeError, VocabularyError, WeightsError
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.parallel import Mesh
from embertrain.train import TrainConfig, Trainer
from embertrain.weights import Source, load

from emberline.cli import main

from . import ranks, runs, texts

STEPS = 60
LORA_STEPS = 30
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two thirds of the manual to learn from, and what is held out."""
    folder, chapters = tmp_path_factory.mktemp("manual"), texts.prose()
    return texts.write(folder / "train", chapters[::3] + chapters[1::3]), texts.write(folder / "held", chapters[2::3])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on sources."""
    folder = tmp_path_factory.mktemp("base")
    held = texts.write(folder / "held", texts.documents()[-5:])
    tables = runs.tables(texts.write(folder / "tokens", texts.documents()[:-5]), folder)
    tables["schedule"]["steps"] = STEPS
    tables["checkpoint"]["every_steps"] = STEPS
    tables["validation"] = {"url": held, "every_steps": STEPS, "samples": 16}
    runs.run(tables)
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path, manual: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of adapters on the manual, without a break."""
    folder = tmp_path_factory.mktemp("adapted")
    runs.run(tables(base, manual, folder))
    return folder


def tables(base: Path, manual: tuple[str, str], folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Adapters beside the weights of `base`."""
    begun = runs.tables(manual[0], folder, schedule={"steps": LORA_STEPS, "lr": 1e-2}, lora=LORA,
                        checkpoint={"every_steps": 10}, **changes)  # fmt: skip
    begun["model"] = {"weights": str(base / "checkpoints")}
    begun["validation"] = {"url": manual[1], "every_steps": LORA_STEPS, "samples": 16}
    return begun


def held_out(tables: dict[str, Any]) -> float:
    """The loss of a run's validation, where the run is."""
    with Trainer(TrainConfig.of(tables)) as trainer:
        from embertrain.train.trainer import _validation

        return trainer.stepper.evaluate(_validation(trainer))


def test_time(base: Path, adapted: Path, manual: tuple[str, str], tmp_path: Path) -> None:
    print([l["loss"] for l in runs.lines(base)][::10], runs.lines(base)[-1]["validation_loss"])
    print(held_out(tables(base, manual, tmp_path)))
    print([l["loss"] for l in runs.lines(adapted)][::5], runs.lines(adapted)[-1]["validation_loss"])
