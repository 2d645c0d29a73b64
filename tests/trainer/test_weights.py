"""Weights in and out of files: names, dtypes, quantised weights, damage. Run: pytest tests/trainer/test_weights.py."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.errors import WeightsError
from embertrain.model.batch import Batch
from embertrain.model.config import ModelConfig
from embertrain.model.model import Model
from embertrain.model.presets import NAMES, preset
from embertrain.model.published import from_published, to_published
from embertrain.weights import Source, load, save, verify
from embertrain.weights.folder import Folder
from embertrain.weights.names import weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.fs.cli_run import emberline, emberline_json

MICROS = ("micro", "micro-v3", "micro-v3.2")


def state_of(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by our names, in the dtypes a model has."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, weight in weights(config).items():
        if weight.form == "table":
            state[name] = torch.randint(0, 8, weight.shape, generator=g, dtype=torch.int32)
        else:
            wanted = torch.float32 if weight.form == "fp32" else dtype
            state[name] = torch.randn(weight.shape, generator=g).to(wanted)
    return state


def empty_like(state: dict[str, Tensor], dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
    return {
        name: torch.zeros(
            t.shape, dtype=t.dtype if dtype is None or not t.is_floating_point() else dtype, device=device
        )
        for name, t in state.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class Tree(nn.Module):
    """A module with parameters of any dotted names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if tensor.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)


# ---- there and back


@pytest.mark.parametrize("name", MICROS)
@pytest.mark.parametrize("names", ["official", "transformers"])
@pytest.mark.parametrize("shard_size_bytes", [None, 100_000])
def test_what_is_saved_is_loaded(name: str, names: Any, shard_size_bytes: int | None, tmp_path: Path) -> None:
    config = preset(name)
    state = state_of(config)
    save(state, tmp_path / "there", config, names=names, shard_size_bytes=shard_size_bytes)
    files = sorted(path.name for path in (tmp_path / "there").glob("*.safetensors"))
    if shard_size_bytes is None:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_bytes())
        assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    target = empty_like(state)
    source = load(target, tmp_path / "there")
    assert same(target, state)
    assert source.names == names and source.config == config
    assert list(verify(source)) == []
    assert not list(tmp_path.glob(".*"))


def test_the_files_are_those_the_safetensors_library_writes(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config, quantised="fp4")
    ours = tmp_path / "a" / "model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_official_names_of_v4(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config, quantised="fp4")
    entries = Folder(tmp_path / "a").entries
    for name, kind, shape in [
        ("embed.weight", "BF16", (256, 64)),
        ("layers.0.attn.attn_sink", "F32", (4,)),
        ("layers.0.ffn.gate.tid2eid", "I32", (256, 2)),
        ("layers.1.attn.indexer.compressor.ape", "F32", (4, 64)),
        ("layers.1.attn.wq_b.weight", "F8_E4M3", (128, 32)),
        ("layers.1.attn.wq_b.scale", "F8_E8M0", (1, 1)),
        ("layers.1.ffn.experts.7.w2.weight", "I8", (64, 16)),
        ("layers.1.ffn.experts.7.w2.scale", "F8_E8M0", (64, 1)),
        ("layers.2.hc_ffn_fn", "F32", (24, 256)),
        ("mtp.0.h_proj.scale", "F8_E8M0", (1, 1)),
        ("mtp.0.hc_head_base", "F32", (4,)),
    ]:
        assert (entries[name].kind, entries[name].shape) == (kind, shape), name
    written = json.loads((tmp_path / "a" / "config.json").read_bytes())
    assert written["quantization_config"]["scale_fmt"] == "ue8m0" and written["expert_dtype"] == "fp4"


