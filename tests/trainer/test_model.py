"""The model as a value: stages, MTP, no side effects, mixed precision, and the mHC kernel."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from embertrain import kernels
from embertrain.cache.cache import Cache
from embertrain.cache.spec import CacheSpec
from embertrain.cache.step import Fresh
from embertrain.errors import ConfigError, ContextError, VocabularyError
from embertrain.model import hybrid, latent
from embertrain.model.batch import Batch
from embertrain.model.config import Hyper, ModelConfig
from embertrain.model.hyper import HyperConnection, sinkhorn
from embertrain.model.model import Model
from torch import Tensor

from . import oracle


def config_of(family: str, seed: int = 0, *, mtp: bool = False) -> ModelConfig:
    rng = random.Random(seed)
    config = oracle.v4_config(rng) if family == "v4" else oracle.v3_config(rng, sparse=family == "v32")
    if not mtp:
        return config
    last = next((x for x in config.layers if family != "v4" or x.attention.ratio == 0), config.layers[-1])
    return replace(config, mtp=(last,))


def model_of(config: ModelConfig, seed: int = 0) -> Model:
    model = Model(config)
    oracle.randomise(model, seed)
    return model


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_ranges_of_layers_make_the_whole(family: str) -> None:
    config = config_of(family)
    whole = model_of(config)
    ids, batch = oracle.tokens(1, 200, config.vocab_size), Batch.of([(0, 60), (0, 140)])
    parts = [Model(config, layers=range(1)), Model(config, layers=range(1, len(config.layers)))]
    state = whole.state_dict()
    for part in parts:
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    assert not hasattr(parts[0], "head") and not hasattr(parts[1], "embed")
    with torch.no_grad():
        out = whole(ids, batch)
        crossing = parts[0].run(parts[0].begin(ids), batch, Fresh(batch))
        crossing = parts[1].run(crossing, batch, Fresh(batch))
        assert torch.equal(parts[1].logits(crossing.residual, batch), out.logits)
        assert crossing.routing.keys() == out.aux.routing.keys()


def test_a_model_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = Model(config_of("v4", mtp=True))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("family", ["v3", "v4"])
def test_mtp_against_its_formula(family: str) -> None:
    config = config_of(family, mtp=True)
    model = model_of(config)
    ids = oracle.tokens(2, 150, config.vocab_size)
    batch = Batch.of([(0, 149)])
    with torch.no_grad():
        out = model(ids[:-1], batch)
        predicted = model.predict(0, out.residual, ids[1:], batch)
        block = model.mtp[0]

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_eps).sqrt() * weight

        e = norm(model.embed.weight[ids[1:]], block.enorm.weight)
        seen = norm(out.residual, model.norm.weight) if family == "v3" else out.residual
        h = norm(seen, block.hnorm.weight)
        if family == "v3":
            x = torch.cat([e, h], -1) @ block.eh_proj.weight.T
        else:
            x = (e @ block.e_proj.weight.T)[:, None, :] + h @ block.h_proj.weight.T
        from embertrain.model.rope import Angles

        x, _ = block(x, ids[1:], batch, Fresh(batch), Angles(batch.positions_T))
        if family == "v4":
            flat = x.flatten(1)
            mix = norm(flat, torch.ones(1)) @ block.hc_head.fn.T * block.hc_head.scale + block.hc_head.base
            x = ((torch.sigmoid(mix) + 1e-6)[:, :, None] * x).sum(1)
        want = norm(x, block.norm.weight) @ model.head.weight.T
    assert float((predicted.logits - want).abs().max()) <= 2e-5
    assert set(predicted.aux.routing) <= {len(config.layers)}


def test_forward_changes_nothing() -> None:
    config = config_of("v4")
    model = model_of(config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids, batch = oracle.tokens(3, 80, config.vocab_size), Batch.of([(0, 80)])
    first, second = model(ids, batch), model(ids, batch)
    assert torch.equal(first.logits, second.logits)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_selections_can_be_replayed() -> None:
    config = config_of("v4")
    model = model_of(config)
    ids, batch = oracle.tokens(4, 50, config.vocab_size), Batch.of([(0, 50)])
    out = model(ids, batch)
    chosen = {layer: routing.experts_TK for layer, routing in out.aux.routing.items()}
    assert torch.equal(model(ids, batch, selections=chosen).logits, out.logits)
    other = {layer: (experts + 1) % 4 for layer, experts in chosen.items()}
    assert not torch.equal(model(ids, batch, selections=other).logits, out.logits)


@pytest.mark.parametrize("wanted", [[], [1, 0], [2], [0, 0, 2]])
def test_logits_are_those_asked_for_in_that_order(wanted: list[int]) -> None:
    config = config_of("v4", mtp=True)
    model = model_of(config)
    ids = oracle.tokens(4, 3, config.vocab_size)
    count = max(2, *wanted, 0) if len(wanted) == 2 else 3  # as many as there are rows, too
    ids, batch = ids[:count], Batch.of([(0, count)], logits=wanted)
    with torch.no_grad():
        out, whole = model(ids, batch), model(ids, Batch.of([(0, count)]))
        assert out.logits.shape == (len(wanted), config.vocab_size)
        torch.testing.assert_close(out.logits, whole.logits[torch.tensor(wanted, dtype=torch.int64)])
        predicted = model.predict(0, out.residual, ids, batch)
        every = model.predict(0, out.residual, ids, Batch.of([(0, count)]))
        torch.testing.assert_close(predicted.logits, every.logits[torch.tensor(wanted, dtype=torch.int64)])


def decode_once(model: Model) -> Tensor:
    cache = Cache(CacheSpec.of(model.config, torch.float32), sequences=1, pages=1)
    sequence = cache.open()
    with torch.no_grad():
        model(torch.tensor([1, 2, 3]), Batch.of([(0, 3, sequence)]), cache)
        return model(torch.tensor([4]), Batch.of([(3, 1, sequence)]), cache).logits


def test_what_decoding_copies_of_weights_follows_them_and_is_not_kept() -> None:
    from copy import deepcopy
    from pickle import dumps

    model = model_of(config_of("v3"))
    attention = model.layers["0"].attn
    size = len(dumps(model))
    before = decode_once(model)
    assert len(dumps(model)) == size
    assert torch.equal(decode_once(deepcopy(model)), before)
    with torch.no_grad():
        attention.wkv_b.weight.mul_(0.5)
    after = decode_once(model)
    assert not torch.equal(after, before)
    # Another parameter where the first one lay, as an allocator may give its memory again.
    attention.wkv_b.weight = torch.nn.Parameter(attention.wkv_b.weight.detach())
    attention.wkv_b.weight.data.mul_(2)
    torch.testing.assert_close(decode_once(model), before)


def test_a_model_made_in_inference_mode_decodes() -> None:
    config = config_of("v3")
    with torch.inference_mode():
        made = model_of(config)
        assert torch.equal(decode_once(made), decode_once(model_of(config)))


@pytest.mark.parametrize("hidden_size", [32, 2048])
def test_hyper_connections_begin_near_neutral_at_any_size(hidden_size: int) -> None:
    config = replace(config_of("v4"), hidden_size=hidden_size)
    model = Model(replace(config, layers=config.layers[:1]), mtp=False)
    model.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(50, 4, hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for connection in (model.layers["0"].hc_attn, model.layers["0"].hc_ffn):
            y, post, comb = connection(x)
            torch.testing.assert_close(y, x.sum(1) / 2, atol=0.2, rtol=0)
            torch.testing.assert_close(post, torch.ones_like(post), atol=0.05, rtol=0)
            torch.testing.assert_close(comb, torch.full_like(comb, 0.25), atol=0.05, rtol=0)


def test_wrong_tokens_and_too_many_of_them_are_refused() -> None:
    config = config_of("v4")
    model = model_of(config)
    with pytest.raises(VocabularyError, match="token 97 is outside"):
        model(torch.tensor([1, 97]), Batch.of([(0, 2)]))
    short = Model(replace(config, positions_max=10))
    with pytest.raises(ContextError, match="11 tokens are more than the 10"):
        short(torch.zeros(11, dtype=torch.int64), Batch.of([(0, 11)]))


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_bf16_is_near_fp32(family: str) -> None:
    config = config_of(family)
    model = model_of(config)
    ids, batch = oracle.tokens(5, 200, config.vocab_size), Batch.of([(0, 200)])
    with torch.no_grad():
        chosen = {layer: r.experts_TK for layer, r in model(ids, batch).aux.routing.items()}
        exact = model(ids, batch, selections=chosen).logits
        rough = model.cast(torch.bfloat16)(ids, batch, selections=chosen).logits
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).abs().mean()) < 0.1 * float(exact.std())


def test_sinkhorn_makes_rows_and_columns_sum_to_one() -> None:
    m = sinkhorn(torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0)), 20, 1e-6)
    assert float((m.sum(-1) - 1).abs().max()) < 1e-3 and float((m.sum(-2) - 1).abs().max()) < 1e-5


@pytest.mark.skipif(kernels.native is None, reason="the C part was not built")
@pytest.mark.parametrize("streams", [2, 4])
def test_the_kernel_is_the_formula(streams: int) -> None:
    g = torch.Generator().manual_seed(streams)
    connection = HyperConnection(Hyper(streams=streams), 8, 1e-6)
    with torch.no_grad():
        connection.base.copy_(torch.randn(connection.base.shape, generator=g))
        connection.scale.copy_(torch.randn(3, generator=g))
        logits = 3 * torch.randn(33, (2 + streams) * streams, generator=g)
        fast = kernels.hyper_mix(logits, connection.scale, connection.base, streams, 20, 1e-6)
        for got, want in zip(fast, connection.mix(logits), strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_every_way_to_attend_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask or gathered entries, expanded or absorbed, large blocks or small: choices for speed and memory only."""
    config = config_of(family, seed=3)
    model = model_of(config)
    ids = oracle.tokens(6, 320, config.vocab_size)

    def logits() -> Tensor:
        cache = Cache(CacheSpec.of(config, torch.float32), sequences=1, pages=3)
        sequence = cache.open()
        with torch.no_grad():
            first = model(ids[:250], Batch.of([(0, 250, sequence)]), cache).logits
            return torch.cat([first, model(ids[250:], Batch.of([(250, 70, sequence)]), cache).logits])

    usual = logits()
    monkeypatch.setattr(latent, "_EXPANDED_MAX", 0)
    monkeypatch.setattr(hybrid, "_GATHER_FROM", 1)
    assert float((logits() - usual).abs().max()) <= 2e-5
    for module in (latent, hybrid):
        monkeypatch.setattr(module, "SCORES_MAX", 1 << 14)
        monkeypatch.setattr(module, "CHOICES_MAX", 1 << 12)
    assert float((logits() - usual).abs().max()) <= 2e-5


