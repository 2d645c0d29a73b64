"""What indexers are taught, against the definition computed row by row; who learns from it, and that it helps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from embertrain.model import hybrid
from embertrain.model.batch import Batch
from embertrain.model.config import Hybrid, Latent, ModelConfig
from embertrain.model.lesson import Lessons, divergence
from embertrain.model.model import Model
from embertrain.model.presets import preset
from torch import Tensor

from . import oracle

COUNT = 200
TOP_K = 16


def shape_of(family: str) -> ModelConfig:
    """In miniature, with an index that has to choose."""
    shape = preset("micro-v3.2" if family == "v32" else "micro")

    def chosen(layer: Any) -> Any:
        attention = layer.attention
        if attention.index is None:
            return layer
        return replace(layer, attention=replace(attention, index=replace(attention.index, top_k=TOP_K)))

    return replace(shape, layers=tuple(map(chosen, shape.layers)), mtp=tuple(map(chosen, shape.mtp)))


def model_of(family: str) -> Model:
    model = Model(shape_of(family))
    oracle.randomise(model, 1)
    return model


def indexed(model: Model) -> list[int]:
    return [int(name) for name, block in model.layers.items() if block.attn.indexer is not None]


def indexer_weights(model: Model) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".indexer." in name and not name.startswith("mtp.")}


def by_hand(attention: Any, x_TH: Tensor, dense: bool) -> float:
    """The loss of one document's queries, one by one, from a layer's normalised input."""
    spec, indexer = attention.spec, attention.indexer
    from embertrain.model.rope import Angles, rotate

    angles = Angles(torch.arange(COUNT))
    turns = angles.tokens(spec.rope)
    batch = Batch.of([(0, COUNT)])
    low = attention.q_norm(attention.wq_a(x_TH))
    q = attention.wq_b(low).unflatten(-1, (spec.heads, -1))
    if isinstance(spec, Latent):
        q = rotate(q, turns)
        latent, key = attention.wkv_a(x_TH).split([spec.kv_rank, spec.rope.dim], -1)
        k_HND, _ = attention._expand(torch.cat([attention.kv_norm(latent), rotate(key, turns)], -1))
        index_keys = indexer.keys(x_TH, turns)
    else:
        assert isinstance(spec, Hybrid)
        from embertrain.cache.step import Fresh
        from embertrain.model.norm import rms

        rows, segment = Fresh(batch), batch.segments[0]
        q = rotate(rms(q, attention.eps), turns)
        kv = rotate(attention.kv_norm(attention.wkv(x_TH)), turns)
        entries = attention.compressor.append(rows, 0, segment, attention.compressor.state(x_TH), angles)
        index_keys = indexer.compressor.append(rows, 0, segment, indexer.compressor.state(x_TH), angles)
    scores_TN = indexer.scores(indexer.queries(low, turns), indexer.weights(x_TH), index_keys)
    total = 0.0
    for t in range(COUNT):
        if isinstance(spec, Latent):
            count = t + 1
            logits = torch.stack([k_HND[h, :count] @ q[t, h] for h in range(spec.heads)]) * spec.scale
            before = torch.empty(spec.heads, 0)
        else:
            count = (t + 1) // spec.ratio
            logits = q[t] @ entries[:count].T * spec.scale
            near = q[t] @ kv[max(0, t - spec.window + 1) : t + 1].T * spec.scale
            before = torch.cat([attention.sink[:, None], near], 1)
        if count == 0:
            continue
        seen = range(count) if dense else scores_TN[t, :count].topk(min(TOP_K, count)).indices.sort().values.tolist()
        p_HN = torch.cat([before, logits[:, list(seen)]], 1).softmax(-1)[:, before.shape[1] :]
        p = p_HN.sum(0) / p_HN.sum()
        total += float((p * (p.log() - scores_TN[t, list(seen)].log_softmax(-1))).sum())
    return total


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("family", ["v32", "v4", "v4 gathering"])
def test_lessons_are_the_definition(family: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "v4 gathering":
        monkeypatch.setattr(hybrid, "_GATHER_FROM", 1)
    model = model_of(family.split()[0])
    inputs: dict[int, Tensor] = {}
    for layer in indexed(model):
        attention = model.layers[str(layer)].attn
        attention.register_forward_pre_hook(lambda module, args: inputs.update({module.layer: args[0]}))
    lessons = Lessons(dense=dense)
    with torch.no_grad():
        out = model(oracle.tokens(1, COUNT, 256), Batch.of([(0, COUNT)]), lessons=lessons)
        assert list(out.aux.index_losses) == indexed(model)
        for layer, loss in out.aux.index_losses.items():
            expected = by_hand(model.layers[str(layer)].attn, inputs[layer], dense)
            assert expected > 1
            assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["v32", "v4"])
def test_only_indexers_learn_and_only_from_lessons(family: str) -> None:
    model = model_of(family)
    ids, batch = oracle.tokens(2, COUNT, 256), Batch.of([(0, 60), (0, COUNT - 60)])
    out = model(ids, batch, lessons=Lessons(dense=False))
    torch.stack(list(out.aux.index_losses.values())).sum().backward(retain_graph=True)
    taught = {name for name, p in model.named_parameters() if p.grad is not None}
    assert taught == set(indexer_weights(model))
    assert all(float(p.grad.abs().max()) > 0 for p in indexer_weights(model).values() if p.grad is not None)
    model.zero_grad()
    out.logits.square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(moved) > 40 and not moved & set(indexer_weights(model))


@pytest.mark.parametrize("family", ["v32", "v4"])
def test_sparse_lessons_change_no_logits_and_dense_ones_see_all(family: str) -> None:
    model = model_of(family)
    ids, batch = oracle.tokens(3, COUNT, 256), Batch.of([(0, COUNT)])
    with torch.no_grad():
        plain = model(ids, batch).logits
        torch.testing.assert_close(model(ids, batch, lessons=Lessons(dense=False)).logits, plain)
        dense = model(ids, batch, lessons=Lessons(dense=True)).logits
        assert float((dense - plain).abs().max()) > 1e-3
        for block in model.layers.values():
            if block.attn.indexer is not None:
                index = block.attn.indexer
                index.spec = replace(index.spec, top_k=COUNT)
        torch.testing.assert_close(model(ids, batch).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["v32", "v4"])
def test_taught_indexers_choose_what_attention_looks_at(family: str) -> None:
    """Lessons alone: the loss falls, and so does what attention loses by seeing the chosen rows only."""
    model = model_of(family)
    ids, batch = oracle.tokens(4, COUNT, 256), Batch.of([(0, COUNT)])

    def lost() -> float:
        with torch.no_grad():
            dense = model(ids, batch, lessons=Lessons(dense=True)).residual
            return float((model(ids, batch).residual - dense).norm() / dense.norm())

    before = lost()
    optimizer = torch.optim.AdamW(indexer_weights(model).values(), lr=3e-3)
    losses = []
    for _ in range(25):
        out = model(ids, batch, lessons=Lessons(dense=True))
        loss = torch.stack(list(out.aux.index_losses.values())).sum() / COUNT
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{family}: KL {losses[0]:.3f} -> {losses[-1]:.3f}, lost {before:.4f} -> {lost():.4f}")
    assert losses[-1] < 0.7 * losses[0]
    assert lost() < before


def test_a_query_that_sees_nothing_teaches_nothing() -> None:
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    shares = torch.tensor([[0.25, 0.75, 0, 0], [0.0] * 4, [1.0, 0, 0, 0]])
    loss = divergence(shares, scores, seen)
    (grad,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(grad).all() and not grad[1].any() and not grad[0, 2:].any()
    first = torch.nn.functional.kl_div(scores[0, :2].log_softmax(-1), shares[0, :2], reduction="sum")
    torch.testing.assert_close(loss, first - scores[2].log_softmax(-1)[0])
