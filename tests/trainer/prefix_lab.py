"""What tests of prefix reuse share: a service on a store, models, and the logits that tokens are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from embertrain.engine import Engine, EngineConfig, Request, Sampling
from embertrain.engine import engine as engine_module
from embertrain.engine.sampling import choose
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.prefix import Prefixes
from torch import Tensor

from tests.kvcache.serving import MIB, Server

from . import oracle

FAMILIES = {"v3": "micro-v3", "v3.2": "micro-v3.2", "v4": "micro"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Logits = dict[int, list[Tensor]]
"""By a request's seed: the rows its tokens were drawn from."""


@dataclass(frozen=True)
class Service:
    """One that runs."""

    address: str
    store: str
    server: Server


def patient(service: Service, **options: str) -> Prefixes:
    """A slow machine is no reason for a miss."""
    return Prefixes(service.address, timeout_s=60.0, **options)


@contextmanager
def serving(directory: Path) -> Iterator[Service]:
    store = f"ember://{directory}/store"
    server = Server(store, 256 * MIB)
    try:
        yield Service(server.address, store, server)
    finally:
        if server.process.poll() is None:
            server.end()


@cache
def model_of(family: str, dtype: str = "f32", seed: int = 11) -> Model:
    model = Model(preset(FAMILIES[family]), mtp=False)
    oracle.randomise(model, seed)
    return model.cast(DTYPES[dtype])


def engine_of(
    model: Model, prefixes: Prefixes | None = None, *, invariant: bool = True, pages: int = 40, step_tokens: int = 512
) -> Engine:
    config = EngineConfig(sequences=4, pages=pages, step_tokens=step_tokens, batch_invariant=invariant)
    return Engine(model, config=config, prefixes=prefixes)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logits]:
    """Of all engines meanwhile."""
    rows: Logits = {}

    def note(logits: Tensor, wanted: Sequence[tuple[Sampling, int]]) -> list[int | None]:
        for row, (sampling, step) in zip(logits, wanted, strict=True):
            rows.setdefault(sampling.seed, [])[step:] = [row.clone()]
        return choose(logits, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "choose", note)
        yield rows


def answers(
    engine: Engine, prompts: Sequence[Sequence[int]], monkeypatch: pytest.MonkeyPatch, *, new: int = 4
) -> tuple[list[Request], list[Tensor]]:
    """All prompts together on an engine that then ends: the requests, and [new, vocabulary] of each."""
    with recorded(monkeypatch) as rows:
        try:
            requests = [engine.submit(ids, Sampling(seed=i), max_new_tokens=new) for i, ids in enumerate(prompts)]
            while not engine.idle:
                engine.step()
        finally:
            engine.close()
    return requests, [torch.stack(rows[i]) for i in range(len(prompts))]


@contextmanager
def computed(model: Model) -> Iterator[list[int]]:
    """Tokens that go through the model meanwhile, call by call."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    try:
        yield counts
    finally:
        hook.remove()
