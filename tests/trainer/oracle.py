"""transformers' DeepSeek models as a numeric oracle: random shapes, and weights put from one model into the other.

Zero-initialised parameters are randomised, or much would pass unseen: sinks, position biases, the bases of hyper-
connections, correction biases and hash tables. transformers clamps V4's shared expert, the published code does not:
`unclamp_shared` mends that, and a `swiglu_limit` of 0.5 makes the difference bind.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from embertrain.model.config import (
    Dense,
    Hybrid,
    Hyper,
    Index,
    Latent,
    Layer,
    Mixture,
    ModelConfig,
    Rope,
    Yarn,
)
from embertrain.model.model import Model
from torch import Tensor, nn


def v4_config(rng: random.Random, *, swiglu_limit: float = 10.0, vocab_size: int = 97) -> ModelConfig:
    """A small V4 with layers of all three kinds in random order."""
    heads = rng.choice([2, 4])
    groups = rng.choice([1, 2])
    ratios = [0, 4, 128, rng.choice([0, 4, 128])]
    rng.shuffle(ratios)
    rope_dim = rng.choice([8, 16])
    yarn = Yarn(factor=16, original_positions=64) if rng.random() < 0.5 else None
    window = rng.choice([16, 128])

    index_dim = rng.choice([16, 32])

    def attention(ratio: int) -> Hybrid:
        rope = Rope(dim=rope_dim, theta=160_000, yarn=yarn) if ratio else Rope(dim=rope_dim)
        index = Index(heads=32, dim=index_dim, top_k=16) if ratio == 4 else None
        return Hybrid(heads=heads, head_dim=32, q_rank=24, out_groups=groups, out_rank=16, rope=rope, ratio=ratio,
                      window=window, index=index)  # fmt: skip

    layers = []
    hashed = rng.randrange(0, 3)
    experts, top_k = rng.choice([(4, 2), (8, 3)])
    for i, ratio in enumerate(ratios):
        a = attention(ratio)
        ffn = Mixture(
            experts=experts, top_k=top_k, inner_size=24, scale=1.5, hashed=i < hashed, swiglu_limit=swiglu_limit
        )
        layers.append(Layer(attention=a, ffn=ffn))
    return ModelConfig(family="v4", vocab_size=vocab_size, hidden_size=rng.choice([32, 48]), layers=tuple(layers),
                       hyper=Hyper(), positions_max=4096)  # fmt: skip


def v4_oracle(config: ModelConfig) -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    layers = [layer.attention for layer in config.layers]
    assert all(isinstance(a, Hybrid) for a in layers)
    a = layers[0]
    compressed = next((x for x in layers if x.ratio), None)
    index = next((x.index for x in layers if x.index), None)
    ffn = config.layers[0].ffn
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    yarn = compressed.rope.yarn if compressed else None
    scaling = {} if yarn is None else {
        "rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
    }  # fmt: skip
    hf = DeepseekV4Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, moe_intermediate_size=ffn.inner_size,
        num_hidden_layers=len(layers), num_attention_heads=a.heads, head_dim=a.head_dim, q_lora_rank=a.q_rank,
        num_experts_per_tok=ffn.top_k, n_routed_experts=ffn.experts, routed_scaling_factor=ffn.scale,
        max_position_embeddings=config.positions_max, layer_types=[kinds[x.ratio] for x in layers],
        mlp_layer_types=["hash_moe" if layer.ffn.hashed else "moe" for layer in config.layers],
        swiglu_limit=ffn.swiglu_limit, sliding_window=a.window, o_groups=a.out_groups, o_lora_rank=a.out_rank,
        index_n_heads=index.heads if index else 32, index_head_dim=index.dim if index else 16,
        index_topk=index.top_k if index else 16, partial_rotary_factor=a.rope.dim / a.head_dim,
        rope_parameters=scaling or None, num_nextn_predict_layers=0,
    )  # fmt: skip
    hf._attn_implementation = "eager"
    hf._experts_implementation = "eager"
    return DeepseekV4ForCausalLM(hf).eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter and buffer that matters gets numbers of its own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and p.dim() == 1:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=g))
            elif p.dim() == 1:
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
            else:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
        for name, b in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "gate.bias")):
                b.copy_(0.1 * torch.randn(b.shape, generator=g))
            elif name.endswith("tid2eid"):
                experts = next(p for n, p in model.named_parameters() if n.endswith(".gate.weight")).shape[0]
                for row in b:
                    row.copy_(torch.randperm(experts, generator=g)[: b.shape[1]])


_V4 = {
    "attn.sink": "self_attn.sinks", "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight", "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight", "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight", "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "hc_attn.fn": "attn_hc.fn", "hc_attn.base": "attn_hc.base", "hc_attn.scale": "attn_hc.scale",
    "hc_ffn.fn": "ffn_hc.fn", "hc_ffn.base": "ffn_hc.base", "hc_ffn.scale": "ffn_hc.scale",
}  # fmt: skip
_LATENT = {
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight", "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight", "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight", "attn.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.indexer.wq_b.weight": "self_attn.indexer.wq_b.weight",
    "attn.indexer.wk.weight": "self_attn.indexer.wk.weight",
    "attn.indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "attn.indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "attn.indexer.weights_proj.weight": "self_attn.indexer.weights_proj.weight",
}  # fmt: skip
_FFN = {
    "ffn.w1.weight": "mlp.gate_proj.weight", "ffn.w3.weight": "mlp.up_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid", "ffn.experts.w13": "mlp.experts.gate_up_proj",
    "ffn.experts.w2": "mlp.experts.down_proj", "ffn.shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.w2.weight": "mlp.shared_experts.down_proj.weight",
}  # fmt: skip
_TOP = {
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "hc_head.fn": "model.hc_head.hc_fn", "hc_head.base": "model.hc_head.hc_base",
    "hc_head.scale": "model.hc_head.hc_scale",
}  # fmt: skip


BUFFERS = {rest: _FFN[rest] for rest in ("ffn.gate.bias", "ffn.gate.tid2eid")}
"""What is no parameter: our names within a layer to transformers'."""