def test_noise_comes_from_the_callers_generator() -> None:
    config = config_of("v4")
    layers = [replace(layer, ffn=replace(layer.ffn, noise=1.0, hashed=False)) for layer in config.layers]
    model = model_of(replace(config, layers=tuple(layers))).train()
    ids, batch = oracle.tokens(7, 50, config.vocab_size), Batch.of([(0, 50)])

    def choices(seed: int) -> Tensor:
        out = model(ids, batch, generator=torch.Generator().manual_seed(seed))
        return torch.stack([routing.experts_TK for routing in out.aux.routing.values()])

    assert torch.equal(choices(1), choices(1)) and not torch.equal(choices(1), choices(2))
    with pytest.raises(ConfigError, match="noise needs a generator"):
        model(ids, batch)


def test_reset_parameters_leaves_no_memory_as_it_was() -> None:
    config = config_of("v4", seed=2)
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(77)
    model.reset_parameters(torch.Generator().manual_seed(0))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not bool((tensor == 77).all()), name


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_mtp_layers_have_a_cache_of_their_own(family: str) -> None:
    config = config_of(family, mtp=True)
    model = model_of(config)
    ids = oracle.tokens(8, 200, config.vocab_size)
    count = len(config.layers)
    spec = CacheSpec.of(config, torch.float32, layers=range(count, count + 1))
    assert not any(spec.layers[:count]) and spec.layers[count]
    cache = Cache(spec, sequences=1, pages=2)
    sequence = cache.open()
    with torch.no_grad():
        residual = model(ids[:-1], Batch.of([(0, 199)])).residual
        want = model.predict(0, residual, ids[1:], Batch.of([(0, 199)])).logits
        got, at = [], 0
        for n in (150, 1, 1, 40, *[1] * 7):
            batch = Batch.of([(at, n, sequence)])
            got.append(model.predict(0, residual[at : at + n], ids[at + 1 : at + n + 1], batch, cache).logits)
            at += n
    assert float((torch.cat(got) - want).abs().max()) <= 2e-5
