"""What every weight of a model is called: here, in DeepSeek's files, and in transformers'.

A `Weight` is one of our parameters or buffers; its `pieces` are the tensors of a file that make it up, one as a rule.
Experts are one weight here, `experts.w13` [E, 2 I, H] of gate rows and then up rows and `experts.w2` [E, H, I], and
2 E and E pieces in DeepSeek's files.

Three ways of naming:

    official        DeepSeek's. V3's and V3.2's are also those that transformers saves.
    transformers    those of a transformers 5 model's own state; it loads them too
    saved           what transformers 5 writes of a V4: the official ones, but for the top

It is all told by the shape of the model; nothing is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..model.config import Dense, Hybrid, Index, Latent, Layer, Mixture, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Names = Literal["official", "transformers", "saved"]
Form = Literal["matrix", "expert", "plain", "fp32", "table"]
"""How a weight is published: matrices and experts may be quantised, `plain` is bf16, a table is int32."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file."""

    name: str
    shape: Shape
    expert: int | None = None
    """Whose it is; None: it is the whole weight."""
    rows: tuple[int, int] | None = None
    """Which rows of that expert; None: all."""

    def of(self, whole: Tensor) -> Tensor:
        """This piece of a whole weight."""
        part = whole if self.expert is None else whole[self.expert]
        return part if self.rows is None else part[slice(*self.rows)]


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter or buffer of ours."""

    name: str
    shape: Shape
    form: Form
    pieces: tuple[Piece, ...]
    copies: tuple[str, ...] = ()
    """Names under which a file holds the same once more."""
    required: bool = True
    """Whether a file without it is incomplete."""


def weights(config: ModelConfig, names: Names = "official") -> dict[str, Weight]:
    """All weights of a model, by our name, in the order of its layers."""
    table = _Table(config, names)
    return {weight.name: weight for weight in table.all()}


class _Table:
    """The names of one model in one way of naming."""

    def __init__(self, config: ModelConfig, names: Names) -> None:
        self.config = config
        # V3's official names are those of transformers, but for the experts of a model in memory.
        self.v4 = config.family == "v4"
        self.official = not self.v4 or names != "transformers"
        self.merged = names == "transformers"
        self.saved = self.v4 and names == "saved"

    def all(self) -> Iterator[Weight]:
        config, H = self.config, self.config.hidden_size
        top = {
            "embed.weight": "embed.weight" if self.v4 and self.official else "model.embed_tokens.weight",
            "norm.weight": "norm.weight" if self.v4 and self.official else "model.norm.weight",
            "head.weight": "head.weight" if self.v4 and self.official else "lm_head.weight",
        }
        if self.saved:
            top |= {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        vocabulary = (config.vocab_size, H)
        yield _one("embed.weight", vocabulary, "plain", top["embed.weight"], self._copies("embed"))
        for number, layer in enumerate(config.layers):
            yield from self._layer(layer, f"layers.{number}", self._prefix(number))
        yield _one("norm.weight", (H,), "plain", top["norm.weight"])
        if self.v4:
            first = "hc_head_" if self.official and not self.saved else "model.hc_head.hc_"
            yield from self._hyper_head("hc_head", first)
        copies = self._copies("head")
        yield _one("head.weight", vocabulary, "plain", top["head.weight"], copies, required=not config.tied)
        for number, layer in enumerate(config.mtp):
            yield from self._mtp(number, layer)

    def _prefix(self, number: int) -> str:
        return f"layers.{number}." if self.v4 and self.official and not self.saved else f"model.layers.{number}."

    def _copies(self, what: Literal["embed", "head"]) -> tuple[str, ...]:
        """V3's files hold the embedding and the head again in every MTP layer."""
        if self.v4:
            return ()
        last = len(self.config.layers)
        leaf = {"embed": "embed_tokens.weight", "head": "shared_head.head.weight"}[what]
        return tuple(f"model.layers.{last + i}.{leaf}" for i in range(len(self.config.mtp)))

    def _mtp(self, number: int, layer: Layer) -> Iterator[Weight]:
        """transformers has no MTP layers of V4: there they keep their official names."""
        H, ours = self.config.hidden_size, f"mtp.{number}"
        if not self.v4:
            theirs = f"model.layers.{len(self.config.layers) + number}."
            yield from self._layer(layer, ours, theirs)
            yield _one(f"{ours}.eh_proj.weight", (H, 2 * H), "plain", f"{theirs}eh_proj.weight")
            norms = {"enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm"}
        else:
            theirs = f"mtp.{number}."
            yield from _Table(self.config, "official")._layer(layer, ours, theirs)
            for joint in ("e_proj", "h_proj"):
                yield _one(f"{ours}.{joint}.weight", (H, H), "matrix", f"{theirs}{joint}.weight")
            yield from self._hyper_head(f"{ours}.hc_head", f"{theirs}hc_head_")
            norms = {"enorm": "enorm", "hnorm": "hnorm", "norm": "norm"}
        for norm, leaf in norms.items():
            yield _one(f"{ours}.{norm}.weight", (H,), "plain", f"{theirs}{leaf}.weight")

    def _hyper_head(self, ours: str, theirs: str) -> Iterator[Weight]:
        hyper = self.config.hyper
        assert hyper is not None
        S = hyper.streams
        shapes: dict[str, Shape] = {"fn": (S, S * self.config.hidden_size), "base": (S,), "scale": (1,)}
        for part, shape in shapes.items():
            yield _one(f"{ours}.{part}", shape, "fp32", f"{theirs}{part}")

    def _layer(self, layer: Layer, ours: str, theirs: str) -> Iterator[Weight]:
        H = self.config.hidden_size
        bare = self.v4 and self.official
        yield _one(
            f"{ours}.attn_norm.weight", (H,), "plain", f"{theirs}{'attn_norm' if bare else 'input_layernorm'}.weight"
        )
        after = "ffn_norm" if bare else "post_attention_layernorm"
        yield _one(f"{ours}.ffn_norm.weight", (H,), "plain", f"{theirs}{after}.weight")
        if hyper := self.config.hyper:
            S = hyper.streams
            shapes: dict[str, Shape] = {"fn": ((2 + S) * S, S * H), "base": ((2 + S) * S,), "scale": (3,)}
            for place in ("attn", "ffn"):
                for part, shape in shapes.items():
                    leaf = f"hc_{place}_{part}" if bare else f"{place}_hc.{part}"
                    yield _one(f"{ours}.hc_{place}.{part}", shape, "fp32", f"{theirs}{leaf}")
        attention = layer.attention
        inner = "attn." if bare else "self_attn."
        parts = _latent(H, attention) if isinstance(attention, Latent) else _hybrid(H, attention)
        for leaf, (shape, form, name) in parts.items():
            official = "attn_sink" if leaf == "sink" else leaf
            yield _one(f"{ours}.attn.{leaf}", shape, form, f"{theirs}{inner}{official if bare else name}")
        yield from self._ffn(layer.ffn, f"{ours}.ffn.", f"{theirs}{'ffn.' if bare else 'mlp.'}")

    def _ffn(self, ffn: Dense | Mixture, ours: str, theirs: str) -> Iterator[Weight]:
        H = self.config.hidden_size
        if isinstance(ffn, Dense):
            yield from self._swiglu(ffn.inner_size, ours, theirs)
            return
        E, inner = ffn.experts, ffn.inner_size
        yield _one(f"{ours}gate.weight", (E, H), "plain", f"{theirs}gate.weight")
        if ffn.hashed:
            shape = (self.config.vocab_size, ffn.top_k)
            yield _one(f"{ours}gate.tid2eid", shape, "table", f"{theirs}gate.tid2eid")
        else:
            bias = "bias" if self.v4 and self.official else "e_score_correction_bias"
            yield _one(f"{ours}gate.bias", (E,), "fp32", f"{theirs}gate.{bias}")
        yield from self._experts(E, inner, f"{ours}experts.", f"{theirs}experts.")
        if ffn.shared:
            yield from self._swiglu(ffn.shared * inner, f"{ours}shared.", f"{theirs}shared_experts.")

    def _experts(self, E: int, inner: int, ours: str, theirs: str) -> Iterator[Weight]:
        H = self.config.hidden_size
        if self.merged:
            yield _one(f"{ours}w13", (E, 2 * inner, H), "expert", f"{theirs}gate_up_proj")
            yield _one(f"{ours}w2", (E, H, inner), "expert", f"{theirs}down_proj")
            return
        w1, w2, w3 = (f"{leaf}.weight" for leaf in self._swiglu_names())
        halves = ((w1, (0, inner)), (w3, (inner, 2 * inner)))
        both = tuple(
            Piece(f"{theirs}{e}.{leaf}", (inner, H), expert=e, rows=rows) for e in range(E) for leaf, rows in halves
        )
        yield Weight(f"{ours}w13", (E, 2 * inner, H), "expert", both)
        down = tuple(Piece(f"{theirs}{e}.{w2}", (H, inner), expert=e) for e in range(E))
        yield Weight(f"{ours}w2", (E, H, inner), "expert", down)

    def _swiglu(self, inner: int, ours: str, theirs: str) -> Iterator[Weight]:
        H = self.config.hidden_size
        w1, w2, w3 = self._swiglu_names()
        for leaf, name, shape in (("w1", w1, (inner, H)), ("w2", w2, (H, inner)), ("w3", w3, (inner, H))):
            yield _one(f"{ours}{leaf}.weight", shape, "matrix", f"{theirs}{name}.weight")

    def _swiglu_names(self) -> tuple[str, str, str]:
        return ("w1", "w2", "w3") if self.v4 and self.official else ("gate_proj", "down_proj", "up_proj")


