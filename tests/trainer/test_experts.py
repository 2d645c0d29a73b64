"""The experts and the whole mixture, against a naive loop and against transformers. Run: pytest
tests/trainer/test_experts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embertrain.model.batch import Batch
from embertrain.model.config import Dropping, Mixture
from embertrain.model.dispatch import LocalDispatcher, from_padded, to_padded
from embertrain.model.experts import Experts, Part
from embertrain.model.moe import MoE
from embertrain.model.router import Routing
from torch import Tensor

from . import oracle

H, V = 32, 60


def mixture(seed: int = 0, **options: Any) -> MoE:
    moe = MoE(Mixture(**{"experts": 8, "top_k": 3, "inner_size": 16, "swiglu_limit": 0.5, **options}), H, V)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in moe.named_parameters():
            p.normal_(0, (1.0 if "w13" in name else 0.3), generator=g)
        if moe.gate.spec.hashed:
            moe.gate.reset_table(g)
        else:
            moe.gate.bias.normal_(0, 0.1, generator=g)
    return moe


def inputs(T: int = 70, seed: int = 1) -> tuple[Tensor, Tensor, Batch]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=g), torch.randint(0, V, (T,), generator=g), Batch.of([(0, T)])


def naive(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for t, row in enumerate(x):
        y = moe.shared(row[None])[0] if moe.shared else torch.zeros(H)
        for e, weight in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            if e < 0:
                continue
            gate, up = (moe.experts.w13[e] @ row).chunk(2)
            limit = moe.gate.spec.swiglu_limit
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y = y + weight * (moe.experts.w2[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swiglu_limit": None, "shared": 0, "experts": 40},
        {"hashed": True, "scale": 1.5},
        {"scoring": "sigmoid", "groups": 4, "groups_kept": 2, "shared": 2},
        {"scoring": "softmax", "normalise": False, "top_p": 0.5},
        {"dropping": Dropping(capacity_factor=0.5)},
    ],
    ids=lambda options: "-".join(options) or "published",
)
def test_outputs_and_gradients_against_a_naive_loop(options: dict[str, Any]) -> None:
    moe = mixture(**options)
    x, ids, batch = inputs()
    x.requires_grad_()
    y, routing = moe(x, ids, batch)
    expected = naive(moe, x, routing)
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
    wanted = [x, *moe.parameters()]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    for mine, his in zip(got, torch.autograd.grad(expected, wanted, grad), strict=True):
        assert float((mine - his).norm()) <= 1e-5 * float(his.norm())


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("limit", [10.0, 0.5])
def test_the_block_of_v4_is_transformers(hashed: bool, limit: float) -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    config = DeepseekV4Config(
        vocab_size=V, hidden_size=H, moe_intermediate_size=16, num_experts_per_tok=3, n_routed_experts=8,
        routed_scaling_factor=1.5, swiglu_limit=limit, num_hidden_layers=1,
        layer_types=["sliding_attention"], mlp_layer_types=["hash_moe" if hashed else "moe"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV4SparseMoeBlock(config, 0)
    theirs.shared_experts.limit = float("inf")  # As published: the shared expert has no limit.
    ours = mixture(scale=1.5, swiglu_limit=limit, hashed=hashed)
    same_as_transformers(ours, theirs, lambda x, ids: theirs(x, ids))


@pytest.mark.parametrize("version", ["v3", "v32"])
def test_the_block_of_v3_is_transformers(version: str) -> None:
    from transformers import DeepseekV3Config, DeepseekV32Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32MoE

    config = (DeepseekV3Config if version == "v3" else DeepseekV32Config)(
        hidden_size=H, moe_intermediate_size=16, num_experts_per_tok=3, n_routed_experts=8, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = (DeepseekV3MoE if version == "v3" else DeepseekV32MoE)(config)
    ours = mixture(scoring="sigmoid", scale=2.5, groups=4, groups_kept=2, shared=2, swiglu_limit=None)
    same_as_transformers(ours, theirs, lambda x, ids: theirs(x))


def same_as_transformers(ours: MoE, theirs: Any, call: Any) -> None:
    names = {"gate.bias": "gate.e_score_correction_bias", "experts.w13": "experts.gate_up_proj",
             "experts.w2": "experts.down_proj", "shared.w1.weight": "shared_experts.gate_proj.weight",
             "shared.w3.weight": "shared_experts.up_proj.weight",
             "shared.w2.weight": "shared_experts.down_proj.weight"}  # fmt: skip
    state = {names.get(name, name): t for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x, ids, batch = inputs()
    x.requires_grad_()
    y, _ = ours(x, ids, batch)
    expected = call(x[None], ids[None])[0]
    assert float((y - expected).detach().abs().max()) <= 2e-5 * max(1.0, float(expected.detach().std()))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    mine, x.grad = x.grad, None
    expected.backward(grad)
    assert float((mine - x.grad).norm()) <= 1e-5 * float(x.grad.norm())
    others = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        his = others[names.get(name, name)].grad
        assert float((p.grad - his).norm()) <= 1e-5 * float(his.norm()), name


def test_the_padded_form_is_the_same() -> None:
    moe = mixture()
    x, ids, batch = inputs()
    sent = LocalDispatcher().dispatch(x, moe.route(x, ids, batch))
    rows = to_padded(sent.rows_RH, sent.counts)
    torch.testing.assert_close(
        from_padded(moe.experts.padded(rows), sent.counts), moe.experts(sent.rows_RH, sent.counts)
    )


def test_a_physical_place_is_where_the_weights_are() -> None:
    moe, other = mixture(), mixture()
    physical = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.experts.w13[physical] = moe.experts.w13
        other.experts.w2[physical] = moe.experts.w2
    x, ids, batch = inputs()
    y, _ = moe(x, ids, batch)
    again, _ = other(x, ids, batch, dispatcher=LocalDispatcher(physical))
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    moe = MoE(Mixture(experts=8, top_k=3, inner_size=64, swiglu_limit=10.0), 128, V)
    oracle.randomise(moe, 0)
    moe.eval()
    for module in moe.modules():
        if hasattr(module, "pad_rows"):
            module.pad_rows = 8
    moe.experts.to(dtype)
    moe.shared.to(dtype)
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(200, 128, generator=g).to(dtype), torch.zeros(200, dtype=torch.int64)
    with torch.no_grad():
        whole, _ = moe(x, ids, Batch.of([(0, 200)]))
        for start, stop in ((0, 1), (3, 10), (50, 91), (120, 200)):
            part, _ = moe(x[start:stop], ids[start:stop], Batch.of([(0, stop - start)]))
            assert torch.equal(part, whole[start:stop])


def test_two_runs_have_the_same_bits() -> None:
    moe = mixture()
    x, ids, batch = inputs()
    x.requires_grad_()
    runs = []
    for _ in range(2):
        y, _ = moe(x, ids, batch)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_experts_without_rows_have_no_gradient() -> None:
    experts = Experts(Mixture(experts=3, top_k=1, inner_size=8), H)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
    experts(torch.randn(5, H), (0, 5, 0)).sum().backward()
    for p in experts.parameters():
        assert p.grad[1].any() and not p.grad[0].any() and not p.grad[2].any()


def test_parts_without_rows_cost_nothing_and_change_nothing() -> None:
    experts, g = mixture().experts, torch.Generator().manual_seed(3)
    rows, empty = torch.randn(9, H, generator=g), Part((0,) * 8, 0)
    full = Part((3, 0, 2, 0, 0, 4, 0, 0), 4)

    def run(rows: Tensor, parts: list[Part]) -> tuple[Tensor, Tensor | None]:
        experts.w13.grad = None
        y = experts(rows, tuple(map(sum, zip(*(part.counts for part in parts), strict=True))), parts)
        y.square().sum().backward()
        return y, experts.w13.grad

    expected, grad = run(rows, [full])
    y, other = run(rows, [empty, full, empty])
    assert torch.equal(y, expected) and grad is not None and other is not None and torch.equal(other, grad)
    y, other = run(rows[:0], [empty, empty])
    assert y.shape == (0, H) and other is not None and not other.any()
