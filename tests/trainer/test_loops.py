"""The loops in C against the torch versions that they stand for, in both types, of each generation that runs here."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from embertrain import kernels
from embertrain.cache import Cache, CacheSpec
from embertrain.kernels import few, grouped, hyper, library
from embertrain.model import attend as torch_attend
from embertrain.model.batch import Batch
from embertrain.model.config import Hyper, Mixture
from embertrain.model.experts import Experts, Shared
from embertrain.model.hyper import HyperConnection
from embertrain.model.hyper import expand as torch_expand
from embertrain.model.model import Model
from embertrain.model.norm import RMSNorm
from embertrain.model.rope import rotate
from embertrain.model.router import Router
from torch import Tensor

from . import oracle

pytestmark = pytest.mark.skipif(kernels.native is None, reason="the C part was not built")

ORDER = ("any", "v3", "v4", "v4-bf16")
HERE = ORDER[: ORDER.index(library.generation()) + 1]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""How far two results may be apart, in units of the largest number."""


@pytest.fixture(params=HERE, autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.load(request.param)
    assert built is not None
    for module in (few, grouped, hyper, library):
        monkeypatch.setattr(module, "native", built)
    # Where torch multiplies bf16 numbers fast, loops are for fewer rows.
    monkeypatch.setattr(library, "AVX512", False)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls what it is given with no loops at hand."""

    def call(function: Any, *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(library, "native", None)
            return function(*args, **options)

    return call


def random_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    most = float(theirs.abs().max())
    assert float((ours.double() - theirs.double()).abs().max()) <= CLOSE[ours.dtype] * max(most, 1e-6)


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


TYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])


@TYPES
def test_products_of_any_few_rows(dtype: torch.dtype) -> None:
    for rows, (inner, out) in itertools.product((1, 2, 3, 4, 5, 8, 9, 16, 33), ((32, 1), (64, 7), (512, 33))):
        x = random_of(rows, rows, inner, dtype=dtype)
        weight = random_of(inner, out, inner, dtype=dtype)
        assert kernels.loops_for_few(x, weight) or rows > kernels.FEW
        assert_close(kernels.product(x, weight), (x.double() @ weight.double().t()).to(dtype))


@TYPES
def test_products_by_group_of_strided_rows(dtype: torch.dtype) -> None:
    x = random_of(1, 5, 3, 96, dtype=dtype)[..., 32:]
    weight = random_of(2, 3, 20, 64, dtype=dtype)
    expected = torch.einsum("tgi,goi->tgo", x.double(), weight.double()).to(dtype)
    assert_close(kernels.product_by_group(x, weight), expected)


@TYPES
def test_the_number_of_threads_does_not_show(dtype: torch.dtype) -> None:
    for out in (1024, 66):
        x, weight = random_of(1, 7, 512, dtype=dtype), random_of(2, out, 512, dtype=dtype)
        alone = kernels.product(x, weight)
        with two_threads():
            together = kernels.product(x, weight)
        assert torch.equal(alone, together)


def test_what_the_loops_cannot_take_is_left_to_torch() -> None:
    weight = random_of(1, 8, 64)
    assert not kernels.loops_for_few(random_of(2, kernels.FEW + 1, 64), weight)
    assert not kernels.loops_for_experts(random_of(2, 1025, 64), weight[:4, None], 4)
    assert not kernels.loops_for_few(random_of(2, 2, 48), random_of(1, 8, 48))
    assert not kernels.loops_for_few(random_of(2, 2, 64, dtype=torch.float64), weight.double())
    assert not kernels.loops_for_few(random_of(2, 2, 64, dtype=torch.bfloat16), weight)
    with torch.enable_grad():
        assert not kernels.loops_for_few(random_of(2, 2, 64), weight)
    rows, weights = random_of(3, library.GROUP_ROWS + 2, 64), random_of(4, 2, 32, 64)
    assert kernels.loops_for_groups(rows, weights, (2, library.GROUP_ROWS))
    assert not kernels.loops_for_groups(rows, weights, (1, library.GROUP_ROWS + 1))
    assert not kernels.loops_for_groups(rows, weights[:, :24].contiguous(), (2, library.GROUP_ROWS))
    assert not kernels.loops_for_groups(rows, random_of(4, 2, 64, 64)[:, :32], (2, library.GROUP_ROWS))


@TYPES
def test_where_torch_is_fast_loops_are_for_fewer_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "AVX512", True)
    monkeypatch.setattr(library, "MULTIPLIES_PAIRS", False)
    weight, weights = random_of(1, 32, 64, dtype=dtype), random_of(4, 2, 32, 64, dtype=dtype)
    assert kernels.loops_for_few(random_of(2, library.FEW, 64, dtype=dtype), weight)
    assert not kernels.loops_for_few(random_of(2, library.FEW + 1, 64, dtype=dtype), weight)
    many = random_of(2, library.FEW + 1, 64, dtype=dtype)
    for takes in (kernels.loops_for_experts(many, weights, 2), kernels.loops_for_groups(many, weights, (len(many), 0))):
        assert takes == (dtype == torch.float32)
    monkeypatch.setattr(library, "MULTIPLIES_PAIRS", True)
    assert kernels.loops_for_experts(many, weights, 2) and kernels.loops_for_groups(many, weights, (len(many), 0))
    assert kernels.loops_for_groups(many, weights, (len(many), 0), gradient=True) == (dtype == torch.float32)


@TYPES
def test_norms_and_turns(dtype: torch.dtype, reference: Any) -> None:
    x = random_of(1, 3, 5, 64, dtype=dtype)
    turns = torch.polar(torch.ones(3, 8), random_of(2, 3, 8))
    norm = RMSNorm(64, 1e-6)
    norm.weight.copy_(random_of(3, 64))
    for args in ((x,), (x, turns)):
        assert_close(norm(*args), reference(norm, *args))
    assert_close(rotate(x, turns), reference(rotate, x, turns))
    assert_close(rotate(rotate(x, turns), turns, back=True), x)
    assert torch.equal(norm(x)[1:2], norm(x[1:2])), "a row's bits depend on the rows beside it"


@TYPES
@pytest.mark.parametrize("heads", [1, 3, 4, 7, 8, 13])
def test_attention_over_one_pool_and_two(dtype: torch.dtype, heads: int) -> None:
    pool, extra = random_of(1, 40, 96, dtype=dtype), random_of(2, 50, 96, dtype=dtype)
    rng = random.Random(heads)
    slots = torch.tensor([[rng.randrange(20) for _ in range(13)] for _ in range(3)])
    slots[0, 5] = slots[2, :4] = -1
    more = torch.tensor([[rng.randrange(30) for _ in range(21)] for _ in range(3)])
    more[1, 7:] = -1
    pool[20:] = extra[30:] = float("nan")  # Nobody's rows: they change nothing.
    q = random_of(3, 3, heads, 96, dtype=dtype)
    sink = random_of(4, heads)
    for far, width, with_sink in itertools.product((None, (extra, more)), (96, 64), (None, sink)):
        got = kernels.attend(q, (pool, slots), far, scale=0.3, value_width=width, sink_H=with_sink)
        expected, _ = torch_attend.attend(
            *(q.double(), pool.double(), slots),
            scale=0.3,
            value_width=width,
            extra_pool=None if far is None else far[0].double(),
            extra_indices=None if far is None else far[1],
            sink_H=with_sink,
        )
        assert_close(got, expected.to(dtype))
        first = None if far is None else (far[0], far[1][:1])
        alone = kernels.attend(q[:1], (pool, slots[:1]), first, scale=0.3, value_width=width, sink_H=with_sink)
        assert torch.equal(alone, got[:1]), "a query's bits depend on the queries beside it"


@pytest.mark.parametrize("heads", [2, 9])
def test_long_contexts_are_summed_in_pieces(heads: int) -> None:
    pool, rng = random_of(1, 200, 64), random.Random(heads)
    slots = torch.tensor([[rng.randrange(200) for _ in range(9000)] for _ in range(2)])
    slots[0, 4000:8500] = -1  # Nothing of some pieces in the middle,
    slots[1, :5000] = -1  # of the first ones,
    slots[:, 8999] = -1
    extra, more = random_of(2, 50, 64), torch.full((2, 4), -1)  # or of the other pool is seen.
    q, sink = random_of(3, 2, heads, 64), random_of(4, heads)
    options: dict[str, Any] = {"scale": 0.1, "value_width": 32, "sink_H": sink}
    got = kernels.attend(q, (pool, slots), (extra, more), **options)
    expected, _ = torch_attend.attend(q.double(), pool.double(), slots, **options)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())  # Thousands of sums.
    with two_threads():
        alone = kernels.attend(q[1:], (pool, slots[1:]), None, **options)
    assert torch.equal(alone, got[1:]), "a query's bits depend on threads or on the queries beside it"
    alone = kernels.attend(q[:1], (pool, slots[:1, :1500]), None, **options)  # Fewer pieces than threads have parts.
    with two_threads():
        assert torch.equal(kernels.attend(q[:1], (pool, slots[:1, :1500]), None, **options), alone)


def test_many_long_contexts_are_worked_through_in_turn() -> None:
    pool, slots = random_of(1, 200, 64), torch.arange(1100).remainder(200)[None].expand(600, -1)
    q = random_of(3, 600, 128, 64)  # Sums of all would be 75 MiB.
    options: dict[str, Any] = {"scale": 0.1, "value_width": 64, "sink_H": None}
    got = kernels.attend(q, (pool, slots.contiguous()), None, **options)
    for i in (0, 300, 599):
        assert torch.equal(kernels.attend(q[i : i + 1], (pool, slots[:1]), None, **options), got[i : i + 1])


def test_a_softmax_of_extreme_scores_is_exact() -> None:
    pool = torch.zeros(4, 32)
    pool[:, 0] = torch.tensor([0.0, -200.0, 90.0, 90.0])
    pool[:, 1] = torch.tensor([1.0, 2.0, 3.0, 5.0])
    q = torch.zeros(1, 1, 32)
    q[..., 0] = 1.0
    out = kernels.attend(q, (pool, torch.arange(4)[None]), None, scale=1.0, value_width=32, sink_H=None)
    assert float(out[0, 0, 1]) == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize(("count", "k"), [(5000, 300), (700, 1), (40, 64)])
def test_the_highest_scores_are_chosen(count: int, k: int, reference: Any) -> None:
    scores = random_of(1, 8, count)
    scores[1] = scores[1].round()  # Many are equal,
    scores[2] = 0.0
    scores[2, ::3] = -0.0  # zeros too,
    scores[3] = scores[3].abs() * 1e-40  # some hardly differ,
    scores[4, ::5] = torch.inf
    scores[5, ::2] = -torch.inf  # or are no numbers to add up.
    visible = torch.tensor([count, count - 3, count, count, count, count // 3, 1, 0])
    expected = reference(torch_attend.top_indices, scores, visible, k)
    assert torch.equal(kernels.choose(scores, visible, k), expected)
    with two_threads():
        assert torch.equal(kernels.choose(scores, visible, k), expected)


def mixture_of(**options: Any) -> Mixture:
    values: dict[str, Any] = {"experts": 8, "top_k": 3, "inner_size": 96, "shared": 1, "scoring": "sigmoid"}
    return Mixture(**(values | options))


@TYPES
@pytest.mark.parametrize("limit", [None, 0.5])
def test_experts_of_few_tokens(dtype: torch.dtype, limit: float | None, reference: Any) -> None:
    experts = Experts(mixture_of(swiglu_limit=limit), 64)
    experts.w13.copy_(random_of(1, *experts.w13.shape) / 8)
    experts.w2.copy_(random_of(2, *experts.w2.shape) / 8)
    experts.to(dtype)
    for tokens in (1, 2, 9, 50):
        x = random_of(tokens, tokens, 64, dtype=dtype)
        chosen = random_of(tokens + 1, tokens, 8).argsort(-1)[:, :3]
        chosen[0, 1] = -1
        weights = random_of(tokens + 2, tokens, 3).abs()
        got = experts.few(x, chosen, weights)
        assert got is not None
        expected = torch.zeros(tokens, 64, dtype=torch.float64)
        for t, k in itertools.product(range(tokens), range(3)):
            e = int(chosen[t, k])
            if e >= 0:
                counts = tuple(int(i == e) for i in range(8))
                expected[t] += reference(experts, x[t : t + 1], counts)[0].double() * float(weights[t, k])
        assert_close(got, expected.to(dtype))


@TYPES
@pytest.mark.parametrize("counts", [(0, 1, 8, 23, 0, 40), (0, 0), (70,)])
def test_rows_sorted_by_expert(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    R, E, inner, out = sum(counts), len(counts), 96, 64
    rows, grads = random_of(1, R, inner, dtype=dtype), random_of(2, R, out, dtype=dtype)
    weights = random_of(3, E, out, inner, dtype=dtype)
    parts = list(zip(rows.double().split(counts), grads.double().split(counts), weights.double(), strict=True))
    calls = {
        "product": (rows, weights, torch.cat([x @ w.t() for x, _, w in parts])),
        "input_gradient": (grads, weights, torch.cat([dy @ w for _, dy, w in parts])),
        "weight_gradient": (grads, rows, torch.stack([dy.t() @ x for x, dy, _ in parts])),
    }
    for name, (a, b, expected) in calls.items():
        function = getattr(kernels.grouped, name)
        got = function(a, b, counts)
        if R:
            assert_close(got, expected.to(dtype))
        else:
            assert torch.equal(got, expected.to(dtype))
        assert got.shape == expected.shape
        with two_threads():
            assert torch.equal(function(a, b, counts), got), "threads share columns, not sums"


@TYPES
def test_gradients_of_experts(dtype: torch.dtype, reference: Any) -> None:
    experts = Experts(mixture_of(swiglu_limit=0.5), 64)
    for i, parameter in enumerate(experts.parameters()):
        parameter.copy_(random_of(i, *parameter.shape) / 8)
    experts.to(dtype)
    counts = (0, 1, 8, 23, 0, 40, 2, 0)
    rows, grads = random_of(5, sum(counts), 64, dtype=dtype), random_of(6, sum(counts), 64, dtype=dtype)

    def results() -> list[Tensor]:
        with torch.enable_grad():
            x = rows.clone().requires_grad_()
            y = experts(x, counts)
            return [y.detach(), *torch.autograd.grad(y, [x, *experts.parameters()], grads)]

    assert kernels.loops_for_groups(rows, experts.w13, counts)
    for got, expected in zip(results(), reference(results), strict=True):
        assert_close(got, expected)


@TYPES
@pytest.mark.parametrize("limit", [None, 0.5])
def test_swiglu_of_rows_and_its_gradient(dtype: torch.dtype, limit: float | None) -> None:
    gate_up, grads = random_of(1, 37, 192, dtype=dtype) * 3, random_of(2, 37, 96, dtype=dtype)
    with torch.enable_grad():
        exact = gate_up.double().requires_grad_()
        gate, up = exact.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        y = torch.nn.functional.silu(gate) * up
        (gradient,) = torch.autograd.grad(y, exact, grads.double())
    assert_close(kernels.grouped.swiglu(gate_up, limit), y.detach().to(dtype))
    assert_close(kernels.grouped.swiglu_gradient(gate_up, grads, limit), gradient.to(dtype))
    gate_up[3, 5] = float("nan")
    assert bool(kernels.grouped.swiglu(gate_up, limit)[3, 5].isnan()), "NaN is not clamped away"


@TYPES
def test_the_shared_expert(dtype: torch.dtype, reference: Any) -> None:
    shared = Shared(64, 96)
    for i, parameter in enumerate(shared.parameters()):
        parameter.copy_(random_of(i, *parameter.shape) / 8)
    shared.to(dtype)
    x = random_of(9, 3, 64, dtype=dtype)
    assert_close(shared(x), reference(shared, x))


@TYPES
@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "sigmoid"},
        {"scoring": "softmax", "normalise": False},
        {"scoring": "sqrtsoftplus", "scale": 2.5},
        {"scoring": "sigmoid", "groups": 4, "groups_kept": 2},
        {"scoring": "sqrtsoftplus", "hashed": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_routing_of_few_tokens(dtype: torch.dtype, options: dict[str, Any], reference: Any) -> None:
    router = Router(mixture_of(**options), 64, 50)
    router.weight.copy_(random_of(1, 8, 64))
    router.weight[3] = router.weight[5]  # Of equal scores the first is taken.
    if router.spec.hashed:
        router.reset_table(torch.Generator().manual_seed(2))
    else:
        router.bias.copy_(random_of(3, 8) / 10)
        router.bias[3] = router.bias[5]
    x, ids = random_of(4, 9, 64, dtype=dtype), torch.arange(9)
    batch = Batch.of([(0, 9)])
    got, expected = router(x, ids, batch), reference(router, x, ids, batch)
    assert torch.equal(got.experts_TK, expected.experts_TK)
    assert_close(got.weights_TK, expected.weights_TK)
    assert_close(got.scores_TE, expected.scores_TE)
    assert got.counts_E.tolist() == expected.counts_E.tolist()


@TYPES
def test_hyper_connections(dtype: torch.dtype, reference: Any) -> None:
    connection = HyperConnection(Hyper(streams=4), 64, 1e-6)
    for i, parameter in enumerate(connection.parameters()):
        parameter.copy_(random_of(i, *parameter.shape) / 4)
    x, y = random_of(7, 5, 4, 64, dtype=dtype), random_of(8, 5, 64, dtype=dtype)
    got, expected = connection(x), reference(connection, x)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)
    assert_close(torch_expand(y, *got[1:], x), reference(torch_expand, y, *got[1:], x))


@pytest.mark.parametrize("hashed", [False, True])
def test_ids_of_any_width_and_stride_route_alike(hashed: bool) -> None:
    router = Router(mixture_of(hashed=hashed), 64, 50)
    router.weight.copy_(random_of(1, 8, 64))
    if hashed:
        router.reset_table(torch.Generator().manual_seed(2))
    x, batch = random_of(4, 9, 64), Batch.of([(0, 9)])
    ids = torch.arange(18).view(9, 2)
    expected = router(x, ids[:, 1].clone(), batch)
    for other in (ids[:, 1], ids[:, 1].int()):
        got = router(x, other, batch)
        assert torch.equal(got.experts_TK, expected.experts_TK) and got.experts_TK.dtype == torch.int64


@pytest.mark.parametrize("family", ["v3", "v4"])
def test_types_that_do_not_go_together_are_not_misread(family: str) -> None:
    """A loop given a pointer knows nothing of types. torch refuses, or, where it multiplies in fp32, takes them."""
    rng = random.Random(family)
    config = oracle.v4_config(rng) if family == "v4" else oracle.v3_config(rng, sparse=False)
    model = Model(config, mtp=False)
    oracle.randomise(model, 1)
    model.cast(torch.bfloat16)

    def told(dtype: torch.dtype) -> Tensor:
        cache = Cache(CacheSpec.of(config, dtype), sequences=1, pages=1)
        return model(oracle.tokens(3, 1, config.vocab_size), Batch.of([(0, 1, cache.open())]), cache).logits

    expected = told(torch.bfloat16)
    try:
        assert float((told(torch.float32) - expected).float().abs().mean()) < 0.05 * float(expected.float().std())
    except RuntimeError as error:
        assert "dtype" in str(error) or "scalar type" in str(error)
    # `.to` casts what is to stay fp32 as well.
    with pytest.raises(RuntimeError, match="dtype"):
        model.to(torch.bfloat16)(oracle.tokens(3, 1, config.vocab_size), Batch.of([(0, 1)]))
