"""What a model costs, by arithmetic on its shape: parameters, FLOPs a token, bytes of KV a token.

Conventions. A product of [m, k] and [k, n] is 2 m k n FLOPs; norms, softmax and rotations count nothing. The embedding
is a look-up: parameters, no FLOPs, and not among the active ones. MTP layers are counted apart. "At context n" is the
token at position n - 1, which sees n tokens, itself included. V3's attention is the absorbed one, as in decoding.

A layer's KV are the rows it keeps for a sequence, without paging; the fp32 state of windows that are not closed yet is
told apart, as its size does not grow with the sequence.

No torch here: the numbers of a model that fits nowhere cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .model.config import Dense, Hybrid, Index, Latent, Layer, Mixture, ModelConfig
from .model.presets import preset

Rows = Literal["bf16", "fp8"]
"""How rows are kept: all in bf16, or as the published engines do: fp8 with scales, V4's index in fp4."""


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a part of the model."""

    total: int
    active: int
    """Those that one token's forward pass multiplies by."""

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active)


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one token's forward pass at a context."""

    weights: int
    """Products with weights."""
    scores: int
    """The index's scores of all that it may choose from."""
    attention: int
    """Scores and sums over the rows attended to."""
    high: int
    """How many of `weights` are of weights that are published in bf16 or fp32."""

    @property
    def total(self) -> int:
        return self.weights + self.scores + self.attention

    def fp8_equivalent(self, index_fp4: bool) -> float:
        """In units of an fp8 FLOP: bf16 counts twice, fp4 half. Attention is bf16; the index fp8, or V4's fp4."""
        return self.weights + self.high + self.scores * (0.5 if index_fp4 else 1) + 2 * self.attention


@dataclass(frozen=True, slots=True)
class KV:
    """Bytes of one sequence's KV at a context."""

    rows: int
    state: int
    """fp32 values and gates of windows that are still open, and of the one before where windows overlap."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the makers say of a model, in their own rounding."""

    total: float
    active: float
    flops_share: float | None = None
    """Of V3.2's, for a token at 1,048,576."""
    kv_share: float | None = None


PUBLISHED = {
    "v3": Published(671e9, 37e9),
    "v3.2": Published(671e9, 37e9),
    "v4-flash": Published(284e9, 13e9, 0.10, 0.07),
    "v4-pro": Published(1.6e12, 49e9, 0.27, 0.10),
}

CONTEXT_PUBLISHED = 1_048_576
"""The context of the published shares."""


def published(config: ModelConfig) -> Published | None:
    """The makers' numbers, if the model is one of theirs."""
    return next((numbers for name, numbers in PUBLISHED.items() if preset(name) == config), None)


# ---- parameters


def parameters(config: ModelConfig) -> dict[str, Count]:
    """By part, without MTP layers."""
    H = config.hidden_size
    vocabulary = config.vocab_size * H
    parts = {"embedding": Count(vocabulary, 0)}
    for layer in config.layers:
        _add(parts, _layer_parts(config, layer))
    _add(parts, {"norms": _all(H), "head": Count(0 if config.tied else vocabulary, vocabulary)})
    if config.hyper:
        _add(parts, {"hyper-connections": _all(_hyper_head(config))})
    return parts


def mtp_parameters(config: ModelConfig) -> dict[str, Count]:
    """Of the MTP layers, by part. They share the model's embedding and head."""
    H = config.hidden_size
    parts: dict[str, Count] = {}
    for layer in config.mtp:
        _add(parts, _layer_parts(config, layer))
        _add(parts, {"joint": _all(2 * H * H), "norms": _all(3 * H)})
        if config.hyper:
            _add(parts, {"hyper-connections": _all(_hyper_head(config))})
    return parts


def whole(parts: Mapping[str, Count]) -> Count:
    """The sum of all parts."""
    return sum(parts.values(), Count(0, 0))


def _add(parts: dict[str, Count], more: Mapping[str, Count]) -> None:
    for name, count in more.items():
        parts[name] = parts.get(name, Count(0, 0)) + count


def _all(count: int) -> Count:
    return Count(count, count)


def _hyper_head(config: ModelConfig) -> int:
    assert config.hyper
    S = config.hyper.streams
    return S * S * config.hidden_size + S + 1


def _layer_parts(config: ModelConfig, layer: Layer) -> dict[str, Count]:
    H = config.hidden_size
    attention = layer.attention
    weights = _latent_weights(H, attention) if isinstance(attention, Latent) else _hybrid_weights(H, attention)
    parts = {name: _all(count) for name, count in weights.items()}
    parts["norms"] += _all(2 * H)
    if config.hyper:
        S = config.hyper.streams
        numbers = (2 + S) * S
        parts["hyper-connections"] = _all(2 * (numbers * S * H + numbers + 3))
    return parts | _ffn_parts(H, config.vocab_size, layer.ffn)


