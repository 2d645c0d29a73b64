"""Decoding beside transformers: the same weights, the same prompts, greedy.

    python -m benchmarks decode --quick

`bench-v3` and `bench-v4` in bf16 on two threads: 64 tokens of prompt, 128 new ones, one request and eight. Both sides
first say the same tokens in fp32. The ceiling is that of reading every weight of a step once: what a step touches, by
the memory bandwidth measured here. The last rows are steps of V3 far into a context, on rows made up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from embertrain.cache.cache import Cache
from embertrain.cache.spec import PAGE_TOKENS, CacheSpec
from embertrain.engine import Engine, EngineConfig
from embertrain.model.batch import Batch
from embertrain.model.config import Mixture
from embertrain.model.model import Model
from embertrain.model.presets import preset
from torch import Tensor

from tests.trainer import oracle

from .runner import OURS, Row, compare, verify

THREADS = 2
PROMPT = 64
PEER = "transformers"
GOALS = {("v4", 1): 3.0, ("v4", 8): 3.5, ("v3", 1): 1.8, ("v3", 8): 4.0}
"""Times transformers, by model and batch."""
FAR_GOAL = 5.0
FAR_STEP_GOAL = 4.0
"""A step at the far end takes at most so many steps at NEAR."""
NEAR = 256
SAME_TOKENS = 8
"""Tokens that both sides say alike in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long it takes."""

    new: int
    rounds: int
    far: int = 16_384
    has_far_goals: bool = True
    very_far: int = 1_048_544
    """Of V4, whose layers see all of it as entries: 32 steps from there end at its last position."""
    far_steps: int = 4
    models: tuple[str, ...] = ("bench-v4", "bench-v3")
    bandwidth_bytes: int = 1 << 29
    """What is read to measure the memory's bandwidth."""


FULL = Size(new=128, rounds=5)
QUICK = Size(new=32, rounds=1, far=512, has_far_goals=False, very_far=16_384, far_steps=1)
WARM_UP = 1
"""New token of the first pass, which is not timed. Without bf16 instructions transformers takes seconds for 32."""


def run(directory: Path, size: Size) -> list[Row]:
    """All rows. Raises WrongResult where both sides say something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.no_grad():
            bandwidth = memory_bandwidth(size.bandwidth_bytes)
            rows = []
            for name in size.models:
                ours, theirs = pair(name)
                family = ours.config.family
                _same_tokens(ours, theirs)
                ours.cast(torch.bfloat16)
                theirs.to(torch.bfloat16)
                for batch in (1, 8):
                    rows += _decode(family, ours, theirs, batch, size, bandwidth)
                rows += _far(ours, theirs, size) if family == "v3" else _very_far(ours, size)
            return rows
    finally:
        torch.set_num_threads(before)


def pair(name: str) -> tuple[Model, Any]:
    """Our model and transformers', with the same weights, in fp32; theirs with the kernels it chooses itself."""
    ours = Model(preset(name), mtp=False)
    family = ours.config.family
    theirs = (oracle.v4_oracle if family == "v4" else oracle.v3_oracle)(ours.config)
    oracle.randomise(theirs, 1)
    oracle.copy_weights(ours, theirs)
    theirs.set_experts_implementation("grouped_mm")
    if family == "v3":
        theirs.set_attn_implementation("sdpa")
    return ours, theirs


def prompts_of(batch: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))


