"""How large the KV of a model is, and what it costs to compute: from the fields of its `config.json`.

Layouts are those of the engines that run the models: MLA in bf16 or in FlashMLA's fp8 (scales for each 128 values, the
rotary part in bf16), DeepSeek-V3.2's indexer keys, V4's compressed entries (ratio 4 with an indexer, ratio 128) and
windows, and plain or grouped heads. Checked against published sizes in tests/kvcache/test_models.py.

FLOPs are those of prefill: two for each active parameter and token, and the attention's products over the keys that a
token sees. Activations, norms and routing are left out, as everybody leaves them out; so are V4's compressor states,
which an engine keeps beside its window's.

Does not know: weights, machines, prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from emberfs.errors import LimitExceeded

from .errors import UnknownModel
from .namespace import Kind

DTYPES = ("bf16", "fp8")

_INDEXED_RATIO = 4
"""V4's layers of this ratio choose their keys with an indexer; those of 128 see them all."""

_V4_LAYER_KINDS = {"compressed_sparse_attention", "heavily_compressed_attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One kind of payload: what a token adds to it, over all layers."""

    name: str
    bytes_per_token: float
    """A fraction where several tokens share an entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The attention of some layers: a token looks at one key for `stride` tokens before it, `keys_max` at most."""

    layers: int
    flops_per_key: float
    stride: int = 1
    keys_max: int | None = None

    def flops(self, tokens: int) -> float:
        """Of the first `tokens` tokens together."""
        full = float(tokens) if self.keys_max is None else float(min(tokens, self.keys_max * self.stride))
        keys = full * full / (2 * self.stride)
        if self.keys_max is not None:
            keys += (tokens - full) * self.keys_max
        return self.layers * self.flops_per_key * keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a cache has to know of a model."""

    name: str
    dtype: str
    parts: tuple[Part, ...]
    window_tokens: int = 0
    state_bytes: int = 0
    """Of the states of all windows at one place, if it has windows that are not replayed."""
    active_params: float | None = None
    """For each token of a prompt. None: not known, and then no FLOPs."""
    attention: tuple[Attention, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        return sum(part.bytes_per_token for part in self.parts)

    def page_bytes(self, page_tokens: int) -> int:
        """All parts of a page, without window states."""
        return sum(ceil(part.bytes_per_token * page_tokens) for part in self.parts)

    def kinds(self, page_tokens: int) -> tuple[Kind, ...]:
        """For a namespace of this model."""
        kinds = [Kind(part.name, ceil(part.bytes_per_token * page_tokens)) for part in self.parts]
        if self.state_bytes:
            kinds.append(Kind("window", self.state_bytes, "trailing:1"))
        return tuple(kinds)

    def prefill_flops(self, tokens: int, *, after: int = 0) -> float:
        """To compute `tokens` tokens that come after `after` others."""
        if self.active_params is None:
            raise UnknownModel(f"the active parameters of {self.name} are not known: give them to have FLOPs")
        attention = sum(part.flops(after + tokens) - part.flops(after) for part in self.attention)
        return 2 * self.active_params * tokens + attention


def model_from_config(
    config: Mapping[str, Any], *, name: str = "", dtype: str = "bf16", active_params: float | None = None
) -> Model:
    """A model from its `config.json`. Raises UnknownModel where that does not say how large its KV is."""
    if dtype not in DTYPES:
        raise LimitExceeded(f"a KV cache is in {' or '.join(DTYPES)}, not {dtype!r}")
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    name = name or str(config.get("model_type", "model"))
    build = _gqa
    if config.get("compress_ratios") or _V4_LAYER_KINDS & set(config.get("layer_types") or ()):
        build = _v4
    elif config.get("kv_lora_rank"):
        build = _mla
    try:
        return build(config, name=name, dtype=dtype, active_params=active_params)
    except KeyError as error:
        raise UnknownModel(f"the config of {name} has no {error.args[0]}") from error


def _mla(config: Mapping[str, Any], *, name: str, dtype: str, active_params: float | None) -> Model:
    layers, rank, rope = config["num_hidden_layers"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    heads = config["num_attention_heads"]
    entry = (rank + rope) * 2 if dtype == "bf16" else rank + ceil(rank / 128) * 4 + rope * 2
    parts = [Part(name="kv", bytes_per_token=layers * entry)]
    head_dims = config.get("qk_nope_head_dim", 128) + rope + config.get("v_head_dim", 128)
    attention = [Attention(layers=layers, flops_per_key=2 * heads * head_dims)]
    if config.get("index_head_dim"):
        # What an indexer chose is read as one head of latents, the weights absorbed into the query.
        chosen, index = config["index_topk"], config["index_head_dim"]
        parts.append(Part(name="indexer", bytes_per_token=layers * _index_bytes(index, dtype)))
        attention = [
            Attention(layers=layers, flops_per_key=2 * heads * (2 * rank + rope), keys_max=chosen),
            Attention(layers=layers, flops_per_key=2 * config["index_n_heads"] * index),
        ]
    return Model(
        name=name, dtype=dtype, parts=tuple(parts), active_params=active_params, attention=tuple(attention)
    )  # fmt: skip


def _v4(config: Mapping[str, Any], *, name: str, dtype: str, active_params: float | None) -> Model:
    layers, head, rope = config["num_hidden_layers"], config["head_dim"], config["qk_rope_head_dim"]
    window, heads, index = config["sliding_window"], config["num_attention_heads"], config["index_head_dim"]
    # Seven of the eight scale bytes are used: one for each 64 values.
    entry = head * 2 if dtype == "bf16" else head - rope + rope * 2 + ceil((head - rope) / 64 / 8) * 8
    ratios = _ratios(config)
    parts: list[Part] = []
    per_key = 2 * heads * 2 * head
    attention = [Attention(layers=layers, flops_per_key=per_key, keys_max=window)]
    for ratio in sorted({ratio for ratio in ratios if ratio > 1}):
        count = ratios.count(ratio)
        chosen = config["index_topk"] if ratio == _INDEXED_RATIO else None
        parts.append(Part(name=f"c{ratio}", bytes_per_token=count * entry / ratio))
        attention.append(Attention(layers=count, flops_per_key=per_key, stride=ratio, keys_max=chosen))
        if chosen is not None:
            parts.append(Part(name=f"c{ratio}_indexer", bytes_per_token=count * _index_bytes(index, dtype) / ratio))
            index_flops = 2 * config["index_n_heads"] * index
            attention.append(Attention(layers=count, flops_per_key=index_flops, stride=ratio))
    return Model(
        name=name,
        dtype=dtype,
        parts=tuple(parts),
        window_tokens=window,
        state_bytes=layers * window * entry,
        active_params=active_params,
        attention=tuple(attention),
    )


def _ratios(config: Mapping[str, Any]) -> list[int]:
    """Of each layer; 0: it has a window only. The list in a config may go on with layers that predict more tokens."""
    if config.get("compress_ratios"):
        return [int(ratio) for ratio in config["compress_ratios"][: config["num_hidden_layers"]]]
    rates = config["compress_rates"]
    return [int(rates.get(layer, 0)) for layer in config["layer_types"]]


def _index_bytes(index: int, dtype: str) -> int:
    return index * 2 if dtype == "bf16" else index + ceil(index / 128) * 4


def _gqa(config: Mapping[str, Any], *, name: str, dtype: str, active_params: float | None) -> Model:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    entry = 2 * (config.get("num_key_value_heads") or heads) * head * (2 if dtype == "bf16" else 1)
    layer_types = list(config.get("layer_types") or ["full_attention"] * layers)
    if strange := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UnknownModel(f"{name} has layers of a kind that is not known here: {', '.join(sorted(strange))}")
    full, sliding = layer_types.count("full_attention"), layer_types.count("sliding_attention")
    window = config["sliding_window"] if sliding else 0
    attention = [Attention(layers=full, flops_per_key=4 * heads * head)]
    if sliding:
        attention.append(Attention(layers=sliding, flops_per_key=4 * heads * head, keys_max=window))
    return Model(
        name=name,
        dtype=dtype,
        parts=(Part(name="kv", bytes_per_token=full * entry),),
        window_tokens=window,
        state_bytes=sliding * window * entry,
        active_params=active_params,
        attention=tuple(attention),
    )


# ---- models known by name

_V3 = {
    "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
_V4_FLASH = {
    "num_hidden_layers": 43, "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "sliding_window": 128,
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512, "compress_ratios": [0, 0, 4, *[128, 4] * 20],
}  # fmt: skip
_V4_PRO = {
    **_V4_FLASH, "num_hidden_layers": 61, "num_attention_heads": 128, "index_topk": 1024,
    "compress_ratios": [128, 128, 4, *[128, 4] * 29],
}  # fmt: skip


def _grouped(layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128}


_KNOWN: dict[str, tuple[dict[str, Any], float]] = {
    "deepseek-v3": (_V3, 37e9),
    "deepseek-v3.2": ({**_V3, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}, 37e9),
    "deepseek-v4-flash": (_V4_FLASH, 13e9),
    "deepseek-v4-pro": (_V4_PRO, 49e9),
    "kimi-k2": ({**_V3, "num_attention_heads": 64}, 32e9),
    "llama-3.1-8b": (_grouped(32, 32, 8), 8.0e9),
    "llama-3.1-70b": (_grouped(80, 64, 8), 70.6e9),
    "qwen3-32b": (_grouped(64, 64, 8), 32.8e9),
    "qwen3-235b-a22b": (_grouped(94, 64, 4), 22e9),
}
"""Config fields, and active parameters, as their makers publish them."""

_V41_FLASH = "deepseek-v4.1-flash"

MODEL_NAMES = (*_KNOWN, _V41_FLASH)


def known_model(name: str, *, dtype: str | None = None) -> Model:
    """A model by its name; without a dtype in that which its engine uses first. Raises UnknownModel."""
    wanted = name.lower().rpartition("/")[2]
    if wanted == _V41_FLASH:
        # fp4, and layers share entries. Its report says how large that is, and that windows are replayed.
        if dtype is not None:
            raise UnknownModel(f"{name} is known in its own format only: leave the dtype out")
        part = Part(name="kv", bytes_per_token=890)
        return Model(name=wanted, dtype="fp4", parts=(part,), window_tokens=128)
    if wanted not in _KNOWN:
        raise UnknownModel(f"{name!r} is none of {', '.join(MODEL_NAMES)}: give the path of its config.json")
    config, active_params = _KNOWN[wanted]
    usual = "fp8" if "index_head_dim" in config else "bf16"
    return model_from_config(config, name=wanted, dtype=dtype or usual, active_params=active_params)
