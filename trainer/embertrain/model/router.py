"""Which experts a token goes to, and with what weights.

Scores are a function of one linear layer, in fp32. Experts are chosen by score plus a bias that training moves to even
the load (`update_bias`, never a loss), weights come from the scores alone. The first layers of V4 do not choose: a
table gives each token its experts. (arXiv 2412.19437 section 2.1.2; 2606.19348 section 2.1)

`forward` changes nothing: what it tells is a `Routing`. It waits for no device, and of equal scores it takes the expert
of the lowest number, on every device.

Options that no published model has: temperature, noise in training (arXiv 1701.06538 section 2.1), and top_p.

T tokens, K choices, E experts, G segments, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import ConfigError
from .batch import Batch
from .config import Mixture
from .linear import product
from .pointwise import sigmoid, softplus

EPS = 1e-20
"""Added to the sum that weights are divided by, as in the published code."""
TINY = 1e-37
"""The least score under the root of sqrtsoftplus: at 0 its gradient would be 0 times infinity."""


@dataclass(frozen=True)
class Routing:
    """What a router decided of T tokens. Counts and losses are computed when they are first asked for."""

    experts_TK: Tensor
    """int64; -1: none, because of top_p or because the expert had no room."""
    weights_TK: Tensor
    """fp32; what the outputs of the experts are multiplied by, 0 where there is none."""
    scores_TE: Tensor
    """fp32, without bias."""
    chosen_TK: Tensor
    """experts_TK before any was dropped for want of room."""
    batch: Batch

    @cached_property
    def counts_E(self) -> Tensor:
        """int64: tokens that chose each expert, dropped ones included."""
        return count(self.chosen_TK, self.scores_TE.shape[1])

    @cached_property
    def dropped_E(self) -> Tensor:
        """int64: of those, the ones that found no room."""
        return self.counts_E - count(self.experts_TK, self.scores_TE.shape[1])

    @cached_property
    def balance_loss(self) -> Tensor:
        """The sequence-wise balance loss of V3 (equations 17 to 20), not scaled: a scalar, 1 when all is even.

            L = sum_i f_i P_i,    f_i = E / (K T) * tokens that chose i,    P_i = mean over t of s_ti / sum_j s_tj

        of each segment, and the mean over segments weighted by their tokens. Gradients come through P alone.
        """
        T, E = self.scores_TE.shape
        K, G = self.chosen_TK.shape[1], len(self.batch.segments)
        segment_T = self.batch.segment_T
        cells = segment_T[:, None] * (E + 1) + self.chosen_TK + 1
        f_GE = count(cells, G * (E + 1), first=0).view(G, E + 1)[:, 1:] * (E / K)
        shares_TE = self.scores_TE / (self.scores_TE.sum(-1, keepdim=True) + EPS)
        p_GE = shares_TE.new_zeros(G, E).index_add(0, segment_T, shares_TE)
        tokens_G = torch.bincount(segment_T, minlength=G)
        # Both f and P are sums over T_g here: one T_g divides, the other is the segment's weight in the mean.
        return ((f_GE * p_GE).sum(-1) / tokens_G).sum() / T


class Router(nn.Module):
    """Scores, a choice and its weights."""

    def __init__(self, spec: Mixture, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.pad_rows = 1
        self.weight = nn.Parameter(torch.empty(spec.experts, hidden_size, dtype=torch.float32))
        if spec.hashed:
            self.tid2eid = nn.Buffer(torch.zeros(vocab_size, spec.top_k, dtype=torch.int32))
        else:
            self.bias = nn.Buffer(torch.zeros(spec.experts, dtype=torch.float32))

    def forward(
        self,
        x_TH: Tensor,
        ids_T: Tensor,
        batch: Batch,
        *,
        selection_TK: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """`selection_TK` are experts, or -1, to be used instead of the router's own choice; their weights still come
        from the scores. `generator` is for noise, in training. Raises ConfigError."""
        spec = self.spec
        if self._can_loop(x_TH, selection_TK):
            experts_TK, weights_TK, scores_TE = kernels.route(
                *(x_TH, self.weight, None if spec.hashed else self.bias, self.tid2eid if spec.hashed else None, ids_T),
                scoring=spec.scoring,
                groups=spec.groups,
                groups_kept=spec.groups_kept,
                top_k=spec.top_k,
                normalise=spec.normalise,
                scale=spec.scale,
                tiny=TINY,
                eps=EPS,
            )
            return Routing(experts_TK, weights_TK, scores_TE, experts_TK, batch)
        logits_TE = self.logits(x_TH)
        scores_TE = self.scores(logits_TE)
        partial = spec.top_p is not None or selection_TK is not None
        if selection_TK is not None:
            experts_TK = selection_TK
        elif spec.hashed:
            experts_TK = self.tid2eid[ids_T].long()
        else:
            experts_TK = self.choose(self._noisy_scores(logits_TE, scores_TE, generator))
        if selection_TK is None and spec.top_p is not None:
            experts_TK = fewest(experts_TK, scores_TE, spec.top_p)
        if partial:
            none_TK = experts_TK < 0
            weights_TK = scores_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(none_TK, 0.0)
        else:
            weights_TK = scores_TE.gather(1, experts_TK)
        if spec.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPS)
        if spec.scale != 1.0:
            weights_TK = weights_TK * spec.scale
        return Routing(experts_TK, weights_TK, scores_TE, experts_TK, batch)

    def _can_loop(self, x_TH: Tensor, selection_TK: Tensor | None) -> bool:
        """Whether tokens are few, and no option is on that the loop lacks."""
        spec = self.spec
        plain = selection_TK is None and spec.top_p is None and spec.temperature == 1.0 and not spec.noise
        few = self.pad_rows == 1 and x_TH.shape[0] <= kernels.FEW and x_TH.shape[1] % 32 == 0
        whole = type(self.weight) is nn.Parameter and self.weight.dtype == torch.float32
        return plain and few and whole and kernels.loops(x_TH)

    def logits(self, x_TH: Tensor) -> Tensor:
        """[T, E] fp32."""
        logits_TE = product(x_TH.float(), self.weight, self.pad_rows)
        return logits_TE if self.spec.temperature == 1.0 else logits_TE / self.spec.temperature

    def scores(self, logits_TE: Tensor) -> Tensor:
        """[T, E] fp32."""
        steady = self.pad_rows > 1
        match self.spec.scoring:
            case "sqrtsoftplus":
                return softplus(logits_TE, steady=steady).clamp_min(TINY).sqrt()
            case "sigmoid":
                return sigmoid(logits_TE, steady=steady)
            case "softmax":
                return logits_TE.softmax(-1)

    @torch.no_grad()
    def choose(self, scores_TE: Tensor) -> Tensor:
        """[T, K]: the best by score and bias, best first; within the best groups where there are groups."""
        spec = self.spec
        choice_TE = scores_TE + self.bias
        if spec.groups > 1:
            in_groups = choice_TE.unflatten(-1, (spec.groups, -1))
            worth = in_groups.topk(min(2, in_groups.shape[-1]), -1).values.sum(-1)
            left_out = torch.ones_like(worth, dtype=torch.bool).scatter(1, _best(worth, spec.groups_kept), False)
            choice_TE = in_groups.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        return _best(choice_TE, spec.top_k)

    def reset_table(self, generator: torch.Generator, frequency_V: Tensor | None = None) -> None:
        """A new model's table of a hashed layer (`balanced_table`)."""
        self.tid2eid.copy_(balanced_table(self.spec, self.tid2eid.shape[0], generator, frequency_V))

    def _noisy_scores(self, logits_TE: Tensor, scores_TE: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.spec.noise == 0:
            return scores_TE
        if generator is None:
            raise ConfigError("mixture: noise needs a generator in training")
        noise_TE = torch.randn(logits_TE.shape, generator=generator, device=logits_TE.device)
        return self.scores(logits_TE.detach() + self.spec.noise * noise_TE)


def _best(scores: Tensor, k: int) -> Tensor:
    # A stable sort, since topk takes any of those that are equal.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@torch.no_grad()
def fewest(experts_TK: Tensor, scores_TE: Tensor, top_p: float) -> Tensor:
    """Per token the fewest of its experts whose scores reach `top_p` of their sum; -1 in place of the others."""
    ranked_TK, order_TK = scores_TE.gather(1, experts_TK).sort(dim=-1, descending=True, stable=True)
    before_TK = ranked_TK.cumsum(-1) - ranked_TK
    needed_TK = before_TK < top_p * ranked_TK.sum(-1, keepdim=True)
    needed_TK[:, 0] = True
    return experts_TK.masked_fill(~torch.zeros_like(needed_TK).scatter(1, order_TK, needed_TK), -1)


def count(numbers: Tensor, size: int, *, first: int = -1) -> Tensor:
    """How often each of 0 to size - 1 is among numbers from `first` on: int64 [size]. Waits for no device."""
    places = numbers.flatten() - first
    counts = torch.zeros(size - first, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[-first:]


@torch.no_grad()
def update_bias(router: Router, counts_E: Tensor, rate: float) -> None:
    """One step towards an even load, b_i += rate * sign(mean load - load_i), after a training step.

    `counts_E` are tokens of the whole step: summed over micro-batches and ranks. (arXiv 2408.15664)
    """
    load_E = counts_E.to(router.bias)
    router.bias.add_(torch.sign(load_E.mean() - load_E), alpha=rate)


def balanced_table(
    spec: Mixture, vocab_size: int, generator: torch.Generator, frequency_V: Tensor | None = None
) -> Tensor:
    """A random table int32 [V, K] that gives each expert as many tokens as any other, to within one, and no token an
    expert twice.

    The published tables are data; how they were made is not told. Here tokens that are about as frequent as each other
    are dealt out together: each run of E / gcd(E, K) tokens takes all experts of a shuffled deck equally often. Without
    `frequency_V` the runs are of consecutive ids, which a BPE vocabulary orders by frequency.
    """
    E, K = spec.experts, spec.top_k
    run = E // math.gcd(E, K)
    decks = torch.rand(-(-vocab_size // run), E, generator=generator).argsort(-1)
    places = (torch.arange(run)[:, None] * K + torch.arange(K)) % E
    table = decks[:, places].flatten(0, 1)[:vocab_size].int()
    if frequency_V is None:
        return table
    order_V = frequency_V.cpu().argsort(descending=True, stable=True)
    return torch.empty_like(table).index_copy_(0, order_V, table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How even a load is."""

    max_over_mean: float
    """1: even. What the slowest expert makes all others wait for."""
    min_over_mean: float
    deviation: float
    """Standard deviation in units of the mean."""
    idle: int
    """Experts without a token."""


def load(counts_E: Tensor) -> Load:
    """Of the tokens each expert got. Waits for the device."""
    loads = counts_E.double()
    mean = max(float(loads.mean()), 1e-9)
    return Load(
        max_over_mean=float(loads.max()) / mean,
        min_over_mean=float(loads.min()) / mean,
        deviation=float(loads.std(correction=0)) / mean,
        idle=int((counts_E == 0).sum()),
    )
