"""One step: the losses of a batch, its gradients, and what they move.

    pack -> forward and backward of each micro-batch -> reduce over ranks -> clip -> optimizers -> biases of routers

A step is a function of the model, the optimizers and its number: noise is drawn from generators made of (seed, step,
micro-batch), and nothing else is remembered. Loads are counted once, after the last micro-batch, from what the
forward calls gave back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import NotFinite
from ..model.config import Mixture
from ..model.router import update_bias
from ..optim import clip, lr, set_lr
from ..parallel import HAS_FP64, Mesh, reduce_gradients
from .config import TrainConfig
from .objective import Objective, Totals, routers
from .packing import Packed, pack
from .precision import DTYPES, computing_in


class Samples(Protocol):
    """What a step reads, as `emberflow.TokenDataset` gives it."""

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """[B, S + 1]."""

    @property
    def starts(self) -> Sequence[NDArray[np.int64]]:
        """Where documents begin, of each sample."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step was, over all ranks."""

    loss: float
    """Cross-entropy of the next token, in nats."""
    mtp_loss: float
    balance_loss: float
    index_loss: float
    gradient_norm: float
    """Before it was cut."""
    lr: float
    tokens: int
    counts: dict[int, tuple[int, ...]]
    """Of layers that choose their experts: the tokens of each."""
    stopped: bool
    """Whether a rank was asked to stop."""

    @property
    def loads(self) -> dict[int, float]:
        """Tokens of the fullest expert over the mean."""
        return {layer: max(count) * len(count) / max(sum(count), 1) for layer, count in self.counts.items()}


class Stepper:
    """Steps of one run."""

    def __init__(
        self,
        objective: Objective,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        mesh: Mesh,
        *,
        eos_id: int,
    ) -> None:
        self.objective, self.optimizers, self.config = objective, optimizers, config
        self.mesh, self.eos_id = mesh, eos_id
        # With fsdp weights are cast as they are gathered.
        self.dtype = torch.float32 if mesh.fsdp > 1 else DTYPES[config.compute.dtype]
        layers = (*objective.model.config.layers, *objective.model.config.mtp)
        self._noisy = any(isinstance(layer.ffn, Mixture) and layer.ffn.noise > 0 for layer in layers)

    def step(self, number: int, samples: Samples, *, stop: Callable[[], bool] = bool) -> Stepped:
        """Step `number`, 0 being the first, on this rank's samples; `stop` is asked once its gradients are there.

        Raises NotFinite before anything is moved, with no gradients left.
        """
        config, model = self.config, self.objective.model
        model.train()
        batches = self._packed(samples)
        totals = self._totals(batches)
        dense = number < config.losses.index_dense_steps
        terms = torch.zeros(4, dtype=torch.float64, device=self.mesh.device)
        counts: dict[int, Tensor] = {}
        for i, packed in enumerate(batches):
            with computing_in(model, self.dtype, exact=is_exact(config, self.mesh)):
                generator = self._generator(number, self.mesh.rank * len(batches) + i)
                losses = self.objective(packed, totals, dense=dense, generator=generator)
                losses.total.backward()
            terms += losses.terms()
            counts = {layer: counts.get(layer, 0) + count for layer, count in losses.counts.items()}
        reduce_gradients(model, self.mesh)
        norm = float(clip(model, config.gradient_norm_max))
        told = self.mesh.sum(torch.cat([terms, terms.new_tensor([float(stop())])])).tolist()
        if not (math.isfinite(told[0]) and math.isfinite(norm)):
            self._drop_gradients()
            raise _not_finite(number, told[0], norm)
        rate = lr(config.schedule, number)
        set_lr(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        self._drop_gradients()
        counted = self._balance(counts)
        return Stepped(told[0], told[1], told[2], told[3], norm, rate, totals.tokens, counted, told[4] > 0)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Samples]) -> float:
        """The mean cross-entropy of the next token, over the samples of all ranks."""
        model = self.objective.model
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for samples in batches:
            for packed in self._packed(samples):
                with computing_in(model, self.dtype):
                    sums[0] += self.objective.language(packed).double()
                sums[1] += packed.counts[0]
        summed, count = self.mesh.sum(sums).tolist()
        return summed / max(count, 1)

    def _packed(self, samples: Samples) -> list[Packed]:
        """Micro-batches."""
        tokens_BS, starts = samples.tokens, samples.starts
        size = self.config.data.micro_samples or len(tokens_BS)
        return [
            pack(
                tokens_BS[i : i + size],
                starts[i : i + size],
                eos_id=self.eos_id,
                depths=self.objective.depths,
                device=self.mesh.device,
            )
            for i in range(0, len(tokens_BS), size)
        ]

    def _totals(self, batches: Sequence[Packed]) -> Totals:
        rows = [(packed.tokens, *packed.counts) for packed in batches]
        here = torch.tensor([sum(column) for column in zip(*rows, strict=True)], dtype=torch.int64)
        tokens, *targets = self.mesh.sum(here.to(self.mesh.device)).tolist()
        return Totals(tokens, tuple(targets))

    def _generator(self, number: int, micro: int) -> torch.Generator | None:
        """`micro` counts the micro-batches of all ranks."""
        if not self._noisy:
            return None
        seed = np.random.SeedSequence([self.config.seed, number, micro]).generate_state(1, np.uint64)
        return torch.Generator(self.mesh.device).manual_seed(int(seed[0] >> 1))

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _balance(self, counts: dict[int, Tensor]) -> dict[int, tuple[int, ...]]:
        """Moves the routers' biases by the loads of the whole step, and tells the loads."""
        counted = {}
        rate = self.config.losses.bias_rate
        for layer, router in routers(self.objective.model):
            if router.spec.hashed or layer not in counts:
                continue
            count_E = self.mesh.sum(counts[layer])
            if rate > 0:
                update_bias(router, count_E, rate)
            counted[layer] = tuple(count_E.tolist())
        return counted


def is_exact(config: TrainConfig, mesh: Mesh) -> bool:
    """Whether gradients are added up exactly: where there are several to add, of micro-batches or of ranks, and torch
    can."""
    data = config.data
    one = mesh.ranks == 1 and (data.micro_samples or data.batch_samples) >= data.batch_samples
    return config.compute.deterministic and HAS_FP64 and not one


def _not_finite(number: int, loss: float, norm: float) -> NotFinite:
    return NotFinite(
        f"step {number + 1}: the loss is {loss} and the gradients' norm {norm}. Nothing was changed by this "
        "step, and no checkpoint is saved after it; lower schedule.lr or gradient_norm_max, or lengthen "
        "schedule.warmup_steps, and go on from the last checkpoint"
    )
