"""Training against transformers' model, stepping on the same batches of real text in fp32.

Both start from the same weights and have an AdamW of the same numbers; MTP, balance loss, bias update and lessons are
off, as transformers has none of them. Samples are single documents there, so they are here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emberflow import TokenDataset
from emberflow.tokens import Samples
from embertrain.model.model import Model
from embertrain.optim import build, clip, lr, set_lr
from embertrain.parallel import Mesh, ParallelConfig
from embertrain.train import TrainConfig
from embertrain.train.objective import Objective
from embertrain.train.step import Stepper

from . import oracle, texts

STEPS = 50
SEQUENCE, BATCH = 160, 2


def config_of(url: str) -> TrainConfig:
    return TrainConfig.of(
        {
            "model": {"preset": "micro", "vocab_size": texts.VOCABULARY},
            "data": {"url": url, "sequence_tokens": SEQUENCE, "batch_samples": BATCH, "micro_samples": 1},
            "schedule": {"lr": 2e-3, "steps": STEPS, "warmup_steps": 10},
            "optimizer": {"kind": "adamw"},
            "losses": {"mtp_weight": 0.0, "balance_weight": 0.0, "bias_rate": 0.0, "index_weight": 0.0},
        }
    )


def copy_weights(theirs: torch.nn.Module, ours: Model) -> None:
    """Ours into theirs: a new model's weights are what training starts with."""
    buffers = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for name, other in oracle.names(ours).items():
        buffers[other].data.copy_(ours.get_parameter(name).data)
    for name, table in ours.named_buffers():
        _, number, rest = name.split(".", 2)
        other = f"model.layers.{number}.{oracle.BUFFERS[rest]}"
        buffers[other].copy_(table)


def their_optimizer(ours: list[torch.optim.Optimizer], model: Model, theirs: torch.nn.Module) -> torch.optim.Optimizer:
    """An AdamW with the groups of ours."""
    named = {p: name for name, p in model.named_parameters()}
    other = oracle.names(model)
    parameters = dict(theirs.named_parameters())
    (adamw,) = ours
    groups: list[dict[str, Any]] = []
    for group in adamw.param_groups:
        mine = [parameters[other[named[p]]] for p in group["params"]]
        groups.append({"params": mine, "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]})
    return torch.optim.AdamW(groups, lr=0.0, betas=group["betas"], eps=group["eps"])


def test_losses_are_transformers_over_fifty_steps(tmp_path: Path) -> None:
    config = config_of(texts.shards(tmp_path))
    shape = replace(config.model.shape(), mtp=())
    assert {a.attention.ratio for a in shape.layers} == {0, 4, 128}  # type: ignore[union-attr]
    ours = Model(shape)
    ours.reset_parameters(torch.Generator().manual_seed(1))
    theirs = oracle.v4_oracle(shape)
    oracle.unclamp_shared(theirs)
    copy_weights(theirs, ours)
    objective = Objective(ours, config.losses)
    objective.freeze_untaught()
    optimizers = build(ours, config.optimizer)
    reference = their_optimizer(optimizers, ours, theirs)
    stepper = Stepper(objective, optimizers, config, Mesh.start(ParallelConfig()), eos_id=texts.EOS)
    whole = (np.zeros(1, np.int64),) * BATCH
    worst, losses = 0.0, []
    with TokenDataset(config.data.url, sequence_tokens=SEQUENCE) as data, data.batches(BATCH) as batches:
        for step in range(STEPS):
            tokens = next(batches).samples.tokens
            tokens = np.where(tokens == texts.EOS, ord("\n"), tokens).astype(np.uint32)
            stepped = stepper.step(step, Samples(tokens, whole))
            ids = torch.from_numpy(tokens.astype(np.int64))
            logits = theirs(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            clip(theirs, config.gradient_norm_max)
            set_lr([reference], lr(config.schedule, step))
            reference.step()
            reference.zero_grad()
            losses.append(stepped.loss)
            worst = max(worst, abs(stepped.loss - loss.item()))
    print(f"worst difference {worst:.1e}, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert worst <= 1e-4
    assert losses[-1] < losses[0] - 1, "a model that learns nothing agrees with anything"