def _latent_weights(H: int, a: Latent) -> dict[str, int]:
    head = a.nope_dim + a.rope.dim
    queries = H * a.heads * head if a.q_rank is None else (H + a.heads * head) * a.q_rank
    kv = H * (a.kv_rank + a.rope.dim) + a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
    parts = {"attention": queries + kv + a.heads * a.value_dim * H, "norms": (a.q_rank or 0) + a.kv_rank}
    if a.index:
        assert a.q_rank is not None
        width = a.index.heads * a.index.dim
        parts["index"] = a.q_rank * width + H * a.index.dim + H * a.index.heads
        parts["norms"] += 2 * a.index.dim
    return parts


def _hybrid_weights(H: int, a: Hybrid) -> dict[str, int]:
    width = a.heads * a.head_dim
    out = width // a.out_groups * a.out_groups * a.out_rank + a.out_groups * a.out_rank * H
    parts = {"attention": (H + width) * a.q_rank + H * a.head_dim + out + a.heads, "norms": a.q_rank + a.head_dim}
    if a.ratio:
        parts["compressors"] = _compressor(H, a, a.head_dim)
        parts["norms"] += a.head_dim
    if a.index:
        parts["index"] = a.q_rank * a.index.heads * a.index.dim + H * a.index.heads
        parts["compressors"] += _compressor(H, a, a.index.dim)
        parts["norms"] += a.index.dim
    return parts


def _compressor(H: int, a: Hybrid, dim: int) -> int:
    """Values and gates, and the gates' bias by slot."""
    width = _compressor_width(a, dim)
    return 2 * H * width + a.ratio * width


def _compressor_width(a: Hybrid, dim: int) -> int:
    return (2 if a.overlaps else 1) * dim


def _ffn_parts(H: int, vocab_size: int, ffn: Dense | Mixture) -> dict[str, Count]:
    if isinstance(ffn, Dense):
        return {"dense": _all(3 * H * ffn.inner_size)}
    one = 3 * H * ffn.inner_size
    parts = {
        "router": _all(H * ffn.experts),
        "routed experts": Count(ffn.experts * one, ffn.top_k * one),
        "shared experts": _all(ffn.shared * one),
    }
    if ffn.hashed:
        parts["hash tables"] = Count(vocab_size * ffn.top_k, 0)
    else:
        parts["router"] += Count(ffn.experts, ffn.experts)
    return parts


# ---- FLOPs


def flops(config: ModelConfig, context: int) -> Flops:
    """Of one token at that context."""
    parts = parameters(config)
    weights = sum(2 * part.active for name, part in parts.items() if name != "norms")
    high = sum(2 * parts[name].active for name in _HIGH if name in parts)
    scores = attention = 0
    for layer in config.layers:
        seen, scored = _seen(layer.attention, context)
        scores += scored * _score_flops(layer.attention.index)
        attention += seen * _row_flops(layer.attention)
    return Flops(weights, scores, attention, high)


_HIGH = ("head", "router", "compressors", "hyper-connections")
"""Parts whose weights are bf16 or fp32 in the published files."""


def dense_flops(config: ModelConfig, context: int) -> Flops:
    """Of the dense equivalent: every expert works, and every query attends to every token before it."""
    parts = parameters(config)
    dense = {name for name in parts if name not in ("norms", "embedding", "hash tables", "index", "compressors")}
    weights = sum(2 * (parts[name].active if name == "head" else parts[name].total) for name in dense)
    high = sum(2 * parts[name].active for name in _HIGH if name in dense)
    return Flops(weights, 0, sum(context * _row_flops(layer.attention) for layer in config.layers), high)


def _seen(attention: Latent | Hybrid, context: int) -> tuple[int, int]:
    """(rows attended to, rows the index scores)."""
    if isinstance(attention, Latent):
        index = attention.index
        return (min(context, index.top_k), context) if index else (context, 0)
    window = min(context, attention.window)
    entries = context // attention.ratio if attention.ratio else 0
    if attention.index:
        return window + min(entries, attention.index.top_k), entries
    return window + entries, 0


def _score_flops(index: Index | None) -> int:
    return 2 * index.heads * index.dim if index else 0


def _row_flops(attention: Latent | Hybrid) -> int:
    """Score and sum of one row, all heads."""
    if isinstance(attention, Latent):
        return 2 * attention.heads * (2 * attention.kv_rank + attention.rope.dim)
    return 2 * attention.heads * 2 * attention.head_dim


