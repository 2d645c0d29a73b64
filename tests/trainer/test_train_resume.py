"""A run that is killed and goes on is the run that was not: the same bits in every step, and no step twice or left out.

EMBERLINE_KILLS asks for more kills than a test run of all takes.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.checkpoint.catalog import Catalog
from embertrain.checkpoint.staging import Staging
from embertrain.errors import ResumeError
from embertrain.train import TrainConfig, Trainer
from embertrain.train.metrics import JsonLines, StepRecord
from embertrain.train.step import Stepper

from . import runs, texts

KILLS = int(os.environ.get("EMBERLINE_KILLS", "3"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return texts.shards(tmp_path_factory.mktemp("tokens"), piece=150)


@pytest.fixture(scope="module")
def whole(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    runs.run(runs.tables(url, folder))
    assert [line["step"] for line in runs.lines(folder)] == list(range(1, runs.STEPS + 1))
    return folder


def end(folder: Path, url: str) -> dict[str, torch.Tensor]:
    """Weights and optimizer states at the end of a run."""
    with Trainer(TrainConfig.of(runs.tables(url, folder))) as trainer:
        assert trainer.done == runs.STEPS
        return {name: t.clone() for name, t in runs.weights(trainer.state()).items()}


def assert_same(folder: Path, whole: Path, url: str) -> None:
    assert runs.lines(folder) == runs.lines(whole)
    ours, theirs = end(folder, url), end(whole, url)
    assert ours.keys() == theirs.keys() and len(ours) > 300
    for name, t in ours.items():
        assert torch.equal(t, theirs[name]), name


def test_kills_at_random_moments(url: str, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(os.environ.get("EMBERLINE_KILL_SEED", "1"))
    steps = sorted(rng.randrange(1, runs.STEPS - 1) for _ in range(KILLS))
    for step in steps:
        process = runs.start(runs.run, runs.tables(url, tmp_path))
        while len(runs.lines(tmp_path)) < step and process.is_alive():
            process.join(0.005)
        process.join(rng.random() * 0.3)
        process.kill()
        process.join()
    runs.run(runs.tables(url, tmp_path))
    assert_same(tmp_path, whole, url)


def die_while_publishing(tables: dict[str, Any], at: int) -> None:
    """A run that is killed when the checkpoint of step `at` has all but its last file."""
    publish = Catalog.publish

    def killed(self: Catalog, folder: str, *args: Any) -> None:
        if folder.startswith(f"step-{at:09d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, folder, *args)

    Catalog.publish = killed  # type: ignore[method-assign]
    runs.run(tables)


def test_a_kill_during_a_checkpoint(url: str, whole: Path, tmp_path: Path) -> None:
    process = runs.start(die_while_publishing, runs.tables(url, tmp_path), 6)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Trainer(TrainConfig.of(runs.tables(url, tmp_path))) as trainer:
        assert trainer.done == 4
        trainer.run()
    assert_same(tmp_path, whole, url)


@pytest.mark.parametrize("what", [(Catalog, "begin"), (Staging, "take"), (Catalog, "publish")], ids=lambda w: w[1])
@pytest.mark.parametrize(("at", "steps"), [(2, [4]), (4, [2, 4])], ids=["an interval", "the end"])
def test_a_failed_save_in_the_background_is_made_up_for(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: tuple[type, str],
    at: int,
    steps: list[int],
) -> None:
    """Also one that fails before the state is copied, for want of the place or of memory."""
    works, saves = getattr(*what), []

    def fails_once(*args: Any) -> Any:
        saves.append(args)
        if len(saves) == at // 2:
            raise OSError("no space")
        return works(*args)

    monkeypatch.setattr(*what, fails_once)
    with Trainer(TrainConfig.of(runs.tables(url, tmp_path))) as trainer:
        report = trainer.run(until=4)
        assert trainer.checkpoints is not None and trainer.checkpoints.steps() == steps
    assert (report.step, report.saved_step) == (4, 4)
    assert f"step {at} could not be saved (no space): saving step 4 now" in caplog.text


def test_saves_that_go_on_failing_end_the_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Catalog, "publish", fails)
    with Trainer(TrainConfig.of(runs.tables(url, tmp_path))) as trainer:
        with pytest.raises(OSError, match="no space"):
            trainer.run()
        assert (trainer.done, trainer.saved) == (4, None), "the next save is waited for"


def interrupt(tables: dict[str, Any], at: int) -> None:
    """A run that gets SIGTERM in the middle of step `at`."""
    step = Stepper.step

    def interrupted(self: Stepper, number: int, samples: Any, **options: Any) -> Any:
        if number == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, samples, **options)

    Stepper.step = interrupted  # type: ignore[method-assign]
    with Trainer(TrainConfig.of(tables)) as trainer:
        report = trainer.run()
    raise SystemExit(0 if report.interrupted_by == signal.SIGTERM and report.saved_step == report.step else 1)


def test_a_signal_ends_the_run_with_a_checkpoint(url: str, whole: Path, tmp_path: Path) -> None:
    process = runs.start(interrupt, runs.tables(url, tmp_path), 3)
    process.join()
    assert process.exitcode == 0
    done = len(runs.lines(tmp_path))
    assert done == 3  # The signal comes in step 3.
    with Trainer(TrainConfig.of(runs.tables(url, tmp_path))) as trainer:
        assert trainer.done == done
        trainer.run()
    assert_same(tmp_path, whole, url)


def test_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    def record(step: int, loss: float) -> StepRecord:
        return StepRecord(step=step, loss=loss, mtp_loss=0, balance_loss=0, index_loss=0, gradient_norm=1, lr=1,
                          tokens=step, tokens_per_s=1, mfu=0.1, expert_load_max_over_mean=None, expert_load={},
                          expert_tokens=None, seconds={})  # fmt: skip

    first = JsonLines(tmp_path, 0)
    for step in range(1, 6):
        first.write(record(step, 1.0))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # What a machine that lost power may leave.
    again = JsonLines(tmp_path, 3)
    again.write(record(4, 2.0))
    again.close()
    assert [(line["step"], line["loss"]) for line in runs.lines(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"batch_samples": 8}}, "data.batch_samples was 4 and is 8"),
        ({"optimizer": {"kind": "adamw"}}, "optimizer.kind was 'muon' and is 'adamw'"),
        ({"losses": {"mtp_weight": 0.0}}, "losses.mtp_weight was 0.3 and is 0.0"),
        ({"model": {"vocab_size": 300}}, "model.vocab_size was 257 and is 300"),
    ],
)
def test_another_run_is_refused(url: str, whole: Path, changes: dict[str, Any], told: str) -> None:
    tables = runs.tables(url, whole, **changes)
    with pytest.raises(ResumeError, match=told):
        Trainer(TrainConfig.of(tables))


def test_other_data_are_refused(whole: Path, tmp_path: Path) -> None:
    for options, told in (({"piece": 80}, "not the same token shards"), ({"tokenizer": "other"}, "another tokenizer")):
        folder = tmp_path / told
        folder.mkdir()
        with pytest.raises(ResumeError, match=told):
            Trainer(TrainConfig.of(runs.tables(texts.shards(folder, **options), whole)))  # type: ignore[arg-type]


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(url: str, whole: Path, tmp_path: Path) -> None:
    runs.run(runs.tables(url, tmp_path), until=6)
    (newest,) = (tmp_path / "checkpoints").glob("step-000000006.*")
    data = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    held = bytearray(data.read_bytes())
    held[len(held) // 2] ^= 1
    data.write_bytes(held)
    with Trainer(TrainConfig.of(runs.tables(url, tmp_path))) as trainer:
        assert trainer.done == 4
        assert "the checkpoint of step 6 is damaged, and its steps are done again" in trainer.notes
        trainer.run()
    assert_same(tmp_path, whole, url)


def test_what_may_change_is_told(url: str, whole: Path) -> None:
    tables = runs.tables(url, whole, schedule={"steps": 20}, optimizer={"weight_decay": 0.05})
    with Trainer(TrainConfig.of(tables)) as trainer:
        changes = ["optimizer.weight_decay was 0.1 and is 0.05", f"schedule.steps was {runs.STEPS} and is 20"]
        assert trainer.notes[0] == f"going on from step {runs.STEPS}" and sorted(trainer.notes[1:]) == changes
        decays = {group["weight_decay"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
        assert decays == {0.0, 0.05}, "settings are the file's, not the config's"


def test_a_fresh_run_needs_force(url: str, tmp_path: Path) -> None:
    tables = runs.tables(url, tmp_path)
    runs.run(tables, until=2)
    before = runs.lines(tmp_path)
    with pytest.raises(ResumeError, match="a checkpoint of step 2"):
        Trainer(TrainConfig.of(tables), fresh=True)
    with Trainer(TrainConfig.of(tables), fresh=True, force=True) as trainer:
        assert trainer.done == 0
        trainer.run(until=1)
    assert runs.lines(tmp_path) == before[:1]
    with Trainer(TrainConfig.of(tables)) as trainer:
        assert trainer.done == 1, "the new run is gone on from, though the old one had come further"
