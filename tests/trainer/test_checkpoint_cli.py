"""`emberline checkpoint`, and what it stands on: a look without torch, verification, export to safetensors.

Run: pytest tests/trainer/test_checkpoint_cli.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner, Result
from embertrain.checkpoint import Checkpoints
from embertrain.checkpoint.place import LocalPlace
from embertrain.errors import ConfigError, StateError, WeightsError
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.train.base import open_base
from embertrain.weights import Source, load
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load as load_safetensors

from emberline.cli import main

from .states import differences, state


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *arguments])


def test_ls_lists_in_order_of_publication(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 30, 20):
            checkpoints.save(step, state(1))
    lines = run("ls", str(tmp_path)).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "10", "30", "20"]
    assert [line.endswith("latest") for line in lines] == [False, False, False, True]
    told = [json.loads(line) for line in run("ls", str(tmp_path), "--json").stdout.splitlines()]
    assert [row["step"] for row in told] == [10, 30, 20] and [row["latest"] for row in told] == [False, False, True]
    assert told[0]["ranks"] == 1 and told[0]["bytes"] > 840_000 and told[0]["config"] is False
    assert run("ls", str(tmp_path / "nothing")).stdout == ""


def test_what_is_removed_meanwhile_is_neither_listed_nor_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(1))
    (folder,) = tmp_path.glob("step-000000001.*")
    reads = LocalPlace.read

    def overtaken(self: LocalPlace, name: str) -> bytes:
        if name.startswith(folder.name):
            shutil.rmtree(folder)
        return reads(self, name)

    monkeypatch.setattr(LocalPlace, "read", overtaken)
    listed = run("ls", str(tmp_path))
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["step", "2"] and "1 checkpoint" in listed.stderr


def test_a_look_and_a_check_load_no_torch(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
    script = (
        "import sys; from embertrain.checkpoint import Checkpoints as C; c = C(sys.argv[1]);"
        "assert c.steps() == [1] and c.latest() == 1 and c.verify() == []; c.close();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_verify_tells_every_damaged_place_and_exits_with_1(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": torch.zeros(3 << 20, dtype=torch.uint8), "b": torch.zeros(9)})
        checkpoints.save(2, {})
    sound = run("verify", str(tmp_path), "--step", "1")
    assert sound.exit_code == 0 and sound.stdout == "" and "sound" in sound.stderr
    (file,) = tmp_path.glob("step-000000001.*/*.bin")
    content = bytearray(file.read_bytes())
    content[(2 << 20) + 7] ^= 4
    file.write_bytes(content)
    found = run("verify", str(tmp_path), "--step", "1")
    assert found.exit_code == 1 and "in the MiB at byte 2097152; the piece holds a, b" in found.stdout
    assert json.loads(run("verify", str(tmp_path), "--step", "1", "--json").stdout)["step"] == 1
    assert run("verify", str(tmp_path)).exit_code == 0, "the latest is another one"
    file.unlink()
    assert "cannot be read" in run("verify", str(tmp_path), "--step", "1").stdout
    (marker,) = tmp_path.glob("step-000000002.*/checkpoint.json")
    marker.write_bytes(marker.read_bytes().replace(b'"ranks":1', b'"ranks":7'))
    assert "checkpoint.json is not what was written" in run("verify", str(tmp_path)).stdout
    assert run("ls", str(tmp_path)).stdout.splitlines()[-1].endswith("damaged")


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for command in (["verify", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "out")]):
        told = run(*command)
        assert told.exit_code == 1 and told.stderr == f"Error: there is no checkpoint at {tmp_path}\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """Checkpoints of a small model in a store, and the model."""
    url = f"ember://{tmp_path_factory.mktemp('export')}/store/!/run"
    config = preset("micro")
    model = Model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    with Checkpoints(url, config=config) as checkpoints:
        checkpoints.save(4, {"model": model.state_dict(), "trainer": {"step": 4}})
    return url, model


def test_an_export_is_the_model_bit_for_bit(saved: tuple[str, Model], tmp_path: Path) -> None:
    url, model = saved
    assert run("export", url, str(tmp_path / "out"), "--step", "4").exit_code == 0
    other = Model(Source(tmp_path / "out").config)
    load(other, tmp_path / "out")
    assert not differences(other.state_dict(), model.state_dict())
    again = run("export", url, str(tmp_path / "out"))
    assert again.exit_code == 1 and "already" in again.stderr


def test_an_export_into_a_store_is_read_by_any_program(saved: tuple[str, Model], tmp_path: Path) -> None:
    url, _ = saved
    out = f"ember://{tmp_path}/store/!/models/micro"
    assert run("export", url, out, "--dtype", "bf16").exit_code == 0
    assert run("export", url, str(tmp_path / "local"), "--dtype", "bf16").exit_code == 0
    fs, path = fsspec.url_to_fs(out)
    assert fs.ls(path.rpartition("/")[0], detail=False) == [path]
    for file in (tmp_path / "local").iterdir():
        assert fs.cat_file(f"{path}/{file.name}") == file.read_bytes()
    assert "head.weight" in load_safetensors(fs.cat_file(f"{path}/model.safetensors"))
    assert run("export", url, out).exit_code == 1


class Killed(BaseException):
    """The process ends here."""


def test_an_export_that_ends_half_way_is_not_taken_for_a_model(
    saved: tuple[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that moves nothing at once, and at whichever call to it the process ends."""
    left = 0

    def counted(name: str) -> None:
        works = getattr(MemoryFileSystem, name)

        def call(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if (left := left - 1) < 0:
                raise Killed
            return works(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, call)

    monkeypatch.setattr(import_module("embertrain.weights.save"), "SHARD_BYTES", 200_000)
    for name in ("put_file", "cp_file", "rm", "makedirs"):
        counted(name)
    fs = MemoryFileSystem()
    calls, ended = 0, False
    while not ended:
        out = f"memory://exports/{calls}"
        calls, left = calls + 1, calls
        with Checkpoints(saved[0]) as checkpoints:
            try:
                checkpoints.export(4, out)
                ended = True
            except Killed:
                left = 100
                with pytest.raises((ConfigError, WeightsError)), open_base(out) as base:
                    base.shape()
                if fs.exists(out):
                    with pytest.raises(FileExistsError, match=r"without config.json: if half an export"):
                        checkpoints.export(4, out)
    assert calls > 5, "there were several files"
    model = Model(preset("micro"))
    left = 100
    with open_base(out) as base:
        base.fill(model)
    assert not differences(model.state_dict(), saved[1].state_dict())


def test_a_failed_export_leaves_nothing(saved: tuple[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    works = MemoryFileSystem.put_file

    def fail(self: MemoryFileSystem, file: str, path: str, **kwargs: Any) -> None:
        if path.endswith("config.json"):
            raise OSError("no space")
        works(self, file, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    with Checkpoints(saved[0]) as checkpoints, pytest.raises(OSError, match="no space"):
        checkpoints.export(4, "memory://exports/failed")
    assert not MemoryFileSystem().exists("memory://exports/failed")


def test_an_export_has_to_know_the_model(saved: tuple[str, Model], tmp_path: Path) -> None:
    model = saved[1]
    with Checkpoints(tmp_path / "bare") as checkpoints:
        checkpoints.save(1, {"model": model.state_dict()})
        checkpoints.save(2, {"trainer": {"step": 2}})
        with pytest.raises(StateError, match="does not say which model"):
            checkpoints.export(1, tmp_path / "out")
        with pytest.raises(StateError, match="no tensors under 'model'"):
            checkpoints.export(2, tmp_path / "out")
    assert (
        run("export", str(tmp_path / "bare"), str(tmp_path / "out"), "--step", "1", "--config", "micro").exit_code == 0
    )