def test_v3_keeps_copies_of_embedding_and_head_in_its_mtp_layer(tmp_path: Path) -> None:
    config = preset("micro-v3")
    state = state_of(config)
    save(state, tmp_path / "a", config)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], state["embed.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], state["head.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.norm.weight"], state["mtp.0.norm.weight"])


@pytest.mark.parametrize("name", MICROS)
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(preset(name), mtp=())
    state = state_of(config, torch.float32)
    kind = getattr(transformers, to_published(config)["architectures"][0])
    for names in ("official", "transformers"):
        save(state, tmp_path / names, config, names=names)  # type: ignore[arg-type]
        theirs, told = kind.from_pretrained(tmp_path / names, output_loading_info=True, dtype=torch.float32)
        assert not any(told.values())
        own = {n: t for n, t in theirs.state_dict().items() if "inv_freq" not in n}
        mine = {
            piece.name: state[n] for n, weight in weights(config, "transformers").items() for piece in weight.pieces
        }
        assert same(own, mine)
    theirs.config.num_nextn_predict_layers = 1  # as transformers has it by default, without a weight for it
    theirs.save_pretrained(tmp_path / "saved")
    target = empty_like(state)
    load(target, tmp_path / "saved")
    assert same(target, state)


# ---- dtypes and quantised weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_into_the_dtype_that_is_there(dtype: torch.dtype, tmp_path: Path) -> None:
    config = preset("micro-v3")
    state = state_of(config, torch.float32)
    save(state, tmp_path / "a", config)
    target = empty_like(state, dtype)
    load(target, tmp_path / "a")
    assert same(target, {name: t.to(target[name].dtype) for name, t in state.items()})


@pytest.mark.parametrize(("name", "quantised"), [("micro", "fp4"), ("micro", "fp8"), ("micro-v3.2", "fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size_bytes", [10_000_000, 50_000])
def test_quantised_files_round_trip_byte_for_byte(
    name: str, quantised: Any, dtype: torch.dtype, shard_size_bytes: int, tmp_path: Path
) -> None:
    config = preset(name)
    save(state_of(config), tmp_path / "a", config, quantised=quantised, shard_size_bytes=shard_size_bytes)
    target = empty_like(state_of(config), dtype)
    source = load(target, tmp_path / "a")
    save(target, tmp_path / "b", config, like=source)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_file_of_another_make_round_trips_too(tmp_path: Path) -> None:
    """Another order, other dtypes, scales as bare bytes, fp4 as F4, and names nobody needs."""
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config, quantised="fp4")
    tensors = {
        name: tensor.view(torch.float4_e2m1fn_x2) if tensor.dtype == torch.int8 else tensor
        for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items()
    }
    tensors = {name: t.view(torch.uint8) if "scale" in name and t.dtype == torch.float8_e8m0fnu else t
               for name, t in tensors.items()}  # fmt: skip
    tensors["norm.weight"] = tensors["norm.weight"].half()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt", "made_by": "a test"})
    target = empty_like(state_of(config))
    source = load(target, tmp_path / "a")
    save(target, tmp_path / "b", config, like=source)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_weight_that_changed_is_quantised_anew_and_no_other(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config, quantised="fp4")
    target = empty_like(state_of(config))
    source = load(target, tmp_path / "a")
    target["layers.1.attn.wo_b.weight"] *= 0.9
    target["layers.2.ffn.experts.w13"][3, 32:] *= 0.9
    save(target, tmp_path / "b", config, like=source)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    changed = {name for name, tensor in before.items() if not torch.equal(_bytes(tensor), _bytes(after[name]))}
    assert {name.removesuffix(".weight").removesuffix(".scale") for name in changed} == {
        "layers.1.attn.wo_b", "layers.2.ffn.experts.3.w3",
    }  # fmt: skip


def test_the_names_can_be_changed_and_the_codes_kept(tmp_path: Path) -> None:
    """From DeepSeek's names to transformers', whole, and back from transformers' to DeepSeek's."""
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config, quantised="fp4")
    source = Source(tmp_path / "a")
    save(source, tmp_path / "b", config, names="transformers", dtype=torch.bfloat16)
    save(Source(tmp_path / "b"), tmp_path / "c", config)
    target, other = empty_like(state_of(config)), empty_like(state_of(config))
    load(target, tmp_path / "a")
    load(other, tmp_path / "c")
    assert same(target, other)
    with pytest.raises(WeightsError, match="official names"):
        save(source, tmp_path / "d", config, names="transformers", like=source)


# ---- models


@pytest.mark.parametrize("name", NAMES)
def test_the_names_and_shapes_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = Model(preset(name))
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: w.shape for n, w in weights(preset(name)).items()}


@pytest.mark.parametrize("name", MICROS)
def test_a_model_that_comes_back_says_the_same(name: str, tmp_path: Path) -> None:
    config = preset(name)
    model = Model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    save(model, tmp_path / "a", config)
    with torch.device("meta"):
        other = Model(config)
    load(other, tmp_path / "a")
    ids = torch.randint(0, config.vocab_size, (150,), generator=torch.Generator().manual_seed(1))
    batch = Batch.of([(0, 150)])
    assert torch.equal(model(ids, batch).logits, other(ids, batch).logits)


