"""Optimizers, schedules and clipping, against formulas written another way, and torch's own where it has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embertrain.errors import ConfigError
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.optim import Muon, OptimConfig, ScheduleConfig, build, clip, gradient_norm, lr, orthogonalise, set_lr
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _micro(name: str = "micro") -> Model:
    model = Model(preset(name))
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


def _train(model: Model, optimizers: list[torch.optim.Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 256, (161,), generator=torch.Generator().manual_seed(step))
        loss, _ = model.loss(ids[:-1], ids[1:], Batch.of([(0, 160)]))
        loss.backward()
        clip(model, 1.0)
        set_lr(optimizers, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- the iteration


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16), (1, 5)])
def test_the_result_is_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    x = _random(3, *shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalise(x), u @ vh, atol=2e-3, rtol=0)


def test_small_singular_values_come_to_one_and_zeros_stay() -> None:
    u, _, vh = torch.linalg.svd(_random(8, 8))
    values = torch.tensor([1.0, 0.3, 1e-1, 1e-2, 1e-3, 2e-4, 0.0, 0.0])
    out = orthogonalise((u @ values.diag() @ vh)[None])[0]
    torch.testing.assert_close(torch.linalg.svdvals(out)[:6], torch.ones(6), atol=0.01, rtol=0)
    assert torch.linalg.svdvals(out)[6:].max() < 0.02
    assert orthogonalise(torch.zeros(1, 4, 6)).equal(torch.zeros(1, 4, 6))


def test_the_size_of_a_gradient_does_not_matter() -> None:
    x = _random(2, 6, 9)
    torch.testing.assert_close(orthogonalise(x * 1e-15), orthogonalise(x))


# ---- Muon


def _step(parameter: nn.Parameter, **options: Any) -> None:
    optimizer = Muon([{"params": [parameter], **options.pop("group", {})}], **options)
    for seed in range(3):
        parameter.grad = _random(*parameter.shape, seed=seed)
        optimizer.step()


def test_the_update_is_the_published_one() -> None:
    weight = nn.Parameter(_random(20, 12, seed=9))
    expected, momentum = weight.detach().double(), torch.zeros(20, 12, dtype=torch.float64)
    for seed in range(3):
        grad = _random(20, 12, seed=seed).double()
        momentum = 0.95 * momentum + grad
        u, _, vh = torch.linalg.svd(grad + 0.95 * momentum, full_matrices=False)
        expected = expected - 0.02 * (0.1 * expected + 0.18 * math.sqrt(20) * (u @ vh))
    _step(weight, lr=0.02)
    torch.testing.assert_close(weight.detach(), expected.float(), atol=2e-4, rtol=0)


def test_an_update_of_full_rank_has_the_root_mean_square_asked_for() -> None:
    weight = nn.Parameter(torch.zeros(40, 16))
    weight.grad = _random(40, 16)
    Muon([weight], lr=1.0, rms=0.18).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.18, rel=2e-3)
    values = torch.linalg.svdvals(weight.detach()) / (0.18 * math.sqrt(40))
    torch.testing.assert_close(values, torch.ones(16), atol=5e-3, rtol=0)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_it_is_torch_s_with_its_coefficients(shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(_random(*shape, seed=7)), nn.Parameter(_random(*shape, seed=7))
    before = ours.detach().clone()
    _step(ours, lr=0.02, rms=0.2, steps=[(3.4445, -4.7750, 2.0315)] * 5, dtype=torch.bfloat16)
    optimizer = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        theirs.grad = _random(*shape, seed=seed)
        optimizer.step()
    moved = theirs.detach() - before
    assert (ours.detach() - theirs.detach()).norm() < 0.03 * moved.norm()  # They differ in where bf16 rounds.


def test_matrices_of_a_stack_are_worked_on_alone() -> None:
    stack = nn.Parameter(torch.zeros(3, 10, 8))
    stack.grad = _random(3, 10, 8)
    Muon([{"params": [stack], "parts": 2}], lr=1.0).step()
    for e in range(3):
        for part in (slice(0, 5), slice(5, 10)):
            single = nn.Parameter(torch.zeros(5, 8))
            single.grad = _random(3, 10, 8)[e, part].clone()
            Muon([single], lr=1.0).step()
            torch.testing.assert_close(stack.detach()[e, part], single.detach(), atol=1e-5, rtol=0)


def test_large_stacks_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (nn.Parameter(torch.zeros(5, 6, 4)) for _ in range(2))
    _step(whole)
    monkeypatch.setattr("embertrain.optim.muon._NUMBERS_MAX", 50)
    _step(cut)
    torch.testing.assert_close(cut.detach(), whole.detach(), atol=1e-6, rtol=0)


# ---- of a model


@pytest.mark.parametrize("name", ["micro", "micro-v3"])
def test_every_parameter_has_one_optimizer(name: str) -> None:
    model = _micro(name)
    optimizers = build(model, OptimConfig())
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    muon, adamw = optimizers
    matrices = {p for g in muon.param_groups for p in g["params"]}
    decaying = set(adamw.param_groups[0]["params"])
    for path, parameter in model.named_parameters():
        last = path.rsplit(".", 1)[-1]
        if path in ("embed.weight", "head.weight"):
            assert parameter in decaying
        elif "norm" in path or last in ("sink", "ape", "base", "scale"):
            assert parameter not in matrices | decaying, path
        else:
            assert parameter in matrices, path


def test_gate_and_up_and_each_group_are_matrices_of_their_own() -> None:
    model = _micro()
    muon = build(model, OptimConfig())[0]
    parts = {p: g["parts"] for g in muon.param_groups for p in g["params"]}
    layer = model.layers["1"]
    assert parts[layer.ffn.experts.w13] == 2
    assert parts[layer.ffn.experts.w2] == 1
    assert parts[layer.attn.wo_a.weight] == 2
    assert parts[layer.attn.wo_b.weight] == 1


def test_frozen_parameters_have_none() -> None:
    model = _micro()
    model.embed.requires_grad_(False)
    held = {p for o in build(model, OptimConfig()) for g in o.param_groups for p in g["params"]}
    assert model.embed.weight not in held
    assert model.head.weight in held


def test_adamw_for_all_is_torch_s() -> None:
    ours, theirs = _micro(), _micro()
    optimizers = build(ours, OptimConfig(kind="adamw"))
    assert [type(o) for o in optimizers] == [torch.optim.AdamW]
    matrices = [p for n, p in theirs.named_parameters() if p.dim() > 1 and not n.endswith(".ape")]
    rest = [p for n, p in theirs.named_parameters() if p.dim() < 2 or n.endswith(".ape")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    for group in groups:
        group["lr_scale"] = 1.0
    reference: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    assert _train(ours, optimizers, range(3)) == _train(theirs, reference, range(3))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_model_learns_and_learns_the_same_twice(kind: Any) -> None:
    runs = []
    for _ in range(2):
        model = _micro()
        optimizers = build(model, OptimConfig(kind=kind))
        ids = torch.arange(161) * 7 % 256
        for _ in range(12):
            set_lr(optimizers, 1e-2)
            loss, _ = model.loss(ids[:-1], ids[1:], Batch.of([(0, 160)]))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] < 5.0 < math.log(256)
    assert runs[0][0] == runs[1][0]
    assert all(a.equal(b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_run_goes_on_from_its_state_bit_for_bit() -> None:
    model = _micro()
    optimizers = build(model, OptimConfig())
    _train(model, optimizers, range(2))
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    state = get_optimizer_state_dict(model, optimizers)
    assert any(name.startswith("layers.1.ffn.experts") for name in state["state"])
    state = _cloned(state)
    expected = _train(model, optimizers, range(2, 5))

    other = _micro()
    other.load_state_dict(weights)
    others = build(other, OptimConfig())
    set_optimizer_state_dict(other, others, state)
    assert _train(other, others, range(2, 5)) == expected
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert a.equal(b)


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _cloned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cloned(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sgd"},
        {"weight_decay": -0.1},
        {"momentum": 1.0},
        {"update_rms": 0.0},
        {"precision": "float16"},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"adamw_lr_scale": 0.0},
    ],
)
def test_a_wrong_field_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OptimConfig(**wrong)


# ---- clipping


def test_the_norm_is_that_of_all_gradients_and_is_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    for seed, parameter in enumerate(model.parameters()):
        parameter.grad = _random(*parameter.shape, seed=seed)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert clip(model, 0.5).item() == pytest.approx(whole.norm().item(), rel=1e-6)
    assert gradient_norm(model).item() == pytest.approx(0.5, rel=1e-6)
    again = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip(model, 0.51)
    assert all(a.equal(b.grad) for a, b in zip(again, model.parameters(), strict=True) if b.grad is not None)


def test_no_gradients_and_gradients_of_zero_have_norm_zero() -> None:
    layer = nn.Linear(3, 3)
    assert clip(layer, 1.0).item() == 0.0
    layer.weight.grad = torch.zeros(3, 3)
    assert clip(layer, 1.0).item() == 0.0
    assert layer.weight.grad.equal(torch.zeros(3, 3))


def test_a_norm_that_is_not_finite_is_told() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.grad = torch.full((3, 3), torch.nan)
    assert not torch.isfinite(clip(layer, 1.0))


# ---- schedules


def test_cosine_goes_up_to_the_peak_and_down_to_the_floor() -> None:
    config = ScheduleConfig(lr=2.0, steps=110, warmup_steps=10, floor=0.1)
    assert lr(config, 0) == pytest.approx(0.2)
    assert lr(config, 9) == lr(config, 10) == 2.0
    assert lr(config, 60) == pytest.approx(2.0 * 0.55)
    assert lr(config, 35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert lr(config, 110) == lr(config, 1000) == pytest.approx(0.2)
    rates = [lr(config, step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_wsd_stays_at_the_peak_and_then_falls(decay: Any, half: float) -> None:
    config = ScheduleConfig(lr=1.0, steps=100, warmup_steps=5, floor=0.0, kind="wsd", decay_steps=20, decay=decay)
    assert {lr(config, step) for step in range(4, 81)} == {1.0}
    assert lr(config, 90) == pytest.approx(half)
    assert 0 < lr(config, 99) < 0.06
    assert lr(config, 100) == 0.0


def test_a_constant_rate_has_a_warm_up_too() -> None:
    config = ScheduleConfig(lr=3.0, steps=10, warmup_steps=2, kind="constant")
    assert [lr(config, step) for step in (0, 1, 9, 50)] == [1.5, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"steps": 0},
        {"warmup_steps": 11},
        {"floor": 1.5},
        {"kind": "linear"},
        {"kind": "wsd", "decay_steps": 11},
        {"decay": "exp"},
        {"decay_steps": 3},
    ],
)
def test_a_wrong_schedule_is_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        ScheduleConfig(**({"lr": 1.0, "steps": 10} | wrong))