def generate(model: Model, prompts: Tensor, new: int) -> list[list[int]]:
    batch = len(prompts)
    pages = batch * -(-(PROMPT + new) // PAGE_TOKENS)
    engine = Engine(model, config=EngineConfig(sequences=batch, pages=pages, step_tokens=batch * PROMPT + 1))
    return [request.new_ids for request in engine.generate(prompts.tolist(), max_new_tokens=new)]


def generate_theirs(model: Any, prompts: Tensor, new: int) -> list[list[int]]:
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = out[:, PROMPT:].tolist()
    return tokens


def _same_tokens(ours: Model, theirs: Any) -> None:
    prompts = prompts_of(2, ours.config.vocab_size)
    mine, his = generate(ours, prompts, SAME_TOKENS), generate_theirs(theirs, prompts, SAME_TOKENS)
    verify(mine == his, f"tokens of ours {mine} and of {PEER} {his} in fp32")


def _decode(family: str, ours: Model, theirs: Any, batch: int, size: Size, bandwidth: float) -> list[Row]:
    """Tokens/s of whole requests, and their share of the ceiling."""
    prompts = prompts_of(batch, ours.config.vocab_size)

    def subject(make: Callable[[Any, Tensor, int], list[list[int]]], model: Any) -> Callable[[bool], float]:
        def once(first: bool) -> float:
            new = WARM_UP if first else size.new
            tokens = make(model, prompts, new)
            verify([len(t) for t in tokens] == [new] * batch, "not all tokens are there")
            return float(batch * new)

        return once

    row = compare(
        f"{family} B{batch}, tokens/s",
        subject(generate, ours),
        peers={PEER: subject(generate_theirs, theirs)},
        baseline=PEER,
        goal=GOALS[family, batch],
        rounds=size.rounds,
    )
    ceiling = batch * bandwidth / step_bytes(ours, batch)
    share = Row(
        row=f"{family} B{batch}, of weight streaming",
        ours=row.ours,
        ceiling=ceiling,
        ratio=row.ours / ceiling,
        baseline="ceiling",
    )
    return [row, share]


def memory_bandwidth(size_bytes: int) -> float:
    """Bytes/s of reading what is in no cache."""
    numbers = torch.ones(size_bytes // 4)
    passes = []
    for _ in range(5):
        begin_s = time.perf_counter()
        numbers.sum()
        passes.append(time.perf_counter() - begin_s)
    return numbers.nbytes / min(passes)


def step_bytes(model: Model, batch: int) -> float:
    """Bytes of the weights that a step of so many tokens reads: of a mixture those experts that are expected to be
    chosen by somebody, of the embedding a row each."""
    total = 0.0
    for name, p in model.named_parameters():
        if name == "embed.weight":
            total += batch * p[0].nbytes
        elif ".experts." in name:
            ffn = model.config.layers[int(name.split(".")[1])].ffn
            assert isinstance(ffn, Mixture)
            total += p.nbytes * (1 - (1 - ffn.top_k / ffn.experts) ** batch)
        else:
            total += p.nbytes
    return total


# ---- far into a context


def _far(ours: Model, theirs: Any, size: Size) -> list[Row]:
    """V3's step after `size.far` tokens, beside transformers' and beside its own after NEAR."""
    near, far = _steps(ours, NEAR), _steps(ours, size.far)
    peer = _steps_theirs(theirs, size.far)
    at = f"v3 B1 at {size.far:,}"
    row = compare(
        f"{at}, tokens/s",
        _many(far, 4 * size.far_steps),
        peers={PEER: _many(peer, size.far_steps), "ours_near": _many(near, 4 * size.far_steps)},
        baseline=PEER,
        goal=FAR_GOAL if size.has_far_goals else None,
        rounds=size.rounds,
    )
    times = statistics.median(
        near_rate / far_rate for near_rate, far_rate in zip(row.rounds["ours_near"], row.rounds[OURS], strict=True)
    )
    peers = {PEER: row.peers[PEER]}
    goal = FAR_STEP_GOAL if size.has_far_goals else None
    own = Row(row=f"{at}, steps at {NEAR} that one takes", ours=times, goal=goal, at_most=True)
    return [replace(row, peers=peers), own]


def _very_far(ours: Model, size: Size) -> list[Row]:
    """V4's step at the end of its context, beside its own after NEAR; transformers is not timed there."""
    near, far = _steps(ours, NEAR), _steps(ours, size.very_far)
    row = compare(
        f"v4 B1 at {size.very_far:,}, tokens/s",
        _many(far, 8 * size.far_steps),
        peers={"after 256": _many(near, 8 * size.far_steps)},
        baseline="after 256",
        rounds=size.rounds,
    )
    return [row]


def _many(step: Callable[[], None], count: int) -> Callable[[bool], float]:
    def once(first: bool) -> float:
        for _ in range(1 if first else count):
            step()
        return float(count)

    return once


def _steps(model: Model, length: int) -> Callable[[], None]:
    """A step of our model after `length` tokens of random rows; called again, it stays there."""
    pages = -(-(length + 1) // PAGE_TOKENS)
    cache = Cache(CacheSpec.of(model.config, torch.bfloat16), sequences=1, pages=pages, drafts=1)
    sequence = cache.open()
    cache.reserve(sequence, length + 1)
    for layer, rows in enumerate(cache.spec.layers):
        for row in rows:
            cache.pool(layer, row.kind).normal_()
    cache.advance(sequence, length)
    ids, batch = torch.tensor([5]), Batch.of([(length, 1, sequence)])

    def step() -> None:
        logits = model(ids, batch, cache, checked=True).logits
        verify(bool(logits.isfinite().all()), "logits are not finite")
        cache.truncate(sequence, length)

    return step


def _steps_theirs(model: Any, length: int) -> Callable[[], None]:
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values

    def fill() -> None:
        for layer in cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                shape = (*held.shape[:-2], length, held.shape[-1])
                setattr(layer, name, torch.randn(shape, dtype=held.dtype))

    fill()
    verify(cache.get_seq_length() == length, f"{PEER}' cache has {cache.get_seq_length()} tokens")

    def step() -> None:
        model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)

    return step
