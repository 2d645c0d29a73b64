"""A run of training: its parts put together, gone on from the last checkpoint, step after step, saved now and then.

    trainer = Trainer(TrainConfig.read("run.toml"))
    report = trainer.run()

Invariant: all state of a run is the model, the optimizers and the number of steps done. Data, learning rates and noise
follow from that number, so a run that was killed anywhere and goes on computes the same bits as one that was not (on as
many ranks and threads). With adapters the model's state is theirs alone, beside weights that are checked to be the same
ones. A checkpoint of step n is saved after step n's metrics are written; whoever resumes forgets the lines after n.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from emberflow import TokenDataset
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .. import info, lora
from ..checkpoint import Checkpoints
from ..checkpoint.ranks import Ranks
from ..errors import ConfigError, DataError, ResumeError, VocabularyError
from ..model.config import ModelConfig
from ..model.model import Model
from ..optim import build
from ..parallel import Mesh, apply
from ..weights.fingerprint import fingerprint
from .base import Base, Origin, open_base
from .config import TrainConfig
from .metrics import JsonLines, Sink, StepRecord, TensorBoard, measured_peak_flops
from .objective import Objective, blocks
from .precision import DTYPES
from .recompute import recompute
from .resume import Run, check_origin, compare
from .step import Samples, Stepped, Stepper, is_exact
from .stop import StopSignals
from .trace import Trace

log = logging.getLogger("emberline.train")


@dataclass(frozen=True, slots=True)
class Report:
    """How a run ended."""

    step: int
    """Steps done, those of earlier runs too."""
    loss: float | None
    """Of the last step; None: there was none to do."""
    interrupted_by: int | None
    """The signal's number."""
    saved_step: int | None
    """What the next run goes on from."""


