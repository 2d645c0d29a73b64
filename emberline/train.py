"""`emberline train`: a run from a TOML file, on the terminal or as JSON.

Invariant: what is imported here does not load torch, so that `--help` does not wait for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import json_option, note, note_if_slow, print_json

if TYPE_CHECKING:
    from embertrain.train import StepRecord, Trainer

TOLD_EVERY_S = 10.0
"""Where there is no terminal for a bar, a line at most so often."""


@click.command(short_help="Train a model from a TOML file.")
@click.argument("config")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A key of the file set otherwise. May be repeated."
)
@click.option("--steps", "until", type=click.IntRange(min=0), metavar="N",
              help="Stop after step N, counted from the run's first; the schedule stays as it is.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Begin anew; refused where there is a checkpoint.")
@click.option("--force", is_flag=True, help="With --fresh: even where there is one.")
@json_option
def train(
    config: str, assignments: tuple[str, ...], until: int | None, fresh: bool, force: bool, as_json: bool
) -> None:
    """Train as CONFIG says, a TOML file or the name of a recipe (tiny).

    A run goes on by itself from the last checkpoint at its checkpoint.url, and computes what it would have computed
    without a break. Ctrl-C and SIGTERM end it after the step under way, with a checkpoint; a second Ctrl-C at once.
    Metrics go to metrics.folder; --json prints the line of each step.

    \b
    Examples:
      emberline train run.toml
      emberline train tiny --set data.url=ember:///srv/store/tokens --set schedule.steps=500
      emberline train run.toml --set model.weights=./DeepSeek-V3 --set lora.rank=8
      emberline train run.toml --steps 100 --json | tail -1
      torchrun --nproc-per-node 2 -m emberline train run.toml --set parallel.fsdp=2
    """
    if force and not fresh:
        raise click.UsageError("--force goes with --fresh")
    with note_if_slow("loading torch ..."):
        from embertrain.train import TrainConfig, Trainer
    chosen = TrainConfig.read(config, assignments)
    with note_if_slow("building the model ..."):
        trainer = Trainer(chosen, fresh=fresh, force=force)
    with trainer:
        is_first = trainer.mesh.rank == 0
        if is_first:
            _begin(trainer, until)
        with _shown(trainer, until, as_json) as on_step:
            report = trainer.run(until=until, on_step=on_step)
    if not is_first:
        return
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    note(f"step {report.step} of {chosen.schedule.steps}{loss}")
    if report.interrupted_by is not None:
        saved = report.saved_step is not None
        note(
            f"interrupted; saved at step {report.saved_step}: the same command goes on from there"
            if saved
            else "interrupted; nothing was saved, as checkpoint.url is not set"
        )
        sys.exit(128 + report.interrupted_by)


def _begin(trainer: Trainer, until: int | None) -> None:
    """What is known before the first step."""
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    adapted = "" if trainer.origin is None else f", of which adapters' {trained / 1e6:,.1f} M are trained,"
    data = trainer.config.data
    epoch = len(trainer.data) / data.batch_samples
    note(
        f"{total / 1e6:,.1f} M parameters{adapted} on {trainer.mesh.ranks} rank(s), {trainer.mesh.device.type}; "
        f"{data.batch_samples * data.sequence_tokens:,} tokens a step, {epoch:,.0f} steps an epoch"
    )
    for line in trainer.notes:
        note(line)
    last = min(trainer.config.schedule.steps, until if until is not None else trainer.config.schedule.steps)
    if trainer.done >= last:
        note("there is no step left to do: raise schedule.steps or --steps to train on")


@contextmanager
def _shown(trainer: Trainer, until: int | None, as_json: bool) -> Iterator[Callable[[StepRecord], None]]:
    """What shows each step: a bar on a terminal, lines now and then elsewhere, or JSON."""
    if as_json:
        from dataclasses import asdict

        yield lambda record: print_json(asdict(record))
        return
    total = trainer.config.schedule.steps
    last = total if until is None else min(until, total)
    if not sys.stderr.isatty():
        yield _lines(last)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=last, completed=trainer.done, told="")
        yield lambda record: progress.update(task, completed=record.step, told=_told(record))


def _lines(last: int) -> Callable[[StepRecord], None]:
    told_s = -TOLD_EVERY_S

    def tell(record: StepRecord) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= TOLD_EVERY_S or record.step == last:
            told_s = now_s
            note(f"step {record.step}/{last} {_told(record)}")

    return tell


def _told(record: StepRecord) -> str:
    validation = "" if record.validation_loss is None else f", validation {record.validation_loss:.3f}"
    return f"loss {record.loss:.3f}{validation}, {record.tokens_per_s:,.0f} tokens/s, MFU {record.mfu:.1%}"
