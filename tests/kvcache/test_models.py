"""Sizes and FLOPs of models against what is published of them. Run: pytest tests/kvcache/test_models.py"""

from __future__ import annotations

from typing import Any

import pytest
from emberfs.errors import LimitExceeded
from emberkv.errors import UnknownModel
from emberkv.models import MODEL_NAMES, Attention, Model, known_model, model_from_config
from emberkv.namespace import Namespace


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_token"),
    [
        ("deepseek-v3", "bf16", 70_272),
        ("deepseek-v3", "fp8", 61 * 656),  # FlashMLA's 656 bytes a token
        ("deepseek-v3.2", "fp8", 61 * (656 + 132)),
        ("kimi-k2", "bf16", 70_272),
        ("llama-3.1-8b", "bf16", 131_072),
        ("llama-3.1-70b", "bf16", 327_680),
        ("llama-3.1-70b", "fp8", 163_840),
        ("qwen3-235b-a22b", "bf16", 192_512),
        ("deepseek-v4.1-flash", None, 890),
    ],
)
def test_a_token_is_as_large_as_published(name: str, dtype: str | None, bytes_per_token: int) -> None:
    assert known_model(name, dtype=dtype).bytes_per_token == bytes_per_token


def test_a_million_tokens_of_v4_pro_in_bf16_are_what_vllm_says() -> None:
    assert round(known_model("deepseek-v4-pro", dtype="bf16").bytes_per_token * 2**20 / 2**30, 2) == 9.62


def test_v41_is_about_a_quarter_of_v4_flash() -> None:
    flash = known_model("deepseek-ai/DeepSeek-V4-Flash")
    assert flash.dtype == "fp8"
    assert flash.bytes_per_token == pytest.approx((21 * (584 + 132) / 4) + 20 * 584 / 128)
    assert 890 / flash.bytes_per_token == pytest.approx(0.25, abs=0.03)


def test_the_states_of_a_window_are_as_large_as_many_pages() -> None:
    flash = known_model("deepseek-v4-flash")
    assert flash.state_bytes == 43 * 128 * 584
    assert flash.state_bytes > 12 * flash.page_bytes(64)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_each_known_model_makes_a_namespace(name: str) -> None:
    model = known_model(name)
    kinds = model.kinds(64)
    namespace = Namespace(model=name, dtype=model.dtype, layout="own", page_tokens=64, kinds=kinds)
    assert sum(kind.payload_bytes for kind in kinds if kind.trailing is None) == model.page_bytes(64)
    assert (namespace.kinds[-1].policy == "trailing:1") == (model.state_bytes > 0)


def test_pages_of_v3_and_v41_are_those_to_be_good_at() -> None:
    assert known_model("deepseek-v3").page_bytes(64) == 4_497_408
    assert known_model("deepseek-v3").page_bytes(512) == 35_979_264  # also Mooncake's for kimi-k2.6
    assert known_model("deepseek-v4.1-flash").page_bytes(64) == 56_960


# ---- configs


def test_a_config_may_name_its_layers() -> None:
    config = {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "num_hidden_layers": 3, "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64,
        "sliding_window": 128, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512,
    }  # fmt: skip
    listed = {**config, "compress_ratios": [0, 4, 128, 0], "layer_types": None}
    assert model_from_config(config) == model_from_config(listed)
    parts = {part.name: part.bytes_per_token for part in model_from_config(config).parts}
    assert parts == {"c4": 256, "c4_indexer": 64, "c128": 8}


def test_sliding_layers_are_states_and_no_pages() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100}
    model = model_from_config({"text_config": config}, name="half")
    assert (model.bytes_per_token, model.state_bytes) == (2 * 2 * 8 * 64 * 2, 2 * 100 * 2 * 8 * 64 * 2)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "the config of model has no num_hidden_layers"),
        ({"kv_lora_rank": 512, "model_type": "x"}, "the config of x has no num_hidden_layers"),
        (
            {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 1, "layer_types": ["linear_attention"]},
            "not known here: linear_attention",
        ),
    ],
)
def test_a_config_that_says_too_little_is_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnknownModel, match=complaint):
        model_from_config(config)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnknownModel, match=r"'gpt' is none of .* the path of its config\.json"):
        known_model("gpt")
    with pytest.raises(UnknownModel, match="in its own format only"):
        known_model("deepseek-v4.1-flash", dtype="fp8")
    with pytest.raises(LimitExceeded, match="bf16 or fp8"):
        known_model("deepseek-v3", dtype="int3")


# ---- FLOPs


@pytest.mark.parametrize("stride", [1, 4, 128])
@pytest.mark.parametrize("keys_max", [None, 10, 512])
def test_attention_counts_the_keys_that_tokens_see(stride: int, keys_max: int | None) -> None:
    tokens = 20_000
    seen = sum(min(token / stride, keys_max or token) for token in range(tokens))
    flops = Attention(layers=3, flops_per_key=2.0, stride=stride, keys_max=keys_max).flops(tokens)
    assert flops == pytest.approx(6 * seen, rel=1e-3)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-flash", "llama-3.1-8b"])
def test_computing_in_two_goes_costs_the_same(name: str) -> None:
    model = known_model(name)
    halves = model.prefill_flops(5_000) + model.prefill_flops(7_000, after=5_000)
    assert halves == pytest.approx(model.prefill_flops(12_000))
    assert model.prefill_flops(1) == pytest.approx(2 * (model.active_params or 0), rel=1e-3)


def test_long_prompts_cost_v3_more_than_its_parameters_do() -> None:
    v3, sparse = known_model("deepseek-v3"), known_model("deepseek-v3.2")
    assert v3.prefill_flops(1_000, after=128_000) > 2 * 2 * 37e9 * 1_000
    assert sparse.prefill_flops(1_000, after=128_000) < v3.prefill_flops(1_000, after=128_000) / 2


def test_no_flops_without_active_parameters() -> None:
    model: Model = model_from_config({"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 64})
    with pytest.raises(UnknownModel, match="active parameters of model are not known"):
        model.prefill_flops(1)