class Trainer:
    """One run. `data` and `checkpoints` are opened from the config if not given, the mesh is torchrun's.

    `fresh`: do not go on from a checkpoint; `force`: even if there is one. Raises ConfigError, DataError,
    VocabularyError, WeightsError, ResumeError, and what the data and the checkpoints raise.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        fresh: bool = False,
        force: bool = False,
        mesh: Mesh | None = None,
        data: TokenDataset | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = config.settled()
        self.config, self.clock = config, clock
        self.mesh = mesh or Mesh.start(config.parallel)
        if config.compute.threads:
            torch.set_num_threads(config.compute.threads)
        weights = _begun_with(config, fresh)
        with nullcontext() if weights is None else open_base(weights) as base:
            self.shape = _shape(config, base)
            self.data = data or TokenDataset(
                config.data.url, sequence_tokens=config.data.sequence_tokens, seed=config.seed
            )
            check_data(self.data, config, self.shape, self.mesh.ranks)
            self.model = _model(config, self.shape, base)
        self.origin: Origin | None = None
        """Of the weights that adapters stand beside."""
        if config.lora is not None and base is not None:
            self.origin = Origin(url=base.url, step=base.step, fingerprint=fingerprint(self.model))
            generator = torch.Generator().manual_seed(config.seed)
            lora.attach(self.model, config.lora, generator, mtp=config.losses.mtp_weight > 0)
        self.model.to(self.mesh.device)
        objective = Objective(self.model, config.losses)
        objective.freeze_untaught()
        _arrange(self.model, config)
        apply(self.model, self.mesh, dtype=DTYPES[config.compute.dtype], exact=is_exact(config, self.mesh))
        self.optimizers = build(self.model, config.optimizer)
        self.stepper = Stepper(objective, self.optimizers, config, self.mesh, eos_id=self.data.eos_id)
        self.done = 0
        """Steps."""
        self.notes: list[str] = []
        """What a person should know about how the run begins."""
        section = config.checkpoint
        self.checkpoints = (
            None if section.url is None else Checkpoints(section.url, keep=section.keep, config=self.shape)
        )
        self.saved: int | None = None
        """The step of the last checkpoint that is published."""
        self._saving: int | None = None
        """The step that is being saved."""
        self._resume(fresh, force)

    # ---- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. Tensors are the run's own, not copies."""
        model = get_model_state_dict(self.model)
        trainer: dict[str, Any] = {"step": self.done, "run": asdict(self._run())}
        if self.origin is not None:
            model = {name: model[name] for name in lora.adapters(self.model)}
            trainer["origin"] = asdict(self.origin)
        return {
            "model": model,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
            "trainer": trainer,
        }

    def _run(self) -> Run:
        return Run.of(
            self.config,
            self.shape,
            data=self.data.fingerprint,
            tokenizer=self.data.tokenizer_hash,
            ranks=self.mesh.ranks,
            threads=torch.get_num_threads(),
        )

    def _resume(self, fresh: bool, force: bool) -> None:
        if self.checkpoints is None:
            return
        latest = _latest(self.checkpoints)
        if latest is None:
            return
        if fresh and not force:
            raise ResumeError(
                f"{self.config.checkpoint.url} holds a checkpoint of step {latest}: go on from it without --fresh, "
                "name another checkpoint.url, or begin anew all the same with --force"
            )
        if fresh:
            self._save(wait=True)  # From here on this run is what is gone on from.
            return
        told: dict[str, Any] = {"trainer": {"step": 0, "run": asdict(self._run())}}
        newest, latest = latest, self.checkpoints.load(told, latest, partial=True, fallback=True)
        self.notes += compare(Run(**told["trainer"]["run"]), self._run())
        if self.origin is not None:
            told = {"trainer": {"origin": asdict(self.origin)}}
            self.checkpoints.load(told, latest, partial=True)
            check_origin(Origin(**told["trainer"]["origin"]), self.origin)
        state = self.state()
        latest = self.checkpoints.load(state, latest, fallback=True)
        if latest != newest:
            self.notes.append(f"the checkpoint of step {newest} is damaged, and its steps are done again")
        options = StateDictOptions(strict=self.origin is None)
        set_model_state_dict(self.model, state["model"], options=options)
        self._load_optimizers(state["optimizer"])
        self.done = self.saved = int(state["trainer"]["step"])
        self.notes.insert(0, f"going on from step {self.done}")

    def _load_optimizers(self, state: dict[str, Any]) -> None:
        """What they have gathered. Their settings are the config's, which torch would replace by those of the file."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        set_optimizer_state_dict(self.model, self.optimizers, state)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, kept in zip(groups, settings, strict=True):
            group.update(kept)

    def _save(self, *, wait: bool = False) -> None:
        """Raises what the save of this step raises; an earlier one that failed makes this one waited for."""
        if self.checkpoints is None:
            return
        wait = not self._settle(self.checkpoints) or wait
        if self.saved == self.done:
            return
        if wait or not self.config.checkpoint.asynchronous:
            self.checkpoints.save(self.done, self.state())
            self.saved = self.done
        else:
            self.checkpoints.save_async(self.done, self.state())
            self._saving = self.done

    def _settle(self, checkpoints: Checkpoints) -> bool:
        """Waits for the save under way; whether none failed. All ranks hear of a failure."""
        saving, self._saving = self._saving, None
        try:
            checkpoints.wait()
        except Exception as error:
            log.warning("step %s could not be saved (%s): saving step %d now", saving, error, self.done)
            return False
        if saving is not None:
            self.saved = saving
        return True

    # ---- the loop

    def run(self, *, until: int | None = None, on_step: Callable[[StepRecord], None] | None = None) -> Report:
        """To the schedule's last step, or step `until` if that is earlier; `on_step` is called on rank 0.

        SIGINT and SIGTERM end the run after the step they meet, with a checkpoint. Raises NotFinite.
        """
        last = self.config.schedule.steps if until is None else min(until, self.config.schedule.steps)
        stepped: Stepped | None = None
        with ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            stack.enter_context(_deterministic(self.config.compute.deterministic))
            told = _Telling(self, stack, on_step)
            data = self.config.data
            batches = stack.enter_context(
                self.data.batches(
                    data.batch_samples,
                    start=self.done,
                    rank=self.mesh.rank,
                    ranks=self.mesh.ranks,
                    prefetch=data.prefetch,
                )
            )
            while self.done < last and not (stepped and stepped.stopped):
                with told.timed("data"):
                    samples = next(batches).samples
                with told.timed("compute"):
                    stepped = self.stepper.step(self.done, samples, stop=lambda: signals.asked is not None)
                self.done += 1
                with told.timed("validation"):
                    validation = told.validate(self.done == last)
                told.tell(stepped, validation)
                if self.done % self.config.checkpoint.every_steps == 0:
                    with told.timed("checkpoint"):
                        self._save()
            self._save(wait=True)
            stopped = stepped is not None and stepped.stopped
            number = int(signals.asked or 0) if stopped else None
        return Report(self.done, stepped.loss if stepped else None, number, self.saved)

    def close(self) -> None:
        """Lets go of the data, the checkpoints and the mesh."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self.data.close()
        self.mesh.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Telling:
    """Times, validation and records of a run; files are rank 0's."""

    def __init__(self, trainer: Trainer, stack: ExitStack, on_step: Callable[[StepRecord], None] | None) -> None:
        self.trainer, self.on_step, self.clock = trainer, on_step, trainer.clock
        config, mesh = trainer.config, trainer.mesh
        metrics = config.metrics
        self.sinks: list[Sink] = []
        self.trace: Trace | None = None
        if metrics.folder is not None and mesh.rank == 0:
            folder = Path(metrics.folder)
            self.sinks.append(JsonLines(folder, trainer.done))
            if metrics.tensorboard:
                self.sinks.append(TensorBoard(folder, trainer.done))
            if metrics.trace_from_step is not None:
                self.trace = Trace(folder, metrics.trace_from_step, metrics.trace_steps)
                self.trace.step(trainer.done)
                stack.callback(self.trace.close)
        for sink in self.sinks:
            stack.callback(sink.close)
        data = config.data
        self.peak_flops = metrics.peak_flops or measured_peak_flops(mesh.device, DTYPES[config.compute.dtype])
        self.token_flops = info.training_flops(
            trainer.shape, data.sequence_tokens, mtp=trainer.stepper.objective.depths > 0
        )
        self.step_tokens = data.batch_samples * data.sequence_tokens
        self.tells_experts = metrics.expert_tokens
        self.seconds: dict[str, float] = {}
        self.validation = _validation(trainer)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        begin_s = self.clock()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.clock() - begin_s

    def validate(self, last: bool) -> float | None:
        trainer = self.trainer
        due = last or trainer.done % trainer.config.validation.every_steps == 0
        return trainer.stepper.evaluate(self.validation) if self.validation and due else None

    def tell(self, stepped: Stepped, validation_loss: float | None) -> None:
        """One step."""
        trainer = self.trainer
        step_s = max(self.seconds["data"] + self.seconds["compute"], 1e-9)
        per_s = stepped.tokens / step_s
        loads = {str(layer): value for layer, value in stepped.loads.items()}
        record = StepRecord(
            step=trainer.done,
            loss=stepped.loss,
            mtp_loss=stepped.mtp_loss,
            balance_loss=stepped.balance_loss,
            index_loss=stepped.index_loss,
            gradient_norm=stepped.gradient_norm,
            lr=stepped.lr,
            tokens=trainer.done * self.step_tokens,
            tokens_per_s=per_s,
            mfu=per_s * self.token_flops / (self.peak_flops * trainer.mesh.ranks),
            expert_load_max_over_mean=max(loads.values(), default=None),
            expert_load=loads,
            expert_tokens={str(n): count for n, count in stepped.counts.items()} if self.tells_experts else None,
            seconds={part: round(value, 6) for part, value in self.seconds.items()},
            validation_loss=validation_loss,
        )
        self.seconds = {}
        for sink in self.sinks:
            sink.write(record)
        if self.trace is not None:
            self.trace.step(trainer.done)
        if self.on_step is not None and trainer.mesh.rank == 0:
            self.on_step(record)


