"""The engine: many requests through one forward call a step, and each gets what it would get alone.

Run: pytest tests/trainer/test_engine.py. Greedy tokens of small random models say whether the right rows were read.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from embertrain.engine import Engine, EngineConfig, Request, Sampling
from embertrain.errors import ConfigError, ContextError, NotFinite, VocabularyError
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.model.presets import preset

from . import oracle

FAMILIES = {"v3": "micro-v3", "v3.2": "micro-v3.2", "v4": "micro"}


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> Model:
    model = Model(preset(FAMILIES[family]), mtp=False)
    oracle.randomise(model, 7)
    return model.cast(dtype)


def prompts_of(seed: int, counts: list[int]) -> list[list[int]]:
    return [oracle.tokens(seed + i, count, 256).tolist() for i, count in enumerate(counts)]


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """Tokens by whole forward calls, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor(ids), Batch.of([(0, len(ids))], logits=[len(ids) - 1])).logits
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_any_length_get_what_they_get_alone(family: str) -> None:
    model = model_of(family)
    prompts = prompts_of(1, [1, 5, 130, 300, 128, 40])
    engine = Engine(model, config=EngineConfig(sequences=4, pages=16, step_tokens=70))
    requests = engine.generate(prompts, max_new_tokens=6)
    assert engine.idle and engine.cache.free_pages == 16
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.new_ids == greedy(model, prompt, 6)
        assert request.finish == "length"


def test_a_step_is_tokens_first_and_then_chunks_within_the_budget() -> None:
    engine = Engine(model_of("v4"), config=EngineConfig(sequences=3, step_tokens=50))
    first = engine.submit(prompts_of(1, [30])[0], max_new_tokens=20)
    assert [t.request for t in engine.step()] == [first]
    second = engine.submit(prompts_of(2, [60])[0], max_new_tokens=20)
    assert [t.request for t in engine.step()] == [first]
    assert second.length == 49
    assert {t.request for t in engine.step()} == {first, second}
    assert (len(first.new_ids), len(second.new_ids)) == (3, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_youngest_gives_way_when_pages_run_out_and_comes_back(family: str) -> None:
    model = model_of(family)
    prompts = prompts_of(3, [120, 100, 250])
    engine = Engine(model, config=EngineConfig(sequences=3, pages=4, step_tokens=300))
    requests = engine.generate(prompts, max_new_tokens=30)
    assert [r.preempted > 0 for r in requests] == [False, False, True]
    for prompt, request in zip(prompts, requests, strict=True):
        alone = Engine(model, config=EngineConfig(sequences=1, pages=4)).generate([prompt], max_new_tokens=30)
        assert request.new_ids == alone[0].new_ids


def test_a_request_ends_at_a_stop_token_or_when_it_is_told_to() -> None:
    model, prompt = model_of("v4"), prompts_of(4, [20])[0]
    told = greedy(model, prompt, 4)
    engine = Engine(model)
    request = engine.submit(prompt, max_new_tokens=50, stop_ids=[told[2]])
    assert list(engine.stream(request)) == told[: told.index(told[2]) + 1]
    assert request.finish == "stop" and engine.idle

    running = engine.submit(prompt, max_new_tokens=50)
    waiting = engine.submit(prompt, max_new_tokens=50)
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    assert engine.idle and running.finish == waiting.finish == "cancelled"
    assert engine.cache.free_pages == engine.config.pages
    assert engine.step() == []


def test_streams_of_several_requests_share_their_steps() -> None:
    model, prompts = model_of("v3"), prompts_of(5, [9, 33])
    engine = Engine(model)
    a, b = (engine.submit(prompt, max_new_tokens=5) for prompt in prompts)
    pairs = list(zip(engine.stream(a), engine.stream(b), strict=True))
    assert [p[0] for p in pairs] == greedy(model, prompts[0], 5)
    assert [p[1] for p in pairs] == greedy(model, prompts[1], 5)


def test_sampled_tokens_depend_on_their_own_seed_only() -> None:
    model, prompts = model_of("v3"), prompts_of(6, [10, 20, 30])
    how = [Sampling(temperature=0.9, top_p=0.9, seed=seed) for seed in (1, 2, 3)]

    def run(order: list[int], sequences: int) -> dict[int, list[int]]:
        engine = Engine(model, config=EngineConfig(sequences=sequences))
        requests: dict[int, Request] = {}
        for i in order:
            requests[i] = engine.submit(prompts[i], how[i], max_new_tokens=12)
            engine.step()
        for request in requests.values():
            list(engine.stream(request))
        return {i: r.new_ids for i, r in requests.items()}

    together = run([0, 1, 2], 3)
    assert together == run([2, 1, 0], 1) == run([1, 0, 2], 2)
    assert together[0] != greedy(model, prompts[0], 12)


def test_what_cannot_run_is_refused_at_once() -> None:
    engine = Engine(model_of("v4"), config=EngineConfig(pages=2))
    with pytest.raises(ContextError, match="250 tokens and 7 new ones are more than the 256 the engine's cache holds"):
        engine.submit([1] * 250, max_new_tokens=7)
    with pytest.raises(VocabularyError, match="token 256 is outside the model's vocabulary of 256"):
        engine.submit([1, 256], max_new_tokens=1)
    with pytest.raises(ContextError, match="a prompt needs a token"):
        engine.submit([], max_new_tokens=1)
    with pytest.raises(ContextError, match="max_new_tokens is 0"):
        engine.submit([1], max_new_tokens=0)
    assert engine.idle
    with pytest.raises(ConfigError, match="step_tokens is 100, and must be 136 or more"):
        EngineConfig(step_tokens=100, batch_invariant=True)


def test_a_nan_ends_the_request_that_has_it() -> None:
    model = Model(preset("micro-v3"), mtp=False)
    oracle.randomise(model, 1)
    with torch.no_grad():
        model.embed.weight[200] = torch.nan
    engine = Engine(model)
    good = engine.submit([1, 2, 3], max_new_tokens=3)
    bad = engine.submit([1, 200, 3], max_new_tokens=3)
    with pytest.raises(NotFinite, match="request 1: logits after 3 tokens are not finite"):
        engine.step()
    assert bad.finish == "not finite" and len(good.new_ids) == 1
    assert list(engine.stream(good)) == good.new_ids and good.finish == "length"


def test_engines_of_one_model_run_in_their_own_mode() -> None:
    model = Model(preset("micro-v3"), mtp=False)
    oracle.randomise(model, 1)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda *_: modes.append(model.apart))
    engines = [Engine(model, config=EngineConfig(batch_invariant=on)) for on in (True, False)]
    for engine in engines:
        engine.submit([1, 2, 3], max_new_tokens=2)
    for engine in engines * 2:
        engine.step()
    assert modes == [True, False] * 2