def test_a_stage_of_a_pipeline_loads_its_layers(tmp_path: Path) -> None:
    config = preset("micro")
    state = state_of(config)
    save(state, tmp_path / "a", config)
    with torch.device("meta"):
        stage = Model(config, layers=range(1, 2))
    load(stage, tmp_path / "a", partial=True)
    assert all(torch.equal(t, state[n].to(t.dtype)) for n, t in stage.state_dict().items())


def test_a_model_on_the_meta_device_is_made_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("micro-v3"), tied=True)
    state = state_of(config)
    save(state, tmp_path / "a", config)
    assert "lm_head.weight" not in Folder(tmp_path / "a").entries
    with torch.device("meta"):
        model = Tree(empty_like(state, device="meta"))
    model.head.weight = model.embed.weight
    load(model, tmp_path / "a")
    assert model.head.weight is model.embed.weight
    assert same(dict(model.state_dict()), state | {"head.weight": state["embed.weight"]})
    assert all(p.requires_grad for p in model.parameters())
    save(model, tmp_path / "b", config)
    assert Folder(tmp_path / "b").entries == Folder(tmp_path / "a").entries


def test_another_drafter_under_the_names_of_mtp_is_none_of_ours(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config)
    path = tmp_path / "a" / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "mtp.0" not in name or "norm" not in name}, path)
    source = Source(tmp_path / "a")
    assert source.config == dataclasses.replace(config, mtp=())
    with pytest.raises(WeightsError, match=r"names mean nothing here \(mtp.0.*partial=True"):
        source.check()
    source.check(partial=True)


def test_a_part_of_a_model_takes_its_part(tmp_path: Path) -> None:
    config = preset("micro")
    state = state_of(config)
    save(state, tmp_path / "a", config)
    stage = {name: t for name, t in state.items() if name.startswith("layers.1.")}
    target = empty_like(stage)
    with pytest.raises(WeightsError, match="partial=True"):
        load(target, tmp_path / "a")
    load(target, tmp_path / "a", partial=True)
    assert same(target, stage)


# ---- what is wrong


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config)
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.attn.wq_a.weight"], tensors["norm.weight"]
    tensors["layers.9.attn.wq_a.weight"] = torch.zeros(3)
    tensors["layers.0.attn.kv_norm.weight"] = torch.zeros(31)
    save_file(tensors, path)
    target = empty_like(state_of(config))
    with pytest.raises(WeightsError) as caught:
        load(target, tmp_path / "a")
    for part in (
        "2 weights are missing (layers.1.attn.wq_a.weight, norm.weight)",
        "1 name means nothing here (layers.9.attn.wq_a.weight)",
        "1 weight has another shape (layers.0.attn.kv_norm.weight [31] in the files and [32] in the model)",
        "Are they of another model?",
    ):
        assert part in str(caught.value)
    assert not any(t.any() for t in target.values()), "nothing is filled before all is checked"


def test_what_to_do_is_told(tmp_path: Path) -> None:
    config = preset("micro")
    plain = dataclasses.replace(config, mtp=())
    save(state_of(plain), tmp_path / "plain", plain)
    with pytest.raises(WeightsError, match=r"no MTP layers: build the model without"):
        load(empty_like(state_of(config)), tmp_path / "plain", config=config)
    other = from_published(to_published(plain) | {"vocab_size": 300})
    with pytest.raises(WeightsError, match=r"Is the vocabulary another one\?"):
        load(empty_like(state_of(other)), tmp_path / "plain", config=other)
    with pytest.raises(WeightsError, match=r"weights of the model are not in its config.*no MTP layers"):
        load(empty_like(state_of(config)), tmp_path / "plain")
    with pytest.raises(WeightsError, match="not those of the model"):
        save(state_of(plain), tmp_path / "b", config)
    with pytest.raises(FileExistsError, match="already"):
        save(state_of(plain), tmp_path / "plain", plain)


def test_codes_without_their_scales_are_told(tmp_path: Path) -> None:
    config = preset("micro-v3")
    save(state_of(config), tmp_path / "a", config, quantised="fp8")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 2)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"the scales of model\.layers\.0\.self_attn\.o_proj\.weight.*up_proj"):
        Source(tmp_path / "a").check()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:5], "damaged or cut short"),
        (lambda b: b[:-10], "is not where its header says"),
        (lambda b: (1 << 40).to_bytes(8, "little") + b[8:], "header is said to have"),
        (lambda b: b[:8] + b"x" + b[9:], "header is not JSON"),
        (lambda b: b.replace(b'"BF16"', b'"BF17"', 1), "is of dtype BF17"),
        (lambda b: b.replace(b'"shape":[256,64]', b'"shape":[256,-6]', 1), "makes no sense"),
        (lambda b: b.replace(b'"shape":[256,64]', b'"shape":[255,64]', 1), "is not where its header says"),
    ],
)
def test_damage_is_told(damage: Any, message: str, tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config)
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=re.escape(str(path)) + f".*{message}"):
        Source(tmp_path / "a")