def _one(
    name: str, shape: Shape, form: Form, theirs: str, copies: tuple[str, ...] = (), *, required: bool = True
) -> Weight:
    return Weight(name, shape, form, (Piece(theirs, shape),), copies, required)


# ---- attention: our leaf -> (shape, form, transformers' leaf)

_Leaves = dict[str, tuple[Shape, Form, str]]


def _latent(H: int, a: Latent) -> _Leaves:
    """V3's and V3.2's."""
    width = a.heads * (a.nope_dim + a.rope.dim)
    leaves: _Leaves = {}
    if a.q_rank is None:
        leaves["wq.weight"] = ((width, H), "matrix", "q_proj.weight")
    else:
        leaves["wq_a.weight"] = ((a.q_rank, H), "matrix", "q_a_proj.weight")
        leaves["q_norm.weight"] = ((a.q_rank,), "plain", "q_a_layernorm.weight")
        leaves["wq_b.weight"] = ((width, a.q_rank), "matrix", "q_b_proj.weight")
    leaves["wkv_a.weight"] = ((a.kv_rank + a.rope.dim, H), "matrix", "kv_a_proj_with_mqa.weight")
    leaves["kv_norm.weight"] = ((a.kv_rank,), "plain", "kv_a_layernorm.weight")
    leaves["wkv_b.weight"] = ((a.heads * (a.nope_dim + a.value_dim), a.kv_rank), "matrix", "kv_b_proj.weight")
    leaves["wo.weight"] = ((H, a.heads * a.value_dim), "matrix", "o_proj.weight")
    if a.index:
        assert a.q_rank is not None
        dim = a.index.dim
        for leaf, shape, form in _index(H, a.index, a.q_rank):
            leaves[leaf] = (shape, form, leaf)
        leaves["indexer.wk.weight"] = ((dim, H), "matrix", "indexer.wk.weight")
        for leaf in ("indexer.k_norm.weight", "indexer.k_norm.bias"):
            leaves[leaf] = ((dim,), "plain", leaf)
    return leaves


