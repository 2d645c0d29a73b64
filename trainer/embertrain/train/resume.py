"""Whether a run may go on from a checkpoint.

A checkpoint holds what its run was. What decides which numbers are learned from which must be the same: the model, the
data and its order, what is trained. The rest may change, and is told, as are changes that only move bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ResumeError
from ..model.config import ModelConfig
from . import toml
from .base import Origin
from .config import TrainConfig

FIXED = ("seed", "data.sequence_tokens", "data.batch_samples", "optimizer.kind")
"""Keys of the config that may not change."""
FREE = ("checkpoint.", "metrics.", "validation.", "data.url", "data.prefetch", "model.")
"""Keys that change nothing of what is learned; the model is compared by its shape, data by its fingerprint, and so are
weights that are not in the checkpoint. Those that are in it are gone on from, whatever the run began with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a checkpoint tells of its run."""

    config: str
    """JSON: the config's keys and values."""
    shape: str
    """JSON: the model's."""
    data: str
    """The token shards' fingerprint."""
    tokenizer: str
    """The hash of what made the tokens."""
    ranks: int
    threads: int
    """Of torch, on a CPU."""

    @classmethod
    def of(cls, config: TrainConfig, shape: ModelConfig, *, data: str, tokenizer: str, ranks: int, threads: int) -> Run:
        return cls(
            config=json.dumps(toml.flat(config)),
            shape=json.dumps(asdict(shape)),
            data=data,
            tokenizer=tokenizer,
            ranks=ranks,
            threads=threads,
        )


def compare(was: Run, now: Run) -> list[str]:
    """What changed that may, a line each. Raises ResumeError for what may not."""
    before, after = json.loads(was.config), json.loads(now.config)
    wrong = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in FIXED if before.get(key) != after.get(key)
    ]
    wrong += _adapter_changes(before, after)
    wrong += _shape_changes(json.loads(was.shape), json.loads(now.shape))
    for key, what in (("losses.mtp_weight", "MTP layers"), ("losses.index_weight", "indexers")):
        if (before.get(key, 0) > 0) != (after.get(key, 0) > 0):
            wrong.append(f"{key} was {before.get(key)} and is {after.get(key)}: {what} are trained in one of the two")
    if was.tokenizer != now.tokenizer:
        wrong.append("the tokens of the data were made by another tokenizer")
    elif was.data != now.data and all(before[key] == after[key] for key in ("seed", "data.sequence_tokens")):
        wrong.append("the data are not the same token shards")
    if wrong:
        raise ResumeError(
            f"the checkpoint is of another run: {'; '.join(wrong)}. Set it as it was, name another checkpoint.url, "
            "or begin anew with --fresh --force"
        )
    notes = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in after.items()
        if key not in FIXED and not key.startswith(FREE) and before.get(key) != value
    ]
    for name, old, new in (("ranks", was.ranks, now.ranks), ("torch threads", was.threads, now.threads)):
        if old != new:
            notes.append(f"{name} were {old} and are {new}: losses may differ in their last bits")
    return notes


def _adapter_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of [lora] is another; one line if there are adapters in one of the two only."""
    names = sorted(key for key in {*before, *after} if key.startswith("lora."))
    if any(key.startswith("lora.") for key in before) != any(key.startswith("lora.") for key in after):
        trained = ("adapters", "all weights")
        was, now = trained if "lora.rank" in before else trained[::-1]
        return [f"{was} were trained, and {now} are to be ([lora])"]
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in names if before.get(key) != after.get(key)
    ]


def check_origin(was: Origin, now: Origin) -> None:
    """Whether adapters go on beside the weights they were trained beside. Raises ResumeError."""
    if was.fingerprint == now.fingerprint:
        return
    told = [
        f"{where.url}{'' if where.step is None else f', step {where.step}'} ({where.fingerprint[:15]})"
        for where in (was, now)
    ]
    raise ResumeError(
        f"model.weights are not those that the adapters were trained beside: they were {told[0]} and are {told[1]}. "
        "Bring those back, or begin anew at another checkpoint.url"
    )


def _shape_changes(before: dict[str, Any], after: dict[str, Any], name: str = "model") -> list[str]:
    """Where two shapes differ."""
    changes: list[str] = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _shape_changes(old, new, f"{name}.{key}")
        elif old != new and (isinstance(old, list) or isinstance(new, list)):
            changes.append(f"{name}.{key} differ")
        elif old != new:
            changes.append(f"{name}.{key} was {old!r} and is {new!r}")
    return changes
