"""Adapters: nothing changes until they are trained, nothing else is trained, and merged they say the same."""

from __future__ import annotations

import random

import pytest
import torch
from embertrain import lora
from embertrain.engine import Engine
from embertrain.errors import ConfigError
from embertrain.lora import LoraConfig
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from torch import Tensor

from . import oracle


def model_of(family: str) -> Model:
    rng = random.Random(family)
    config = oracle.v4_config(rng) if family == "v4" else oracle.v3_config(rng, sparse=False)
    model = Model(config, mtp=False)
    oracle.randomise(model, 1)
    return model


def logits(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, Batch.of([(0, len(ids))])).logits


def shake(model: Model) -> None:
    """Adapters as if they were trained."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)


@pytest.mark.parametrize("family", ["v3", "v4"])
def test_adapters_begin_as_nothing_and_merge_to_what_they_are(family: str) -> None:
    model = model_of(family)
    ids = oracle.tokens(3, 70, model.config.vocab_size)
    names = list(model.state_dict())
    before = logits(model, ids)
    lora.attach(model, LoraConfig(rank=4), torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, ids), before)
    assert set(names) < set(model.state_dict()), "a weight has another name now"
    shake(model)
    trained = logits(model, ids)
    assert float((trained - before).abs().max()) > 1e-3
    prompt = ids[:20].tolist()
    engine = Engine(model)
    (adapted,) = engine.generate([prompt], max_new_tokens=8)
    lora.merge(model)
    assert list(model.state_dict()) == names
    assert float((logits(model, ids) - trained).abs().max()) < 2e-5
    (merged,) = Engine(model).generate([prompt], max_new_tokens=8)
    assert adapted.new_ids == merged.new_ids


@pytest.mark.parametrize("target", lora.TARGETS)
def test_only_adapters_of_the_target_are_trained(target: str) -> None:
    model = model_of("v4")
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    lora.attach(model, LoraConfig(rank=2, targets=(target,)), torch.Generator().manual_seed(0))
    shake(model)
    ids = oracle.tokens(3, 64, model.config.vocab_size)
    model.loss(ids[:-1], ids[1:], Batch.of([(0, len(ids) - 1)]))[0].backward()
    adapters = lora.adapters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters) and adapters
    unused = [name for name, p in adapters.items() if p.grad is None or not bool(p.grad.any())]
    assert not unused
    inside = {"attention": ".attn.", "shared": ".shared.", "experts": ".experts."}[target]
    assert all(inside in name for name in adapters)
    for name, p in model.named_parameters():
        assert name in adapters or torch.equal(p, frozen[name])


def test_gradients_are_those_of_the_merged_matrix() -> None:
    """dL/dB = scale * dL/dW A', for an expert as well."""
    model = model_of("v4")
    ids = oracle.tokens(4, 64, model.config.vocab_size)
    batch = Batch.of([(0, len(ids) - 1)])
    config = LoraConfig(rank=3, alpha=6.0)
    lora.attach(model, config, torch.Generator().manual_seed(0))
    model.loss(ids[:-1], ids[1:], batch)[0].backward()
    name = next(n for n in lora.adapters(model) if n.endswith("experts.b13"))
    got = lora.adapters(model)[name].grad
    a = lora.adapters(model)[name.replace("b13", "a13")].detach()
    lora.merge(model)
    model.loss(ids[:-1], ids[1:], batch)[0].backward()
    whole = model.get_parameter(name.replace("b13", "w13")).grad
    assert got is not None and whole is not None
    expected = config.scale * torch.bmm(whole, a.transpose(1, 2))
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_wrong_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match="head"):
        LoraConfig(targets=("head",))
