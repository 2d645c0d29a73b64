"""`emberline model info`: the published numbers from the published shapes. Run: pytest tests/trainer/test_info.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emberkv.models import model_from_config
from embertrain import info
from embertrain.cache.spec import CacheSpec
from embertrain.info import CONTEXT_PUBLISHED, Rows
from embertrain.model.config import Hybrid
from embertrain.model.presets import NAMES, preset
from embertrain.model.published import to_published

from tests.fs.cli_run import emberline, emberline_json

MILLION = CONTEXT_PUBLISHED


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp"),
    [
        ("v4-flash", 284.3e9, 13.27e9, 6.61e9),
        ("v4-pro", 1573.0e9, 48.85e9, 25.84e9),
        ("v3", 671.03e9, 36.63e9, 11.61e9),
        ("v3.2", 671.88e9, 37.48e9, 11.62e9),
        ("bench-v3", 83.0e6, 26.9e6, 0),
        ("bench-v4", 101.3e6, 34.2e6, 0),
    ],
)
def test_parameters(name: str, total: float, active: float, mtp: float) -> None:
    whole = info.whole(info.parameters(preset(name)))
    assert whole.total == pytest.approx(total, rel=5e-4)
    assert whole.active == pytest.approx(active, rel=1e-3)
    assert info.whole(info.mtp_parameters(preset(name))).total == pytest.approx(mtp, rel=5e-4)


@pytest.mark.parametrize("name", info.PUBLISHED)
def test_the_makers_round_to_the_same(name: str) -> None:
    config = preset(name)
    told = info.published(config)
    assert told is not None
    whole = info.whole(info.parameters(config))
    assert whole.total == pytest.approx(told.total, rel=0.02)
    assert whole.active == pytest.approx(told.active, rel=0.025)
    if told.kv_share is not None:
        shares = info.shares(config, MILLION)
        assert round(shares.kv, 2) == told.kv_share
        assert round(shares.flops_fp8, 2) == told.flops_share
        assert abs(shares.flops - (told.flops_share or 0)) < 0.025


@pytest.mark.parametrize(
    ("name", "context", "rows", "bytes_per_token"),
    [
        ("v4-pro", MILLION, "bf16", 9856),
        ("v4-flash", MILLION, "bf16", 6885),
        ("v4-pro", MILLION, "fp8", 5036),
        ("v4-flash", MILLION, "fp8", 3517),
        ("v3.2", 65_536, "bf16", 85_888),
        ("v3.2", MILLION, "fp8", 48_068),
        ("v3", 1, "bf16", 70_272),
    ],
)
def test_kv_bytes_a_token(name: str, context: int, rows: Rows, bytes_per_token: int) -> None:
    assert round(info.kv(preset(name), context, rows).rows / context) == bytes_per_token


@pytest.mark.parametrize("name", ["v3", "v3.2", "v4-flash", "v4-pro"])
def test_the_kv_cache_reckons_with_the_same_rows(name: str) -> None:
    config = preset(name)
    told = model_from_config(to_published(config), dtype="bf16")
    window_bytes = sum(128 * 1024 for layer in config.layers if isinstance(layer.attention, Hybrid))
    assert info.kv(config, MILLION, "bf16").rows == told.bytes_per_token * MILLION + window_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_takes_as_many_bytes(name: str) -> None:
    config = preset(name)
    spec = CacheSpec.of(config, torch.bfloat16)
    kv = info.kv(config, MILLION, "bf16")
    assert kv.rows + kv.state == MILLION // 128 * spec.page_bytes + spec.sequence_bytes(drafts=0)


def test_rows_are_as_large_as_the_engines_make_them() -> None:
    assert info.kv_row_bytes(preset("v4-pro"), "fp8") == {"window": 584, "csa": 584, "hca": 584, "index": 68}
    assert info.kv_row_bytes(preset("v3.2"), "fp8") == {"latent": 656, "index": 132}


def test_flops_of_a_short_context_are_those_of_the_weights() -> None:
    f = info.flops(preset("v3"), 1)
    assert f.weights == pytest.approx(2 * 36.63e9, rel=1e-3)
    assert f.attention == 61 * 2 * 128 * (2 * 512 + 64)
    assert f.scores == 0


def test_the_index_sees_everything_and_attention_what_it_chose() -> None:
    f = info.flops(preset("v3.2"), MILLION)
    assert f.scores == 61 * MILLION * 2 * 64 * 128
    assert f.attention == 61 * 2048 * 2 * 128 * (2 * 512 + 64)


def test_the_dense_equivalent_has_every_expert_work() -> None:
    config = preset("bench-v3")
    whole = info.whole(info.parameters(config))
    dense = info.dense_flops(config, 1)
    embedding = config.vocab_size * config.hidden_size
    norms = info.parameters(config)["norms"].total
    assert dense.weights == 2 * (whole.total - embedding - norms)


def test_named_sizes_are_what_their_names_say() -> None:
    for name in NAMES:
        total = info.whole(info.parameters(preset(name)) | {"mtp": info.whole(info.mtp_parameters(preset(name)))}).total
        if name.startswith("micro"):
            assert total < 1e6
        if name == "tiny":
            assert total < 10e6
        if name == "small":
            assert total < 250e6


# ---- the command


def test_the_command_tells_the_published_numbers_beside_ours() -> None:
    text = emberline("model", "info", "v4-flash", "--context", "1048576").stdout
    assert "43 layers (2 window, 21 CSA, 20 HCA)" in text
    assert "6,885 B" in text and "3,517 B" in text
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in text.splitlines() if line}
    assert lines["KV of V3.2's at 1,048,576, fp8 and fp4 rows"] == ["7%", "7.3%"]
    assert lines["FLOPs of V3.2's at 1,048,576, each counted once"] == ["10%", "12.1%"]
    assert lines["the same in fp8 equivalents: bf16 twice, fp4 half"] == ["10%", "10.1%"]


def test_the_command_reads_a_folder_and_speaks_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_published(preset("tiny"))))
    (fields,) = emberline_json("model", "info", str(tmp_path), "--context", "1000", "--context", "2000")
    assert [at["context"] for at in fields["contexts"]] == [1000, 2000]
    assert fields["parameters"]["total"] == info.whole(info.parameters(preset("tiny"))).total
    assert fields["published"] is None


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_published(preset("tiny")) | {"o_groups": None}))
    assert "o_groups is missing" in emberline("model", "info", str(path), code=1).stderr
    path.write_text("{")
    assert "is not JSON" in emberline("model", "info", str(path), code=1).stderr
    assert "nor one of v3, " in emberline("model", "info", "v9", code=2).stderr


def test_the_command_does_not_wait_for_torch() -> None:
    code = "import sys; from emberline.cli import main; main(['model', 'info', 'v4-pro'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