def copy_weights(ours: Model, oracle: nn.Module) -> None:
    """The oracle's numbers into our model, every one of them."""
    table = _FFN | (_V4 if ours.config.family == "v4" else _LATENT)
    theirs = dict(oracle.named_parameters()) | dict(oracle.named_buffers())
    taken = set()
    with torch.no_grad():
        for name, p in (dict(ours.named_parameters()) | dict(ours.named_buffers())).items():
            if name in _TOP:
                other = _TOP[name]
            else:
                _, number, rest = name.split(".", 2)
                other = f"model.layers.{number}.{table[rest]}"
            p.copy_(theirs[other])
            taken.add(other)
    left = {n for n in theirs if n not in taken and "inv_freq" not in n}
    assert not left, left


def names(ours: Model) -> dict[str, str]:
    """Our parameters' names to transformers'."""
    table = _FFN | (_V4 if ours.config.family == "v4" else _LATENT)
    out = {}
    for name, _ in ours.named_parameters():
        if name in _TOP:
            out[name] = _TOP[name]
        else:
            _, number, rest = name.split(".", 2)
            out[name] = f"model.layers.{number}.{table[rest]}"
    return out


def tokens(seed: int, count: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def v3_config(rng: random.Random, *, sparse: bool, vocab_size: int = 97) -> ModelConfig:
    """A small V3, or V3.2 when `sparse`."""
    yarn = Yarn(factor=40, original_positions=64, mscale=1.0, mscale_all_dim=1.0) if rng.random() < 0.5 else None
    rope = Rope(dim=rng.choice([8, 16]), yarn=yarn)
    index = Index(heads=32, dim=rng.choice([32, 64]), top_k=rng.choice([24, 48])) if sparse else None
    attention = Latent(heads=rng.choice([2, 4]), q_rank=24, kv_rank=rng.choice([16, 32]), nope_dim=16,
                       value_dim=rng.choice([16, 24]), rope=rope, index=index)  # fmt: skip
    ffn = Mixture(
        experts=8, top_k=rng.choice([2, 3]), inner_size=24, scoring="sigmoid", scale=2.5, groups=4, groups_kept=2
    )
    count = 3
    dense = rng.randrange(0, 2)
    layers = [Layer(attention=attention, ffn=Dense(inner_size=40) if i < dense else ffn) for i in range(count)]
    return ModelConfig(family="v32" if sparse else "v3", vocab_size=vocab_size, hidden_size=rng.choice([32, 48]),
                       layers=tuple(layers), positions_max=4096)  # fmt: skip


def v3_oracle(config: ModelConfig) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

    a = config.layers[0].attention
    ffn = config.layers[-1].ffn
    dense = [layer.ffn.inner_size for layer in config.layers if isinstance(layer.ffn, Dense)]
    yarn = a.rope.yarn
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope.theta}
    if yarn:
        rope = {
            "rope_type": "yarn", "rope_theta": a.rope.theta, "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions, "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
        }  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": dense[0] if dense else 40,
        "moe_intermediate_size": ffn.inner_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "n_shared_experts": ffn.shared,
        "n_routed_experts": ffn.experts,
        "routed_scaling_factor": ffn.scale,
        "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.q_rank,
        "qk_rope_head_dim": a.rope.dim,
        "v_head_dim": a.value_dim,
        "qk_nope_head_dim": a.nope_dim,
        "n_group": ffn.groups,
        "topk_group": ffn.groups_kept,
        "num_experts_per_tok": ffn.top_k,
        "first_k_dense_replace": len(dense),
        "max_position_embeddings": config.positions_max,
        "rope_parameters": rope,
    }
    if a.index:
        hf = DeepseekV32Config(
            index_topk=a.index.top_k, index_head_dim=a.index.dim, index_n_heads=a.index.heads, **common
        )
    else:
        hf = DeepseekV3Config(**common)
    hf._attn_implementation = "eager"
    hf._experts_implementation = "eager"
    return (DeepseekV32ForCausalLM if a.index else DeepseekV3ForCausalLM)(hf).eval()


def unclamp_shared(oracle: Any) -> None:
    """The published V4 code builds its shared experts without a limit."""
    for layer in oracle.model.layers:
        layer.mlp.shared_experts.limit = float("inf")


def without_limit(model: Model) -> Model:
    """The same model with nothing clamped."""
    layers = [replace(layer, ffn=replace(layer.ffn, swiglu_limit=None)) for layer in model.config.layers]
    free = Model(replace(model.config, layers=tuple(layers)), mtp=False)
    free.load_state_dict(model.state_dict())
    return free
