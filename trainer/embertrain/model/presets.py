"""Models by name: those that were published, and small ones for tests, the quickstart and benchmarks.

They are written as the `config.json` they have; `published` reads them. A small model has the shape of its family and
all of its parts, and nothing of its quality.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .config import ModelConfig
from .published import from_published

_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163_840,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "first_k_dense_replace": 3,
    "intermediate_size": 18_432,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}

_V32_INDEX = {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}

_V4_FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129_280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1_048_576,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    # Two layers that see the window alone, then both compressions in turn, and the MTP layer.
    "compress_ratios": [0, 0, *(4, 128) * 20, 4, 0],
    "rope_theta": 10_000,
    "compress_rope_theta": 160_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65_536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "num_hash_layers": 3,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
}

_V4_PRO = _V4_FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *(4, 128) * 29, 4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}

_MICRO_V3 = _V3 | {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
}

# An index of few heads has many scores that are exactly zero, and then its choices are ties: small ones have 32.
_MICRO_INDEX = {"index_n_heads": 32, "index_head_dim": 32, "index_topk": 32}

_MICRO = _V4_FLASH | {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "compress_ratios": [0, 4, 128, 0],
    **_MICRO_INDEX,
    "num_hash_layers": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

# Bytes, and room for tokens with a meaning of their own.
_TINY = _V4_FLASH | {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 64,
    "num_hash_layers": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}

_SMALL = _TINY | {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "compress_ratios": [0, 0, *(4, 128) * 3, 0],
    "index_topk": 256,
    "num_hash_layers": 2,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}

_BENCH: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}

_PRESETS: dict[str, dict[str, Any]] = {
    "v3": _V3,
    "v3.2": _V3 | _V32_INDEX,
    "v4-flash": _V4_FLASH,
    "v4-pro": _V4_PRO,
    "micro": _MICRO,
    "micro-v3": _MICRO_V3,
    "micro-v3.2": _MICRO_V3 | _V32_INDEX | _MICRO_INDEX,
    "tiny": _TINY,
    "small": _SMALL,
    "bench-v3": _V3 | _BENCH | {"first_k_dense_replace": 1, "intermediate_size": 1024, "n_group": 4, "topk_group": 2},
    "bench-v4": _V4_FLASH | _BENCH | {"o_groups": 2, "o_lora_rank": 128, "compress_ratios": [0, 0, 4, 128, 4, 128]},
}

NAMES = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The model of that name, one of `NAMES`."""
    if name not in _PRESETS:
        raise ConfigError(f"no model is named {name!r}; there are {', '.join(NAMES)}")
    return from_published(_PRESETS[name])
