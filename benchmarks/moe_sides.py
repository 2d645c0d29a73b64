"""The sides of the comparison of experts: ours, transformers' and the loop, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from embertrain.kernels.products import linear
from embertrain.model.batch import Batch
from embertrain.model.config import Mixture
from embertrain.model.experts import Experts
from embertrain.model.moe import mix
from embertrain.model.router import Routing
from torch import Tensor, nn

from .runner import Subject, verify

if TYPE_CHECKING:
    from .moe import Shape

LIMIT = 10.0
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Norm of the difference to a loop over experts in fp32, by the norm of the result."""


class Sides:
    """All sides of one shape and dtype."""

    peers = ("eager", "grouped_mm")
    """transformers' implementations; its batched_mm is a hundred times slower."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape = shape
        self.dtype = dtype
        g = torch.Generator().manual_seed(0)
        T, E, K = shape.tokens, shape.experts, shape.top_k
        kind = getattr(torch, dtype)
        spec = Mixture(experts=E, top_k=K, inner_size=shape.inner, swiglu_limit=LIMIT)
        self.experts = Experts(spec, shape.hidden).to(kind)
        with torch.no_grad():
            for weight in self.experts.parameters():
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=g)
        self.x_TH = torch.randn(T, shape.hidden, generator=g).to(kind).requires_grad_()
        self.chosen_TK = torch.rand(T, E, generator=g).topk(K, -1).indices
        weights = torch.rand(T, K, generator=g)
        self.weights_TK = (weights / weights.sum(-1, keepdim=True)).to(kind).requires_grad_()
        self.grad_TH = torch.randn(T, shape.hidden, generator=g).to(kind)
        self.batch = Batch.of([(0, T)])
        self.theirs = {name: self._transformers(name) for name in self.peers}
        self.expected = {backward: self._results(self._reference, backward, True) for backward in (False, True)}

    def subject(self, name: str, backward: bool, repeats: int) -> Subject:
        """One of ours, eager, grouped_mm."""
        experts = self.experts if name == "ours" else self.theirs[name]
        forward = self._ours if name == "ours" else lambda: experts(self.x_TH, self.chosen_TK, self.weights_TK)

        def go(check: bool) -> float:
            passes = 1 if check else repeats
            for _ in range(passes):
                results = self._results(forward, backward, False, experts)
                if check:
                    for got, want in zip(results, self.expected[backward], strict=True):
                        wrong = float((got.float() - want).norm() / want.norm())
                        verify(wrong <= TOLERANCE[self.dtype], f"{name}: results are {wrong:.1e} off")
            return float(passes * self.shape.tokens)

        return go

    def ceiling(self, backward: bool, repeats: int) -> Subject:
        """Both products of all rows by the weights of one expert, and their gradients' products."""
        shape, kind = self.shape, self.x_TH.dtype
        R = shape.tokens * shape.top_k
        rows, inner = torch.randn(R, shape.hidden).to(kind), torch.randn(R, shape.inner).to(kind)
        both = torch.randn(R, 2 * shape.inner).to(kind)
        w13, w2 = self.experts.w13[0].detach(), self.experts.w2[0].detach()

        def go(check: bool) -> float:
            for _ in range(repeats):
                linear(rows, w13)
                linear(inner, w2)
                if backward:
                    for grad, weight, row in ((both, w13, rows), (rows, w2, inner)):
                        linear(grad, weight.t())
                        linear(grad.t(), row.t())
            return float(repeats * shape.tokens)

        return go

    def loop(self) -> Subject:
        """The articles' layer, forward: a list of tokens for each expert, its rows stacked, rows added one by one."""
        E, H, inner = self.shape.experts, self.shape.hidden, self.shape.inner
        experts = [nn.Sequential(nn.Linear(H, inner), nn.GELU(), nn.Linear(inner, H)) for _ in range(E)]

        @torch.no_grad()
        def go(check: bool) -> float:
            x_TH = self.x_TH.detach()
            lists: dict[int, list[tuple[int, float]]] = {e: [] for e in range(E)}
            for t in range(self.shape.tokens):
                for weight, expert in zip(self.weights_TK[t], self.chosen_TK[t], strict=True):
                    lists[int(expert.item())].append((t, weight.item()))
            y_TH = torch.zeros_like(x_TH)
            for e, members in lists.items():
                if members:
                    members.sort(key=lambda member: member[1], reverse=True)
                    made = experts[e](torch.stack([x_TH[t] for t, _ in members]))
                    for (t, weight), row in zip(members, made, strict=True):
                        y_TH[t] += weight * row
            if check:
                every_TEH = torch.stack([expert(x_TH) for expert in experts], 1)
                chosen = every_TEH.gather(1, self.chosen_TK[..., None].expand(-1, -1, H))
                want = (chosen * self.weights_TK[..., None]).sum(1)
                verify(bool(torch.allclose(y_TH, want, atol=1e-4)), "the loop: wrong results")
            return float(self.shape.tokens)

        return go

    def _ours(self) -> Tensor:
        # Scores are there for their shape: the number of experts.
        scores_TE = torch.empty(0, self.shape.experts)
        routing = Routing(self.chosen_TK, self.weights_TK, scores_TE, self.chosen_TK, self.batch)
        return mix(self.x_TH, routing, self.experts)

    def _reference(self) -> Tensor:
        """In fp32, an expert at a time."""
        y_TH = torch.zeros(self.x_TH.shape)
        for e in range(self.shape.experts):
            tokens, choice = torch.where(self.chosen_TK == e)
            gate, up = (self.x_TH[tokens].float() @ self.experts.w13[e].float().t()).chunk(2, -1)
            inner = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
            rows = inner @ self.experts.w2[e].float().t() * self.weights_TK[tokens, choice, None].float()
            y_TH = y_TH.index_add(0, tokens, rows)
        return y_TH

    def _results(
        self, forward: Callable[[], Tensor], backward: bool, exact: bool, experts: nn.Module | None = None
    ) -> list[Tensor]:
        """What comes out, and the gradients of tokens, weights of choices and both matrices."""
        if not backward:
            with torch.no_grad():
                return [forward()]
        y_TH = forward()
        wanted = [self.x_TH, self.weights_TK, *(experts or self.experts).parameters()]
        grads = torch.autograd.grad(y_TH, wanted, self.grad_TH.float() if exact else self.grad_TH)
        return [y_TH.detach(), *(grad.float() if exact else grad for grad in grads)]

    def _transformers(self, implementation: str) -> Any:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

        shape = self.shape
        config = DeepseekV4Config(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inner,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            swiglu_limit=LIMIT,
        )
        config._experts_implementation = implementation
        theirs = DeepseekV4Experts(config)
        theirs.gate_up_proj = nn.Parameter(self.experts.w13.detach().clone())
        theirs.down_proj = nn.Parameter(self.experts.w2.detach().clone())
        return theirs
