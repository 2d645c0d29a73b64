"""Batch-invariant mode: a request's logits have the same bits alone, among others, and after its prefix came from
elsewhere. Run: pytest tests/trainer/test_invariance.py."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from embertrain.cache.cache import Cache
from embertrain.cache.spec import CacheSpec
from embertrain.engine import Engine, EngineConfig, Sampling
from embertrain.engine import engine as engine_module
from embertrain.engine.sampling import choose
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.model.presets import preset
from torch import Tensor

from . import oracle

FAMILIES = {"v3": "micro-v3", "v3.2": "micro-v3.2", "v4": "micro"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
NEW = 6
COUNTS = [200, 1, 300, 129, 128, 255, 77, 384]


def model_of(family: str, dtype: str) -> Model:
    model = Model(preset(FAMILIES[family]), mtp=False)
    oracle.randomise(model, 11)
    return model.cast(DTYPES[dtype])


Logits = dict[tuple[int, int], Tensor]
"""By a request's seed and step: the row its token was drawn from."""


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logits]:
    rows: Logits = {}

    def note(logits: Tensor, wanted: Sequence[tuple[Sampling, int]]) -> list[int | None]:
        for row, (sampling, step) in zip(logits, wanted, strict=True):
            rows[sampling.seed, step] = row.clone()
        return choose(logits, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "choose", note)
        yield rows


def run(model: Model, monkeypatch: pytest.MonkeyPatch, seeds: Sequence[int], *, late: bool, pages: int) -> Logits:
    """All of these prompts together, some of them after steps of the others."""
    config = EngineConfig(sequences=8, pages=pages, step_tokens=400, batch_invariant=True)
    engine = Engine(model, config=config)
    rng = random.Random(len(seeds))
    with recorded(monkeypatch) as rows:
        for seed in seeds:
            prompt = oracle.tokens(seed, COUNTS[seed], 256).tolist()
            engine.submit(prompt, Sampling(seed=seed, temperature=1), max_new_tokens=NEW)
            for _ in range(rng.randrange(4) if late else 0):
                engine.step()
        while not engine.idle:
            engine.step()
    return rows


def differing(one: Logits, other: Logits) -> list[tuple[int, int]]:
    return [key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_eight_changes_no_bit(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, dtype)
    seeds = list(range(len(COUNTS)))
    alone: Logits = {}
    for seed in seeds:
        alone |= run(model, monkeypatch, [seed], late=False, pages=4)
    assert len(alone) == len(COUNTS) * NEW
    together = run(model, monkeypatch, seeds, late=False, pages=40)
    assert together.keys() == alone.keys() and differing(alone, together) == []
    others = run(model, monkeypatch, [6, 3, 7, 0, 5, 2, 4, 1], late=True, pages=40)
    assert differing(alone, others) == []
    preempting = run(model, monkeypatch, seeds, late=True, pages=7)
    assert differing(alone, preempting) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_from_elsewhere_changes_no_bit(family: str, dtype: str) -> None:
    """Whole pages of a prompt are exported by one cache, and another one goes on from them."""
    model = model_of(family, dtype)
    model.batch_invariant(True)
    ids = oracle.tokens(20, 330, 256)

    def fill(cache: Cache, sequence: int, begin: int, end: int) -> Tensor:
        logits = torch.zeros(0)
        for first in range(begin, end, 128):
            count = min(128, end - first)
            logits = model(ids[first : first + count], Batch.of([(first, count, sequence)]), cache).logits
        return logits

    spec = CacheSpec.of(model.config, DTYPES[dtype])
    with torch.no_grad():
        first = Cache(spec, sequences=1, pages=3)
        whole = first.open()
        fill(first, whole, 0, 256)
        rows = first.export(whole, 0, 256)
        expected = fill(first, whole, 256, 330)

        second = Cache(spec, sequences=3, pages=8)
        second.reserve(second.open(), 129)
        other = second.open()
        second.import_(other, 0, 256, rows)
        assert torch.equal(fill(second, other, 256, 330), expected)
        if family != "v4":  # without rings, pages of a sequence that went on are as good
            later = first.export(whole, 0, 128)
            third = second.open()
            second.import_(third, 0, 128, later)
            assert torch.equal(fill(second, third, 128, 330), expected)
