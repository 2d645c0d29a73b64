"""A run's TOML: mistakes are told by their key, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from embertrain.errors import ConfigError
from embertrain.model.presets import preset
from embertrain.model.published import to_published
from embertrain.train import TrainConfig
from embertrain.train.config import recipes

from emberline.cli import main

from . import runs


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("data.batch_sample=4", r"\[data\] has no batch_sample: did you mean batch_samples\?"),
        ("dat.url=x", "there is no dat: did you mean data"),
        ("zzz=1", "there is no zzz: there are model, data, schedule"),
        ("data.batch_samples=four", "data.batch_samples is a whole number, not 'four'"),
        ("data.batch_samples=true", "data.batch_samples is a whole number, not True"),
        ("data.batch_samples=0", r"\[data\] batch_samples is more than 0"),
        ("compute.dtype=fp16", "compute.dtype is one of fp32, bf16, not 'fp16'"),
        ("compute.recompute=1", "compute.recompute is true or false, not 1"),
        ("optimizer.betas=[0.9]", r"optimizer.betas is a list of 2, not \[0.9\]"),
        ("optimizer.eps=0", "eps is more than 0"),
        ("schedule=1", r"schedule is a table, \[schedule\], not 1"),
        ("schedule.decay_steps=3", "decay_steps is for wsd alone"),
        ("data.url.more=3", "data.url.more: url is a value, not a table"),
        ("metrics.folder", "'metrics.folder' is not KEY=VALUE"),
        ("model.config=x.json", "say either preset or config"),
        ("parallel.fsdp=0", "fsdp is 1 or more"),
        ("losses.index_weight=0", "index_dense_steps are for indexers that learn"),
        ("lora.rank=8", "lora: indexers are not taught: leave out losses.index_dense_steps"),
    ],
)
def test_a_mistake_is_told_by_its_key(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(_toml(runs.tables("x", model={"weights": "y"}, losses={"index_dense_steps": 1})))
    TrainConfig.read(file)
    with pytest.raises(ConfigError, match=told):
        TrainConfig.read(file, [line])


def test_what_has_to_be_set_is_told() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.lr is not set"):
        TrainConfig.of({"model": {"preset": "micro"}, "data": {"url": "x", "sequence_tokens": 8, "batch_samples": 1}})


def test_keys_set_on_the_command_line_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(_toml(runs.tables("x")))
    config = TrainConfig.read(file, ["data.url=ember:///s/tokens", "schedule.lr=1", "optimizer.betas=[0.5, 0.6]"])
    assert (config.data.url, config.schedule.lr, config.optimizer.betas) == ("ember:///s/tokens", 1.0, (0.5, 0.6))


def test_a_model_may_be_a_config_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_published(preset("micro-v3"))))
    tables = runs.tables("x") | {"model": {"config": str(file), "vocab_size": 300}}
    shape = TrainConfig.of(tables).model.shape()
    assert (shape.family, shape.vocab_size, len(shape.layers)) == ("v3", 300, 3)
    with pytest.raises(ConfigError, match="there is no file"):
        TrainConfig.of(tables | {"model": {"config": str(tmp_path / "gone")}}).model.shape()


def test_recipes_are_right() -> None:
    assert "tiny" in recipes()
    for name in recipes():
        TrainConfig.read(name).model.shape()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.toml"], "nowhere.toml is neither a file nor one of"),
        (["tiny", "--force"], "--force goes with --fresh"),
        (["tiny", "--set", "data.url=/no/such/place"], "/no/such/place"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code != 0 and told in result.output
    assert "Traceback" not in result.output


def _toml(tables: dict[str, Any]) -> str:
    """Of scalars and tables of scalars, as JSON writes them; scalars first."""
    keys = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            keys += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(keys)