def _hybrid(H: int, a: Hybrid) -> _Leaves:
    """V4's."""
    width = a.heads * a.head_dim
    leaves: _Leaves = {
        "sink": ((a.heads,), "fp32", "sinks"),
        "wq_a.weight": ((a.q_rank, H), "matrix", "q_a_proj.weight"),
        "q_norm.weight": ((a.q_rank,), "plain", "q_a_norm.weight"),
        "wq_b.weight": ((width, a.q_rank), "matrix", "q_b_proj.weight"),
        "wkv.weight": ((a.head_dim, H), "matrix", "kv_proj.weight"),
        "kv_norm.weight": ((a.head_dim,), "plain", "kv_norm.weight"),
        "wo_a.weight": ((a.out_groups * a.out_rank, width // a.out_groups), "matrix", "o_a_proj.weight"),
        "wo_b.weight": ((H, a.out_groups * a.out_rank), "matrix", "o_b_proj.weight"),
    }
    if a.ratio:
        leaves |= _compressor(H, a, a.head_dim, "compressor.", "compressor.")
    if a.index:
        theirs = {"wq_b": "q_b_proj", "weights_proj": "scorer.weights_proj"}
        for leaf, shape, form in _index(H, a.index, a.q_rank):
            leaves[leaf] = (shape, form, f"compressor.indexer.{theirs[leaf.split('.')[1]]}.weight")
        leaves |= _compressor(H, a, a.index.dim, "indexer.compressor.", "compressor.indexer.")
    return leaves


def _index(H: int, index: Index, q_rank: int) -> tuple[tuple[str, Shape, Form], ...]:
    return (
        ("indexer.wq_b.weight", (index.heads * index.dim, q_rank), "matrix"),
        ("indexer.weights_proj.weight", (index.heads, H), "plain"),
    )


def _compressor(H: int, a: Hybrid, dim: int, ours: str, theirs: str) -> _Leaves:
    width = (2 if a.overlaps else 1) * dim
    return {
        f"{ours}ape": ((a.ratio, width), "fp32", f"{theirs}position_bias"),
        f"{ours}wkv.weight": ((width, H), "plain", f"{theirs}kv_proj.weight"),
        f"{ours}wgate.weight": ((width, H), "plain", f"{theirs}gate_proj.weight"),
        f"{ours}norm.weight": ((dim,), "plain", f"{theirs}kv_norm.weight"),
    }
