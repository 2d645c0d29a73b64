"""What a run of training is: one TOML file, one frozen dataclass a table.

A file is read by `TrainConfig.read`, and refused with the key that is wrong. What is checked here needs neither the
data nor the model's weights; `Trainer` checks the rest before its first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..lora import LoraConfig
from ..model.config import ModelConfig
from ..model.presets import preset
from ..model.published import from_published
from ..optim import OptimConfig, ScheduleConfig
from ..parallel import ParallelConfig
from . import toml


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """[model]: its shape, by a preset's name or a config.json, and its weights.

    With weights alone the shape is theirs.
    """

    preset: str | None = None
    """`emberline model info` lists them: micro, tiny, small, v4-flash and others."""
    config: str | None = None
    """A config.json as DeepSeek or transformers write it."""
    vocab_size: int | None = None
    """In place of the shape's own."""
    weights: str | None = None
    """What the run begins with, at any URL: a folder of safetensors, or the checkpoints of an earlier run, of which the
    latest is taken. None: new weights."""
    init_std: float = 0.02
    """Standard deviation of new weights."""

    def __post_init__(self) -> None:
        shapes = (self.preset, self.config)
        _need(None in shapes, "say either preset or config")
        _need(shapes != (None, None) or self.weights is not None, "say preset or config, or weights to begin with")
        _need(
            shapes != (None, None) or self.vocab_size is None,
            "weights have a vocabulary of their own: vocab_size goes with preset or config",
        )
        _need(self.vocab_size is None or self.vocab_size > 0, "vocab_size is more than 0")
        _need(self.init_std > 0, "init_std is more than 0")

    @property
    def is_shaped(self) -> bool:
        """Whether a shape is said; if not it is that of the weights."""
        return self.preset is not None or self.config is not None

    def shape(self) -> ModelConfig:
        """The one that is said. Raises ConfigError."""
        if self.preset is not None:
            shape = preset(self.preset)
        else:
            assert self.config is not None
            try:
                shape = from_published(json.loads(Path(self.config).read_bytes()))
            except FileNotFoundError:
                raise ConfigError(f"model.config: there is no file {self.config}") from None
            except json.JSONDecodeError as error:
                raise ConfigError(f"model.config: {self.config} is not JSON: {error}") from error
        return shape if self.vocab_size is None else replace(shape, vocab_size=self.vocab_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """[data]: token shards, and how much of them a step takes."""

    url: str
    """Of the token shards."""
    sequence_tokens: int
    """Tokens of a sample."""
    batch_samples: int
    """Samples of one step, of all ranks together."""
    micro_samples: int = 0
    """Samples of one forward call of a rank; gradients are summed over as many as it takes. 0: all of the rank's.
    Runs on other ranks compute the same, with `compute.deterministic`, where this is the same, not 0, and divides what
    each rank has of a batch."""
    prefetch: int = 4
    """Batches read ahead."""

    def __post_init__(self) -> None:
        _need(self.sequence_tokens > 1, "sequence_tokens is more than 1")
        _need(self.batch_samples > 0, "batch_samples is more than 0")
        _need(self.micro_samples >= 0, "micro_samples is 0 or more")
        _need(self.prefetch >= 0, "prefetch is 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSection:
    """[validation]: the loss on other data, now and then."""

    url: str | None = None
    """Token shards that are not trained on. None: no validation."""
    every_steps: int = 100
    samples: int = 32
    """The first so many of a fixed order."""

    def __post_init__(self) -> None:
        _need(self.every_steps > 0 and self.samples > 0, "every_steps and samples are more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSection:
    """[losses]: what is minimised beside the cross-entropy of the next token, and what keeps experts even."""

    mtp_weight: float = 0.3
    """Of the mean of the MTP layers' losses; 0: MTP layers stay as they are."""
    balance_weight: float = 1e-4
    """Of the sequence-wise balance loss, summed over layers."""
    bias_rate: float = 1e-3
    """By how much a step moves the bias of an expert that is chosen too often or too seldom; 0: not at all."""
    index_weight: float = 1.0
    """Of the indexers' lessons, summed over layers; 0: indexers stay as they are."""
    index_dense_steps: int = 0
    """So many steps attention sees every row and indexers learn from all of them; then only what they choose."""

    def __post_init__(self) -> None:
        weights = (self.mtp_weight, self.balance_weight, self.bias_rate, self.index_weight)
        _need(min(weights) >= 0, "weights and rates are 0 or more")
        _need(self.index_dense_steps >= 0, "index_dense_steps is 0 or more")
        taught = self.index_weight > 0 or not self.index_dense_steps
        _need(taught, "index_dense_steps are for indexers that learn: index_weight is 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSection:
    """[compute]: how, not what."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of products. Weights, gradients and optimizers are fp32 either way."""
    recompute: bool = False
    """Keep only what layers take in, and compute the rest again for the gradient: less memory, a third more time."""
    compile: bool = False
    """Norms and hyper-connections of layers go through torch.compile, which needs a C++ compiler on a CPU and up to a
    minute before the first step. Attention and experts do not: their shapes are those of documents and of routers'
    choices, other ones in every step."""
    deterministic: bool = True
    """Refuse operations whose bits change from run to run. And where there are several ranks or micro-batches, add
    gradients up in fp64, and multiply the rows that experts get from each rank by themselves: what the ranks are for
    then changes no bit, but by accidents of rounding. It costs some per cent of a step, more with many ranks
    of ep, and up to four times the memory of gradients while they are added up; torch 2.9 goes on without."""
    threads: int = 0
    """Of torch, on a CPU; 0: as it finds it. A resumed run has the same bits with as many only."""

    def __post_init__(self) -> None:
        _need(self.threads >= 0, "threads is 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """[checkpoint]: what a run goes on from."""

    url: str | None = None
    """A folder on any file system, ember:// too. None: nothing is saved."""
    every_steps: int = 500
    """And at the end, and when the run is interrupted."""
    keep: int = 3
    """The newest so many stay."""
    asynchronous: bool = True
    """Train on while a checkpoint is written."""

    def __post_init__(self) -> None:
        _need(self.every_steps > 0 and self.keep > 0, "every_steps and keep are more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsSection:
    """[metrics]: what is told of each step."""

    folder: str | None = None
    """A local folder for metrics.jsonl, TensorBoard's files and traces. None: nothing is written."""
    tensorboard: bool = False
    """Needs the package tensorboard."""
    expert_tokens: bool = False
    """Tell the tokens of each expert, not of the fullest alone: numbers by layer and expert in every line."""
    peak_flops: float | None = None
    """Of one rank's device a second, which MFU is a share of. None: measured at the start by a product."""
    trace_from_step: int | None = None
    """The first step of a profiler trace, for chrome://tracing or Perfetto. None: no trace."""
    trace_steps: int = 3

    def __post_init__(self) -> None:
        _need(self.peak_flops is None or self.peak_flops > 0, "peak_flops is more than 0")
        _need(self.trace_from_step is None or self.trace_from_step > 0, "trace_from_step is 1 or more")
        _need(self.trace_steps > 0, "trace_steps is more than 0")
        needs_folder = self.tensorboard or self.trace_from_step is not None
        _need(self.folder is not None or not needs_folder, "tensorboard and traces need a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A run."""

    model: ModelSection
    data: DataSection
    schedule: ScheduleConfig
    """Of learning rates; its `steps` are the run's."""
    lora: LoraConfig | None = None
    """Adapters are trained, and the weights they stand beside stay as they are: biases of routers and indexers too,
    whatever [losses] says. None: all weights are trained."""
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    losses: LossSection = field(default_factory=LossSection)
    gradient_norm_max: float = 1.0
    """Gradients of a greater norm are scaled down to it."""
    compute: ComputeSection = field(default_factory=ComputeSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    seed: int = 0
    """Of new weights and adapters, of the order of samples, and of routers' noise."""

    def __post_init__(self) -> None:
        _need(self.gradient_norm_max > 0, "gradient_norm_max is more than 0")
        _need(self.seed >= 0, "seed is 0 or more")
        if self.lora is not None:
            _need(self.model.weights is not None, "lora: adapters stand beside weights: say model.weights")
            shared = self.parallel.fsdp > 1 or self.parallel.ep > 1
            _need(not shared, "lora: adapters are trained on copies of the model (parallel.dp), not with fsdp or ep")
            _need(
                not self.losses.index_dense_steps, "lora: indexers are not taught: leave out losses.index_dense_steps"
            )

    def settled(self) -> TrainConfig:
        """What a run does: with adapters it moves no bias of a router, and teaches no indexer."""
        if self.lora is None:
            return self
        return replace(self, losses=replace(self.losses, bias_rate=0.0, index_weight=0.0))

    @classmethod
    def of(cls, tables: dict[str, Any]) -> TrainConfig:
        """Of the tables of a TOML file. Raises ConfigError."""
        return toml.build(cls, tables)

    @classmethod
    def read(cls, source: str | Path, assignments: Iterable[str] = ()) -> TrainConfig:
        """Of a TOML file or a recipe's name, with some keys set otherwise ("data.batch_samples=4").

        Raises ConfigError.
        """
        tables = toml.parse(_text(str(source)), str(source))
        toml.override(tables, assignments)
        return cls.of(tables)


def recipes() -> tuple[str, ...]:
    """Names of the configs that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def _text(source: str) -> str:
    path = Path(source)
    if not path.exists() and source in recipes():
        return (resources.files(__package__) / "recipes" / f"{source}.toml").read_text()
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{source} is neither a file nor one of {', '.join(recipes())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