def check_data(data: TokenDataset, config: TrainConfig, shape: ModelConfig, ranks: int) -> None:
    """Whether a run can train on it. Raises VocabularyError, DataError, ConfigError."""
    if data.vocab_size > shape.vocab_size:
        change = "" if config.model.weights else f"set model.vocab_size = {data.vocab_size}, or "
        raise VocabularyError(
            f"the tokens of {config.data.url} are of a vocabulary of {data.vocab_size:,}, and the model has "
            f"{shape.vocab_size:,}: {change}make the tokens with another tokenizer"
        )
    wanted = config.data.batch_samples
    if len(data) < wanted:
        raise DataError(
            f"{config.data.url} has {data.tokens_count:,} tokens, {len(data):,} samples of "
            f"{config.data.sequence_tokens:,}: fewer than the {wanted:,} of one step (data.batch_samples)"
        )
    if wanted % ranks:
        raise ConfigError(f"data.batch_samples is {wanted}, and {ranks} ranks cannot share that evenly")
    if config.data.sequence_tokens > shape.positions_max:
        raise ConfigError(
            f"data.sequence_tokens is {config.data.sequence_tokens:,}, and the model is made for "
            f"{shape.positions_max:,} positions"
        )


def _begun_with(config: TrainConfig, fresh: bool) -> str | None:
    """Where weights are to be had. A run that goes on has its own in its checkpoint, unless it trains adapters: what it
    once began with may be gone, and only their shape may be wanted."""
    own = config.checkpoint.url
    if config.model.weights is None or config.lora is not None or fresh or own is None:
        return config.model.weights
    with Checkpoints(own) as checkpoints:
        if _latest(checkpoints) is None:
            return config.model.weights
    return None if config.model.is_shaped else own


