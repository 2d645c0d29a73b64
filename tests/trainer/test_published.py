"""config.json of DeepSeek and of transformers, read and written. Run: pytest tests/trainer/test_published.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from embertrain.errors import ConfigError
from embertrain.model.config import Dense, Dropping, Hybrid, Latent, Mixture, ModelConfig, Yarn
from embertrain.model.presets import NAMES, preset
from embertrain.model.published import from_published, to_published

FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}


def test_v4_flash_as_shipped_is_the_preset() -> None:
    config = from_published(FLASH)
    assert config == preset("v4-flash")
    kinds = [layer.attention.ratio for layer in config.layers if isinstance(layer.attention, Hybrid)]
    assert (kinds.count(0), kinds.count(4), kinds.count(128)) == (2, 21, 20)
    window, sparse = config.layers[0].attention, config.layers[2].attention
    assert isinstance(window, Hybrid) and isinstance(sparse, Hybrid)
    assert (window.rope.theta, window.rope.yarn) == (10_000, None)
    assert sparse.rope.theta == 160_000
    assert sparse.rope.yarn == Yarn(factor=16, original_positions=65_536)
    assert sparse.rope.yarn.rotation_scale == sparse.rope.yarn.softmax_scale == 1
    assert sum(isinstance(layer.ffn, Mixture) and layer.ffn.hashed for layer in config.layers) == 3


def test_v4_pro_begins_with_two_layers_of_128_and_its_mtp_layer_sees_the_window_alone() -> None:
    config = preset("v4-pro")
    kinds = [layer.attention.ratio for layer in config.layers if isinstance(layer.attention, Hybrid)]
    assert kinds[:4] == [128, 128, 4, 128]
    assert (kinds.count(4), kinds.count(128)) == (30, 31)
    assert isinstance(config.mtp[0].attention, Hybrid) and config.mtp[0].attention.ratio == 0


def test_v3_corrects_the_softmax_and_not_the_rotation() -> None:
    attention = preset("v3").layers[0].attention
    assert isinstance(attention, Latent) and attention.rope.yarn
    assert attention.rope.yarn.rotation_scale == 1
    assert attention.scale == pytest.approx(192**-0.5 * 1.3688879454**2)
    dense = [isinstance(layer.ffn, Dense) for layer in preset("v3").layers]
    assert dense == [True] * 3 + [False] * 58


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_reads_back_from_what_is_written(name: str) -> None:
    written = json.loads(json.dumps(to_published(preset(name))))
    assert from_published(written) == preset(name)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_written_and_what_it_saves_is_read(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = to_published(preset(name))
    kind = getattr(transformers, written["architectures"][0].replace("ForCausalLM", "Config"))
    kind.from_dict(dict(written)).save_pretrained(tmp_path)
    assert from_published(json.loads((tmp_path / "config.json").read_text())) == preset(name)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "rotation_scale"), [(0.0, 0.0, 1.0), (1.0, 0.0, 1.3688879454), (0.0, 1.0, 0.7305199)]
)
def test_transformers_turns_v3_as_we_do(mscale: float, mscale_all_dim: float, rotation_scale: float) -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = FLASH["rope_scaling"] | {"factor": 40, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    config = from_published(to_published(preset("micro-v3")) | {"rope_scaling": scaling})
    written = to_published(config)
    assert from_published(written) == config
    theirs = transformers.DeepseekV3Config.from_dict(dict(written))
    _, attention_factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert attention_factor == pytest.approx(rotation_scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', and must be a whole number"),
        ({"num_hash_layers": 2.5}, "num_hash_layers is 2.5, and must be a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; known here: 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"compress_ratios": [0, 0, 4]}, "compress_ratios must be a list of 43 entries"),
        ({"compress_ratios": [2] * 44}, r"compress_ratios\[0\] is 2, and must be 0, 4 or 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings is missing"),
        ({"compress_ratios": None, "layer_types": ["full_attention"] * 43}, "layer_types holds .'full_attention'"),
        ({"num_experts_per_tok": 300}, "top_k 300 of 256 experts"),
        ({"scoring_func": "cosine"}, "no scoring named 'cosine'"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_published(FLASH | changes)


JUNK = [None, "x", -1, 0, 2.5, True, [], {}, ["x"], {"x": 1}, float("nan"), 10**30]


@pytest.mark.parametrize("name", ["micro", "micro-v3.2"])
@pytest.mark.parametrize("saved_by_transformers", [False, True])
def test_whatever_a_field_holds_the_model_is_built_or_the_field_is_named(
    name: str, saved_by_transformers: bool
) -> None:
    fields = to_published(preset(name)) | {"emberline": {"top_p": 0.9}}
    if saved_by_transformers:
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, fields["architectures"][0].replace("ForCausalLM", "Config"))
        fields = json.loads(kind.from_dict(fields).to_json_string())
    refused = 0
    for field in fields:
        for junk in JUNK:
            try:
                from_published(fields | {field: junk})
            except ConfigError:
                refused += 1
    for outer in [field for field, value in fields.items() if isinstance(value, dict)]:
        for inner in fields[outer]:
            for junk in JUNK:
                try:
                    from_published(fields | {outer: fields[outer] | {inner: junk}})
                except ConfigError:
                    refused += 1
    assert refused > 200


@pytest.mark.parametrize("name", ["micro", "micro-v3"])
def test_a_model_without_yarn(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = from_published(to_published(preset(name)) | {"rope_scaling": None})
    written = to_published(config)
    kind = getattr(transformers, written["architectures"][0].replace("ForCausalLM", "Config"))
    kind.from_dict(dict(written)).save_pretrained(tmp_path)
    assert from_published(json.loads((tmp_path / "config.json").read_text())) == config
    assert from_published(written) == config


def test_options_without_a_published_field_are_kept_under_a_key_of_our_own() -> None:
    config = _with_ffn(preset("micro"), top_p=0.9, noise=0.1, dropping=Dropping(capacity_factor=1.25))
    written = json.loads(json.dumps(to_published(config)))
    assert written["emberline"]["dropping"] == {"capacity_factor": 1.25, "min_capacity": 4}
    assert from_published(written) == config


def test_a_model_that_the_fields_cannot_say_is_refused() -> None:
    config = preset("micro")
    odd = dataclasses.replace(config.layers[1].ffn, top_k=3)
    layers = (config.layers[0], dataclasses.replace(config.layers[1], ffn=odd), config.layers[2])
    with pytest.raises(ConfigError, match=r"cannot say it: layers\[1\] has top_k 3"):
        to_published(dataclasses.replace(config, layers=layers))


def test_a_preset_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no model is named .v5.; there are v3, "):
        preset("v5")


def _with_ffn(config: ModelConfig, **changes: Any) -> ModelConfig:
    layers, mtp = (
        tuple(dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, **changes)) for layer in part)
        for part in (config.layers, config.mtp)
    )
    return dataclasses.replace(config, layers=layers, mtp=mtp)