def training_flops(config: ModelConfig, tokens: int, *, mtp: bool = True) -> float:
    """Of one token of a training step, on average over a document of that many tokens: forward, and twice that for the
    gradient. V3's attention is the naive one, as in training; nothing is computed twice.
    """
    layers = (*config.layers, *(config.mtp if mtp else ()))
    weights = flops(config, 1).weights
    if mtp and config.mtp:
        parts = mtp_parameters(config)
        heads = len(config.mtp) * config.vocab_size * config.hidden_size
        weights += 2 * (sum(part.active for name, part in parts.items() if name != "norms") + heads)
    # Rows seen grow by pieces that are straight: so many places tell the mean.
    places = sorted({max(1, round(tokens * (i + 0.5) / _PLACES)) for i in range(_PLACES)})
    rows = 0.0
    for layer in layers:
        for place in places:
            seen, scored = _seen(layer.attention, place)
            row = _naive_row_flops(layer.attention)
            rows += (seen * row + scored * _score_flops(layer.attention.index)) / len(places)
    return 3 * (weights + rows)


_PLACES = 64


def _naive_row_flops(attention: Latent | Hybrid) -> int:
    if isinstance(attention, Hybrid):
        return _row_flops(attention)
    return 2 * attention.heads * (attention.nope_dim + attention.rope.dim + attention.value_dim)


# ---- KV


def kv(config: ModelConfig, context: int, rows: Rows) -> KV:
    """What one sequence of that many tokens keeps, MTP layers left out."""
    kept = [_layer_kv(layer.attention, context, rows) for layer in config.layers]
    return KV(sum(k.rows for k in kept), sum(k.state for k in kept))


def kv_row_bytes(config: ModelConfig, rows: Rows) -> dict[str, int]:
    """Bytes of one row of each kind that the model keeps."""
    sizes: dict[str, int] = {}
    for attention in (layer.attention for layer in config.layers):
        if isinstance(attention, Latent):
            sizes["latent"] = _latent_row(attention, rows)
        else:
            sizes["window"] = _hybrid_row(attention, rows)
            if attention.ratio:
                sizes["csa" if attention.overlaps else "hca"] = _hybrid_row(attention, rows)
        if attention.index:
            sizes["index"] = _index_row(attention, rows)
    return sizes


def _layer_kv(attention: Latent | Hybrid, context: int, rows: Rows) -> KV:
    index = _index_row(attention, rows)
    if isinstance(attention, Latent):
        return KV(context * (_latent_row(attention, rows) + index), 0)
    window = min(context, attention.window) * _hybrid_row(attention, rows)
    if not attention.ratio:
        return KV(window, 0)
    entries = context // attention.ratio * (_hybrid_row(attention, rows) + index)
    slots = attention.ratio * (2 if attention.overlaps else 1)
    widths = _compressor_width(attention, attention.head_dim)
    if attention.index:
        widths += _compressor_width(attention, attention.index.dim)
    return KV(window + entries, slots * widths * 2 * 4)


def _latent_row(a: Latent, rows: Rows) -> int:
    """fp8: the latent with an fp32 scale for every 128 numbers, and the rotated key in bf16: 656 B of 512 + 64."""
    if rows == "bf16":
        return 2 * (a.kv_rank + a.rope.dim)
    return a.kv_rank + 4 * _blocks(a.kv_rank, 128) + 2 * a.rope.dim


def _hybrid_row(a: Hybrid, rows: Rows) -> int:
    """fp8: a scale byte for every 64 numbers that are not rotated, padded to 8, and the rotated ones in bf16: 584 B."""
    if rows == "bf16":
        return 2 * a.head_dim
    nope = a.head_dim - a.rope.dim
    return nope + 2 * a.rope.dim + 8 * _blocks(_blocks(nope, 64), 8)


def _index_row(a: Latent | Hybrid, rows: Rows) -> int:
    """V3.2: fp8 with an fp32 scale for every 128 numbers, 132 B. V4: fp4 with a scale byte for every 32, 68 B."""
    if a.index is None:
        return 0
    dim = a.index.dim
    if rows == "bf16":
        return 2 * dim
    return dim + 4 * _blocks(dim, 128) if isinstance(a, Latent) else _blocks(dim, 2) + _blocks(dim, 32)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


# ---- against V3.2


@dataclass(frozen=True, slots=True)
class Shares:
    """A model's cost of a token at a context, as shares of V3.2's."""

    flops: float
    """Every FLOP counted once."""
    flops_fp8: float
    """In fp8 equivalents: see `Flops.fp8_equivalent`. The weighting is ours; the published one is not described."""
    kv: float
    """Of rows in fp8, V4's index in fp4."""


def shares(config: ModelConfig, context: int) -> Shares:
    """Against V3.2 at the same context, whatever the longest is that either was made for."""
    other = preset("v3.2")
    mine, theirs = flops(config, context), flops(other, context)
    return Shares(
        flops=mine.total / theirs.total,
        flops_fp8=mine.fp8_equivalent(config.family == "v4") / theirs.fp8_equivalent(False),
        kv=kv(config, context, "fp8").rows / kv(other, context, "fp8").rows,
    )


def contexts(config: ModelConfig, asked: Iterable[int]) -> tuple[int, ...]:
    """Those asked for, or three that show how costs grow, up to the longest."""
    longest = config.positions_max
    return tuple(asked) or tuple(sorted({min(4096, longest), min(65_536, longest), longest}))