def _latest(checkpoints: Checkpoints) -> int | None:
    """The step that rank 0 finds: ranks that each looked might not see the same, and wait for each other for ever."""
    with Ranks() as ranks:
        return ranks.told(checkpoints.latest)


def _shape(config: TrainConfig, base: Base | None) -> ModelConfig:
    """The one that is said, or that of the weights."""
    return config.model.shape() if config.model.is_shaped or base is None else base.shape()


def _model(config: TrainConfig, shape: ModelConfig, base: Base | None) -> Model:
    """With the weights of the base, or new ones, the same on any device."""
    model = Model(shape)
    if base is None:
        model.reset_parameters(torch.Generator().manual_seed(config.seed), std=config.model.init_std)
    else:
        # What says itself which model it is may hold more: V4's later releases have another drafter. What is said to be
        # of a model may not: that would be a part of another one.
        base.fill(model, partial=not config.model.is_shaped)
    return model


def _arrange(model: Model, config: TrainConfig) -> None:
    """How layers are computed."""
    for block in blocks(model):
        if config.compute.compile:
            # What is many small operations on as many tokens in every step. Attention goes by documents and experts by
            # counts: as one graph, they would be another in every step.
            for part in (block.hc_attn, block.hc_ffn, block.attn_norm, block.ffn_norm):
                if part is not None:
                    part.compile()
        if config.compute.recompute:
            recompute(block)


def _validation(trainer: Trainer) -> Sequence[Samples]:
    """This rank's samples, a forward call's at a time."""
    section, data, mesh = trainer.config.validation, trainer.config.data, trainer.mesh
    if section.url is None:
        return []
    with TokenDataset(section.url, sequence_tokens=data.sequence_tokens, seed=trainer.config.seed) as held_out:
        if held_out.tokenizer_hash != trainer.data.tokenizer_hash:
            raise DataError(f"{section.url} and {data.url} were made by different tokenizers")
        count = min(section.samples, len(held_out)) // mesh.ranks
        if count == 0:
            raise DataError(f"{section.url} has {len(held_out)} samples, and {mesh.ranks} ranks want one each")
        numbers = range(mesh.rank * count, (mesh.rank + 1) * count)
        size = data.micro_samples or data.batch_samples // mesh.ranks
        return [held_out.read(list(numbers)[i : i + size]) for i in range(0, count, size)]


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Operations whose bits change from run to run are refused meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if on:
        torch.use_deterministic_algorithms(True)
        # What is not written yet is never read.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