def test_a_folder_that_is_not_whole_is_told(tmp_path: Path) -> None:
    config = preset("micro")
    with pytest.raises(WeightsError, match="no checkpoint at"):
        Source(tmp_path / "a")
    save(state_of(config), tmp_path / "a", config, shard_size_bytes=100_000)
    (tmp_path / "a" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        Source(tmp_path / "a")
    next((tmp_path / "a").glob("model-00002-*")).unlink()
    with pytest.raises(WeightsError, match="lacks 1 of its"):
        Source(tmp_path / "a", config)
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"safetensors files and no model\.safetensors\.index\.json"):
        Source(tmp_path / "a", config)


def test_an_interrupted_save_leaves_nothing_that_looks_whole_and_the_next_one_succeeds(tmp_path: Path) -> None:
    config = preset("micro")
    state = state_of(config)
    broken = state | {"layers.2.attn.wo_b.weight": state["layers.2.attn.wo_b.weight"] * torch.inf}
    with pytest.raises(ArithmeticError):
        save(broken, tmp_path / "a", config, quantised="fp8", shard_size_bytes=50_000)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "model.safetensors").write_bytes(b"of a process that was killed")
    save(state, tmp_path / "a", config, quantised="fp8", shard_size_bytes=50_000)
    assert list(verify(Source(tmp_path / "a"))) == []
    assert not list(tmp_path.glob(".*"))


def test_verify_finds_numbers_that_are_none(tmp_path: Path) -> None:
    config = preset("micro-v3")
    state = state_of(config)
    state["norm.weight"][3] = torch.nan
    state["layers.1.ffn.experts.w13"][5, 2, 1] = torch.inf
    save(state, tmp_path / "a", config)
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.embed_tokens.weight"] += 1
    save_file(tensors, path)
    assert set(verify(Source(tmp_path / "a"))) == {
        "model.layers.1.mlp.experts.5.gate_proj.weight holds 1 numbers that are not finite",
        "model.norm.weight holds 1 numbers that are not finite",
        "model.layers.3.embed_tokens.weight is not the copy of model.embed_tokens.weight that it is meant to be",
    }
    config = preset("micro")
    state = state_of(config)
    state["layers.0.ffn.gate.tid2eid"][7, 1] = 8
    save(state, tmp_path / "b", config)
    assert list(verify(Source(tmp_path / "b"))) == ["layers.0.ffn.gate.tid2eid names experts 0 to 8 of 8"]


# ---- the command


def test_the_commands_look_check_and_convert(tmp_path: Path) -> None:
    config = preset("micro")
    save(state_of(config), tmp_path / "a", config)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    command = ("model", "weights")
    emberline(*command, "convert", tmp_path / "a", tmp_path / "b", "--quantise", "fp4", "--shard-size", "100kB")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    assert "under official names: sound" in emberline(*command, "verify", tmp_path / "b").stderr
    listed = {line["name"]: line for line in emberline_json(*command, "ls", tmp_path / "b")}
    assert listed["layers.1.ffn.experts.0.w1.weight"]["dtype"] == "I8"
    assert len({line["file"] for line in listed.values()}) > 3
    # To transformers' names only whole: and from there, as it is, to the names it came from.
    told = emberline(*command, "convert", tmp_path / "b", tmp_path / "c", "--names", "transformers", code=1).stderr
    assert "official names" in told
    emberline(*command, "convert", tmp_path / "b", tmp_path / "c", "--names", "transformers", "--dtype", "bf16")
    assert "under transformers names: sound" in emberline(*command, "verify", tmp_path / "c").stderr
    emberline(*command, "convert", tmp_path / "b", tmp_path / "d")
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "d" / file.name).read_bytes()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    config = preset("micro")
    state = state_of(config)
    state["norm.weight"][0] = torch.nan
    save(state, tmp_path / "a", config)
    told = emberline("model", "weights", "verify", tmp_path / "a", code=1)
    assert told.stdout == "norm.weight holds 1 numbers that are not finite\n"
    assert "1 problem" in told.stderr
    told = emberline("model", "weights", "convert", tmp_path / "a", tmp_path / "a", code=1)
    assert "already" in told.stderr
