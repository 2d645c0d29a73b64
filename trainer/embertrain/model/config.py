"""The shape of a model, layer by layer.

A model is a tuple of layers, and a layer is an attention and a feed-forward part: `Latent` (V3's MLA, with V3.2's
indexer where `index` is set) or `Hybrid` (V4's shared-KV attention: a window, and compressed entries of `ratio`
tokens), then `Dense` or `Mixture`. Nothing here is a tensor, and nothing knows of caches, weights or devices.

Sources: the `config.json` files that DeepSeek publishes with V3, V3.2 and V4, read by `embertrain.model.published`.
V4.1's layers that read other layers' rows would be two more fields of `Hybrid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Scoring = Literal["sqrtsoftplus", "sigmoid", "softmax"]


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """Frequencies stretched for a longer context (YaRN, arXiv 2309.00071)."""

    factor: float
    """How many times longer the context is."""
    original_positions: int
    """The context the frequencies were first trained at."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this in the original context are left alone."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are stretched whole."""
    mscale: float = 0.0
    """V3's correction of cosine and sine; 0: none."""
    mscale_all_dim: float = 0.0
    """V3's correction of the softmax scale; 0: none."""

    def __post_init__(self) -> None:
        _need(self.factor >= 1 and self.original_positions > 0, "yarn: factor >= 1 and original_positions > 0")

    @property
    def rotation_scale(self) -> float:
        """What cosine and sine are multiplied by."""
        return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale is multiplied by."""
        return _magnitude(self.factor, self.mscale_all_dim) ** 2


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions over `dim` numbers of a head, as interleaved pairs."""

    dim: int
    theta: float = 10_000.0
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        _need(self.dim > 0 and self.dim % 2 == 0, f"rope: dim is {self.dim}, and must be even and positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """The lightning indexer: which rows a query attends to."""

    heads: int
    dim: int
    top_k: int
    """Rows a query attends to at most: tokens (V3.2) or compressed entries (V4)."""

    def __post_init__(self) -> None:
        _need(min(self.heads, self.dim, self.top_k) > 0, "index: heads, dim and top_k must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Multi-head latent attention (V3, arXiv 2412.19437 section 2.1.1); with an index, V3.2's sparse one."""

    heads: int
    q_rank: int | None
    """Width of the queries' latent; None: queries come straight from the hidden state."""
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: Rope
    index: Index | None = None

    def __post_init__(self) -> None:
        _need(min(self.heads, self.kv_rank, self.nope_dim, self.value_dim) > 0, "latent: all widths must be positive")
        _need(self.index is None or self.q_rank is not None, "latent: an index needs q_rank, the latent it reads")
        _need(self.index is None or self.index.dim >= self.rope.dim, "latent: index.dim is less than rope.dim")

    @property
    def scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        yarn = self.rope.yarn
        return float((self.nope_dim + self.rope.dim) ** -0.5) * (yarn.softmax_scale if yarn else 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hybrid:
    """V4's attention (arXiv 2606.19348 section 2.3): one shared key-and-value row a token, 128 of them in sight, and,
    with a ratio, compressed entries of all the rest."""

    heads: int
    head_dim: int
    q_rank: int
    out_groups: int
    out_rank: int
    rope: Rope
    ratio: int = 0
    """Tokens an entry stands for: 0 (window only), 4 (CSA: overlapping, chosen by the index) or 128 (HCA: all seen)."""
    window: int = 128
    index: Index | None = None

    def __post_init__(self) -> None:
        widths = (self.heads, self.head_dim, self.q_rank, self.out_groups, self.out_rank)
        _need(min(widths) > 0, "hybrid: all widths must be positive")
        _need(self.heads % self.out_groups == 0, f"hybrid: {self.heads} heads in {self.out_groups} out_groups")
        _need(self.rope.dim <= self.head_dim, "hybrid: rope.dim is greater than head_dim")
        _need(self.ratio in (0, 4, 128), f"hybrid: ratio is {self.ratio}, and must be 0, 4 or 128")
        _need((self.index is not None) == (self.ratio == 4), "hybrid: layers of ratio 4 have an index, and only they")
        _need(self.index is None or self.index.dim >= self.rope.dim, "hybrid: index.dim is less than rope.dim")
        _need(self.window > 0, "hybrid: window must be positive")

    @property
    def overlaps(self) -> bool:
        """Whether an entry pools the window before its own as well."""
        return self.ratio == 4

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """A SwiGLU of `inner_size`."""

    inner_size: int

    def __post_init__(self) -> None:
        _need(self.inner_size > 0, "dense: inner_size must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropping:
    """Experts of bounded room: the least wanted above it are dropped (GShard, repaired; no published model)."""

    capacity_factor: float
    """Room of an expert in units of its even share of the batch's assignments."""
    min_capacity: int = 4

    def __post_init__(self) -> None:
        _need(self.capacity_factor > 0 and self.min_capacity > 0, "dropping: both numbers must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Routed experts and shared ones (DeepSeekMoE)."""

    experts: int
    top_k: int
    inner_size: int
    """Of one expert."""
    shared: int = 1
    """Shared experts: one SwiGLU of `shared * inner_size`."""
    scoring: Scoring = "sqrtsoftplus"
    scale: float = 1.0
    """What the weights of the chosen are multiplied by."""
    normalise: bool = True
    """Whether the weights of the chosen are made to sum to one first."""
    groups: int = 1
    groups_kept: int = 1
    """V3: experts come from the best `groups_kept` of `groups`, a group scored by its best two."""
    hashed: bool = False
    """V4's first layers: the token alone chooses its experts, by a table that is part of the weights."""
    swiglu_limit: float | None = None
    """V4: gate <= limit and -limit <= up <= limit, in routed experts only."""
    dropping: Dropping | None = None
    temperature: float = 1.0
    """Scores are those of logits / temperature."""
    noise: float = 0.0
    """Standard deviation, in training, of what is added to logits before experts are chosen (Shazeer 2017)."""
    top_p: float | None = None
    """Per token the fewest of its top_k experts whose weights reach this share of their sum."""

    def __post_init__(self) -> None:
        _need(0 < self.top_k <= self.experts, f"mixture: top_k {self.top_k} of {self.experts} experts")
        _need(self.inner_size > 0 and self.shared >= 0, "mixture: inner_size > 0 and shared >= 0")
        _need(self.scoring in ("sqrtsoftplus", "sigmoid", "softmax"), f"mixture: no scoring named {self.scoring!r}")
        _need(self.groups > 0, f"mixture: groups is {self.groups}, and must be positive")
        _need(self.experts % self.groups == 0, f"mixture: {self.experts} experts in {self.groups} groups")
        _need(0 < self.groups_kept <= self.groups, f"mixture: {self.groups_kept} of {self.groups} groups kept")
        room = self.experts // self.groups * self.groups_kept
        _need(self.top_k <= room, f"mixture: the groups kept hold {room} experts, and top_k is {self.top_k}")
        _need(not (self.hashed and self.groups > 1), "mixture: a hashed layer has no groups")
        _need(self.temperature > 0 and self.noise >= 0, "mixture: temperature > 0 and noise >= 0")
        _need(self.top_p is None or 0 < self.top_p <= 1, "mixture: top_p must be in (0, 1]")
        _need(self.swiglu_limit is None or self.swiglu_limit > 0, "mixture: swiglu_limit is more than 0, or None")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyper:
    """Hyper-connections on a manifold (mHC): the residual is `streams` wide, mixed by doubly stochastic matrices."""

    streams: int = 4
    iterations: int = 20
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _need(self.streams > 1 and self.iterations > 0, "hyper: streams > 1 and iterations > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer: attention, then feed-forward, each on a normalised residual."""

    attention: Latent | Hybrid
    ffn: Dense | Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A whole model."""

    family: Literal["v3", "v32", "v4"]
    """Whose names and whose MTP joint the weights have."""
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    mtp: tuple[Layer, ...] = ()
    """Layers that predict the token after the next, each on the one before."""
    hyper: Hyper | None = None
    positions_max: int = 1_048_576
    rms_eps: float = 1e-6
    tied: bool = False
    """Whether the head is the embedding."""

    def __post_init__(self) -> None:
        _need(min(self.vocab_size, self.hidden_size, self.positions_max) > 0, "sizes must be positive")
        _need(len(self.layers) > 0, "a model needs a layer")
        wanted = Hybrid if self.family == "v4" else Latent
        for i, layer in enumerate((*self.layers, *self.mtp)):
            _need(isinstance(layer.attention, wanted), f"layer {i}: {self.family} has {wanted.__name__} attention")
        _need((self.hyper is not None) == (self.family == "v4"), "v4 has hyper-connections, and only v4")
