"""`config.json` as published: DeepSeek's own of V3, V3.2 and V4, and what transformers 5 saves of the same models.

`from_published` reads either; `to_published` writes DeepSeek's fields, which transformers reads too, and refuses a
model that they cannot say. What they have no field for (options of the router that no published model uses) stands
under a key of our own, `emberline`.

It does not know how the weights are stored: `quantization_config` is the weights' own matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import ItemsView, Mapping
from typing import Any, Literal

from ..errors import ConfigError
from .config import Dense, Dropping, Hybrid, Hyper, Index, Latent, Layer, Mixture, ModelConfig, Rope, Scoring, Yarn

MODEL_TYPES: dict[str, Literal["v3", "v32", "v4"]] = {"deepseek_v3": "v3", "deepseek_v32": "v32", "deepseek_v4": "v4"}

LAYERS_MAX = 1000
"""More are a mistake, and would take long to refuse otherwise."""

_ARCHITECTURES = {"v3": "DeepseekV3ForCausalLM", "v32": "DeepseekV32ForCausalLM", "v4": "DeepseekV4ForCausalLM"}
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_OPTIONS = ("temperature", "noise", "top_p", "dropping")
"""Fields of `Mixture` that are kept under `emberline`."""


class _Fields:
    """A config.json whose fields are asked for by name and type; what is wrong is told by name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def _need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ConfigError(f"config.json: {name} is missing")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Without a default it must be there; so with the others."""
        return int(self._number(name, default, "a whole number"))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._number(name, default, "a number"))

    def _number(self, name: str, default: float | None, sort: str) -> float:
        value = self._need(name) if default is None else self.get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (sort == "a whole number" and int(value) != value):
            raise ConfigError(f"config.json: {name} is {value!r}, and must be {sort}")
        number: float = value
        return number

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} is {value!r}, and must be true or false")
        return value

    def table(self, name: str) -> _Fields:
        """Fields within fields; none where there are none."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {name} is {value!r}, and must be an object")
        return _Fields(value)

    def items(self) -> ItemsView[str, Any]:
        return self._values.items()

    def only(self, name: str, *allowed: Any) -> None:
        """A field that may be missing, and of which only these values are known here."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"config.json: {name} is {value!r}; known here: {', '.join(map(repr, allowed))}")

    def layers(self, name: str) -> int:
        """A number of layers."""
        value = self.integer(name)
        if not 0 <= value <= LAYERS_MAX:
            raise ConfigError(f"config.json: {name} is {value}, and must be 0 to {LAYERS_MAX}")
        return value

    def entries(self, name: str, length: int) -> list[Any]:
        """A list with at least so many entries."""
        value = self._need(name)
        if not isinstance(value, list | tuple) or len(value) < length:
            raise ConfigError(f"config.json: {name} must be a list of {length} entries, and is {value!r}")
        return list(value)

    def kinds(self, name: str, length: int, *known: str) -> list[str]:
        """A list of so many words."""
        words = [str(word) for word in self.entries(name, length)[:length]]
        if unknown := set(words) - set(known):
            raise ConfigError(f"config.json: {name} holds {sorted(unknown)}; known here: {', '.join(known)}")
        return words


# ---- reading


def from_published(config_json: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes."""
    fields = _Fields(config_json)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(f"config.json: model_type is {model_type!r}; known here: {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("topk_method", "noaux_tc")
    family = MODEL_TYPES[model_type]
    layers, mtp = _hybrid_layers(fields) if family == "v4" else _latent_layers(fields, family)
    hyper = None
    if family == "v4":
        hyper = Hyper(
            streams=fields.integer("hc_mult"),
            iterations=fields.integer("hc_sinkhorn_iters"),
            eps=fields.number("hc_eps"),
        )
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layers=layers,
        mtp=mtp,
        hyper=hyper,
        positions_max=fields.integer("max_position_embeddings"),
        rms_eps=fields.number("rms_norm_eps"),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _latent_layers(fields: _Fields, family: str) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """V3's and V3.2's: some dense layers, then mixtures."""
    fields.only("rope_interleave", True)
    fields.only("moe_layer_freq", 1)
    heads = fields.integer("num_attention_heads")
    fields.only("num_key_value_heads", heads)
    attention = Latent(
        heads=heads,
        q_rank=fields.integer("q_lora_rank") if fields.get("q_lora_rank") is not None else None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        rope=_latent_rope(fields),
        index=_index(fields) if family == "v32" else None,
    )
    count = fields.layers("num_hidden_layers")
    if fields.get("mlp_layer_types") is None:
        dense_count = fields.layers("first_k_dense_replace")
        dense = [i < dense_count for i in range(count)]
    else:
        kinds = fields.kinds("mlp_layer_types", count, "dense", "sparse")
        dense = [kind == "dense" for kind in kinds]
    layers = tuple(
        Layer(
            attention=attention,
            ffn=Dense(inner_size=fields.integer("intermediate_size")) if is_dense else _mixture(fields, "sigmoid"),
        )
        for is_dense in dense
    )
    mtp = tuple(Layer(attention=attention, ffn=_mixture(fields, "sigmoid")) for _ in range(_mtp_count(fields)))
    return layers, mtp


def _hybrid_layers(fields: _Fields) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """V4's: a ratio for each layer, the MTP layers' behind the others', and hashed experts in the first layers."""
    fields.only("num_key_value_heads", 1)
    count, mtp_count = fields.layers("num_hidden_layers"), _mtp_count(fields)
    if fields.get("compress_ratios") is not None:
        ratios = fields.entries("compress_ratios", count)
    else:
        _check_rates(fields)
        ratios = [_RATIOS[kind] for kind in fields.kinds("layer_types", count, *_RATIOS)]
    ratios += [0] * (count + mtp_count - len(ratios))
    if fields.get("mlp_layer_types") is not None:
        hashed = [kind == "hash_moe" for kind in fields.kinds("mlp_layer_types", count, "hash_moe", "moe")]
    else:
        hash_count = fields.layers("num_hash_layers")
        hashed = [i < hash_count for i in range(count)]
    hashed += [False] * mtp_count
    plain, compressed = _hybrid_ropes(fields)

    def layer(i: int) -> Layer:
        ratio = ratios[i]
        if ratio not in _RATIOS.values():
            raise ConfigError(f"config.json: compress_ratios[{i}] is {ratio!r}, and must be 0, 4 or 128")
        attention = Hybrid(
            heads=fields.integer("num_attention_heads"),
            head_dim=fields.integer("head_dim"),
            q_rank=fields.integer("q_lora_rank"),
            out_groups=fields.integer("o_groups"),
            out_rank=fields.integer("o_lora_rank"),
            rope=compressed if ratio else plain,
            ratio=ratio,
            window=fields.integer("sliding_window"),
            index=_index(fields) if ratio == 4 else None,
        )
        return Layer(attention=attention, ffn=_mixture(fields, "sqrtsoftplus", hashed=hashed[i]))

    layers = tuple(layer(i) for i in range(count + mtp_count))
    return layers[:count], layers[count:]


def _check_rates(fields: _Fields) -> None:
    """transformers lets the ratio of each kind of layer be chosen; here it is the kind."""
    for kind, rate in fields.table("compress_rates").items():
        if _RATIOS.get(kind) != rate:
            raise ConfigError(f"config.json: compress_rates has {rate!r} for {kind}; known here: {_RATIOS.get(kind)}")


def _mtp_count(fields: _Fields) -> int:
    """DeepSeek's name for it, or the one that transformers 5 saves."""
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        if fields.get(name) is not None:
            return fields.layers(name)
    return 0


def _index(fields: _Fields) -> Index:
    return Index(
        heads=fields.integer("index_n_heads"),
        dim=fields.integer("index_head_dim"),
        top_k=fields.integer("index_topk"),
    )


def _mixture(fields: _Fields, scoring: Scoring, *, hashed: bool = False) -> Mixture:
    own = fields.table("emberline")
    dropping = own.table("dropping")
    return Mixture(
        experts=fields.integer("n_routed_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        inner_size=fields.integer("moe_intermediate_size"),
        shared=fields.integer("n_shared_experts", 0),
        scoring=fields.get("scoring_func", scoring),
        scale=fields.number("routed_scaling_factor"),
        normalise=fields.flag("norm_topk_prob", True),
        groups=fields.integer("n_group", 1),
        groups_kept=fields.integer("topk_group", 1),
        hashed=hashed,
        swiglu_limit=fields.number("swiglu_limit") if fields.get("swiglu_limit") is not None else None,
        temperature=own.number("temperature", 1.0),
        noise=own.number("noise", 0.0),
        top_p=own.number("top_p") if own.get("top_p") is not None else None,
        dropping=Dropping(
            capacity_factor=dropping.number("capacity_factor"), min_capacity=dropping.integer("min_capacity")
        )
        if own.get("dropping") is not None
        else None,
    )


def _latent_rope(fields: _Fields) -> Rope:
    """DeepSeek writes rope_theta and rope_scaling; transformers 5 saves both in rope_parameters."""
    both = fields.table("rope_parameters")
    scaling = both if fields.get("rope_scaling") is None else fields.table("rope_scaling")
    theta = fields if both.get("rope_theta") is None else both
    return Rope(
        dim=fields.integer("qk_rope_head_dim"), theta=theta.number("rope_theta"), yarn=_yarn(scaling, scaled=True)
    )


def _hybrid_ropes(fields: _Fields) -> tuple[Rope, Rope]:
    """Of layers without and with compressed entries. Only the latter are stretched."""
    if fields.get("qk_rope_head_dim") is not None:
        dim = fields.integer("qk_rope_head_dim")
    else:
        dim = int(fields.integer("head_dim") * fields.number("partial_rotary_factor"))
    both = fields.table("rope_parameters")
    main, compress = both.table("main"), both.table("compress")
    scaling = both if compress.get("rope_theta") is None else compress
    if fields.get("rope_scaling") is not None:
        scaling = fields.table("rope_scaling")
    plain = fields.number("rope_theta") if main.get("rope_theta") is None else main.number("rope_theta")
    long = compress if compress.get("rope_theta") is not None else None
    theta = long.number("rope_theta") if long else fields.number("compress_rope_theta")
    return Rope(dim=dim, theta=plain), Rope(dim=dim, theta=theta, yarn=_yarn(scaling, scaled=False))


def _yarn(fields: _Fields, *, scaled: bool) -> Yarn | None:
    """`scaled`: whether cosine, sine and softmax are corrected too (V3); V4 only stretches the frequencies."""
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling.type is {kind!r}; known here: 'yarn'")
    yarn = Yarn(
        factor=fields.number("factor"),
        original_positions=fields.integer("original_max_position_embeddings"),
        beta_fast=fields.number("beta_fast", 32),
        beta_slow=fields.number("beta_slow", 1),
        # DeepSeek's defaults: cosine and sine are corrected, and the softmax is not.
        mscale=fields.number("mscale", 1.0) if scaled else 0.0,
        mscale_all_dim=fields.number("mscale_all_dim", 0.0) if scaled else 0.0,
    )
    if not scaled or fields.get("attention_factor") is None or yarn.factor <= 1:
        return yarn
    # transformers' way to say what cosine and sine are multiplied by.
    wanted = fields.number("attention_factor")
    if math.isclose(yarn.rotation_scale, wanted):
        return yarn
    magnitude = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return dataclasses.replace(yarn, mscale=(wanted * magnitude - 1) / (0.1 * math.log(yarn.factor)))


# ---- writing


def to_published(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in DeepSeek's fields. ConfigError where they cannot say what the model is."""
    model_type = next(name for name, family in MODEL_TYPES.items() if family == config.family)
    layers = (*config.layers, *config.mtp)
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_act": "silu",
        "num_hidden_layers": len(config.layers),
        "num_nextn_predict_layers": len(config.mtp),
        "max_position_embeddings": config.positions_max,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tied,
        **(_hybrid_fields(config) if config.family == "v4" else _latent_fields(config)),
    }
    mixtures = [layer.ffn for layer in layers if isinstance(layer.ffn, Mixture)]
    if mixtures:
        fields |= _mixture_fields(mixtures[0], config.family)
    elif config.family == "v4":
        raise ConfigError("config.json cannot say it: a v4 model without a mixture")
    _check_said(config, from_published(fields))
    return fields


def _latent_fields(config: ModelConfig) -> dict[str, Any]:
    attention = config.layers[0].attention
    assert isinstance(attention, Latent)
    dense = [layer.ffn.inner_size for layer in config.layers if isinstance(layer.ffn, Dense)]
    fields: dict[str, Any] = {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope.dim,
        "v_head_dim": attention.value_dim,
        "rope_theta": attention.rope.theta,
        "rope_scaling": None,
        "first_k_dense_replace": len(dense),
    }
    if dense:
        fields["intermediate_size"] = dense[0]
    if yarn := attention.rope.yarn:
        fields["rope_scaling"] = _yarn_fields(yarn) | {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        if not (yarn.mscale and yarn.mscale_all_dim):
            # transformers would take a default of its own.
            fields["rope_scaling"]["attention_factor"] = yarn.rotation_scale
    if attention.index:
        fields |= _index_fields(attention.index)
    return fields


def _hybrid_fields(config: ModelConfig) -> dict[str, Any]:
    layers = (*config.layers, *config.mtp)
    attentions = [layer.attention for layer in layers if isinstance(layer.attention, Hybrid)]
    first, hyper = attentions[0], config.hyper
    assert hyper is not None
    # Without a layer of one sort, its fields are those that V4 has.
    plain = next((a.rope for a in attentions if not a.ratio), Rope(dim=first.rope.dim))
    compressed = next((a.rope for a in attentions if a.ratio), Rope(dim=first.rope.dim, theta=160_000.0))
    index = next((a.index for a in attentions if a.index), Index(heads=64, dim=128, top_k=512))
    return {
        "num_attention_heads": first.heads,
        "num_key_value_heads": 1,
        "head_dim": first.head_dim,
        "qk_rope_head_dim": first.rope.dim,
        "q_lora_rank": first.q_rank,
        "o_groups": first.out_groups,
        "o_lora_rank": first.out_rank,
        "sliding_window": first.window,
        "compress_ratios": [a.ratio for a in attentions],
        "rope_theta": plain.theta,
        "compress_rope_theta": compressed.theta,
        "rope_scaling": _yarn_fields(compressed.yarn) if compressed.yarn else None,
        **_index_fields(index),
        "num_hash_layers": sum(isinstance(layer.ffn, Mixture) and layer.ffn.hashed for layer in layers),
        "hc_mult": hyper.streams,
        "hc_sinkhorn_iters": hyper.iterations,
        "hc_eps": hyper.eps,
    }


def _yarn_fields(yarn: Yarn) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }


def _index_fields(index: Index) -> dict[str, Any]:
    return {"index_n_heads": index.heads, "index_head_dim": index.dim, "index_topk": index.top_k}


def _mixture_fields(mixture: Mixture, family: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "n_routed_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "moe_intermediate_size": mixture.inner_size,
        "n_shared_experts": mixture.shared,
        "scoring_func": mixture.scoring,
        "topk_method": "noaux_tc",
        "norm_topk_prob": mixture.normalise,
        "routed_scaling_factor": mixture.scale,
    }
    if family != "v4" or mixture.groups > 1:
        fields |= {"n_group": mixture.groups, "topk_group": mixture.groups_kept}
    if mixture.swiglu_limit is not None:
        fields["swiglu_limit"] = mixture.swiglu_limit
    default = Mixture(experts=1, top_k=1, inner_size=1)
    own = {name: getattr(mixture, name) for name in _OPTIONS if getattr(mixture, name) != getattr(default, name)}
    if mixture.dropping is not None:
        own["dropping"] = dataclasses.asdict(mixture.dropping)
    return fields | ({"emberline": own} if own else {})


def _check_said(config: ModelConfig, read: ModelConfig) -> None:
    """Layers may differ in more than the fields can say: reading them back must give the same model."""
    if read == config:
        return
    for name, kept, got in (("layers", config.layers, read.layers), ("mtp", config.mtp, read.mtp)):
        for i, (layer, other) in enumerate(zip(kept, got, strict=True)):
            for part, there in ((layer.attention, other.attention), (layer.ffn, other.ffn)):
                _check_part(f"{name}[{i}]", part, there)
    raise ConfigError("config.json cannot say it: the model reads back as another one")


def _check_part(where: str, part: Any, read: Any) -> None:
    if type(part) is not type(read):
        raise ConfigError(f"config.json cannot say it: {where} is a {type(part).__name__}")
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value != getattr(read, field.name):
            raise ConfigError(f"config.json cannot say it: {where} has {field.name} {value!r}, unlike other layers")
